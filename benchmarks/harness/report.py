"""Findings of a benchmark: figures beside floors, comparisons beside targets; tables and JSON."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import datetime
import itertools
import json
import os
import statistics
import sys
from typing import Any, TypeVar

import rich.box
import rich.console
import rich.table

from benchmarks.harness.results import AVX2_ONLY, describe_machine
from benchmarks.harness.timing import interval, quartiles, ratio_interval
from benchmarks.harness.worker import threads
from topklm import errors
from topklm.imports import versions
from topklm.storage.files import local_path, write_atomically

_PACKAGES = ("topklm", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")
_VARIABLES = ("LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "LD_PRELOAD", "OMP_NUM_THREADS", *AVX2_ONLY)
_INTERVAL = "95 %"  # of the median, by bootstrap over the rounds
_NOTE_WIDTH = 24  # so many characters stand beside the figures at 80 columns
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
    write_json(report.to_dict(command), destination)


def write_json(content: Mapping[str, Any], destination: str) -> None:
    """Writes JSON to a file, whole or not at all, or prints it for "-"; errors as `write`."""
    text = json.dumps(content, indent=1) + "\n"
    if destination == "-":
        sys.stdout.write(text)
        return
    with errors.disk_errors_are_user_errors("writing --json"):
        path = local_path(destination, "--json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())


def show(report: Report, console: rich.console.Console) -> None:
    """Prints tables of figures and of comparisons, one for each case, for 80 columns, and the notes."""
    tables = [_figures(case, rows) for case, rows in _by_case(report.results)]
    tables += [_comparisons(case, rows) for case, rows in _by_case(report.comparisons)]
    for table, notes in tables:
        console.print(table)
        for note in notes:
            console.print(note, markup=False, highlight=False)
    for note in report.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Change:
    """One figure or ratio of two reports."""

    name: str
    before: float
    after: float
    ratio: tuple[float, float]  # 95 % interval of after / before

    @property
    def is_real(self) -> bool:
        """Whether the interval leaves 1 out."""
        return not self.ratio[0] <= 1 <= self.ratio[1]


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Compares what two reports (as JSON has them) both have, in the order of the first.

    The interval is of the ratio of medians, by bootstrap over the rounds of each; of figures without rounds,
    as memory, it is the ratio itself.
    """

    def rows(content: Mapping[str, Any]) -> dict[str, Sequence[float]]:
        return {row["name"]: row["samples"] for part in ("results", "comparisons") for row in content[part]}

    found, others = [], rows(after)
    for name, samples in rows(before).items():
        if name in others:
            middles = statistics.median(samples), statistics.median(others[name])
            found.append(Change(name, *middles, ratio_interval(others[name], samples)))
    return found


def show_changes(found: Sequence[Change], console: rich.console.Console) -> None:
    """Prints a table of those that are real, and says how many are not."""
    table = rich.table.Table(box=rich.box.SIMPLE)
    table.add_column("later / earlier", overflow="fold")
    table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column(_INTERVAL, justify="right", no_wrap=True)
    for one in found:
        if one.is_real:
            table.add_row(one.name, f"{one.after / one.before:.3f} x", "{:.3f}..{:.3f}".format(*one.ratio))
    n_real = sum(one.is_real for one in found)
    if n_real:
        console.print(table)
    console.print(f"{n_real} of {len(found)} figures differ by more than their 95 % interval")


def formatted(value: float, unit: str) -> str:
    """Writes a figure with its unit for a person: 0.0012 "s" -> "1.20 ms"."""
    if unit in _SCALES:
        scales = _SCALES[unit]
        scale, name = next((each for each in scales if abs(value) >= each[0]), scales[-1])
        return f"{_digits(value / scale)} {name}"
    return f"{value:.1%}" if unit == "share" else f"{_digits(value)} {unit}".rstrip()


Row = TypeVar("Row", Result, Comparison)


def _case_and_name(row: Result | Comparison) -> tuple[str, str]:
    """Parts "s1 float32: step, TopK" where the colon is; a name without one is of no case."""
    case, colon, name = row.name.partition(": ")
    return (case, name) if colon else ("", row.name)


def _by_case(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    return [
        (case, list(group)) for case, group in itertools.groupby(rows, lambda row: _case_and_name(row)[0])
    ]


def _table(case: str, first: str, *others: str) -> rich.table.Table:
    title = {"title": case, "title_justify": "left", "title_style": "bold"} if case else {}
    table = rich.table.Table(box=rich.box.SIMPLE, **title)  # type: ignore[arg-type]
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _figures(case: str, results: Sequence[Result]) -> tuple[rich.table.Table, list[str]]:
    table = _table(case, "figure", "median", _INTERVAL, "floor", "x floor")
    beside = all(len(row.note) <= _NOTE_WIDTH for row in results)
    if beside and any(row.note for row in results):
        table.add_column("")
    for row in results:
        floor = "" if row.floor is None else formatted(row.floor, row.unit)
        times = _digits(row.median / row.floor) if row.floor else ""
        of_median = _interval(row.samples, lambda value, unit=row.unit: formatted(value, unit))  # type: ignore[misc]
        cells = [_case_and_name(row)[1], formatted(row.median, row.unit), of_median, floor, times]
        table.add_row(*cells, *([row.note] if beside and row.note else []))
    return table, [] if beside else [f"  {_case_and_name(row)[1]}: {row.note}" for row in results if row.note]


def _comparisons(case: str, comparisons: Sequence[Comparison]) -> tuple[rich.table.Table, list[str]]:
    table = _table(case, "comparison", "median", _INTERVAL, "target", "reached")
    notes = []
    for row in comparisons:
        target = "" if row.at_least is None else f">= {row.at_least:g}"
        target += "" if row.at_most is None else f"<= {row.at_most:g}"
        reached = {None: "", True: "yes", False: "NO"}[row.reached]
        of_median, name = _interval(row.samples, "{:.2f}".format), _case_and_name(row)[1]
        table.add_row(name, f"{row.median:.3f} x", of_median, target, reached)
        notes += [f"  {name}: {row.note}"] if row.note else []
    return table, notes


def _interval(samples: Sequence[float], shown: Callable[[float], str]) -> str:
    if len(samples) == 1:
        return ""
    (low, _, unit), end = (text.partition(" ") for text in map(shown, interval(samples)))
    return f"{low}..{''.join(end)}" if unit == end[2] else f"{low} {unit}..{''.join(end)}"


def _digits(value: float) -> str:
    """Writes three digits that say something, and no exponent."""
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def _with_spread(row: Result | Comparison, **more: Any) -> dict[str, Any]:
    spread = {
        "quartiles": [*quartiles(row.samples)],
        "interval": [*interval(row.samples)],
        "range": [min(row.samples), max(row.samples)],
    }
    return {**dataclasses.asdict(row), "median": row.median, **spread, **more}
