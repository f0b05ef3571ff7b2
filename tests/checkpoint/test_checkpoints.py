import functools
import json
import math

from etils import epath
import flax.serialization
from helpers import TINY, assert_same_bits, devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from topklm.checkpoint.manager import CheckpointManager
from topklm.checkpoint.step_folder import CheckpointWriter, open_arrays
from topklm.config import CheckpointConfig, Config, resolve
from topklm.errors import UserError
from topklm.layout import one_device
from topklm.training.step import abstract_state, empty_window, init_state, make_optimizer, make_train_step

# Saves a trained state of 8 devices, then restores a checkpoint of one device onto its own layout:
# `SCRIPT CONFIG_JSON FOLDER_OF_8 ARRAYS_OF_8 FOLDER_OF_1 ARRAYS_OF_1`.
ON_EIGHT_DEVICES = """
import json, pathlib, sys
import jax, numpy as np
from topklm import config as config_lib
from topklm.checkpoint.manager import CheckpointManager
from topklm.training.step import make_optimizer
from topklm.layout import make_layout
from topklm.training.step import abstract_state, init_state

config = config_lib.from_saved(json.loads(sys.argv[1]))
of_8, arrays_of_8, of_1, arrays_of_1 = map(pathlib.Path, sys.argv[2:])
layout = make_layout(config_lib.MeshConfig(data=2, fsdp=2, tensor=2))
optimizer = make_optimizer(config.optim, config.train.steps)

def write(path, state):
    np.savez(path, *map(np.asarray, jax.tree.leaves(state)))

def is_split(state):
    return any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(state.params))

state = init_state(config, optimizer, layout)
assert jax.device_count() == 8 and is_split(state)
checkpoints = CheckpointManager(of_8, config.checkpoint)
checkpoints.save(state._replace(step=state.step + 7), {"next_index": 7}, {"note": "eight"})
checkpoints.close()
write(arrays_of_8, state._replace(step=state.step + 7))

manager = CheckpointManager(of_1, config.checkpoint)
state, data, facts = manager.restore(abstract_state(config, optimizer), layout)
assert is_split(state)
assert (data, facts) == ({"next_index": 3}, {"note": "one"})
write(arrays_of_1, state)
"""


@pytest.fixture(scope="module")
def config() -> Config:
    sections: dict = {}
    for name, value in TINY.items():
        section, field = name.split(".")
        sections.setdefault(section, {})[field] = value
    sections["model"]["vocab_size"] = 320
    return resolve(sections)


@pytest.fixture(scope="module")
def optimizer(config):
    return make_optimizer(config.optim, config.train.steps)


@pytest.fixture(scope="module")
def layout():
    return one_device()


@pytest.fixture(scope="module")
def train_step(config, optimizer, layout):
    return make_train_step(config, optimizer, layout)


def batch(config, seed):
    shape = (config.train.batch_size, config.model.context_length)
    tokens = np.random.default_rng(seed).integers(0, 320, shape, dtype=np.int32)
    return {
        "inputs": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "loss_weights": np.ones(shape, np.float32),
    }


def copied(state):
    """Copies the values into memory of their own."""
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)


@pytest.fixture(scope="module")
def trained_state(config, optimizer, layout, train_step):
    """Trains three steps, so that no part of the optimizer is zero any more."""
    state = init_state(config, optimizer, layout)
    for seed in range(3):
        state, _ = train_step(state, batch(config, seed))
    return state


@pytest.fixture
def state(trained_state):
    """Makes a copy that a step may overwrite."""
    return jax.tree.map(jnp.copy, trained_state)


def test_everything_comes_back_bit_for_bit(tmp_path, config, optimizer, layout, state):
    checkpoints = CheckpointManager(tmp_path / "c", config.checkpoint)
    checkpoints.save(state, {"next_index": 3}, {"tokens_seen": 384, "config": config.to_dict()})
    checkpoints.close()
    again = CheckpointManager(tmp_path / "c", config.checkpoint)
    assert again.latest_step == 3
    restored, data, facts = again.restore(abstract_state(config, optimizer), layout)
    assert_same_bits(restored, state)
    assert any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(restored.opt_state))
    assert data == {"next_index": 3}
    assert facts == {"tokens_seen": 384, "config": config.to_dict()}
    again.close()


def test_a_state_may_be_any_pytree_with_a_step_and_params(tmp_path, config, layout):
    state = {
        "step": jnp.int32(7),
        "params": {"embed": {"embedding": jnp.arange(12.0).reshape(4, 3)}},
        "best": {"loss": jnp.float32(1.5)},
    }
    checkpoints = CheckpointManager(tmp_path / "c", config.checkpoint)
    checkpoints.save(state, {"next_index": 7}, {})
    checkpoints.wait()
    restored, data, _ = checkpoints.restore(jax.eval_shape(lambda: state), layout)
    assert_same_bits(restored, state)
    assert data == {"next_index": 7}
    checkpoints.close()


