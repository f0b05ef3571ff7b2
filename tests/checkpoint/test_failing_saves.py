"""Saves onto storage that fails, and works again later: real limits on the size of files, real processes."""

import contextlib
import errno
import itertools
import os
import resource
import shutil

from helpers import assert_same_bits, coordinator_port
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from topklm.checkpoint import manager
from topklm.checkpoint.manager import CheckpointManager, Patience
from topklm.config import CheckpointConfig
from topklm.errors import UserError
from topklm.layout import one_device
from topklm.training.step import TrainState

# TensorStore's threads may come back to an event loop that a failure has ended.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

# One of two processes; the second one cannot write its part of the first checkpoint: `SCRIPT FOLDER`.
FAILS_IN_ONE = """
import pathlib, resource, sys
from topklm import distributed

with distributed.session():
    import jax, jax.numpy as jnp, optax
    from jax.sharding import NamedSharding, PartitionSpec
    from topklm.config import CheckpointConfig, MeshConfig
    from topklm.layout import make_layout
    from topklm.checkpoint import manager
    from topklm.checkpoint.manager import CheckpointManager
    from topklm.training.step import TrainState

    manager.FIRST_WAIT_S = 0.0
    layout = make_layout(MeshConfig(fsdp=2, data=1))

    def init(step):
        params = {"embed": {"embedding": jnp.arange(64 * 128.0).reshape(64, 128) + step}}
        return TrainState(jnp.int32(step), params, optax.adam(1.0).init(params), {"loss": jnp.arange(4.0)})

    def state(step):
        shapes = jax.eval_shape(lambda: init(step))
        return jax.jit(lambda: init(step), out_shardings=layout.shardings(shapes))()

    def limit(n_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))

    checkpoints = CheckpointManager(pathlib.Path(sys.argv[1]), CheckpointConfig())
    checkpoints.save(state(1), {}, {})
    checkpoints.wait()
    if jax.process_index() == 1:
        limit(5000)
    checkpoints.save(state(2), {}, {})
    step = next(step for step in range(3, 10**9) if checkpoints.due(step))
    print("due", checkpoints.latest_step, flush=True)
    limit(resource.RLIM_INFINITY)
    checkpoints.save(state(step), {}, {})
    checkpoints.wait()
    restored, _, _ = checkpoints.restore(jax.eval_shape(lambda: init(1)), layout)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), restored, state(step))
    print("saved", checkpoints.latest_step == step, all(jax.tree.leaves(same)), flush=True)
"""


def some_state(step):
    params = {
        "embed": {"embedding": jnp.asarray(np.random.default_rng(step).normal(size=(64, 128)), jnp.float32)}
    }
    optimizer = optax.adam(1.0)
    _, opt_state = optimizer.update(params, optimizer.init(params))
    return TrainState(jnp.int32(step), params, opt_state, {"loss": jnp.arange(4.0)})


