"""Compiles the full train step for a topology, with nothing allocated, and reads off what it needs.

The step, its shardings and its refusals are those of training; only the devices are described, not there: TPU
slices by libtpu, virtual CPU devices, and chips by their data sheets.
"""

import collections
from collections.abc import Mapping
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import io
import math
import os
import re
import time
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
import rich.box
import rich.console
import rich.table

from topklm.compile_check import cost
from topklm.config import Config
from topklm.errors import UserError
from topklm.layout import make_layout
from topklm.training import only, throughput
from topklm.training.step import abstract_batch, abstract_state, make_optimizer, make_train_step

GIB = 2**30

# Without a TPU in the machine, libtpu would ask a metadata server for one, and print that it found none.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any known one: the topology asked for is what counts
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling needs no lock on the device
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


_MOST_CPU_DEVICES = 1024  # each has threads


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU.

    Sources: cloud.google.com/tpu/docs/v5e, /v5p and /v6e ("System architecture"), except for the memory: that
    is what the compiler grants a program, of the data sheet's 16 GB, 95 GiB and 32 GB.
    """

    name: str
    hbm_bytes: int
    flops_per_second: float  # bfloat16, dense
    hbm_bytes_per_second: float
    link_bytes_per_second: float  # of one link, in one direction
    dcn_bytes_per_second: float  # a chip's share of the data-centre network, between slices
    n_dims: int  # of the torus; there are two links a dim
    ring_multiple: int  # a dim is closed to a ring where it is a multiple of this
    pod_chips: int

    def closes_to_rings(self, dims: tuple[int, ...]) -> tuple[bool, ...]:
        """Tells which dims of a slice wrap around.

        A v5e or v6e does where a dim spans the pod's 16 chips, a v5p in slices of whole cubes of 4 x 4 x 4
        (Austin et al. 2025, How to Scale Your Model, chapter 2).
        """
        whole = all(dim % self.ring_multiple == 0 for dim in dims)
        return tuple(dim % self.ring_multiple == 0 and (whole or self.n_dims == 2) for dim in dims)


# ICI: the data sheet's bidirectional bandwidth of a chip, over its links and two directions. DCN: of a pod,
# over its 256 chips (v5e 6.4 Tbit/s, v6e 25.6 Tbit/s); of a chip (v5p 50 Gbit/s).
CHIPS = {
    "v5e": Chip("v5e", int(15.75 * GIB), 197e12, 819e9, 400e9 / 4 / 2, 6.4e12 / 256 / 8, 2, 16, 256),
    "v5p": Chip("v5p", int(95.73 * GIB), 459e12, 2765e9, 1200e9 / 6 / 2, 50e9 / 8, 3, 4, 8960),
    "v6e": Chip("v6e", int(31.24 * GIB), 918e12, 1638e9, 800e9 / 4 / 2, 25.6e12 / 256 / 8, 2, 16, 256),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for."""

    name: str  # "v5e:16x16"
    devices: tuple[jax.Device, ...]
    chip: Chip | None  # None: virtual CPU devices, of which no data sheet speaks
    dims: tuple[int, ...]  # chips along each dim of one slice
    n_slices: int

    def link_bandwidth(self, group: tuple[jax.Device, ...]) -> float:
        """Bytes per second that a device can send to a group of its slice with a ring algorithm.

        Along each torus dim that the group spans, a closed ring sends both ways at once, a line one way;
        where the group takes every n-th chip of a dim, n groups share its links.
        """
        assert self.chip is not None
        rings = self.chip.closes_to_rings(self.dims)
        total = 0.0
        for dim, (size, ring) in enumerate(zip(self.dims, rings, strict=True)):
            places = sorted({device.coords[dim] for device in group})
            if len(places) > 1:
                whole_ring = ring and len(places) == size
                gap = 1 if whole_ring else (places[-1] - places[0]) / (len(places) - 1)
                total += (2 if whole_ring else 1) / gap
        return total * self.chip.link_bytes_per_second