def test_training_on_after_restoring_is_training_on(tmp_path, config, optimizer, layout, train_step, state):
    checkpoints = CheckpointManager(tmp_path / "c", config.checkpoint)
    checkpoints.save(state, {}, {})
    checkpoints.wait()
    restored, _, _ = checkpoints.restore(abstract_state(config, optimizer), layout)
    checkpoints.close()
    for seed in range(3, 6):
        state, expected = train_step(state, batch(config, seed))
        restored, actual = train_step(restored, batch(config, seed))
        assert_same_bits(actual, expected)
    assert_same_bits(restored, state)


def test_steps_taken_while_a_save_is_written_do_not_reach_it(
    tmp_path, config, optimizer, layout, train_step, state
):
    checkpoints = CheckpointManager(tmp_path / "c", CheckpointConfig(keep=10))
    expected = {}
    for _ in range(5):
        expected[int(state.step)] = copied(state)
        checkpoints.save(state, {}, {})
        for seed in range(8):
            before = state
            state, _ = train_step(state, batch(config, seed))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))  # steps reuse the memory
    checkpoints.close()
    for step, values in expected.items():
        only = tmp_path / f"only-{step}"
        only.mkdir()
        (tmp_path / "c" / str(step)).rename(only / str(step))
        restored, _, _ = CheckpointManager(only, config.checkpoint).restore(
            abstract_state(config, optimizer), layout
        )
        assert_same_bits(restored, values)


def test_the_newest_checkpoints_are_kept(tmp_path, state):
    checkpoints = CheckpointManager(tmp_path / "c", CheckpointConfig(keep=2))
    assert checkpoints.latest_step is None
    for step in (3, 4, 5):
        checkpoints.save(state._replace(step=np.int32(step)), {}, {})
    checkpoints.close()
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"4", "5"}


def test_a_step_that_is_saved_already_is_left_as_it_is(tmp_path, config, optimizer, layout, state):
    checkpoints = CheckpointManager(tmp_path / "c", config.checkpoint)
    checkpoints.save(state, {"next_index": 1}, {})
    checkpoints.save(state, {"next_index": 2}, {})
    checkpoints.wait()
    assert checkpoints.restore(abstract_state(config, optimizer), layout)[1] == {"next_index": 1}
    checkpoints.close()


def test_what_a_killed_process_left_half_written_is_removed_and_never_read(tmp_path, config, state):
    checkpoints = CheckpointManager(tmp_path / "c", config.checkpoint)
    checkpoints.save(state, {}, {})
    checkpoints.close()
    half = tmp_path / "c" / "9.orbax-checkpoint-tmp"
    (half / "params.orbax-checkpoint-tmp").mkdir(parents=True)
    again = CheckpointManager(tmp_path / "c", config.checkpoint)
    assert again.latest_step == 3
    again.save(state._replace(step=np.int32(4)), {}, {})
    again.close()
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"3", "4"}


def test_a_checkpoint_of_another_model_is_refused_and_its_arrays_named(
    tmp_path, config, optimizer, layout, state
):
    checkpoints = CheckpointManager(tmp_path / "c", config.checkpoint)
    checkpoints.save(state, {}, {})
    checkpoints.wait()
    other = resolve({**config.to_dict(), "model": {**config.to_dict()["model"], "tie_embeddings": True}})
    with pytest.raises(
        UserError, match=r"checkpoint 3 of .* holds .*: unembed\.kernel is not part of this model"
    ):
        checkpoints.restore(abstract_state(other, optimizer), layout)
    checkpoints.close()


