"""How arrays are laid out over devices: the mesh and the one table of partition rules.

Axes: `data` repeats parameters, `fsdp` splits them and is gathered at use, `context` splits the tokens of a
sequence, `tensor` the inner dimension of attention, MLP and vocabulary. A batch is split over `data` and
`fsdp`; the residual dimension of an activation is never split, so TopK sees whole rows.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
import os
from typing import Any

import jax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from topklm.config import Config, MeshConfig, ModelConfig
from topklm.errors import UserError
from topklm.model import backends
from topklm.model.parallel import ALONE, Parallel, gather_parameter

AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")
PARAMETER_AXES = ("fsdp", "tensor")  # those that can split parameters
MAX_REPLICATED_SHARE = 0.02  # of the parameters' bytes, on a mesh that is there to split them

# Parameter (its last two names) -> partition of its dims. Block parameters have a leading layer axis.
PARAMETER_RULES: Mapping[tuple[str, str], PartitionSpec] = {
    ("embed", "embedding"): PartitionSpec("tensor", "fsdp"),
    ("unembed", "kernel"): PartitionSpec("fsdp", "tensor"),
    ("query", "kernel"): PartitionSpec(None, "fsdp", "tensor"),
    ("key", "kernel"): PartitionSpec(None, "fsdp", "tensor"),
    ("value", "kernel"): PartitionSpec(None, "fsdp", "tensor"),
    ("query_norm", "scale"): PartitionSpec(),
    ("key_norm", "scale"): PartitionSpec(),
    ("out", "kernel"): PartitionSpec(None, "tensor", "fsdp"),
    ("gate", "kernel"): PartitionSpec(None, "fsdp", "tensor"),
    ("up", "kernel"): PartitionSpec(None, "fsdp", "tensor"),
    ("down", "kernel"): PartitionSpec(None, "tensor", "fsdp"),
    ("attention_norm", "scale"): PartitionSpec(),
    ("mlp_norm", "scale"): PartitionSpec(),
    ("final_norm", "scale"): PartitionSpec(),
    # Not parameters, but of the train state too.
    ("recent", "loss"): PartitionSpec(),
    ("recent", "gradient_norm"): PartitionSpec(),
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The device mesh; an axis of -1 takes the devices that are left.

    Neighbours along the later axes are neighbours in the machine. Where the devices are several slices of
    TPUs, whose links to each other are slower, only `data` spans slices.

    Raises:
        UserError: If the axes do not multiply to the number of devices, or `data` does not to the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    fixed = math.prod(size for size in sizes if size > 0)
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        asked = " ".join(f"{axis}={getattr(config, axis)}" for axis in AXES)
        raise UserError(
            f"mesh {asked}: must multiply to the {len(devices)} devices found; set one axis to -1 to take "
            "all that are left"
        )
    # Auto: outside the model's own program XLA propagates the layout. make_mesh defaults to Explicit.
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
    if sizes[0] % slices:
        raise UserError(f"mesh.data = {sizes[0]}: must be a multiple of the {slices} slices, which it spans")
    between = (slices, *(1,) * (len(AXES) - 1))
    within = (sizes[0] // slices, *sizes[1:])
    return Mesh(mesh_utils.create_hybrid_device_mesh(within, between, devices), AXES, axis_types=types)


def describe_devices(mesh: Mesh) -> str:
    """Names a mesh's devices, such as "8 x TPU v5 lite" or "1 x cpu (2 cores)"."""
    kinds = collections.Counter(device.device_kind for device in mesh.devices.flat)
    cores = f" ({os.cpu_count()} cores)" if mesh.devices.flat[0].platform == "cpu" else ""
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) + cores


