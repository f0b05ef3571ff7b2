"""`checkpoint.trace`: parameters alone, as bfloat16, at chosen steps of a run."""

import json
import resource
import shutil
import signal
import threading

from helpers import (
    STEPS,
    assert_one_line_error,
    assert_same_bits,
    devices,
    final_arrays,
    in_this_process,
    metrics,
)
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saved_runs import facts, save, state

from topklm.checkpoint.manager import TraceManager
from topklm.checkpoint.run_folder import TRACE_FOLDER
from topklm.checkpoint.step_folder import CheckpointWriter
from topklm.config import resolve
from topklm.errors import UserError
from topklm.inference.load import checkpoint_step, load, saved_steps
from topklm.model import transformer

# Kills itself right after a step's figures are shown: `SCRIPT STEP FLAGS...`.
KILLED_AFTER = """
import os, signal, sys
from topklm import main
from topklm.training.metrics import Console

last, report = int(sys.argv.pop(1)), Console.report

def report_and_die(self, step, **figures):
    report(self, step, **figures)
    if step == last:
        os.kill(os.getpid(), signal.SIGKILL)

Console.report = report_and_die
sys.exit(main.run())
"""

TRACED = {"checkpoint.trace": "0,1,4,16,24"}


def traced(run) -> list[int]:
    return sorted(int(path.name) for path in (run / TRACE_FOLDER).iterdir())


def rounded(params):
    return jax.tree.map(lambda array: np.asarray(jnp.asarray(array).astype(jnp.bfloat16)), params)


@pytest.mark.parametrize(
    "trace, last, steps",
    [
        ("", 1300, []),
        ("log2", 20, [0, 1, 2, 4, 8, 16, 20]),
        ("log", 5, [0, 1, 2, 4, 5]),
        ("log", 300, [0, 1, 2, 4, 8, 16, 32, 64, 91, 128, 181, 256, 300]),
        ("pythia", 3500, [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 3000, 3500]),
        ("0,7,9", 9, [0, 7, 9]),
    ],
)
def test_schedule_names_its_steps(trace, last, steps):
    assert resolve({"checkpoint": {"trace": trace}, "train": {"steps": last}}).traced_steps == steps


@pytest.mark.parametrize("trace", ["x", "log10", "0,,1", "-1", "1,1", "4,2", "0,25", "1 2"])
def test_a_schedule_that_cannot_be_is_refused(trace):
    with pytest.raises(UserError, match=r"^checkpoint\.trace = "):
        resolve({"checkpoint": {"trace": trace}, "train": {"steps": 24}})


@pytest.fixture(scope="module")
def traced_run(tmp_path_factory, trainer):
    run = tmp_path_factory.mktemp("traced") / "run"
    ended = trainer.train(run, TRACED)
    assert ended.exit_code == 0, ended.errors
    return run


def test_traced_run_is_the_untraced_run_bit_for_bit(traced_run, finished_run):
    losses = [[line.get("train/loss") for line in metrics(run)] for run in (traced_run, finished_run)]
    assert losses[0] == losses[1]
    assert_same_bits(final_arrays(traced_run), final_arrays(finished_run))


def test_trace_holds_rounded_parameters_of_its_steps_and_nothing_else(tmp_path, traced_run, finished_run):
    assert traced(traced_run) == [0, 1, 4, 16, 24]
    run = shutil.copytree(traced_run, tmp_path / "run")
    entry = run / TRACE_FOLDER / "16"
    assert sorted(path.name for path in entry.iterdir()) == ["commit_success.txt", "facts", "params"]
    whole = load(finished_run, step=STEPS)
    shutil.rmtree(run / "checkpoints" / str(STEPS))
    assert_same_bits(rounded(whole.params), rounded(load(run, step=STEPS).params))
    n_bytes = sum(path.stat().st_size for path in (entry / "params").rglob("*") if path.is_file())
    n_parameters = sum(leaf.size for leaf in jax.tree.leaves(whole.params))
    assert 2 * n_parameters <= n_bytes < 2 * n_parameters + 20_000


def test_step_0_of_the_trace_is_the_seed_s(traced_run):
    model = load(traced_run, step=0)
    from_seed = transformer.create(model.config.model, model.config.train.seed)
    assert_same_bits(model.params, jax.tree.map(lambda a: a.astype(jnp.float32), rounded(from_seed)))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(model.params))


def test_load_prefers_the_checkpoint_and_lists_both(traced_run):
    # Rounded in the trace; the checkpoint of the same step is whole.
    assert_same_bits(load(traced_run, step=STEPS).params, final_arrays(traced_run)["params"])
    steps = saved_steps(traced_run)
    assert {0, 1, 4, 5, 10, 15, 16, 20} <= set(steps)
    assert steps == sorted(set(steps))
    with pytest.raises(UserError, match=r"step = 3: .* has checkpoints 0, 1, 4, 5"):
        load(traced_run, step=3)


def test_show_lists_the_trace(traced_run):
    ended = in_this_process("show", traced_run)
    assert ended.exit_code == 0, ended.errors
    assert "\ntrace: 0, 1, 4, 16, 24 (5)\n" in ended.output


