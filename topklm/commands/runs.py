"""`topklm runs`: the runs of a folder, how far each is, and how well it does."""

import argparse
from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import functools
import importlib
import shlex
import time
from typing import Any

from rich.text import Text

from topklm import config as config_lib
from topklm.commands import shared, train
from topklm.commands.shared import Output
from topklm.config import Config
from topklm.errors import UserError, explain, visible
from topklm.imports import when_used
from topklm.storage.files import AnyPath, absolute, as_path, storage_errors_are_user_errors

with when_used():
    from topklm.checkpoint import run_folder
    from topklm.training import metrics

DESCRIPTION = "Lists the runs of a folder, newest first: config, steps, held-out bits per byte, age."
EXAMPLE = "topklm runs gs://my-bucket/runs"

DEFAULT_FOLDER = "runs"
BITS = "eval/bits_per_byte"
_FAR = 8  # changes, above which a config is told as one of its own
_LONGEST_PROBLEM = 50  # characters in the table
_UNITS = {"d": 86_400, "h": 3_600, "min": 60, "s": 1}
FILLED_IN = ("model.vocab_size",)  # by the data


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """Facts of a run that its folder tells, as far as it can be read."""

    run: str  # path of the folder
    # Of the nearest config that comes with topklm, such as "small:base"; "" of no known config
    name: str = ""
    n_changes: int = 0  # fields in which the run's config differs from that one
    # Of the newest checkpoint, or of the last metrics where there is none; None: of neither
    step: int | None = None
    steps: int | None = None  # of the whole run; None where the config cannot be read
    bits_per_byte: float | None = None  # newest of the held-out text; None before the first evaluation
    changed: float | None = None  # Unix time of the last metrics or the newest checkpoint; None: of neither
    problems: tuple[str, ...] = ()  # damages, a line each

    @property
    def config(self) -> str:
        """The config for a person, such as "small:base, 2 changes"."""
        if self.name and self.n_changes > _FAR:
            return "its own"
        changes = f", {self.n_changes} change{'s' if self.n_changes > 1 else ''}"
        return self.name + (changes if self.n_changes else "")


@dataclasses.dataclass(frozen=True)
class FoundRun:
    """The content of a run folder, as far as it can be read, and its facts."""

    facts: RunFacts
    config: Config | None
    lines: list[dict[str, Any]]  # of its metrics
    checkpoints: list[int]  # steps
    trace: list[int]  # steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = shared.flags(parser, "json")
    add("folder FOLDER", f"that holds run folders; default {DEFAULT_FOLDER}", nargs="?")


def run(arguments: argparse.Namespace) -> None:
    output = Output(arguments.json)
    name = DEFAULT_FOLDER if arguments.folder is None else arguments.folder
    folder = as_path(name, "FOLDER")
    with storage_errors_are_user_errors(f"listing {folder}", folder):
        if not folder.is_dir():
            advice = "train a model (topklm train), or name another folder"
            raise UserError("there is no such folder", field="FOLDER", value=name, advice=advice)
        folders = sorted(path for path in [folder, *folder.iterdir()] if is_run(path))
    found = sorted((read_run(path).facts for path in folders), key=lambda one: -(one.changed or 0))
    facts = {"folder": name, "runs": [dataclasses.asdict(one) for one in found]}
    output.give(facts, lambda: _show(output, name, found))


def is_run(path: AnyPath) -> bool:
    """Tells whether a folder has a part of a run in it; False where that cannot be seen."""
    try:
        names = run_folder.CONFIG_FILE, run_folder.METRICS_FILE, run_folder.CHECKPOINTS_FOLDER
        return any((path / name).exists() for name in names)
    except OSError:
        return False


