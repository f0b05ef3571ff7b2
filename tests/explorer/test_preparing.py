"""Pages of a run that is still being harvested and measured."""

import contextlib
import dataclasses
import http.client
import json
import os
import re
import signal
import sys
import threading
import time

from helpers import Process, sentences, write_documents
import numpy as np
import pyarrow as pa
import pytest
import saved_runs
from serve_site import Site, answering

from topklm import web
from topklm.commands.neurons import is_measured
from topklm.config import DataConfig
from topklm.data.building.build import prepare
from topklm.errors import UserError
from topklm.explorer.app import Preparing
from topklm.neurons import NeuronsFolder
from topklm.neurons.statistics import table
from topklm.neurons.store import Store
from topklm.progress import Progress

PATIENCE_S = 60


class StepByStep:
    """Work that waits for the test before each step."""

    def __init__(self, folder, fails=None):
        self.folder, self.fails, self.turn = folder, fails, threading.Semaphore(0)
        self.rows, self.measured = table.read(folder.table)

    def __call__(self, progress, ready):
        with progress.phase("harvesting", 200) as report:
            self.turn.acquire()
            report(50, 1, 50)
            self.turn.acquire()
            report(150, 1, 150)
        if self.fails == "at once":
            raise UserError("the disk is full")
        empty = pa.nulls(self.rows.num_rows, pa.float64())
        place = self.rows.column_names.index("ablation_effect")
        table.write(self.folder.table, self.rows.set_column(place, "ablation_effect", empty), self.measured)
        ready(self.folder)
        self.turn.acquire()
        if self.fails:
            raise UserError("out of memory")
        progress.say("ablating")
        table.write(self.folder.table, self.rows, self.measured)
        return self.folder


@contextlib.contextmanager
def prepared(work):
    told = []
    made = Preparing("village", work, Progress(told.append))
    listening = web.listen("127.0.0.1", 0)
    with answering(made, listening, closing=made.close) as running:
        made.start(running.end)
        yield made, Site(listening.getsockname()[1], None), running
        work.turn.release(5)


def wait_for(condition):
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_pages_come_at_once_then_neurons_then_ablation_effects(explored_copy):
    work = StepByStep(explored_copy)
    with prepared(work) as (made, site, _):
        wait_for(lambda: made.facts()["stage"] == "harvesting")
        page = site.ask("/neurons/0/3")
        assert (page.status, "is being prepared" in page.text) == (200, True)
        assert 'http-equiv="refresh"' in page.text  # for browsers without scripts
        assert site.ask("/api/neurons/0/3").status == 503
        style = re.search(r'href="(/static/\S+/style.css)"', page.text)[1]
        assert site.ask(style).status == 200
        work.turn.release()
        wait_for(lambda: made.facts()["share"] is not None)
        facts = site.ask("/api/progress").json
        assert (facts["stage"], facts["share"], facts["made"]) == ("harvesting", 0.25, 0)
        assert facts["seconds_left"] >= 0
        work.turn.release()
        wait_for(lambda: made.facts()["made"] == 1)
        assert site.ask("/api/neurons/0/3").json["figures"]["ablation_effect"] is None
        assert "data-progress" in site.ask("/neurons/0/3").text
        work.turn.release()
        wait_for(lambda: made.done)
        assert site.ask("/api/progress").json["made"] == 2
        effect = site.ask("/api/neurons/0/3").json["figures"]["ablation_effect"]
        assert effect == work.rows["ablation_effect"][3].as_py()
        assert "data-progress" not in site.ask("/neurons/0/3").text
        made.finish(print)


def test_work_that_is_stopped_ends_where_it_next_tells_of_itself(explored_copy):
    work = StepByStep(explored_copy)
    before = explored_copy.table.read_bytes()
    with prepared(work) as (made, _, _):
        wait_for(lambda: made.facts()["stage"] == "harvesting")
        made.close()
        work.turn.release(5)
        said = []
        made.finish(said.append)
        assert made.done and made.facts()["made"] == 0
    assert explored_copy.table.read_bytes() == before


def test_an_error_before_there_is_anything_to_show_ends_the_server_and_is_raised(explored_copy):
    work = StepByStep(explored_copy, fails="at once")
    with prepared(work) as (made, _, running):
        work.turn.release(5)
        wait_for(lambda: running.should_exit)
        with pytest.raises(UserError, match="the disk is full"):
            made.finish(print)


def test_figures_that_cannot_be_measured_are_named_on_every_page(explored_copy):
    work = StepByStep(explored_copy, fails="later")
    with prepared(work) as (made, site, running):
        work.turn.release(5)
        wait_for(lambda: made.done)
        assert "out of memory" in site.ask("/labels").text
        assert not running.should_exit
        made.finish(print)  # raises nothing


def asked(port, path="/api/progress"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().read()


@pytest.mark.slow  # compiles the harvest, the Jacobian and the ablation, each in a process of its own
def test_the_command_is_stopped_while_it_harvests_and_goes_on_when_it_is_started_again(tmp_path):
    texts = write_documents(tmp_path / "some.jsonl", sentences(3, 120))
    data = DataConfig(source=str(texts), dir=str(tmp_path / "datasets"), vocab_size=300, heldout_fraction=0.3)
    config = dataclasses.replace(saved_runs.CONFIG, data=data)
    tokenizer = prepare(data, lambda line: None).tokenizer
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved_runs, "tokenizer", lambda: tokenizer)
        saved_runs.save(tmp_path / "village", [5], config)
    folder = NeuronsFolder(tmp_path / "village", 5)
    command = [sys.executable, "-m", "topklm", "explore", str(folder.run), "--port", "0"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}

    def started():
        process = Process(command, env=environment)
        line = process.wait_for_line("open http://127.0.0.1:")
        return process, int(re.search(r":(\d+)/", line)[1])

    process, port = started()
    assert b"is being prepared" in asked(port, "/")
    wait_for(lambda: b"harvesting" in asked(port))
    process.signal(signal.SIGINT)
    assert process.finish() == 0
    assert "Traceback" not in process.errors
    assert not is_measured(folder)
    assert not list(tmp_path.rglob("*.tmp"))
    process, port = started()
    wait_for(lambda: json.loads(asked(port))["done"])
    process.signal(signal.SIGINT)
    assert process.finish() == 0
    assert is_measured(folder)
    rows, measured = table.read(folder.table)
    assert measured.n_tokens == Store(folder.store).n_tokens > 0
    assert np.isfinite(rows["ablation_effect"].to_numpy()).any()