def test_the_newest_is_a_checkpoint_even_where_the_trace_is_ahead(tmp_path):
    save(tmp_path / "run", [1, 2])
    manager = TraceManager(tmp_path / "run" / TRACE_FOLDER, [3])
    manager.save(3, state(3).params, facts(3))
    manager.close()
    assert checkpoint_step(tmp_path / "run") == 2
    assert saved_steps(tmp_path / "run") == [1, 2, 3]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert load(tmp_path / "run").step == 3


def test_killed_run_goes_on_with_its_trace(tmp_path, trainer, traced_run):
    run = tmp_path / "killed"
    settings = {**TRACED, "checkpoint.every_steps": 3}
    process = trainer.start_python("-c", KILLED_AFTER, "12", *trainer.arguments(run, settings))
    assert process.finish() == -signal.SIGKILL
    # Of a future that the resumed run may not have: a step after its newest checkpoint.
    shutil.copytree(run / TRACE_FOLDER / "4", run / TRACE_FOLDER / "16")
    kept = (run / TRACE_FOLDER / "4").stat().st_mtime_ns
    assert trainer.train(run, settings).exit_code == 0
    assert traced(run) == traced(traced_run)
    assert (run / TRACE_FOLDER / "4").stat().st_mtime_ns == kept
    for step in traced(run):
        assert_same_bits(load(run, step=step).params, load(traced_run, step=step).params)


def test_new_run_in_a_folder_without_checkpoints_begins_its_trace_anew(tmp_path, trainer, traced_run):
    run = tmp_path / "again"
    shutil.copytree(traced_run / TRACE_FOLDER, run / TRACE_FOLDER)
    ended = trainer.train(run, {"checkpoint.trace": "0,2", "train.steps": 2, "train.seed": 1})
    assert ended.exit_code == 0, ended.errors
    assert traced(run) == [0, 2]
    assert load(run, step=0).config.train.seed == 1


def test_entry_that_cannot_be_written_costs_a_warning_and_not_the_run(tmp_path):
    said: list[str] = []
    manager = TraceManager(tmp_path / TRACE_FOLDER, [1, 2], said.append)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))  # as on a full disk
    try:
        manager.save(1, state(1).params, facts(1))
        manager.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    manager.save(2, state(2).params, facts(2))
    manager.close()
    assert len(said) == 1
    assert said[0].startswith("warning: the trace lacks step 1, which could not be written (")
    assert not manager.due(1)
    assert traced(tmp_path) == [2]


def test_no_checkpoint_outlives_the_entry_of_an_earlier_step(tmp_path, monkeypatch):
    may_end, finish = threading.Event(), CheckpointWriter.finish_part

    def finish_late(self, timeout_s):
        may_end.wait(60)
        finish(self, timeout_s)

    monkeypatch.setattr(CheckpointWriter, "finish_part", finish_late)
    manager = TraceManager(tmp_path / TRACE_FOLDER, [5], pytest.fail)
    manager.save(5, state(5).params, facts(5))
    manager.settle_before(5)  # resumed from 5, a run saves the entry of 5 again
    assert not (tmp_path / TRACE_FOLDER / "5").exists()
    threading.Timer(0.2, may_end.set).start()
    manager.settle_before(6)
    assert (tmp_path / TRACE_FOLDER / "5").exists()


def test_entry_that_a_checkpoint_of_its_step_outlived_is_saved_when_the_run_goes_on(
    tmp_path, trainer, traced_run
):
    run = shutil.copytree(traced_run, tmp_path / "run")
    for step in (20, 24):
        shutil.rmtree(run / "checkpoints" / str(step))
    shutil.rmtree(run / TRACE_FOLDER / "24")
    settings = {"checkpoint.trace": "0,1,4,15,16,24"}  # 15 is its newest checkpoint
    assert trainer.train(run, settings).exit_code == 0
    assert traced(run) == [0, 1, 4, 15, 16, 24]
    assert_same_bits(load(run, step=16).params, load(traced_run, step=16).params)


def test_damaged_entry_is_named(tmp_path, traced_run):
    run = tmp_path / "damaged"
    shutil.copytree(traced_run, run)
    record = run / TRACE_FOLDER / "1" / "facts" / "checksums.json"
    sums = json.loads(record.read_text())
    name = next(iter(sums["arrays"]))
    sums["arrays"][name][1] ^= 1
    record.write_text(json.dumps(sums))
    with pytest.raises(UserError, match=r"checkpoint 1 of .* is damaged .*checksum differs"):
        load(run, step=1)


@pytest.mark.slow
def test_entry_of_eight_devices_is_that_of_one(tmp_path, trainer, traced_run):
    run = tmp_path / "eight"
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    process = trainer.run(run, {"train.steps": 1, "checkpoint.trace": "0,1", **mesh}, environment=devices(8))
    assert process.exit_code == 0, process.errors
    assert_same_bits(load(run, step=0).params, load(traced_run, step=0).params)


def test_wrong_schedule_ends_in_one_line(tmp_path, trainer):
    ended = trainer.train(tmp_path / "run", {"checkpoint.trace": "0,99"})
    assert ended.exit_code == 2
    assert "checkpoint.trace = '0,99': 99 is after the last step" in assert_one_line_error(ended.errors)
