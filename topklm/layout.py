"""How arrays lie over devices: the mesh, the one table of partition rules, and sums over devices.

Axes: `data` repeats parameters, `fsdp` splits them and is gathered at use, `context` splits the tokens of a
sequence, `tensor` the inner dimension of attention, MLP and vocabulary. A batch is split over `data` and
`fsdp`; the residual dimension of an activation is never split, so TopK sees whole rows.

`Layout` is made once from a config's mesh section and handed to everything that puts arrays on devices.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
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

from topklm.config import Config, MeshConfig
from topklm.errors import UserError
from topklm.parallel import ALONE, Parallel, gather_parameter

AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")
PARAMETER_AXES = ("fsdp", "tensor")  # that can split parameters
MAX_REPLICATED_SHARE = 0.02  # of the parameters' bytes, on a mesh that is there to split them

REPLICATED = PartitionSpec()
ROWS = PartitionSpec(BATCH_AXES)  # of arrays [B, ...]
TOKENS = PartitionSpec(BATCH_AXES, "context")  # of arrays [B, T] in a device's program

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


@dataclasses.dataclass(frozen=True)
class ParameterLayout:
    """One parameter on a mesh."""

    name: str  # "blocks.mlp.up.kernel"
    shape: tuple[int, ...]
    spec: PartitionSpec
    n_bytes: int
    n_bytes_on_device: int
    is_split: bool  # along every axis of the mesh that can split parameters


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the arrays of a run live; made once (`make_layout`) and handed on."""

    mesh: Mesh  # all devices, by `AXES`

    @property
    def size(self) -> int:
        """Number of devices, of all processes."""
        return self.mesh.size

    @property
    def is_shared(self) -> bool:
        """Whether the devices are those of several processes."""
        return len({device.process_index for device in self.mesh.devices.flat}) > 1

    @property
    def platform(self) -> str:
        """Platform of the devices: "cpu", "gpu" or "tpu"."""
        return self.mesh.devices.flat[0].platform

    @property
    def batch(self) -> NamedSharding:
        """Sharding of arrays [B, T] as the hosts provide them: every process has all tokens of its rows."""
        return NamedSharding(self.mesh, ROWS)

    @property
    def replicated(self) -> NamedSharding:
        """Sharding of an array that every device holds whole."""
        return NamedSharding(self.mesh, REPLICATED)

    def describe_devices(self) -> str:
        """Names the devices, such as "8 x TPU v5 lite" or "1 x cpu (2 cores)"."""
        devices = self.mesh.devices.flat
        kinds = collections.Counter(device.device_kind for device in devices)
        cores = f" ({os.cpu_count()} cores)" if self.platform == "cpu" else ""
        return ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) + cores

    def describe_parameters(self, parameters: Any) -> list[ParameterLayout]:
        """Lists the layout of every parameter (`shardings`), for people to read."""
        rows = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
            spec = self._spec(path, leaf)
            axes = {axis for axis in spec if axis}
            ways = math.prod(self.mesh.shape[axis] for axis in axes)
            n_bytes = leaf.size * leaf.dtype.itemsize
            split = all(axis in axes for axis in PARAMETER_AXES if self.mesh.shape[axis] > 1)
            name = ".".join(_names(path))
            rows.append(ParameterLayout(name, leaf.shape, spec, n_bytes, n_bytes // ways, split))
        return rows

    def check(self, config: Config) -> None:
        """Refuses shapes that the mesh cannot split evenly; UserError with the field."""
        model, train, shape = config.model, config.train, self.mesh.shape
        ways = shape["data"] * shape["fsdp"] * train.grad_accumulation
        if train.batch_size % ways:
            raise UserError(
                f"train.batch_size = {train.batch_size}: must be a multiple of {ways} (mesh data "
                f"{shape['data']} x fsdp {shape['fsdp']} x grad_accumulation {train.grad_accumulation})"
            )
        context, tensor = shape["context"], shape["tensor"]
        if context > 1 and config.optim.topic_weight:
            advice = "0 with mesh.context above 1, where the tokens that follow are on other devices"
            raise UserError(f"optim.topic_weight = {config.optim.topic_weight}: must be {advice}")
        tokens, why = context * tensor, "mesh.context x mesh.tensor"
        if context > 1:
            tokens, why = context * math.lcm(2, tensor), f"{why}, and of 2 x mesh.context"
        divisors = {
            "model.context_length": (model.context_length, tokens, why),
            "model.n_heads": (model.n_heads, tensor, "mesh.tensor"),
            "model.n_kv_heads": (model.n_kv_heads, tensor, "mesh.tensor"),
            "model.d_mlp": (model.d_mlp, tensor, "mesh.tensor"),
            "the padded vocabulary (model.vocab_multiple)": (model.padded_vocab_size, tensor, "mesh.tensor"),
        }
        for name, (size, divisor, why) in divisors.items():
            if size % divisor:
                raise UserError(
                    f"{name} = {size}: must be a multiple of {divisor} ({why}); choose another mesh"
                )

    def check_split(self, parameters: Any) -> None:
        """Refuses a mesh over which parameters stay whole that it is there to split.

        UserError if more than `MAX_REPLICATED_SHARE` of the bytes are repeated along fsdp or tensor.
        """
        rows = self.describe_parameters(parameters)
        replicated = [row for row in rows if not row.is_split]
        total, whole = (sum(row.n_bytes for row in some) for some in (rows, replicated))
        if whole > MAX_REPLICATED_SHARE * total:
            largest, shape = max(replicated, key=lambda row: row.n_bytes), self.mesh.shape
            raise UserError(
                f"mesh fsdp={shape['fsdp']} tensor={shape['tensor']}: {whole / total:.0%} of the parameter "
                f"bytes would be repeated, {largest.name} {list(largest.shape)} above all; at most "
                f"{MAX_REPLICATED_SHARE:.0%} may: choose axes that divide its dims (model.d_model, "
                "model.d_mlp)"
            )

    def specs(self, tree: Any) -> Any:
        """Returns the `PartitionSpec` of every leaf of parameters, or of a tree that contains parameters.

        Leaves are arrays or ShapeDtypeStructs; scalars are replicated. KeyError for an array that no rule
        names.
        """
        return jax.tree_util.tree_map_with_path(self._spec, tree)

    def shardings(self, tree: Any) -> Any:
        """Returns the `NamedSharding` of every leaf, as `specs`."""
        return jax.tree.map(functools.partial(NamedSharding, self.mesh), self.specs(tree))

    def with_shardings(self, abstract: Any) -> Any:
        """Returns shapes and dtypes with the sharding of every leaf added."""

        def add(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(add, abstract, self.shardings(abstract))

    def round_up(self, batch_size: int) -> int:
        """Returns the least batch size that is no smaller and that the mesh splits evenly."""
        ways = math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
        return -(-batch_size // ways) * ways

    def process_rows(self, batch_size: int) -> np.ndarray:
        """Returns int64[R], the rows of a batch that this process must provide, rising, each once.

        They need not be neighbours: where the devices of two processes take turns in the mesh, so do the
        rows. `jax.make_array_from_process_local_data` expects the rows of its local data in this order.
        """
        held = self.batch.addressable_devices_indices_map((batch_size,)).values()
        return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held]))

    def put_batch(
        self, batch: Mapping[str, Any], batch_size: int, rows: slice | np.ndarray = slice(None)
    ) -> dict[str, jax.Array]:
        """Starts the transfer of a batch [R, T], each process's own rows, as [B, T] laid out as `self.batch`.

        `rows` says where `process_rows` are in `batch`, which by default holds just those.
        """
        local = {name: np.asarray(array)[rows] for name, array in batch.items()}
        shapes = {name: (batch_size, *array.shape[1:]) for name, array in local.items()}
        return jax.make_array_from_process_local_data(self.batch, local, shapes)

    def one_per_device(self, value: int) -> jax.Array:
        """Makes an int32 array with one element on each device: this process's value, on its own devices."""
        shape = self.mesh.devices.shape
        return jax.make_array_from_callback(
            shape,
            NamedSharding(self.mesh, PartitionSpec(*self.mesh.axis_names)),
            lambda _: np.full((1,) * len(shape), value, np.int32),
        )

    def device_view(self, parameters: Any, dtype: jnp.dtype, attention: str) -> Parallel:
        """Returns one device's view of the mesh, which gathers `parameters` (shapes) in the compute dtype."""
        scans = scans_layers(self.platform)
        if self.size == 1:
            return dataclasses.replace(ALONE, attention=attention, scan_layers=scans)
        split_dims = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
            spec = (*self._spec(path, leaf), *(None,) * leaf.ndim)[: leaf.ndim]
            if "fsdp" in spec and self.mesh.shape["fsdp"] > 1:
                # Counted from the end: inside the stack of layers the layer axis is gone.
                split_dims[_names(path)[-2:]] = spec.index("fsdp") - leaf.ndim

        def whole(path: tuple, part: jax.Array) -> jax.Array:
            dim = split_dims.get(_names(path)[-2:])
            return part if dim is None else gather_parameter(part, "fsdp", dim + part.ndim, dtype)

        context, tensor = (axis if self.mesh.shape[axis] > 1 else None for axis in ("context", "tensor"))
        gather = functools.partial(jax.tree_util.tree_map_with_path, whole)
        return Parallel(context, tensor, gather, attention, scans)

    def on_every_device(self, program: Callable, parameters: Any, out: Any) -> Callable:
        """Makes `program(parameters, batch)` of one device's parts a program of whole arrays.

        `parameters` are the specs of the parameters, `out` those of its results.
        """
        if self.size == 1:
            return program
        # Our own sums make arrays replicated; the TopK search's carry could not be checked.
        return jax.shard_map(
            program, mesh=self.mesh, in_specs=(parameters, TOKENS), out_specs=out, check_vma=False
        )

    def sum_over(self, x: jax.Array, *, keep: PartitionSpec, leave_out: str | None = None) -> jax.Array:
        """Sums over devices, in a program of `on_every_device`.

        Nothing is summed over the axes of `keep`, the partition of the result, nor over `leave_out`, an axis
        along which all devices have the same value already.
        """
        kept = {axis for entry in keep for axis in (entry if isinstance(entry, tuple) else (entry,))}
        kept |= {leave_out}
        summed = tuple(axis for axis, size in self.mesh.shape.items() if size > 1 and axis not in kept)
        return jax.lax.psum(x, summed) if summed else x

    def _spec(self, path: tuple, leaf: Any) -> PartitionSpec:
        if leaf.ndim == 0:
            return REPLICATED
        *_, module, parameter = "", *_names(path)
        if (module, parameter) not in PARAMETER_RULES:
            name = ".".join(_names(path))
            raise KeyError(f"{name}: add ({module!r}, {parameter!r}) to layout.PARAMETER_RULES")
        rule = zip(PARAMETER_RULES[module, parameter], leaf.shape, strict=False)
        # A dim that the axis does not divide (a vocabulary of 50,257, say) is not split.
        return PartitionSpec(
            *(axis if axis and size % self.mesh.shape[axis] == 0 else None for axis, size in rule)
        )


def make_layout(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Layout:
    """Arranges devices as a mesh; an axis of -1 takes the devices that are left.

    Neighbours along the later axes are neighbours in the machine. Where the devices are several slices of
    TPUs, whose links to each other are slower, only `data` spans slices. UserError if axes do not multiply to
    the devices, or `data` not to the slices.
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
        return Layout(jax.make_mesh(sizes, AXES, axis_types=types, devices=devices))
    if sizes[0] % slices:
        raise UserError(f"mesh.data = {sizes[0]}: must be a multiple of the {slices} slices, which it spans")
    between = (slices, *(1,) * (len(AXES) - 1))
    within = (sizes[0] // slices, *sizes[1:])
    hybrid = mesh_utils.create_hybrid_device_mesh(within, between, devices)
    return Layout(Mesh(hybrid, AXES, axis_types=types))


def one_device() -> Layout:
    """Returns the layout of this process's first device."""
    return make_layout(MeshConfig(), jax.local_devices()[:1])


def scans_layers(platform: str) -> bool:
    """Tells whether `model.layer_stack = "auto"` scans layers on a platform (docs/performance.md)."""
    return platform != "cpu"


def _names(path: tuple) -> tuple[str, ...]:
    """Returns the dict keys and fields on the way to a leaf."""
    entries = [getattr(entry, "key", getattr(entry, "name", None)) for entry in path]
    if entries[-1:] == ["value"]:  # of an NNX variable
        del entries[-1]
    return tuple(str(entry) for entry in entries if entry is not None)
