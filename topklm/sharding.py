"""How arrays are laid out over devices: the mesh and the one table of partition rules.

Axes: `data` repeats parameters, `fsdp` splits them and is gathered at use, `tensor` splits the inner
dimension of attention and MLP. A batch is split over `data` and `fsdp`; the residual dimension of an
activation is never split, so TopK sees whole rows.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from topklm.config import MeshConfig, TrainConfig
from topklm.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Parameter (its last two names) -> partition of its dims. Block parameters have a leading layer axis.
PARAMETER_RULES: Mapping[tuple[str, str], PartitionSpec] = {
    ("embed", "embedding"): PartitionSpec("tensor", "fsdp"),
    ("unembed", "kernel"): PartitionSpec("fsdp", "tensor"),
    ("query", "kernel"): PartitionSpec(None, "fsdp", "tensor"),
    ("key", "kernel"): PartitionSpec(None, "fsdp", "tensor"),
    ("value", "kernel"): PartitionSpec(None, "fsdp", "tensor"),
    ("out", "kernel"): PartitionSpec(None, "tensor", "fsdp"),
    ("gate", "kernel"): PartitionSpec(None, "fsdp", "tensor"),
    ("up", "kernel"): PartitionSpec(None, "fsdp", "tensor"),
    ("down", "kernel"): PartitionSpec(None, "tensor", "fsdp"),
    ("attention_norm", "scale"): PartitionSpec(),
    ("mlp_norm", "scale"): PartitionSpec(),
    ("final_norm", "scale"): PartitionSpec(),
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The device mesh; an axis of -1 takes the devices that are left.

    Raises:
        UserError: If the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    fixed = math.prod(size for size in sizes if size > 0)
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor}: must multiply to the "
            f"{len(devices)} devices found; set one axis to -1 to take all that are left"
        )
    # Auto: XLA propagates the layout from the parameters and the batch. make_mesh defaults to Explicit.
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """Refuses a batch that the mesh cannot split evenly.

    Raises:
        UserError: Naming train.batch_size.
    """
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES) * config.grad_accumulation
    if config.batch_size % ways:
        raise UserError(
            f"train.batch_size = {config.batch_size}: must be a multiple of {ways} (mesh data "
            f"{mesh.shape['data']} x fsdp {mesh.shape['fsdp']} x grad_accumulation "
            f"{config.grad_accumulation})"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [B, T]."""
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


def hidden_sharding(mesh: Mesh) -> NamedSharding | None:
    """Of the residual stream [B, T, D]; None on one device, where nothing needs to be said."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, None, None)) if mesh.size > 1 else None


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

    def layout(path: tuple, leaf: Any) -> NamedSharding:
        names = tuple(str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))
        if leaf.ndim == 0:
            return NamedSharding(mesh, PartitionSpec())
        spec = PARAMETER_RULES[names[-2:]]  # type: ignore[index]
        return NamedSharding(mesh, _that_divides(spec, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(layout, tree)


def _that_divides(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Drops the split of a dim that the axis does not divide (a vocabulary of 50,257, say)."""
    return PartitionSpec(
        *(
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(spec, shape, strict=False)
        )
    )