def check(config: Config, mesh: Mesh) -> None:
    """Refuses shapes that the mesh cannot split evenly.

    Raises:
        UserError: Naming the field.
    """
    model, train, shape = config.model, config.train, mesh.shape
    ways = shape["data"] * shape["fsdp"] * train.grad_accumulation
    if train.batch_size % ways:
        raise UserError(
            f"train.batch_size = {train.batch_size}: must be a multiple of {ways} (mesh data "
            f"{shape['data']} x fsdp {shape['fsdp']} x grad_accumulation {train.grad_accumulation})"
        )
    context, tensor = shape["context"], shape["tensor"]
    divisors = {
        "model.context_length": (model.context_length, context * tensor, "mesh.context x mesh.tensor"),
        "model.n_heads": (model.n_heads, tensor, "mesh.tensor"),
        "model.n_kv_heads": (model.n_kv_heads, tensor, "mesh.tensor"),
        "model.d_mlp": (model.d_mlp, tensor, "mesh.tensor"),
        "the padded vocabulary (model.vocab_multiple)": (model.padded_vocab_size, tensor, "mesh.tensor"),
    }
    for name, (size, divisor, why) in divisors.items():
        if size % divisor:
            raise UserError(f"{name} = {size}: must be a multiple of {divisor} ({why}); choose another mesh")


def check_split(parameters: Any, mesh: Mesh) -> None:
    """Refuses a mesh over which parameters stay whole that it is there to split.

    Args:
        parameters: Nested dict of arrays or ShapeDtypeStructs.
        mesh: Of the run.

    Raises:
        UserError: If more than `MAX_REPLICATED_SHARE` of the bytes are repeated along fsdp or tensor.
    """
    rows = layout_of(parameters, mesh)
    replicated = [row for row in rows if not row.is_split]
    total, whole = (sum(row.n_bytes for row in some) for some in (rows, replicated))
    if whole > MAX_REPLICATED_SHARE * total:
        largest = max(replicated, key=lambda row: row.n_bytes)
        raise UserError(
            f"mesh fsdp={mesh.shape['fsdp']} tensor={mesh.shape['tensor']}: {whole / total:.0%} of the "
            f"parameter bytes would be repeated, {largest.name} {list(largest.shape)} above all; at most "
            f"{MAX_REPLICATED_SHARE:.0%} may: choose axes that divide its dims (model.d_model, model.d_mlp)"
        )


@dataclasses.dataclass(frozen=True)
class ParameterLayout:
    """One parameter on a mesh."""

    name: str  # "blocks.mlp.up.kernel"
    shape: tuple[int, ...]
    spec: PartitionSpec
    n_bytes: int
    n_bytes_on_device: int
    is_split: bool  # along every axis of the mesh that can split parameters


