"""Every file of a checkpoint is damaged in every way; nothing but what was saved may ever come back."""

import itertools
import json
import random
import shutil

from helpers import assert_same_bits, coordinator_port
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from topklm.checkpoint.manager import CheckpointManager
from topklm.config import CheckpointConfig
from topklm.errors import UserError
from topklm.layout import one_device
from topklm.training.step import TrainState

# One of two processes, each with a copy of its own of the folder: `SCRIPT FOLDER`.
RESTORES_WITH_ANOTHER = """
import pathlib, sys
from topklm import distributed

with distributed.session():
    import jax, jax.numpy as jnp, numpy as np, optax
    from topklm.config import CheckpointConfig, MeshConfig
    from topklm.layout import make_layout
    from topklm.checkpoint.manager import CheckpointManager
    from topklm.training.step import TrainState

    layout = make_layout(MeshConfig(fsdp=2, data=1))
    params = {"embed": {"embedding": jax.ShapeDtypeStruct((64, 8), jnp.float32)}}
    opt_state = jax.eval_shape(optax.adam(1.0).init, params)
    recent = {"loss": jax.ShapeDtypeStruct((4,), jnp.float32)}
    abstract = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state, recent)
    checkpoints = CheckpointManager(pathlib.Path(sys.argv[1]), CheckpointConfig())
    state, data, _ = checkpoints.restore(abstract, layout)
    part = state.params["embed"]["embedding"].addressable_shards[0].data
    print("restored", int(state.step), data, part.shape, checkpoints.latest_step)
"""


def tiny_state(step):
    rng = np.random.default_rng(step)
    params = {"embed": {"embedding": jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)}}
    optimizer = optax.adam(1.0)
    _, opt_state = optimizer.update(params, optimizer.init(params))
    return TrainState(jnp.int32(step), params, opt_state, {"loss": jnp.arange(4.0)})


@pytest.fixture(scope="module")
def layout():
    return one_device()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Checkpoints of steps 1, 2 and 3; not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoints"
    checkpoints = CheckpointManager(folder, CheckpointConfig(keep=3))
    for step in (1, 2, 3):
        checkpoints.save(tiny_state(step), {"index": step}, {"note": f"step {step}", "rate": 0.25})
    checkpoints.wait()
    return folder


@pytest.fixture
def folder(tmp_path, whole):
    return shutil.copytree(whole, tmp_path / "checkpoints")


def files(whole, step):
    return sorted(path.relative_to(whole) for path in (whole / str(step)).rglob("*") if path.is_file())


def damage(path, kind):
    content = path.read_bytes()
    if kind == "deleted":
        path.unlink()
    elif kind == "emptied":
        path.write_bytes(b"")
    elif kind == "cut off":
        path.write_bytes(content[: len(content) // 2])
    else:
        place, bit = kind
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])


def restored_step(folder, layout):
    """Restores, checks bits and folders; returns the step that came back, and the lines that were said."""
    said = []
    checkpoints = CheckpointManager(folder, CheckpointConfig(keep=3), said.append)
    abstract = jax.eval_shape(lambda: tiny_state(1))
    state, data, facts = checkpoints.restore(abstract, layout)
    step = int(state.step)
    assert_same_bits(state, tiny_state(step))
    assert (data, facts) == ({"index": step}, {"note": f"step {step}", "rate": 0.25})
    assert checkpoints.latest_step == step
    aside = {f"{later}.damaged-1" for later in range(step + 1, 4)}
    assert {path.name for path in folder.iterdir()} == {str(s) for s in range(1, step + 1)} | aside
    return step, said


def assert_falls_back_or_is_harmless(whole, folder, file, kind, layout):
    shutil.rmtree(folder)
    shutil.copytree(whole, folder)
    damage(folder / file, kind)
    step, said = restored_step(folder, layout)
    assert step in (2, 3)
    assert [f"checkpoint 3 of {folder} is damaged (" in line for line in said] == [True] * (3 - step)
    return step


AT_NIGHT = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("deleted", "emptied")]


@pytest.mark.parametrize("kind", ["cut off", *AT_NIGHT])
def test_a_file_that_is_not_whole_is_noticed_or_not_needed(whole, folder, layout, kind):
    steps = [assert_falls_back_or_is_harmless(whole, folder, file, kind, layout) for file in files(whole, 3)]
    assert steps.count(2) >= 8


def test_a_flipped_bit_is_noticed_or_harmless(whole, folder, layout):
    chance, steps = random.Random(0), []
    for file in files(whole, 3):
        size = (whole / file).stat().st_size
        for _ in range(3 if size else 0):
            kind = (chance.randrange(size), chance.randrange(8))
            steps.append(assert_falls_back_or_is_harmless(whole, folder, file, kind, layout))
    assert {2, 3} == set(steps)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_no_flipped_bit_brings_back_anything_else(whole, folder, layout):
    chance = random.Random(1)
    for file in files(whole, 3):
        for place in range((whole / file).stat().st_size):
            assert_falls_back_or_is_harmless(whole, folder, file, (place, chance.randrange(8)), layout)