def limit_files_to(n_bytes):
    """Makes writing beyond that fail from now on, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def lift_limit():
    limit_files_to(resource.getrlimit(resource.RLIMIT_FSIZE)[1])


@contextlib.contextmanager
def files_of_at_most(n_bytes):
    limit_files_to(n_bytes)
    try:
        yield
    finally:
        lift_limit()


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch):
    monkeypatch.setattr(manager, "FIRST_WAIT_S", 0.0)


@pytest.fixture
def said():
    return []


@pytest.fixture
def checkpoints(tmp_path, said):
    """Has a good checkpoint of step 1."""
    checkpoints = CheckpointManager(tmp_path / "c", CheckpointConfig(keep=2), said.append)
    checkpoints.save(some_state(1), {"index": 1}, {})
    checkpoints.wait()
    return checkpoints


def steps_until_due(checkpoints, after):
    """Goes on training until a save is due again."""
    return next(step for step in itertools.count(after + 1) if checkpoints.due(step))


def assert_holds(checkpoints, step):
    layout = one_device()
    state, data, _ = checkpoints.restore(jax.eval_shape(lambda: some_state(1)), layout)
    assert_same_bits(state, some_state(step))
    assert data == {"index": step}


def test_training_goes_on_and_a_later_step_is_saved_instead(tmp_path, checkpoints, said):
    with files_of_at_most(5000):
        checkpoints.save(some_state(2), {"index": 2}, {})
        step = steps_until_due(checkpoints, 2)
    assert checkpoints.latest_step == 1
    assert said == [
        "checkpoint 2 could not be written (the file would pass the size limit set for this process: raise "
        f"it (ulimit -f)): will try again at step {step}, 1 failure so far"
    ]
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"1"}  # nothing half-written is left
    checkpoints.save(some_state(step), {"index": step}, {})
    assert not checkpoints.due(step)
    checkpoints.wait()
    assert said[1:] == [f"checkpoint {step} is written"]
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"1", str(step)}
    assert_holds(checkpoints, step)


def test_a_folder_that_cannot_be_written_counts_as_a_failure_too(tmp_path, checkpoints, said):
    folder = tmp_path / "c"
    folder.rename(tmp_path / "aside")
    folder.write_text("in the way")
    checkpoints.save(some_state(2), {"index": 2}, {})
    step = steps_until_due(checkpoints, 2)
    assert "could not be written (a part of the path is a file" in said[0]
    folder.unlink()
    (tmp_path / "aside").rename(folder)
    checkpoints.save(some_state(step), {"index": step}, {})
    checkpoints.wait()
    assert_holds(checkpoints, step)


def test_failures_in_a_row_are_counted_until_one_succeeds(checkpoints, said):
    step = 2
    with files_of_at_most(5000):
        for _ in range(3):
            checkpoints.save(some_state(step), {"index": step}, {})
            step = steps_until_due(checkpoints, step)
    assert [line.rpartition(", ")[2] for line in said] == [
        f"{n} so far" for n in ("1 failure", "2 failures", "3 failures")
    ]
    checkpoints.save(some_state(step), {"index": step}, {})
    checkpoints.wait()
    with files_of_at_most(5000):
        checkpoints.save(some_state(step + 1), {"index": step + 1}, {})
        steps_until_due(checkpoints, step + 1)
    assert said[-1].endswith("1 failure so far")


def test_when_patience_is_over_the_folder_and_the_last_good_checkpoint_are_named(tmp_path, said):
    patience = Patience(while_training_s=0.0)
    checkpoints = CheckpointManager(tmp_path / "c", CheckpointConfig(), said.append, patience)
    checkpoints.save(some_state(1), {}, {})
    checkpoints.wait()
    with files_of_at_most(5000), pytest.raises(UserError) as error:
        checkpoints.save(some_state(2), {}, {})
        steps_until_due(checkpoints, 2)
    for words in ("checkpoint 2", "size limit", str(tmp_path / "c"), "that of step 1", "resume"):
        assert words in str(error.value)
    assert said == []


def test_at_the_end_it_is_tried_again_until_it_is_written(tmp_path, said):
    def say(line):
        said.append(line)
        if len(said) == 2:
            lift_limit()  # somebody freed space

    checkpoints = CheckpointManager(tmp_path / "c", CheckpointConfig(), say)
    with files_of_at_most(5000):
        checkpoints.save(some_state(1), {"index": 1}, {})
        checkpoints.wait()
    assert [line.rpartition("): ")[2] for line in said] == [
        "will try again in 0 s, 1 failure so far",
        "will try again in 0 s, 2 failures so far",
        "checkpoint 1 is written",
    ]
    assert_holds(checkpoints, 1)


def test_at_the_end_patience_is_over_sooner(tmp_path, said):
    checkpoints = CheckpointManager(tmp_path / "c", CheckpointConfig(), said.append, Patience(at_end_s=0.0))
    with files_of_at_most(5000):
        checkpoints.save(some_state(1), {}, {})
        with pytest.raises(UserError, match=r"checkpoint 1 could not .* the last good one in .*c is none"):
            checkpoints.wait()
        checkpoints.close()
    assert list((tmp_path / "c").iterdir()) == []


def test_settling_never_raises_and_says_what_is_on_the_disk(checkpoints, said):
    with files_of_at_most(5000):
        checkpoints.save(some_state(2), {}, {})
        assert checkpoints.settle() == 1
    assert len(said) == 1
    checkpoints.save(some_state(3), {}, {})
    assert checkpoints.settle() == 3


def test_a_bug_while_saving_is_not_taken_for_the_storage(checkpoints):
    checkpoints.save(some_state(2), {"not JSON": object()}, {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.wait()


def test_waits_double_up_to_a_minute_and_end_with_patience(monkeypatch):
    monkeypatch.setattr(manager, "FIRST_WAIT_S", 2.0)
    now = 1000.0
    monkeypatch.setattr(manager.time, "monotonic", lambda: now)
    backoff, waits = manager.Backoff(patience_s=300.0), []
    while (seconds := backoff.failed()) is not None:
        waits.append(seconds)
        now += seconds
    assert waits == [2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert backoff.failures == 10


def test_what_fails_in_one_process_is_tried_again_by_all(trainer, tmp_path):
    places = {"TOPKLM_COORDINATOR": f"127.0.0.1:{coordinator_port()}", "TOPKLM_PROCESS_COUNT": "2"}
    processes = [
        trainer.start_python(
            "-c", FAILS_IN_ONE, str(tmp_path / "c"), environment={**places, "TOPKLM_PROCESS_ID": str(i)}
        )
        for i in range(2)
    ]
    for process in processes:
        assert process.finish() == 0, process.errors
        assert (
            "checkpoint 2 could not be written (process 1: the file would pass the size limit"
            in process.output
        )
        assert "due 1\n" in process.output
        assert "saved True True\n" in process.output
    assert len(list((tmp_path / "c").iterdir())) == 2


# Old checkpoints that cannot be removed.


def link_to_elsewhere(checkpoint):
    checkpoint.rename(checkpoint.parents[1] / "elsewhere")
    checkpoint.symlink_to("../elsewhere")


def refuse_to_remove(monkeypatch, name, code):
    """As NFS does while a process of another machine reads something in the folder."""
    remove = shutil.rmtree

    def rmtree(path, *arguments, **options):
        if name in str(path):
            raise OSError(code, os.strerror(code), str(path))
        remove(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)


@pytest.mark.parametrize("code", [errno.ENOTEMPTY, errno.EBUSY, errno.EACCES, errno.EROFS])
def test_an_old_checkpoint_that_cannot_be_removed_costs_a_warning(tmp_path, monkeypatch, code):
    folder, said = tmp_path / "c", []
    checkpoints = CheckpointManager(folder, CheckpointConfig(keep=2), said.append)
    for step in (1, 2):
        checkpoints.save(some_state(step), {}, {})
        checkpoints.wait()
    with monkeypatch.context() as patched:
        refuse_to_remove(patched, "/1.deleted", code)
        for step in (3, 4):
            checkpoints.save(some_state(step), {}, {})
            checkpoints.wait()
            assert checkpoints.latest_step == step
    assert ["older checkpoints" in line and "try again" in line for line in said] == [True, True]
    # The second one went although the first one could not.
    assert {path.name for path in folder.iterdir()} == {"1.deleted.orbax-checkpoint-tmp", "3", "4"}
    checkpoints.save(some_state(5), {}, {})
    checkpoints.wait()
    assert {path.name for path in folder.iterdir()} == {"4", "5"}
    assert len(said) == 2


def test_an_old_checkpoint_that_is_a_link_is_removed_without_what_it_leads_to(tmp_path):
    folder, said = tmp_path / "c", []
    checkpoints = CheckpointManager(folder, CheckpointConfig(keep=2), said.append)
    for step in (1, 2, 3):
        checkpoints.save(some_state(step), {}, {})
        checkpoints.wait()
        if step == 1:
            link_to_elsewhere(folder / "1")
    assert {path.name for path in folder.iterdir()} == {"2", "3"}
    assert (tmp_path / "elsewhere" / "params").is_dir()
    assert said == []


def test_what_is_half_written_and_cannot_be_removed_does_not_keep_a_run_from_starting(tmp_path, monkeypatch):
    folder, said = tmp_path / "c", []
    checkpoints = CheckpointManager(folder, CheckpointConfig(keep=2))
    checkpoints.save(some_state(1), {}, {})
    checkpoints.wait()
    (folder / "2.orbax-checkpoint-tmp").mkdir()
    refuse_to_remove(monkeypatch, "2.orbax", errno.ENOTEMPTY)
    assert CheckpointManager(folder, CheckpointConfig(keep=2), said.append).latest_step == 1
    assert "half-written cannot be removed" in said[0]