def saved_by_an_earlier_version(folder, state):
    """As version 0.1 did: by Orbax's manager, compressed, in large chunks, without checksums or `recent`."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    optimizer = {"step": state.step, "opt_state": flax.serialization.to_state_dict(state.opt_state)}
    with ocp.CheckpointManager(folder, handler_registry=registry) as manager:
        manager.save(
            int(state.step),
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(state.params),
                optimizer=ocp.args.PyTreeSave(optimizer),
                data=ocp.args.JsonSave({"next_index": 3}),
                facts=ocp.args.JsonSave({"note": "old"}),
            ),
        )


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path, config, optimizer, layout, state):
    saved_by_an_earlier_version(tmp_path / "c", state)
    checkpoints = CheckpointManager(tmp_path / "c", config.checkpoint)
    fresh = {"recent": empty_window()}
    restored, data, facts = checkpoints.restore(abstract_state(config, optimizer), layout, fresh)
    assert_same_bits(restored, state._replace(recent=empty_window()))
    assert restored.recent["loss"].sharding == restored.step.sharding
    assert (data, facts) == ({"next_index": 3}, {"note": "old"})


def test_what_an_earlier_version_did_not_save_is_named_if_nothing_takes_its_place(
    tmp_path, config, optimizer, layout, state
):
    saved_by_an_earlier_version(tmp_path / "c", state)
    checkpoints = CheckpointManager(tmp_path / "c", config.checkpoint)
    with pytest.raises(UserError, match=r"recent\.count is missing; recent\.gradient_norm is missing"):
        checkpoints.restore(abstract_state(config, optimizer), layout)


def test_what_is_saved_is_restored_and_not_taken_afresh(tmp_path, config, optimizer, layout, state):
    checkpoints = CheckpointManager(tmp_path / "c", config.checkpoint)
    checkpoints.save(state, {}, {})
    checkpoints.wait()
    fresh = {"recent": empty_window()}
    restored, _, _ = checkpoints.restore(abstract_state(config, optimizer), layout, fresh)
    assert_same_bits(restored.recent, state.recent)
    assert int(restored.recent["count"]) == 3


def test_another_optimizer_or_dtype_is_another_model_and_no_damage(
    tmp_path, config, layout, optimizer, state
):
    said = []
    checkpoints = CheckpointManager(tmp_path / "c", config.checkpoint, said.append)
    checkpoints.save(state, {}, {})
    checkpoints.wait()
    shapes = abstract_state(config, optimizer)
    with pytest.raises(UserError, match=r"checkpoint 3 of .*: opt_state\.\S+ is not part of this model"):
        checkpoints.restore(shapes._replace(opt_state=optax.sgd(1.0).init(state.params)), layout)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes.params)
    with pytest.raises(UserError, match=r"embed\.embedding is float32, this model needs bfloat16"):
        checkpoints.restore(shapes._replace(params=half), layout)
    assert said == []


def test_a_checkpoint_half_deleted_when_its_process_died_is_never_read(tmp_path, config, state):
    checkpoints = CheckpointManager(tmp_path / "c", config.checkpoint)
    checkpoints.save(state, {}, {})
    checkpoints.close()
    (tmp_path / "c" / "2.deleted.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    assert CheckpointManager(tmp_path / "c", config.checkpoint).latest_step == 3
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"3"}


def test_arrays_are_stored_in_small_chunks_that_can_be_read_alone(tmp_path):
    folder = epath.Path(tmp_path)
    array = jnp.arange(12 * 1024 * 1024, dtype=jnp.float32).reshape(3, 1024, 4096)  # 48 MiB
    writer = CheckpointWriter(folder, 1)
    writer.make_folders(["params", "facts"])
    writer.start_record({"params": {"up": {"kernel": array}}})
    writer.copy({"params": {"up": {"kernel": array}}})
    writer.finish_part(timeout_s=300)
    writer.commit({"facts": {}})
    stored = open_arrays(folder / "1" / "params")["up.kernel"]
    assert 2**20 <= math.prod(stored.chunk_layout.read_chunk.shape) * 4 <= 16 * 2**20
    np.testing.assert_array_equal(stored[1, 5:7].read().result(), array[1, 5:7])


def test_restoring_from_nothing_is_refused(tmp_path, config, optimizer, layout):
    checkpoints = CheckpointManager(tmp_path / "c", config.checkpoint)
    with pytest.raises(ValueError, match="no checkpoint"):
        checkpoints.restore(abstract_state(config, optimizer), layout)
    checkpoints.close()


def test_a_checkpoint_moves_between_eight_devices_and_one(
    tmp_path, trainer, config, optimizer, layout, state
):
    checkpoints = CheckpointManager(tmp_path / "one", config.checkpoint)
    checkpoints.save(state, {"next_index": 3}, {"note": "one"})
    checkpoints.close()
    places = [tmp_path / name for name in ("eight", "eight.npz", "one", "one.npz")]
    process = trainer.start_python(
        "-c",
        ON_EIGHT_DEVICES,
        json.dumps(config.to_dict()),
        *map(str, places),
        environment=devices(8),
    )
    assert process.finish() == 0, process.errors
    shapes = functools.partial(abstract_state, config, optimizer)
    from_eight, data, facts = CheckpointManager(tmp_path / "eight", config.checkpoint).restore(
        shapes(), layout
    )
    assert (int(from_eight.step), data, facts) == (7, {"next_index": 7}, {"note": "eight"})
    assert_same_bits(jax.tree.leaves(from_eight), list(np.load(tmp_path / "eight.npz").values()))
    assert_same_bits(jax.tree.leaves(state), list(np.load(tmp_path / "one.npz").values()))
