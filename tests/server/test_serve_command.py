"""`topklm serve` as people call it; what answers is tested elsewhere."""

import json
import signal
import time

import pytest
import saved_runs
from served import serving

from topklm import cli
from topklm.commands import serve
from topklm.errors import UserError
from topklm.server import app
from topklm.web import listen, name_of, names_of


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Calls the command on a run, up to where it would serve; gives what it would serve."""
    folder = tmp_path / "village"
    saved_runs.save(folder, [7])
    found = {}

    def fake(service, listening, host, token, ready):
        port = listening.getsockname()[1]
        listening.close()
        ready(f"http://{host}:{port}/v1")
        service.engine.close()
        found.update(service=service, token=token, port=port)

    monkeypatch.setattr(app, "serve", fake)
    monkeypatch.setenv("TOPKLM_COMPILATION_CACHE", "off")

    def start(*flags):
        cli.dispatch(["serve", str(folder), "--port", "0", "--no-warm-up", *flags])
        return found

    return start


def test_it_tells_its_address_in_one_line(started, capsys):
    found = started()
    assert capsys.readouterr().out == (
        f"village: answers at http://127.0.0.1:{found['port']}/v1   (Ctrl-C ends it)\n"
    )
    assert found["token"] is None
    assert found["service"].model.step == 7


def test_its_flags_are_passed_on(started, capsys):
    flags = (
        "--slots 3 --max-waiting 5 --max-texts 6 --max-prompt-tokens 7 --max-tokens 8 --timeout 9 --grace 2"
    )
    found = started(*flags.split(), "--name", "mine", "--json")
    service = found["service"]
    assert service.name == "mine"
    assert service.buckets.most_slots == 3
    limits = service.limits
    assert (limits.waiting, limits.texts, limits.prompt_tokens, limits.max_tokens) == (5, 6, 7, 8)
    assert (limits.timeout, limits.grace) == (9, 2)
    told = json.loads(capsys.readouterr().out)
    assert told == {"address": f"http://127.0.0.1:{found['port']}/v1", "model": "mine", "token": None}


def test_beyond_this_machine_a_token_is_made_or_taken(started, capsys, monkeypatch):
    made = started("--host", "0.0.0.0")["token"]
    assert len(made) >= 20
    assert capsys.readouterr().out.count(made) == 1
    monkeypatch.setenv(serve.TOKEN_VARIABLE, "of-my-own")
    assert started("--host", "0.0.0.0")["token"] == "of-my-own"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--slots", "0"], "--slots = 0: must be from 1 to 1024"),
        (["--timeout", "0"], "--timeout = 0.0: must be 1 or more"),
        (["--max-waiting", "-1"], "--max-waiting = -1: must be 0 or more"),
        (["--port", "70000"], "--port = 70000: must be from 0 to 65535"),
        (["--host", "no such host"], "--host = no such host"),
        (["--slots", "many"], "argument --slots"),
        ([], "not a run folder"),
    ],
)
def test_mistakes_are_named(tmp_path, flags, said):
    with pytest.raises(UserError, match=said):
        cli.dispatch(["serve", str(tmp_path), *(flags or ["--port", "0"])])


def test_a_taken_port_is_named_before_anything_is_done(tmp_path):
    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(UserError, match=f"--port = {port}: cannot listen"):
            cli.dispatch(["serve", str(tmp_path / "no run"), "--port", str(port)])


def test_without_its_packages_it_says_which(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "_NEEDED", ("uvicorn", "no_such_package"))
    with pytest.raises(UserError, match=r"serve needs no_such_package: run pip install 'topklm\[explore\]'"):
        cli.dispatch(["serve", str(tmp_path)])


def test_addresses_are_written_as_in_links():
    assert name_of("::1") == "[::1]"
    assert names_of("::1", 5) == {"[::1]:5", "localhost:5", "127.0.0.1:5"}


def test_interrupted_while_it_compiles_it_ends_without_a_crash_or_an_error(trainer, tmp_path):
    saved_runs.save(tmp_path / "village", [7])
    process = trainer.start_python(
        "-m", "topklm", "serve", str(tmp_path / "village"), "--port", "0",
        environment={"TOPKLM_COMPILATION_CACHE": "off"},
    )  # fmt: skip
    while "compiling" not in process.errors:
        assert process.exit_code is None, process.errors
        time.sleep(0.05)
    time.sleep(1.0)  # into compilations, in which an interpreter that ends crashes, though not each time
    process.signal(signal.SIGINT)
    assert process.finish() == 0
    assert "Error" not in process.errors


def test_it_answers_before_all_is_compiled_and_then_compiles_the_rest(tmp_path):
    with serving(tmp_path, "--slots", "1") as served:
        status, answer = served.ask("/v1/completions", {"prompt": "The", "max_tokens": 2, "seed": 1})
        assert (status, answer["usage"]["completion_tokens"]) == (200, 2)
        left = [served.ask("/health")[1]["to_compile"]]
        assert left[0] > 0
        while left[-1]:
            time.sleep(0.05)
            left.append(served.ask("/health")[1]["to_compile"])
        assert left == sorted(left, reverse=True)
        served.process.signal(signal.SIGTERM)
        assert served.process.finish() == 0
        assert "compiling: all is compiled" in served.process.errors