def layout_of(parameters: Any, mesh: Mesh) -> list[ParameterLayout]:
    """The layout of every parameter (`parameter_shardings`), for people to read."""
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        spec = _spec(path, leaf, mesh)
        axes = {axis for axis in spec if axis}
        ways = math.prod(mesh.shape[axis] for axis in axes)
        n_bytes = leaf.size * leaf.dtype.itemsize
        split = all(axis in axes for axis in PARAMETER_AXES if mesh.shape[axis] > 1)
        name = ".".join(_names(path))
        rows.append(ParameterLayout(name, leaf.shape, spec, n_bytes, n_bytes // ways, split))
    return rows


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [B, T], as the hosts provide them: every process has all tokens of its rows."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """The rows of a batch that this process must provide, as rising numbers.

    They need not be neighbours: where the devices of two processes take turns in the mesh, so do the
    rows. `jax.make_array_from_process_local_data` expects the rows of its local data in this order.

    Args:
        sharding: Of the batch (`batch_sharding`).
        batch_size: B, rows over all processes; a multiple of the ways the sharding splits them.

    Returns:
        int64[R], the rows that the addressable devices hold, each once.
    """
    held = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held]))


def parameter_shardings(tree: Any, mesh: Mesh) -> Any:
    """The layout of every leaf of a parameter tree, or of anything that contains parameter trees.

    Args:
        tree: Nested dict of arrays or ShapeDtypeStructs, or an optimizer state holding such dicts.
            Scalars are replicated.
        mesh: Whose axes the rules name.

    Returns:
        The same tree of `NamedSharding`.

    Raises:
        KeyError: For an array that no rule names.
    """
    return jax.tree.map(functools.partial(NamedSharding, mesh), parameter_specs(tree, mesh))


def parameter_specs(tree: Any, mesh: Mesh) -> Any:
    """The same tree of `PartitionSpec`; arguments and errors as `parameter_shardings`."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _spec(path, leaf, mesh), tree)


def parallel(mesh: Mesh, parameters: Any, dtype: jnp.dtype) -> Parallel:
    """What one device's program needs to know of the mesh, see `Parallel`.

    Args:
        mesh: Of the run.
        parameters: Shapes of the whole parameters, nested dict.
        dtype: Compute dtype, in which parameters are gathered.
    """
    if mesh.size == 1:
        return ALONE
    split_dims = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        spec = (*_spec(path, leaf, mesh), *(None,) * leaf.ndim)[: leaf.ndim]
        if "fsdp" in spec and mesh.shape["fsdp"] > 1:
            # Counted from the end: inside the stack of layers the layer axis is gone.
            split_dims[_names(path)[-2:]] = spec.index("fsdp") - leaf.ndim

    def whole(path: tuple, part: jax.Array) -> jax.Array:
        dim = split_dims.get(_names(path)[-2:])
        return part if dim is None else gather_parameter(part, "fsdp", dim + part.ndim, dtype)

    def axis(name: str) -> str | None:
        return name if mesh.shape[name] > 1 else None

    return Parallel(axis("context"), axis("tensor"), lambda t: jax.tree_util.tree_map_with_path(whole, t))


def other_axes(mesh: Mesh, spec: PartitionSpec) -> tuple[str, ...]:
    """The axes of the mesh, longer than 1, along which an array with this partition is repeated."""
    named = {axis for entry in spec for axis in (entry if isinstance(entry, tuple) else (entry,))}
    return tuple(axis for axis in mesh.axis_names if mesh.shape[axis] > 1 and axis not in named)


def _spec(path: tuple, leaf: Any, mesh: Mesh) -> PartitionSpec:
    if leaf.ndim == 0:
        return PartitionSpec()
    *_, module, parameter = "", *_names(path)
    if (module, parameter) not in PARAMETER_RULES:
        raise KeyError(
            f"{'.'.join(_names(path))}: add ({module!r}, {parameter!r}) to sharding.PARAMETER_RULES"
        )
    return _that_divides(PARAMETER_RULES[module, parameter], leaf.shape, mesh)


def _names(path: tuple) -> tuple[str, ...]:
    """The dict keys and fields on the way to a leaf."""
    entries = [getattr(entry, "key", getattr(entry, "name", None)) for entry in path]
    if entries[-1:] == ["value"]:  # of an NNX variable
        del entries[-1]
    return tuple(str(entry) for entry in entries if entry is not None)


def _that_divides(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Drops the split of a dim that the axis does not divide (a vocabulary of 50,257, say)."""
    return PartitionSpec(
        *(
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(spec, shape, strict=False)
        )
    )


def scans_layers(platform: str) -> bool:
    """What `model.layer_stack = "auto"` is on devices of a platform (docs/performance.md)."""
    return platform != "cpu"


def outside_shard_map(model: ModelConfig, mesh: Mesh) -> ModelConfig:
    """The same model for programs that XLA splits over the mesh by itself: it cannot split kernels.

    Args:
        model: As it is trained.
        mesh: Where its parameters are.
    """
    if not backends.TOPK.needs_one_device(model.topk_backend):
        return model
    # A kernel that was asked for by name may be one for other devices than these; the bits are the same.
    splittable = backends.TOPK.automatic(None, model.dtype).name
    return dataclasses.replace(model, topk_backend=splittable if mesh.size > 1 else backends.AUTO)
