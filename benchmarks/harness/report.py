"""Findings of a benchmark: figures beside floors, comparisons beside targets; tables and JSON."""

from collections.abc import Mapping, Sequence
import dataclasses
import datetime
import json
import os
import statistics
import sys
from typing import Any

import rich.box
import rich.console
import rich.table

from benchmarks.harness.results import describe_machine
from benchmarks.harness.timing import quartiles
from benchmarks.harness.worker import threads
from topklm import errors
from topklm.imports import versions
from topklm.storage.files import local_path, write_atomically

_PACKAGES = ("topklm", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "LD_PRELOAD", "OMP_NUM_THREADS")
_SCALES = {"s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")), "bytes": ((2**30, "GiB"), (2**20, "MiB"))}


@dataclasses.dataclass(frozen=True)
class Result:
    """One figure."""

    name: str  # unique in its report
    unit: str  # "s", "tokens/s", "bytes", "share", ...
    samples: tuple[float, ...]  # one a round, or one only, in `unit`
    floor: float | None = None  # the best that the machine could do, in `unit`, where there is such a thing
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for plots: sizes, dtype, backend
    note: str = ""  # for a person

    @property
    def median(self) -> float:
        """In `unit`."""
        return statistics.median(self.samples)

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON has it."""
        return _with_spread(self, facts=dict(self.facts))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two figures of the same rounds as a ratio, and its target."""

    name: str  # says what is divided by what, unique in its report
    samples: tuple[float, ...]  # the ratio, one a round
    at_least: float | None = None  # the target, where more is better
    at_most: float | None = None  # the target, where less is better
    note: str = ""  # for a person

    @property
    def median(self) -> float:
        """Of the rounds' ratios."""
        return statistics.median(self.samples)

    @property
    def reached(self) -> bool | None:
        """Whether the median is at its target; None without one."""
        if self.at_least is None and self.at_most is None:
            return None
        enough = self.at_least is None or self.median >= self.at_least
        return enough and (self.at_most is None or self.median <= self.at_most)

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON has it."""
        return _with_spread(self, reached=self.reached)


@dataclasses.dataclass(frozen=True)
class Report:
    """All that one call of `topklm bench` found."""

    bench: str  # the verb: "topk", "step", ...
    settings: Mapping[str, Any]  # flags, and how it ran, the allocator included
    results: Sequence[Result]
    comparisons: Sequence[Comparison] = ()
    notes: Sequence[str] = ()  # lines for a person, under the tables

    def to_dict(self, command: Sequence[str] = ()) -> dict[str, Any]:
        """Returns it as JSON has it, with machine, versions, threads, flags, command and date."""
        return {
            "bench": self.bench,
            "command": list(command),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "threads": threads(),
            "versions": {name: v for name, v in versions(*_PACKAGES).items() if v != "unknown"},
            "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
            "settings": dict(self.settings),
            "results": [result.to_dict() for result in self.results],
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
            "notes": list(self.notes),
        }


def write(report: Report, destination: str, command: Sequence[str] = ()) -> None:
    """Writes the JSON to a file, whole or not at all, or prints it for "-".

    Raises:
        UserError: If the file cannot be written.
    """
    text = json.dumps(report.to_dict(command), indent=1) + "\n"
    if destination == "-":
        sys.stdout.write(text)
        return
    with errors.disk_errors_are_user_errors("writing --json"):
        path = local_path(destination, "--json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())


def show(report: Report, console: rich.console.Console) -> None:
    """Prints one table of figures, one of comparisons, and the notes."""
    console.print(_figures(report.results))
    if report.comparisons:
        console.print(_comparisons(report.comparisons))
    for note in report.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def formatted(value: float, unit: str) -> str:
    """Writes a figure with its unit for a person: 0.0012 "s" -> "1.20 ms"."""
    if unit in _SCALES:
        scales = _SCALES[unit]
        scale, name = next((each for each in scales if abs(value) >= each[0]), scales[-1])
        return f"{_digits(value / scale)} {name}"
    return f"{value:.1%}" if unit == "share" else f"{_digits(value)} {unit}".rstrip()


def _table(first: str, *numbers: str) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE)
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    return table


def _figures(results: Sequence[Result]) -> rich.table.Table:
    table = _table("figure", "median", "spread", "floor", "of the floor")
    for row in results:
        floor = "" if row.floor is None else formatted(row.floor, row.unit)
        times = f"{_digits(row.median / row.floor)} x" if row.floor else ""
        median, spread = formatted(row.median, row.unit), _spread(row.samples)
        table.add_row(row.name, median, spread, floor, times, row.note)
    return table


def _comparisons(comparisons: Sequence[Comparison]) -> rich.table.Table:
    table = _table("comparison", "median", "spread", "target", "reached")
    for row in comparisons:
        target = "" if row.at_least is None else f">= {row.at_least:g}"
        target += "" if row.at_most is None else f"<= {row.at_most:g}"
        reached = {None: "", True: "yes", False: "NO"}[row.reached]
        table.add_row(row.name, f"{row.median:.3f} x", _spread(row.samples), target, reached, row.note)
    return table


def _spread(samples: Sequence[float]) -> str:
    """Writes half the distance between the quartiles, against the median."""
    low, high = quartiles(samples)
    middle = statistics.median(samples)
    return f"+-{(high - low) / 2 / middle:.1%}" if len(samples) > 1 and middle else ""


def _digits(value: float) -> str:
    """Writes three digits that say something, and no exponent."""
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def _with_spread(row: Result | Comparison, **more: Any) -> dict[str, Any]:
    spread = {"quartiles": [*quartiles(row.samples)], "range": [min(row.samples), max(row.samples)]}
    return {**dataclasses.asdict(row), "median": row.median, **spread, **more}
