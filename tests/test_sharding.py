"""Meshes and partition rules: what is refused, and what is split how."""

import jax
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from topklm import sharding
from topklm.config import MeshConfig, ModelConfig, TrainConfig
from topklm.errors import UserError
from topklm.model import transformer


def mesh_of(data, fsdp, tensor):
    """A mesh by shape alone: rules need no devices."""
    return jax.sharding.AbstractMesh((data, fsdp, tensor), sharding.AXES)


def test_one_axis_takes_the_devices_that_are_left():
    devices = jax.devices()
    assert dict(sharding.make_mesh(MeshConfig(), devices).shape) == {
        "data": len(devices),
        "fsdp": 1,
        "tensor": 1,
    }


@pytest.mark.parametrize("mesh", [MeshConfig(data=3), MeshConfig(data=-1, fsdp=7)])
def test_axes_that_do_not_multiply_to_the_devices_are_refused(mesh):
    with pytest.raises(UserError, match=r"must multiply to the \d+ devices"):
        sharding.make_mesh(mesh, jax.devices()[:1])


def test_a_batch_that_the_mesh_cannot_split_is_refused():
    with pytest.raises(UserError, match=r"train.batch_size = 12: must be a multiple of 8"):
        sharding.check_batch(TrainConfig(batch_size=12, grad_accumulation=2), mesh_of(2, 2, 1))
    sharding.check_batch(TrainConfig(batch_size=16, grad_accumulation=2), mesh_of(2, 2, 1))


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_has_a_rule_and_only_norms_are_whole(tied):
    config = ModelConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=4, vocab_size=64, tie_embeddings=tied)
    params = jax.eval_shape(lambda: transformer.create(config, 0))
    shardings = sharding.parameter_shardings(params, mesh_of(1, 4, 2))
    for path, layout in jax.tree_util.tree_leaves_with_path(shardings):
        split = {axis for axis in layout.spec if axis}
        assert split == (set() if path[-1].key == "scale" else {"fsdp", "tensor"})


def test_a_dim_that_the_axis_does_not_divide_stays_whole():
    table = {"embed": {"embedding": np.zeros((50_257, 32))}}
    layout = sharding.parameter_shardings(table, mesh_of(1, 4, 2))["embed"]["embedding"]
    assert layout.spec == PartitionSpec(None, "fsdp")


def test_a_parameter_that_no_rule_names_is_a_bug():
    with pytest.raises(KeyError):
        sharding.parameter_shardings({"new": {"thing": np.zeros((4, 4))}}, mesh_of(1, 4, 2))
