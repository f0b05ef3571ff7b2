"""The findings of a compile check, figures derived from them, and their tables."""

from collections.abc import Mapping
import dataclasses
import io
import math
from typing import Any

import rich.box
import rich.console
import rich.table

from topklm.compile_check.topology import CHIPS, GIB, Chip

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