def read_run(folder: AnyPath) -> FoundRun:
    """Reads a run folder; parts that cannot be read are told in `problems`."""
    problems = list[str]()

    def tried(read: Any, otherwise: Any) -> Any:
        try:
            return read()
        except Exception as e:  # of a library that meets damaged files
            problems.append(explain(e) or f"{folder}: {type(e).__name__}: {e}")
            return otherwise

    config = tried(lambda: run_folder.saved_config(folder), None)
    if config is None and not problems:
        problems.append(f"{folder}: has neither {run_folder.CONFIG_FILE} nor a checkpoint")
    lines = tried(lambda: metrics.read(folder), [])
    checkpoints = tried(lambda: run_folder.complete_steps(folder), [])
    trace = tried(lambda: run_folder.complete_steps(folder, run_folder.TRACE_FOLDER), [])
    bits = [line[BITS] for line in lines if isinstance(line.get(BITS), int | float)]
    steps_seen = checkpoints[-1:] or [line["step"] for line in lines[-1:]]
    name, n_changes = ("", 0) if config is None else nearest(config)
    facts = RunFacts(
        run=str(folder),
        name=name,
        n_changes=n_changes,
        step=steps_seen[0] if steps_seen else None,
        steps=None if config is None else config.train.steps,
        bits_per_byte=bits[-1] if bits else None,
        changed=_changed(folder, checkpoints),
        problems=tuple(problems),
    )
    return FoundRun(facts, config, lines, checkpoints, trace)


def nearest(config: Config) -> tuple[str, int]:
    """Names the config of topklm that differs from one in the fewest fields, and says in how many."""
    flat = config_lib.flatten(config)

    def n_changes(other: Mapping[str, Any]) -> int:
        return sum(flat[field] != other[field] for field in flat if field not in FILLED_IN)

    return min(((name, n_changes(other)) for name, other in _known().items()), key=lambda one: one[1])


@functools.cache
def _known() -> dict[str, dict[str, Any]]:
    """Returns the fields of all configs that come with topklm, by name, such as "small:base"."""
    found = {}
    for name in train.shipped_configs():
        module = importlib.import_module(f"topklm.configs.{name}")
        for number, variant in enumerate(module.VARIANTS):
            resolved = config_lib.resolve(module.get_config(variant))
            found[f"{name}:{variant}" if number else name] = config_lib.flatten(resolved)
    return found


def _changed(folder: AnyPath, checkpoints: list[int]) -> float | None:
    paths = [folder / run_folder.METRICS_FILE]
    paths += [folder / run_folder.CHECKPOINTS_FOLDER / str(step) for step in checkpoints[-1:]]
    times = list[float]()
    for path in paths:
        with contextlib.suppress(OSError, ValueError):  # not there, or without a time in a bucket
            times.append(absolute(path).stat().mtime)
    return max(times, default=None)


def age(seconds: float) -> str:
    """Writes how long ago something was, such as "5 h"."""
    for unit, length in _UNITS.items():
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return "now"


def _show(output: Output, name: str, found: Sequence[RunFacts]) -> None:
    rows, now = list[list[Text]](), time.time()
    for one in found:
        step = "-" if one.step is None else f"{one.step:,}"
        cells = [
            as_path(one.run).name,
            "; ".join(filter(None, [one.config, *(_shortened(one, line) for line in one.problems)])),
            step if one.steps is None else f"{step} of {one.steps:,}",
            "-" if one.bits_per_byte is None else f"{one.bits_per_byte:.4f}",
            "-" if one.changed is None else age(now - one.changed),
        ]
        rows.append([Text(visible(cell)) for cell in cells])
    if not rows:
        output.say(f"{name}: no runs yet; topklm train makes one")
        return
    heads = ("run", "config", "steps", "bits/byte", "age")
    output.console.print(shared.table(heads, rows, left=["run", "config"]))
    for one in found:
        if one.problems:
            output.say(visible(f"topklm show {shlex.quote(one.run)} says more of its damage"))


def _shortened(one: RunFacts, problem: str) -> str:
    line = problem.replace(f"{one.run}/", "").removeprefix(f"{one.run}: ")
    return f"damaged: {line if len(line) <= _LONGEST_PROBLEM else line[:_LONGEST_PROBLEM] + '...'}"
