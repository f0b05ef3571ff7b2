"""`topklm explore` as people call it."""

import http.client
import os
import re
import signal
import sys

from helpers import Process
import pytest

from topklm import cli, web
from topklm.errors import UserError


@pytest.fixture
def start(explored_copy):
    """Starts the command on the explored run; what still runs at the end is killed."""
    started = []

    def start(*arguments, run=None):
        command = ["-m", "topklm", "explore", str(run or explored_copy.run), *arguments]
        process = Process([sys.executable, *command], env={**os.environ, "JAX_PLATFORMS": "cpu"})
        started.append(process)
        return process

    yield start
    for process in started:
        if process.exit_code is None:
            process.kill()


def test_it_serves_until_ctrl_c_and_ends_without_a_trace(start):
    process = start("--port", "0")
    line = process.wait_for_line("open http://127.0.0.1:")
    port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", line)[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/neurons/0/3")
    assert connection.getresponse().status == 200
    process.signal(signal.SIGINT)
    assert process.finish() in (0, 130)
    assert "Traceback" not in process.errors


def test_on_another_address_it_prints_a_token_and_demands_it(start):
    process = start("--port", "0", "--host", "0.0.0.0")
    found = re.search(r"http://0\.0\.0\.0:(\d+)/\?token=(\S{20,})", process.wait_for_line("open http://"))
    for path, status in (("/", 401), (f"/?token={found[2]}", 303)):
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
        connection.request("GET", path)
        assert connection.getresponse().status == status
    process.signal(signal.SIGTERM)
    process.finish()
    assert process.output.count(found[2]) == 1


def test_one_file_is_written(explored_copy, tmp_path, capsys):
    path = tmp_path / "neurons.html"
    cli.dispatch(["explore", str(explored_copy.run), "--export", str(path), "--neurons", "0:3, 1:17"])
    assert "2 neurons" in capsys.readouterr().out
    assert path.read_text().count('type="text/plain"') == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--neurons", "0:3"], "--neurons = 0:3: goes with --export only"),
        (["--export", "x.html", "--neurons", "3"], "--neurons = 3: must be all, or LAYER:NEURON"),
        (["--export", "x.html", "--neurons", "0:3,,"], "--neurons = 0:3,,: must be all"),
        (["--port", "99999"], "--port = 99999: must be from 0 to 65535"),
        (["--port", "x"], "argument --port"),
        (["--host", "no such host"], "--host = no such host"),
    ],
)
def test_mistakes_are_named(explored_copy, arguments, said):
    with pytest.raises(UserError, match=said):
        cli.dispatch(["explore", str(explored_copy.run), *arguments])


def test_a_taken_port_is_named_before_anything_is_done(tmp_path):
    with web.listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(UserError, match=f"--port = {port}: cannot listen"):
            cli.dispatch(["explore", str(tmp_path / "no run"), "--port", str(port)])


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        cli.dispatch(["explore", str(tmp_path), "--port", "0"])
    with pytest.raises(UserError, match="copy the run to one"):
        cli.dispatch(["explore", "gs://bucket/run", "--port", "0"])


def test_the_files_of_neuronpedia_are_written(explored_copy, tmp_path, capsys):
    out = tmp_path / "pedia"
    arguments = ["--export", str(out), "--format", "neuronpedia", "--neurons", "0:3", "--model-id", "mine"]
    cli.dispatch(["explore", str(explored_copy.run), *arguments])
    assert "bulk import of mine" in capsys.readouterr().out
    assert [path.name for path in (out / "mine").iterdir()] == ["0-res-topk"]


def test_a_flag_of_the_export_alone_is_refused(explored_copy):
    with pytest.raises(UserError, match="--model-id = mine: goes with --export only"):
        cli.dispatch(["explore", str(explored_copy.run), "--model-id", "mine"])