def find(name: str, n_slices: int = 1) -> Topology:
    """Looks up "v5e:16x16", "v5p:4x4x4", "v6e:8x8", chips along dims of a slice; "cpu:8": virtual devices.

    The data-centre network joins the slices. UserError if the name is wrong, libtpu is missing or does not
    know it.
    """
    kind, _, shape = name.partition(":")
    if not re.fullmatch("[1-9][0-9]{0,4}(x[1-9][0-9]{0,4})*", shape) or kind not in (*CHIPS, "cpu"):
        raise UserError(f"--topology = {name}: must be like v5e:16x16, v5p:4x4x4, v6e:8x8 or cpu:8")
    if n_slices < 1:
        raise UserError(f"--slices = {n_slices}: must be 1 or more")
    dims = tuple(int(size) for size in shape.split("x"))
    if kind == "cpu":
        return Topology(name, _cpu_devices(name, math.prod(dims), n_slices), None, dims, 1)
    chip = CHIPS[kind]
    if len(dims) != chip.n_dims:
        raise UserError(f"--topology = {name}: a {kind} slice has {chip.n_dims} dims")
    if math.prod(dims) > chip.pod_chips:
        raise UserError(f"--topology = {name}: a {kind} pod has {chip.pod_chips} chips; use more --slices")
    return Topology(name, _tpu_devices(name, dims, n_slices), chip, dims, n_slices)


def _cpu_devices(name: str, n: int, n_slices: int) -> tuple[jax.Device, ...]:
    if n_slices > 1:
        raise UserError(f"--slices = {n_slices}: {name} has no slices; name a TPU topology")
    if n > _MOST_CPU_DEVICES:
        raise UserError(f"--topology = {name}: must be at most {_MOST_CPU_DEVICES} virtual devices")
    with contextlib.suppress(RuntimeError):  # it has its devices already: they will do if they are enough
        jax.config.update("jax_num_cpu_devices", n)
    devices = jax.devices("cpu")
    if len(devices) < n:
        raise UserError(f"--topology = {name}: this process has {len(devices)} CPU devices already")
    return tuple(devices[:n])


def _tpu_devices(name: str, dims: tuple[int, ...], n_slices: int) -> tuple[jax.Device, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology = {name}: needs libtpu, which compiles for TPUs without one; run: "
            'pip install "topklm[tpu-compile]"'
        )
    for variable, value in _NO_TPU_HERE.items():
        os.environ.setdefault(variable, value)
    options: dict = {"num_slices": n_slices} if n_slices > 1 else {}
    if math.prod(dims) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as e:
        raise UserError(f"--topology = {name}: libtpu does not know this slice: {e}") from e
    return tuple(description.devices)


_PARAMETER_AXES = {"data", "fsdp"}
_WIDTH = 80


