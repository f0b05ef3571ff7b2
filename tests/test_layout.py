"""Meshes and partition rules: refusals, and how each parameter is split."""

import jax
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from topklm.config import Config, MeshConfig, ModelConfig, TrainConfig
from topklm.errors import UserError
from topklm.layout import AXES, Layout, make_layout
from topklm.model import topk, transformer


def layout_of(data, fsdp, tensor, context=1):
    """Makes a layout of a mesh by shape alone: rules need no devices."""
    return Layout(jax.sharding.AbstractMesh((data, fsdp, context, tensor), AXES))


def params_of(**fields):
    small = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "vocab_size": 64}
    return jax.eval_shape(lambda: transformer.create(ModelConfig(**{**small, **fields}), 0))


def test_one_axis_takes_the_devices_that_are_left():
    devices = jax.devices()
    assert dict(make_layout(MeshConfig(), devices).mesh.shape) == {
        "data": len(devices),
        "fsdp": 1,
        "context": 1,
        "tensor": 1,
    }


@pytest.mark.parametrize("mesh", [MeshConfig(data=3), MeshConfig(data=-1, fsdp=7)])
def test_axes_that_do_not_multiply_to_the_devices_are_refused(mesh):
    with pytest.raises(UserError, match=r"must multiply to the \d+ devices"):
        make_layout(mesh, jax.devices()[:1])


def test_a_batch_that_the_mesh_cannot_split_is_refused():
    with pytest.raises(UserError, match=r"train.batch_size = 12: must be a multiple of 8"):
        layout_of(2, 2, 1).check(Config(train=TrainConfig(batch_size=12, grad_accumulation=2)))
    layout_of(2, 2, 1).check(Config(train=TrainConfig(batch_size=16, grad_accumulation=2)))


@pytest.mark.parametrize(
    ("fields", "mesh", "message"),
    [
        ({"context_length": 60}, (1, 1, 2, 4), r"model.context_length = 60: must be a multiple of 8"),
        (
            {"context_length": 62},
            (1, 1, 1, 2),
            r"model.context_length = 62: must be a multiple of 4 \(.* 2 x mesh",
        ),
        ({"n_heads": 2, "n_kv_heads": 2}, (1, 1, 4), r"model.n_heads = 2: must be a multiple of 4"),
        ({"n_heads": 4, "n_kv_heads": 2}, (1, 1, 4), r"model.n_kv_heads = 2: must be a multiple of 4"),
        ({"d_mlp": 86}, (1, 1, 4), r"model.d_mlp = 86: must be a multiple of 4 \(mesh.tensor\)"),
        (
            {"vocab_multiple": 1, "vocab_size": 41},
            (1, 1, 4),
            r"model.vocab_multiple\) = 41: must be a multiple",
        ),
    ],
)
def test_a_shape_that_the_mesh_cannot_split_is_refused_by_name(fields, mesh, message):
    config = Config(model=ModelConfig(**{"vocab_size": 256, **fields}))
    with pytest.raises(UserError, match=message):
        layout_of(*mesh).check(config)


def test_a_mesh_over_which_most_parameters_stay_whole_is_refused():
    with pytest.raises(
        UserError, match=r"fsdp=3 .* 100% of the parameter bytes would be repeated, .*\["
    ) as e:
        layout_of(1, 3, 1).check_split(params_of())
    assert "\n" not in str(e.value)
    layout_of(1, 4, 2).check_split(params_of())
    layout_of(3, 1, 1).check_split(params_of())  # data parallelism repeats them on purpose


def test_the_layout_table_gives_the_bytes_of_each_parameter_on_a_device():
    rows = {row.name: row for row in layout_of(2, 4, 2).describe_parameters(params_of())}
    up = rows["blocks.mlp.up.kernel"]
    assert (up.shape, up.spec) == ((2, 32, 688), PartitionSpec(None, "fsdp", "tensor"))
    assert (up.n_bytes, up.n_bytes_on_device) == (2 * 32 * 688 * 4, 2 * 32 * 688 * 4 // 8)
    assert up.is_split
    assert not rows["final_norm.scale"].is_split
    assert len(rows) == len(jax.tree.leaves(params_of()))


def test_only_data_spans_slices():
    class Device:
        platform = device_kind = "TPU v5 lite"
        process_index = 0

        def __init__(self, number):
            self.id, self.slice_index = number, number // 8
            self.coords, self.core_on_chip = (number % 4, number % 8 // 4, 0), 0

    mesh = make_layout(MeshConfig(data=2, fsdp=4, tensor=2), [Device(i) for i in range(16)]).mesh
    assert [{d.slice_index for d in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(UserError, match=r"mesh.data = 1: must be a multiple of the 2 slices"):
        make_layout(MeshConfig(data=1, fsdp=16), [Device(i) for i in range(16)])


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_has_a_rule_and_only_norms_are_whole(tied):
    shardings = layout_of(1, 4, 2).shardings(params_of(tie_embeddings=tied))
    for path, layout in jax.tree_util.tree_leaves_with_path(shardings):
        split = {axis for axis in layout.spec if axis}
        assert split == (set() if path[-1].key == "scale" else {"fsdp", "tensor"})


def test_a_dim_that_the_axis_does_not_divide_stays_whole():
    table = {"embed": {"embedding": np.zeros((50_257, 32))}}
    layout = layout_of(1, 4, 2).shardings(table)["embed"]["embedding"]
    assert layout.spec == PartitionSpec(None, "fsdp")


def test_a_parameter_that_no_rule_names_is_a_bug():
    with pytest.raises(KeyError, match=r"new.thing: add \('new', 'thing'\) to layout.PARAMETER_RULES"):
        layout_of(1, 4, 2).shardings({"new": {"thing": np.zeros((4, 4))}})


@pytest.mark.parametrize(
    ("backend", "devices", "wanted"),
    [
        ("auto", 1, "auto"),
        ("pallas_tpu", 1, "auto"),
        ("auto", 8, "threshold"),
        ("pallas_gpu", 8, "threshold"),
        ("lax", 8, "lax"),
        ("approx", 8, "approx"),
    ],
)
def test_a_program_that_xla_splits_by_itself_has_no_kernels(backend, devices, wanted):
    model = topk.for_gspmd(ModelConfig(topk_backend=backend), devices)
    assert model == ModelConfig(topk_backend=wanted)


@pytest.mark.parametrize(
    ("backend", "platform", "wanted"),
    [("auto", "cpu", "threshold"), ("auto", "gpu", "auto"), ("auto", "tpu", "auto"), ("lax", "cpu", "lax")],
)
def test_kernels_are_left_out_only_where_the_platform_has_none(backend, platform, wanted):
    model = topk.for_platform(ModelConfig(topk_backend=backend), platform)
    assert model == ModelConfig(topk_backend=wanted)
