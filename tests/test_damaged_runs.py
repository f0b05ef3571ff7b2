"""Every file of a run is damaged in turn: who reads it gives the same answer, or one line."""

import contextlib
import io
import json
import shutil

import damage
from helpers import STEPS
import jax
import numpy as np
import pytest
import saved_runs

import topklm
from topklm import cli, config, errors
from topklm.checkpoint.manager import CheckpointManager
from topklm.layout import one_device
from topklm.storage.files import storage_errors_are_user_errors
from topklm.training.step import abstract_state, make_optimizer

OTHER = saved_runs.CONFIG.to_dict() | {"train": {**saved_runs.CONFIG.to_dict()["train"], "seed": 7}}


def is_no_input(path):
    """Numbers for people, and what Orbax writes for its own readers."""
    return path.name in ("metrics.jsonl", "commit_success.txt") or "tensorboard" in path.parts


def is_of_step_5(path):
    return "5" in path.parts


def loaded(run):
    model = topklm.load(run, step=10)
    arrays = {name: np.asarray(array) for name, array in jax.tree_util.tree_leaves_with_path(model.params)}
    return [str(path) for path in arrays], list(arrays.values()), model.config.to_dict(), model.step


def newest_state(run):
    asked = config.from_saved(json.loads((run / "config.json").read_bytes()))
    checkpoints = CheckpointManager(run / "checkpoints", asked.checkpoint)
    return [np.asarray(array) for array in jax.tree.leaves(checkpoints.restore(*onto_one_device(asked))[0])]


def onto_one_device(asked):
    layout = one_device()
    return abstract_state(asked, make_optimizer(asked.optim, 100)), layout


def restored(run):
    """As a run that is continued; that an older checkpoint is taken instead is said."""
    said = []
    with storage_errors_are_user_errors("reading the checkpoints", run):
        checkpoints = CheckpointManager(run / "checkpoints", saved_runs.CONFIG.checkpoint, said.append)
        if checkpoints.latest_step in (None, 5):  # to take checkpoints away is the way to go back
            raise errors.UserError("the newest checkpoint is not there")
        state, data, facts = checkpoints.restore(*onto_one_device(saved_runs.CONFIG))
    if said:
        raise errors.UserError(said[0])
    return [np.asarray(array) for array in jax.tree.leaves(state)], data, facts


def copies(whole, place):
    """A function that makes new copies; each shares its files with the whole, until they are replaced."""

    def copy():
        shutil.rmtree(place, ignore_errors=True)
        return shutil.copytree(whole, place)

    return copy


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    saved_runs.save(folder, [5, 10])
    return folder


@pytest.fixture(scope="module")
def another_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("another") / "run"
    saved_runs.save(folder, [10], config.resolve(OTHER))
    return folder


def test_a_damaged_run_loads_as_it_was_or_not_at_all(run, another_run, tmp_path):
    done = damage.check(copies(run, tmp_path / "run"), loaded, loaded(run), other=another_run, share=0.07)
    assert done > 10


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(3))
def test_many_damages_of_a_run_are_noticed(run, another_run, tmp_path, seed):
    copy = copies(run, tmp_path / "run")
    damage.check(copy, loaded, loaded(run), seed=seed, per_file=8, other=another_run)
    damage.check(copy, restored, restored(run), seed=seed, per_file=8, ignore=is_of_step_5)


def test_a_run_that_may_not_be_read_is_not_called_damaged(run, tmp_path):
    assert damage.check_unreadable(copies(run, tmp_path / "run"), loaded, loaded(run), share=0.4) > 5


def test_a_damaged_run_is_continued_as_it_was_or_from_an_older_checkpoint(run, tmp_path):
    whole = restored(run)
    assert damage.check(copies(run, tmp_path / "run"), restored, whole, ignore=is_of_step_5, share=0.07) > 5


@pytest.mark.slow
def test_a_run_that_may_not_be_read_is_not_continued_from_elsewhere(run, tmp_path):
    copy, whole = copies(run, tmp_path / "run"), restored(run)
    assert damage.check_unreadable(copy, restored, whole, ignore=is_of_step_5, share=0.4) > 3


def trained_on(trainer, datasets):
    """Gives the command of a finished run again; what is left is the arrays of its newest checkpoint."""

    def reader(run):
        said, wrong = io.StringIO(), io.StringIO()
        arguments = trainer.arguments(run, {"data.dir": datasets})
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
            code = errors.guarded(lambda: cli.dispatch(["train", *map(str, arguments)]))
        if code:
            raise errors.UserError(wrong.getvalue())
        return newest_state(run)

    return reader


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_damaged_run_is_trained_to_the_same_end_or_not_at_all(trainer, finished_run, tmp_path, monkeypatch):
    monkeypatch.setenv("TOPKLM_ALLOCATOR", "system")
    monkeypatch.setenv("XDG_CACHE_HOME", str(trainer.compilation_cache))
    slim = shutil.copytree(finished_run, tmp_path / "slim")
    for step in (5, 10, 15):
        shutil.rmtree(slim / "checkpoints" / str(step))
    reader = trained_on(trainer, finished_run.parent / "datasets")
    copy = copies(slim, tmp_path / "run")
    assert damage.check(copy, reader, newest_state(finished_run), per_file=1, share=0.3) > STEPS