@dataclasses.dataclass(frozen=True)
class Memory:
    """Of one device, bytes."""

    arguments: int  # state and batch
    outputs: int  # without outputs in the memory of an argument
    temporaries: int
    program: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.arguments + self.outputs + self.temporaries + self.program


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind along the same mesh axes: of one device, in one step."""

    kind: str
    axes: tuple[str, ...]
    across_slices: bool
    count: int
    bytes: int  # of the whole arrays
    bytes_sent: float
    seconds: float  # at the data sheet's bandwidth, one after the other

    @property
    def moves_parameters(self) -> bool:
        """Parameters or gradients, as much for few tokens as for many; activations otherwise."""
        summed_over_context = self.kind == "all-reduce" and "context" in self.axes
        return summed_over_context or not _PARAMETER_AXES.isdisjoint(self.axes)


@dataclasses.dataclass(frozen=True)
class Report:
    """One train step on one topology. All sizes and times are of one device and one step."""

    config: str
    topology: str
    n_slices: int
    mesh: Mapping[str, int]
    parameters: int
    tokens_per_device: float
    memory: Memory
    model_flops: float  # `throughput.flops_per_token`: no recomputation, no padding
    compiled_flops: float  # matrix products that the compiled program does
    hbm_traffic: float  # bytes
    traffic: tuple[Traffic, ...]
    compile_seconds: float
    unread: Mapping[str, int] = dataclasses.field(default_factory=dict)  # not in the sums: kind -> runs

    @property
    def chip(self) -> Chip | None:
        """None for virtual CPU devices."""
        return CHIPS.get(self.topology.partition(":")[0])

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return self.chip is None or self.memory.total <= self.chip.hbm_bytes

    @property
    def compute_seconds(self) -> float:
        """At the chip's peak."""
        return self.compiled_flops / self.chip.flops_per_second if self.chip else math.nan

    @property
    def hbm_seconds(self) -> float:
        """At the memory's peak."""
        return self.hbm_traffic / self.chip.hbm_bytes_per_second if self.chip else math.nan

    @property
    def communication_seconds(self) -> float:
        """All collectives one after the other."""
        return sum(row.seconds for row in self.traffic) if self.chip else math.nan

    @property
    def communication_share(self) -> float:
        """Of the time for communication and matrix products, if the two never overlap."""
        both = self.communication_seconds + self.compute_seconds
        return self.communication_seconds / both if both else 0.0

    @property
    def critical_tokens(self) -> float:
        """Tokens per device and step below which communication takes longer than the matrix products.

        Traffic of parameters does not depend on the tokens; the rest grows with them, as the products do.
        Infinite where that rest alone takes longer.
        """
        fixed = sum(row.seconds for row in self.traffic if row.moves_parameters)
        gain = (self.compute_seconds - self.communication_seconds + fixed) / self.tokens_per_device
        return fixed / gain if gain > 0 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Returns values for JSON; `from_dict` reads the fields back and derives the rest again."""
        derived = ("compute_seconds", "hbm_seconds", "communication_seconds", "communication_share")
        values = {name: getattr(self, name) for name in (*derived, "critical_tokens")}
        return {
            **dataclasses.asdict(self),
            "fits": self.fits,
            "memory_total": self.memory.total,
            "memory_available": self.chip.hbm_bytes if self.chip else None,
            **{name: value if math.isfinite(value) else None for name, value in values.items()},
        }


def from_dict(values: Mapping[str, Any]) -> Report:
    """Reads the result of `Report.to_dict`."""
    # Reports of earlier versions have no `unread`.
    fields = {f.name: values[f.name] for f in dataclasses.fields(Report) if f.name in values}
    fields["memory"] = Memory(**values["memory"])
    fields["traffic"] = tuple(Traffic(**{**row, "axes": tuple(row["axes"])}) for row in values["traffic"])
    return Report(**fields)


def as_text(report: Report) -> str:
    """Returns the output of `show`, without colours."""
    console = rich.console.Console(file=io.StringIO(), width=_WIDTH, color_system=None)
    show(report, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines).strip() + "\n"


def show(report: Report, console: rich.console.Console) -> None:
    """Prints one table of sizes and times and one of collectives."""
    mesh = " ".join(f"{axis}={size}" for axis, size in report.mesh.items() if size > 1) or "of one device"
    slices = f"{report.n_slices} x " if report.n_slices > 1 else ""
    title = f"{report.config} on {slices}{report.topology}, mesh {mesh}: {report.parameters:,} parameters"
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    console.print(_sizes(report))
    console.print(_collectives(report))
    if report.unread:
        unread = ", ".join(f"{name} ({runs:,} runs)" for name, runs in report.unread.items())
        console.print(
            f"not counted, as it is not known: {unread}", markup=False, highlight=False, soft_wrap=True
        )


def _sizes(report: Report) -> rich.table.Table:
    table = _table("of a device, a step", "", "")
    memory = report.memory
    table.add_row("state and batch", _gib(memory.arguments))
    table.add_row("temporaries", _gib(memory.temporaries))
    table.add_row("new outputs", _gib(memory.outputs))
    table.add_row("program", _gib(memory.program))
    chip = report.chip
    left = f"{_gib(chip.hbm_bytes - memory.total)} left of {chip.hbm_bytes / GIB:.2f}" if chip else ""
    table.add_row("memory", _gib(memory.total), left)
    table.add_section()
    ratio = f"{report.compiled_flops / report.model_flops:.2f} of the model's"
    table.add_row("arithmetic of the model", f"{report.model_flops / 1e12:,.3f} TFLOP")
    table.add_row("matrix products compiled", f"{report.compiled_flops / 1e12:,.3f} TFLOP", ratio)
    table.add_row("memory traffic", f"{report.hbm_traffic / 1e9:,.2f} GB")
    if chip:
        table.add_section()
        table.add_row("matrix products at peak", _ms(report.compute_seconds))
        table.add_row("memory traffic at peak", _ms(report.hbm_seconds))
        share = f"{report.communication_share:.1%} if none overlaps"
        table.add_row("communication at peak", _ms(report.communication_seconds), share)
        bound = f"below {report.critical_tokens:,.0f} tokens" if report.critical_tokens else "never"
        bound = "always" if math.isinf(report.critical_tokens) else bound
        table.add_row("bound by communication", bound, f"now {report.tokens_per_device:,.0f} tokens")
    return table


def _collectives(report: Report) -> rich.table.Table:
    table = _table("collectives", "along", "runs", "MB sent", "ms")
    for row in report.traffic:
        axes = ", ".join(row.axes) + (" between slices" if row.across_slices else "")
        seconds = f"{row.seconds * 1e3:,.3f}" if report.chip else ""
        table.add_row(row.kind, axes, f"{row.count:,}", f"{row.bytes_sent / 1e6:,.3f}", seconds)
    if not report.traffic:
        table.add_row("none", "", "", "", "")
    return table


def _table(first: str, *others: str) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="left" if name == "along" else "right", no_wrap=True)
    return table


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / GIB:,.2f} GiB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms"


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def compile_check(config: Config, topology: Topology, name: str) -> Report:
    """Compiles the train step of a config, which has a name, for a topology.

    A `model.vocab_size` of 0 stands for the tokenizer's, which is not here: it is taken to have
    `data.vocab_size` tokens. UserError if the mesh cannot split the model or the batch, the compiler gives up
    for lack of memory (where it does not, the report says whether it fits), or this jax cannot read the
    program.
    """
    config = with_vocabulary(config)
    layout = make_layout(config.mesh, topology.devices)
    layout.check(config)
    optimizer = only.selective(make_optimizer(config.optim, config.train.steps), config)
    state = abstract_state(config, optimizer)
    layout.check_split(state.params)
    began = time.perf_counter()
    lowered = make_train_step(config, optimizer, layout).lower(
        layout.with_shardings(state), abstract_batch(config, layout)
    )
    compiled = _compile(lowered, topology)
    seconds = time.perf_counter() - began
    parsed = _parsed(compiled)
    stats: Any = compiled.memory_analysis()
    unread = {what: collections.Counter[str]() for what in ("arithmetic", "memory traffic", "traffic")}
    tokens = config.train.batch_size * config.model.context_length
    return Report(
        config=name,
        topology=topology.name,
        n_slices=topology.n_slices,
        mesh=dict(layout.mesh.shape),
        parameters=throughput.parameter_count(state.params),
        tokens_per_device=tokens / layout.size,
        memory=Memory(
            arguments=stats.argument_size_in_bytes,
            outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
            temporaries=stats.temp_size_in_bytes,
            program=stats.generated_code_size_in_bytes,
        ),
        model_flops=throughput.flops_per_token(config.model) * tokens / layout.size,
        compiled_flops=float(cost.matmul_flops(parsed, unread["arithmetic"])),
        hbm_traffic=float(cost.main_memory_bytes(parsed, unread["memory traffic"])),
        traffic=_traffic(parsed, layout.mesh, topology, unread["traffic"]),
        compile_seconds=seconds,
        unread={f"{what} of {name}": n for what, missed in unread.items() for name, n in missed.items()},
    )


def with_vocabulary(config: Config) -> Config:
    """Returns the config with `data.vocab_size` tokens, if `model.vocab_size` leaves that to a tokenizer."""
    size = config.model.vocab_size or config.data.vocab_size
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def does_not_fit(needed: float, available: float, chip: str) -> UserError:
    """Returns the error for a step that needs more bytes than a device has, with advice."""
    return UserError(
        f"needs {needed / GIB:.1f} GiB per device, a {chip} has {available / GIB:.2f}: more mesh.fsdp, "
        "model.remat=full, a smaller train.batch_size or more train.grad_accumulation, or a larger topology"
    )


def _compile(lowered: jax.stages.Lowered, topology: Topology) -> jax.stages.Compiled:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        limits = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", str(e))
        if "RESOURCE_EXHAUSTED" not in str(e) or limits is None:
            reason = str(e).partition("\n")[0]
            raise UserError(
                f"the compiler for {topology.name} cannot make a program of this step: {reason}"
            ) from e
        needed, available = (float(limits[i]) * _UNITS[limits[i + 1]] for i in (1, 3))
        raise does_not_fit(needed, available, topology.name.partition(":")[0]) from e


def _parsed(compiled: jax.stages.Compiled) -> cost.Program:
    try:
        return cost.parse(compiled.as_text() or "")
    except (jax.errors.JaxRuntimeError, ValueError) as e:
        if importlib.util.find_spec("libtpu") is None:
            raise
        jax_version, libtpu = (importlib.metadata.version(name) for name in ("jax", "libtpu"))
        raise UserError(
            f"the program that libtpu {libtpu} has compiled cannot be read by jax {jax_version}: install the "
            'libtpu that belongs to it, pip install "jax[tpu]", or the newest jax'
        ) from e


def _traffic(
    program: cost.Program, mesh: Mesh, topology: Topology, unread: cost.Unread
) -> tuple[Traffic, ...]:
    """Sums over the collectives of one kind along the same axes."""
    rows: dict[tuple[str, tuple[str, ...], bool], Traffic] = {}
    for found in cost.collectives(program, unread):
        with cost.reading(found.name, cost.Runs(found.count, is_exact=True), unread):
            key = (found.kind, found.axes(mesh.shape), found.across_slices)
            before = rows.get(key, Traffic(*key, count=0, bytes=0, bytes_sent=0.0, seconds=0.0))
            rows[key] = Traffic(
                *key,
                count=before.count + found.count,
                bytes=before.bytes + found.count * found.bytes,
                bytes_sent=before.bytes_sent + found.count * found.bytes_sent,
                seconds=before.seconds + found.count * _seconds(found, mesh, topology),
            )
    return tuple(sorted(rows.values(), key=lambda row: -row.bytes_sent))


def _seconds(collective: cost.Collective, mesh: Mesh, topology: Topology) -> float:
    """Returns the time of one run at the data sheet's bandwidth, without latency; 0 for unknown devices."""
    if topology.chip is None:
        return 0.0
    # Of what goes to every other device of a ring, a piece travels a quarter of the way round on average.
    hops = collective.group_size / 4 if collective.kind == "all-to-all" else 1
    if collective.across_slices:
        bandwidth = topology.chip.dcn_bytes_per_second
    else:
        devices = mesh.devices.reshape(-1)[list(collective.groups[0])]  # all groups lie alike
        bandwidth = topology.link_bandwidth(tuple(devices))
    return collective.bytes_sent * max(hops, 1) / bandwidth
