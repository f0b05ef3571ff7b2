"""Trackers get every line of the metrics, and no failure of theirs ends a run."""

import importlib
import json
import sys
import types

from helpers import STEPS, assert_one_line_error, metrics
import pytest

from topklm.config import Config
from topklm.errors import UserError
from topklm.training import metrics as metrics_lib

MINE = """
SEEN = []

class Mine:
    def __init__(self, folder, config):
        SEEN.append(("start", folder, config["model"]["topk_k"]))

    def write(self, step, values):
        SEEN.append((step, values))

    def close(self):
        SEEN.append(("end",))

class Failing(Mine):
    def write(self, step, values):
        super().write(step, values)
        raise ConnectionError("nobody\\nthere")

def never(folder, config):
    raise OSError("no network")

def broken_end(folder, config):
    tracker = Mine(folder, config)
    tracker.close = lambda: 1 / 0
    return tracker
"""
POINTS = "[topklm.trackers]\nnotebook = mine_tracker:Mine\nwrong = mine_tracker:nothing\n"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module with trackers, one of which an installed package offers by a name."""
    place = tmp_path / "site"
    (place / "mine-1.0.dist-info").mkdir(parents=True)
    (place / "mine-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (place / "mine-1.0.dist-info/entry_points.txt").write_text(POINTS)
    (place / "mine_tracker.py").write_text(MINE)
    monkeypatch.syspath_prepend(place)
    yield importlib.import_module("mine_tracker")
    del sys.modules["mine_tracker"]


@pytest.mark.parametrize("name", ["mine_tracker:Mine", "notebook"])
def test_a_tracker_gets_every_line_of_the_metrics(trainer, finished_run, tmp_path, mine, name):
    settings = {"data.dir": finished_run.parent / "datasets", "log.trackers": name}
    process = trainer.train(tmp_path / "run", settings)
    assert process.exit_code == 0, process.errors
    (begin, *lines, end) = mine.SEEN
    assert begin == ("start", str(tmp_path / "run"), 8)
    assert end == ("end",)
    written = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [{"step": step, **values} for step, values in lines] == written
    assert metrics(tmp_path / "run") == metrics(finished_run)


def test_trackers_that_fail_are_told_once_and_change_nothing(trainer, finished_run, tmp_path, mine):
    names = "mine_tracker:Failing, mine_tracker:never,mine_tracker:broken_end"
    settings = {"data.dir": finished_run.parent / "datasets", "log.trackers": names}
    process = trainer.train(tmp_path / "run", settings)
    assert process.exit_code == 0, process.errors
    warnings = [line for line in process.output.splitlines() if line.startswith("warning: log.trackers:")]
    assert [line.split()[2] for line in warnings] == [
        "mine_tracker:never",
        "mine_tracker:Failing",
        "mine_tracker:broken_end",
    ]
    assert "ConnectionError: nobody there" in warnings[1]
    assert len([entry for entry in mine.SEEN if type(entry[0]) is int]) == 1 + len(metrics(tmp_path / "run"))
    assert metrics(tmp_path / "run") == metrics(finished_run)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("wandbb", "log.trackers = wandbb: there is no tracker 'wandbb'; did you mean wandb?"),
        ("x", "there is no tracker 'x'; there are wandb"),
        ("no.such:thing", "no.such:thing cannot be imported (ModuleNotFoundError"),
        ("mine_tracker:nothing", "mine_tracker:nothing cannot be imported (AttributeError"),
        ("wrong", "wrong cannot be imported (AttributeError"),
        (":", ": cannot be imported"),
        ("wandb", "log.trackers = wandb: needs the package wandb"),
    ],
)
def test_a_tracker_that_is_not_there_is_one_line(trainer, tmp_path, mine, monkeypatch, names, message):
    monkeypatch.setitem(sys.modules, "wandb", None)
    process = trainer.train(tmp_path / "run", {"log.trackers": names})
    assert process.exit_code == 2
    assert message in assert_one_line_error(process.errors)
    assert not (tmp_path / "run").exists()


class StandIn(types.ModuleType):
    """Takes the place of the package, and keeps what it is given."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.lines, self.finished = [], [], 0

    def init(self, **settings):
        self.started.append(settings)
        return self

    def log(self, values, step):
        self.lines.append((step, values))

    def finish(self):
        self.finished += 1


def test_weights_and_biases_gets_figures_and_a_continued_run_goes_on_there(
    trainer, run_copy, finished_run, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", wandb := StandIn())
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    datasets = {"data.dir": finished_run.parent / "datasets", "log.trackers": "wandb"}
    for n in (1, 2):
        process = trainer.train(run_copy, {**datasets, "train.steps": STEPS + 2 * n})
        assert process.exit_code == 0, process.errors
    first, again = wandb.started
    assert (first["project"], first["name"], first["resume"]) == ("topklm", "copy", "allow")
    assert first["id"] == again["id"] and len(first["id"]) == 32
    assert first["config"]["train"]["steps"] == STEPS + 2
    assert wandb.finished == 2
    assert {step for step, _ in wandb.lines} == set(range(STEPS + 1, STEPS + 5))
    evaluated = next(values for _, values in wandb.lines if "eval/loss" in values)
    assert "eval/dead_neurons/0" in evaluated and "eval/dead_neurons" not in evaluated


def test_no_tracker_is_the_default():
    assert metrics_lib.find(Config().log.trackers) == {}
    with pytest.raises(UserError):
        metrics_lib.find("x")


@pytest.mark.slow
def test_the_real_wandb_is_given_every_line(trainer, tmp_path):
    """`pip install wandb`; offline, where it writes a file beside the run."""
    pytest.importorskip("wandb")
    settings = {"train.steps": 3, "log.trackers": "wandb", "log.every_steps": 1}
    process = trainer.start(tmp_path / "run", settings, environment={"WANDB_MODE": "offline"})
    assert process.finish() == 0, process.errors
    [made] = (tmp_path / "run").rglob("*.wandb")
    content = made.read_bytes()
    assert all(name in content for name in (b"train/loss", b"eval/bits_per_byte", b"d_model"))
