"""`topklm show`: config, loss curve, checkpoints and harvested activations of a run."""

import argparse
from collections.abc import Mapping, Sequence
import time
from typing import Any

from rich.text import Text

from topklm import config as config_lib
from topklm.commands import runs, shared
from topklm.commands.runs import FoundRun
from topklm.commands.shared import Output
from topklm.config import Config
from topklm.errors import UserError, visible
from topklm.imports import when_used
from topklm.neurons import NeuronsFolder, harvested_steps
from topklm.neurons.labels import Labels
from topklm.storage.files import as_path, is_bucket, local_path, storage_errors_are_user_errors

with when_used():
    from topklm.neurons import store as store_lib
    from topklm.training import metrics

DESCRIPTION = (
    "Shows a run: where its config differs from the defaults, its loss over the steps, its checkpoints, and "
    "what is harvested and measured of its neurons."
)
EXAMPLE = "topklm show runs/small"

_LOSS, _HELDOUT = "train/loss", "eval/loss"
_WIDTH, _HEIGHT = 66, 12  # of the curve, in characters
_MARKS = {_LOSS: ".", _HELDOUT: "o"}  # the latter over the former


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.flags(parser, "run", "json")


def run(arguments: argparse.Namespace) -> None:
    output = Output(arguments.json)
    folder = as_path(arguments.run, "RUN")
    with storage_errors_are_user_errors(f"reading {folder}", folder):
        if not folder.exists():
            raise UserError(
                f"RUN = {arguments.run}: there is no such folder; check the path, or: topklm runs"
            )
    if not runs.is_run(folder):
        raise UserError(f"RUN = {arguments.run}: is no run folder: it has neither a config nor checkpoints")
    found = runs.read_run(folder)
    problems = list(found.facts.problems)
    harvested = [] if is_bucket(folder) else _harvested(arguments.run, problems)
    differences = {} if found.config is None else _differences(found.config)
    facts = {
        "run": arguments.run,
        "config": found.facts.name,
        "changes": found.facts.n_changes,
        "differences": {name: {"run": here, "default": there} for name, (here, there) in differences.items()},
        "step": found.facts.step,
        "steps": found.facts.steps,
        "bits_per_byte": found.facts.bits_per_byte,
        "curve": [{name: line[name] for name in ("step", *_MARKS) if name in line} for line in found.lines],
        "checkpoints": found.checkpoints,
        "trace": found.trace,
        "neurons": harvested,
        "problems": problems,
    }
    output.give(facts, lambda: _show(output, arguments.run, found, differences, harvested))
    if problems:
        raise UserError("; ".join(problems))


def _differences(config: Config) -> dict[str, tuple[Any, Any]]:
    """Returns the fields that a run changes, each with its value and the default."""
    here, there = config_lib.flatten(config), config_lib.flatten(Config())
    return {name: (here[name], there[name]) for name in here if here[name] != there[name]}


def _harvested(name: str, problems: list[str]) -> list[dict[str, Any]]:
    """Describes what is known of the neurons at each step; damage is added to `problems`."""
    path = local_path(name, "RUN")
    found: list[dict[str, Any]] = []
    try:
        n_labels = len(Labels(path / "neurons" / "labels.json").all())
        for step in harvested_steps(path):
            folder = NeuronsFolder(path, step)
            entry: dict[str, Any] = {"step": step, "measured": folder.table.exists(), "labels": n_labels}
            found.append(entry)
            store = store_lib.Store(folder.store)
            metadata = store.metadata
            entry |= {"tokens": store.n_tokens, "kind": metadata.kind, "source": metadata.source}
    except (UserError, OSError) as e:
        problems.append(str(e))
    return found


def _show(
    output: Output,
    name: str,
    found: FoundRun,
    differences: Mapping[str, tuple[Any, Any]],
    harvested: Sequence[Mapping[str, Any]],
) -> None:
    facts = found.facts
    say = output.say
    say(visible(f"{name}: {facts.config}" if facts.config else name))
    parts = list[str]()
    if facts.step is not None:
        parts.append(f"step {facts.step:,}" + (f" of {facts.steps:,}" if facts.steps else ""))
    if facts.bits_per_byte is not None:
        parts.append(f"{facts.bits_per_byte:.4f} bits per byte")
    if facts.changed is not None:
        since = runs.age(time.time() - facts.changed)
        parts.append("changed now" if since == "now" else f"changed {since} ago")
    if parts:
        say("; ".join(parts))
    if found.config is not None:
        say(metrics.describe_model(found.config))
        rows = [
            [field, Text(visible(str(here))), Text(visible(str(there)))]
            for field, (here, there) in differences.items()
        ]
        heads = ("setting", "here", "default")
        output.console.print(
            shared.table(heads, rows, left=heads) if rows else "all settings are the defaults"
        )
    for line in curve(found.lines):
        say(line)
    say(f"checkpoints: {_listed(found.checkpoints)}")
    if found.trace:
        say(f"trace: {_listed(found.trace)}")
    for entry in harvested:
        what = f"{entry['tokens']:,} tokens, {entry['kind']}" if "tokens" in entry else "cannot be read"
        measured = "measured" if entry["measured"] else f"not measured: topklm neurons measure {name}"
        say(visible(f"neurons of step {entry['step']:,}: {what}; {measured}; {entry['labels']:,} labels"))
    if not harvested and found.checkpoints:
        say(visible(f"neurons: nothing harvested; topklm explore {name} does it"))


def _listed(steps: Sequence[int]) -> str:
    texts = [f"{step:,}" for step in steps]
    shown = texts if len(texts) <= 8 else [*texts[:3], "...", *texts[-3:]]
    return (", ".join(shown) or "none") + (f" ({len(texts)})" if len(texts) > 1 else "")


def curve(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Draws the losses of a run's metrics over its steps, as lines of text; none without two steps."""
    points = [
        (line["step"], float(line[name]), mark)
        for name, mark in _MARKS.items()
        for line in lines
        if isinstance(line.get(name), int | float) and line[name] == line[name] and abs(line[name]) < 1e30
    ]
    steps, losses = [step for step, _, _ in points], [loss for _, loss, _ in points]
    if len(set(steps)) < 2:
        return []
    first, last, low, high = min(steps), max(steps), min(losses), max(losses)
    grid = [[" "] * _WIDTH for _ in range(_HEIGHT)]
    for step, loss, mark in points:
        row = round((high - loss) / (high - low or 1) * (_HEIGHT - 1))
        grid[row][round((step - first) / (last - first) * (_WIDTH - 1))] = mark
    ends = {0: f"{high:.3g}", _HEIGHT - 1: f"{low:.3g}"}
    drawn = [f"{ends.get(row, ''):>8} |{''.join(cells)}".rstrip() for row, cells in enumerate(grid)]
    left, right = f"step {first:,}", f"{last:,}"
    return [
        f"loss, nats per token: {_MARKS[_LOSS]} training, {_MARKS[_HELDOUT]} held out",
        *drawn,
        f"{'':>8} +{'-' * _WIDTH}",
        f"{'':>10}{left}{right:>{_WIDTH - len(left)}}",
    ]