@pytest.mark.parametrize("item", ["params", "optimizer", "data", "facts"])
def test_a_missing_item_is_damage(folder, layout, item):
    shutil.rmtree(folder / "3" / item)
    assert restored_step(folder, layout)[0] == 2


def test_several_damaged_ones_are_gone_back_over_one_by_one(folder, layout):
    (folder / "3" / "data" / "metadata").write_text("{")
    (folder / "2" / "facts" / "checksums.json").write_bytes(b"\xff")
    step, said = restored_step(folder, layout)
    assert step == 1
    assert [line.rpartition("): ")[2] for line in said] == ["going back to step 2", "going back to step 1"]


def test_a_changed_weight_is_named(folder, layout):
    record = folder / "3" / "facts" / "checksums.json"
    content = json.loads(record.read_text())
    content["arrays"]["params.embed.embedding"][1] ^= 1
    record.write_text(json.dumps(content))
    _, said = restored_step(folder, layout)
    why = "params.embed.embedding: checksum differs"
    assert said == [f"checkpoint 3 of {folder} is damaged ({why}): going back to step 2"]


def test_when_all_are_damaged_each_is_named_and_left_where_it_is(folder, layout):
    for step in (1, 2, 3):
        (folder / str(step) / "data" / "metadata").write_text("{}")
    checkpoints = CheckpointManager(folder, CheckpointConfig(keep=3), lambda line: None)
    with pytest.raises(
        UserError, match=r"every .* damaged \(3: data: checksum differs; 2: .*; 1: .*\): put back"
    ):
        checkpoints.restore(jax.eval_shape(lambda: tiny_state(1)), layout)
    assert {path.name for path in folder.iterdir()} == {"1", "2", "3"}


def test_the_step_of_a_damaged_checkpoint_can_be_saved_again(folder, layout):
    for n in itertools.count(1):
        (folder / "3" / "data" / "metadata").unlink()
        checkpoints = CheckpointManager(folder, CheckpointConfig(keep=3), lambda line: None)
        checkpoints.restore(jax.eval_shape(lambda: tiny_state(1)), layout)
        checkpoints.save(tiny_state(3), {"index": 3}, {"note": "step 3", "rate": 0.25})
        checkpoints.wait()
        assert {path.name for path in folder.iterdir()} == {"1", "2", "3"} | {
            f"3.damaged-{i}" for i in range(1, n + 1)
        }
        if n == 2:
            break
    assert checkpoints.latest_step == 3


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), TimeoutError(), OSError(5, "I/O")]
)
def test_storage_in_trouble_is_not_damage(folder, layout, monkeypatch, error):
    def refuse(path):
        raise error

    checkpoints = CheckpointManager(folder, CheckpointConfig(keep=3))
    monkeypatch.setattr("topklm.checkpoint.step_folder.open_arrays", refuse)
    with pytest.raises(type(error)):
        checkpoints.restore(jax.eval_shape(lambda: tiny_state(1)), layout)
    assert {path.name for path in folder.iterdir()} == {"1", "2", "3"}


def test_a_folder_that_is_gone_is_not_damage(folder, layout):
    checkpoints = CheckpointManager(folder, CheckpointConfig(keep=3))
    folder.rename(folder.with_name("unmounted"))
    with pytest.raises((FileNotFoundError, ValueError)):
        checkpoints.restore(jax.eval_shape(lambda: tiny_state(1)), layout)
    assert not folder.exists()


def test_processes_go_back_together_though_only_one_sees_the_damage(trainer, whole, tmp_path):
    folders = [shutil.copytree(whole, tmp_path / name) for name in ("first", "second")]
    (folders[1] / "3" / "optimizer" / "manifest.ocdbt").write_bytes(b"")
    places = {"TOPKLM_COORDINATOR": f"127.0.0.1:{coordinator_port()}", "TOPKLM_PROCESS_COUNT": "2"}
    processes = [
        trainer.start_python(
            "-c", RESTORES_WITH_ANOTHER, str(folder), environment={**places, "TOPKLM_PROCESS_ID": str(i)}
        )
        for i, folder in enumerate(folders)
    ]
    for process in processes:
        assert process.finish() == 0, process.errors
        assert "is damaged (process 1: DATA_LOSS" in process.output
        assert process.output.endswith("restored 2 {'index': 2} (64, 4) 2\n")
    assert {path.name for path in folders[0].iterdir()} == {"1", "2", "3.damaged-1"}
