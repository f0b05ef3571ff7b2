"""`topklm eval`: how well models do at tasks, runs against others, and lm-evaluation-harness."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import dataclasses
import json
import math
from pathlib import Path
import time
from typing import TYPE_CHECKING, Any

from topklm.commands import shared
from topklm.commands.shared import Output
from topklm.errors import UserError, disk_errors_are_user_errors, visible
from topklm.imports import versions, when_used
from topklm.storage.files import local_path, write_atomically

with when_used():
    from topklm.eval import scoring, tasks
    from topklm.inference import adaptive
    from topklm.inference import load as load_lib
    from topklm.neurons import documents as documents_lib
    from topklm.steering import survey

if TYPE_CHECKING:
    from topklm.data.tokenizer import Tokenizer
    from topklm.eval.tasks import Figure, Outcome, Task, TokenizedTask
    from topklm.inference.language_model import LanguageModel
    from topklm.neurons.documents import TextModel

DESCRIPTION = (
    "Evaluates runs at tasks: text (bits per byte), minimal pairs, last words, multiple choice. With "
    "--against each is paired with another run: differences with intervals over items and runs, and whether "
    "the runs are no worse. With --harness: tasks of lm-evaluation-harness."
)
EXAMPLE = "topklm eval runs/small --against runs/small-base"

HELDOUT = "heldout"  # the task of the run's own held-out text
_OF_ONE = 1 / 20  # of the tokens of a text, that one document gives at most: intervals are over documents
_NATIVE = ("against", "tasks", "text", "margin", "items")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = shared.flags(parser)
    add("runs RUN", "run folders, e.g. runs/small; several: the same model with other seeds", nargs="+")
    text = "as many runs to compare with, paired by their order, e.g. runs/small-base"
    add("--against RUN", text, nargs="+", default=[])
    text = f"names with commas between; default {HELDOUT}, blimp, and all that --data holds"
    add("--tasks NAME,...", text)
    add("--data DIR", "folder with tasks: NAME.jsonl (also .gz, .xz) in lm-evaluation-harness' fields")
    text = "a domain's text: files as of topklm prepare, NAME= before them; may be given several times"
    add("--text SOURCE", text, action="append", default=[])
    text = "of each text, at most, by the first run's tokenizer, a twentieth of them of one document; 0: all"
    add("--tokens N", text, 50_000)
    add("--limit N", "only the first N items of each task, of each paradigm of blimp; default all", int)
    text = "MEASURE=X,...: by which a run may be worse and counts as no worse, e.g. acc=0.01"
    add("--margin M=X,...", text)
    add("--topk-k K", "neurons that each TopK of the RUNs keeps; default as in training", int)
    shared.add_steering(parser)
    add("--step N", "which checkpoint of the RUNs; default the newest", int)
    add("--base-step N", "which checkpoint of the runs of --against; default the newest", int)
    add("--items FILE", "write what each run makes of each item, a JSON line each")
    text = "tasks of lm-evaluation-harness instead, e.g. piqa,arc_easy; with --data of local files"
    add("--harness NAME,...", text)
    shared.flags(parser, "seed", "json")


def run(arguments: argparse.Namespace) -> None:
    shared.check_at_least(arguments, 0, "seed", "tokens")
    shared.check_at_least(arguments, 1, "limit")
    shared.check_can_write(arguments, "items")
    output = Output(arguments.json)
    data = tasks_folder(arguments.data)
    if arguments.harness is not None:
        _check_harness(arguments)
        _run_harness(arguments, output, data)
        return
    margins = tasks.margins(arguments.margin)
    _check_runs(arguments)
    found = _Evaluation(arguments, output, data)
    content, figures = _content(arguments, found, margins)
    if arguments.items is not None:
        _write_items(arguments.items, found)
    output.give(survey.without_nan(content), lambda: _show(output, arguments, found, figures))


def tasks_folder(name: str | None) -> Path | None:
    """Returns the folder of --data; UserError if it is none."""
    if name is None:
        return None
    folder = local_path(name, "--data")
    if not folder.is_dir():
        raise UserError("is no folder; give one with files of tasks", field="--data", value=name)
    return folder


def _check_runs(arguments: argparse.Namespace) -> None:
    """Refuses runs that cannot be paired, or have no such checkpoint, before the work, which takes long."""
    n_runs, n_others = len(arguments.runs), len(arguments.against)
    if n_others not in (0, n_runs):
        text = f"names {n_others} runs, to be paired with {n_runs}; give as many"
        raise UserError(text, field="--against", value=" ".join(arguments.against))
    if (arguments.steer or arguments.steer_file) and n_runs > 1:
        raise UserError("--steer with several RUNs: a neuron's number means something else in each; give one")
    for name in arguments.runs:
        load_lib.checkpoint_step(name, arguments.step)
    for name in arguments.against:
        load_lib.checkpoint_step(name, arguments.base_step)


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """Outcomes of a run at all tasks; its parameters are let go of."""

    name: str  # as it was given
    side: str  # "runs" or "against"
    facts: dict[str, Any]
    context_length: int
    tokenizer: Tokenizer
    outcomes: Sequence[Outcome]

    def figures(self) -> list[Figure]:
        return [figure for outcome in self.outcomes for figure in tasks.figures_of(outcome)]


class _Evaluation:
    """All runs at all tasks, one run after another."""

    def __init__(self, arguments: argparse.Namespace, output: Output, data: Path | None):
        self._arguments, self._output = arguments, output
        self.notes = list[str]()
        self.tasks: list[Task] = []
        first: LanguageModel | None = None
        self.runs: list[_Run] = []
        self._tokenized: dict[tuple[str, str, int], TokenizedTask] = {}
        asked = [(name, "runs", arguments.step) for name in arguments.runs]
        asked += [(name, "against", arguments.base_step) for name in arguments.against]
        for name, side, step in asked:
            model, layout = shared.load(argparse.Namespace(run=name, step=step))
            if first is None:
                first = dataclasses.replace(model, params={})
                self.tasks = self._tasks(model, data)
            elif self._has_heldout and _text_of(model) != _text_of(first):
                text = "was trained on other data, of which held-out text of the first run may be a part"
                self.notes.append(f"{name} {text}")
            self.runs.append(self._evaluate(name, side, model, shared.text_model(model, layout)))
        self._note_differences()

    def _tasks(self, model: LanguageModel, data: Path | None) -> list[Task]:
        arguments = self._arguments
        names = None if arguments.tasks is None else [n.strip() for n in arguments.tasks.split(",")]
        found = []
        if names is None or HELDOUT in names:
            try:
                found.append(self._text(model, HELDOUT, None))
            except UserError as e:
                if names is not None:
                    raise
                self.notes.append(f"without {HELDOUT} text: {e}")
        asked = ["blimp", *(tasks.names_in(data) if data else ())] if names is None else names
        for name in dict.fromkeys(asked):
            if name != HELDOUT:
                found.append(tasks.find(name, data, arguments.limit))
        for text in arguments.text:
            name, equals, source = text.partition("=")
            name, source = (name, source) if equals else (Path(text).name.partition(".")[0], text)
            found.append(self._text(model, name, source))
        self.notes += [f"{task.name}: {note}" for task in found for note in task.notes]
        for number, task in enumerate(found):
            if task.name in {other.name for other in found[:number]}:
                text = f"two tasks are called {task.name}; name a text as NAME=SOURCE"
                raise UserError(text, field="--text", value=" ".join(arguments.text))
        return found

    def _text(self, model: LanguageModel, name: str, source: str | None) -> Task:
        documents = documents_lib.open_documents(model.tokenizer, model.config.data, source, flag="--text")
        texts = tasks.beginning(documents, model.tokenizer, self._arguments.tokens or None, _OF_ONE)
        if not texts:
            said = f"--text = {source}" if source else f"{model.run}: held-out text"
            raise documents_lib.no_text(documents, said)
        return tasks.of_text(name, texts, documents.name)

    @property
    def _has_heldout(self) -> bool:
        return any(task.name == HELDOUT for task in self.tasks)

    def _evaluate(self, name: str, side: str, model: LanguageModel, text_model: TextModel) -> _Run:
        arguments, interventions = self._arguments, None
        facts: dict[str, Any] = {"run": name, "step": model.step, "context_length": model.cfg.context_length}
        if side == "runs":
            with shared.arguments_are_flags(arguments):
                config = adaptive.with_topk_k(model.cfg, arguments.topk_k)
                steer = shared.interventions(arguments, model)
                interventions = scoring.interventions_for(config, steer)
            shared.warn_of_another_model(arguments, model)
            text_model = dataclasses.replace(text_model, config=config)
            facts |= {"topk_k": config.topk_k if config.n_topk_layers else None}
            facts |= {"steer": [dataclasses.asdict(one) for one in steer or ()]}
        outcomes, began = [], time.perf_counter()
        for task in self.tasks:
            key = task.name, model.tokenizer.sha256, model.cfg.context_length
            if key not in self._tokenized:
                self._tokenized[key] = tasks.tokenize(task, text_model, model.tokenizer)
            tokenized = self._tokenized[key]
            with self._output.progress.phase_of_tokens(f"{name}: {task.name}", tokenized.n_tokens) as report:
                outcome = tokenized.evaluate(text_model, interventions, report=report)
            assert outcome is not None  # nothing stops it
            outcomes.append(outcome)
            if outcome.n_cut:
                n = f"{outcome.n_cut:,} of {len(task.items):,}"
                length = model.cfg.context_length
                self.notes.append(f"{task.name}: {n} contexts were cut to the {length:,} tokens of {name}")
        facts |= {"cut": {outcome.task.name: outcome.n_cut for outcome in outcomes}}
        facts |= {"seconds": time.perf_counter() - began}
        return _Run(name, side, facts, model.cfg.context_length, model.tokenizer, outcomes)

    def _note_differences(self) -> None:
        first = self.runs[0]
        for other in self.runs[1:]:
            if other.context_length != first.context_length:
                lengths = f"{first.context_length:,} tokens, {other.name} {other.context_length:,}"
                self.notes.append(f"{first.name} sees {lengths}: long texts are read with other contexts")
            if other.tokenizer.sha256 != first.tokenizer.sha256:
                self.notes.append(f"{other.name} has another tokenizer than {first.name}")

    def side(self, side: str) -> list[_Run]:
        return [one for one in self.runs if one.side == side]

    def incomparable(self) -> set[str]:
        """Names tasks whose likelihoods are of other texts: tokenizers differ, and one changes the text."""
        tokenizers = {one.tokenizer.sha256: one.tokenizer for one in self.runs}.values()
        if len(tokenizers) == 1:
            return set()
        return {task.name for task in self.tasks if not all(tasks.keeps(one, task) for one in tokenizers)}


def _text_of(model: LanguageModel) -> tuple[str, str]:
    return model.config.data.source, model.config.data.mixture


def _content(
    arguments: argparse.Namespace, found: _Evaluation, margins: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns all that is known, for JSON, and the figures in it."""
    by_key: dict[tuple[str, str, str], dict[str, list[Figure]]] = {}
    for one in found.runs:
        for figure in one.figures():
            by_key.setdefault(figure.key, {"runs": [], "against": []})[one.side].append(figure)
    incomparable, figures = found.incomparable(), []
    for (task, part, measure), sides in by_key.items():
        ours, theirs = sides["runs"], sides["against"]
        entry: dict[str, Any] = {"task": task, "part": part, "measure": measure}
        entry |= {"unit": ours[0].unit, "units": len(ours[0].sums)}
        for name, side in sides.items():
            entry[name] = [dataclasses.asdict(figure.estimate(arguments.seed)) for figure in side]
        entry["mean"] = dataclasses.asdict(tasks.mean_over_runs(ours, arguments.seed))
        entry["difference"] = None
        if theirs:
            entry["mean_against"] = dataclasses.asdict(tasks.mean_over_runs(theirs, arguments.seed))
            if task in incomparable and not measure.startswith("acc"):
                title = tasks.MEASURES[measure].title
                text = "not compared: tokenizers differ, and one does not keep the text as it is"
                found.notes.append(f"{task}: {title} {text}")
            else:
                gap = tasks.difference(ours, theirs, margins.get(measure), arguments.seed)
                entry["difference"] = dataclasses.asdict(gap)
        figures.append(entry)
    content = {
        "runs": [one.facts for one in found.side("runs")],
        "against": [one.facts for one in found.side("against")],
        "tasks": [
            {
                "task": task.name,
                "kind": task.title,
                "source": task.source,
                "sha256": task.sha256,
                "items": len(task.items) or len(task.documents),
            }
            for task in found.tasks
        ],
        "settings": {"tokens": arguments.tokens, "limit": arguments.limit, "seed": arguments.seed},
        "figures": figures,
        "notes": found.notes,
        "versions": versions("topklm", "jax", "jaxlib"),
    }
    return content, figures


def _write_items(path: str, found: _Evaluation) -> None:
    lines = [
        json.dumps(
            {
                "side": one.side,
                "run": one.name,
                "task": outcome.task.name,
                "item": number,
                "nats": nats.tolist(),
            }
        )
        for one in found.runs
        for outcome in one.outcomes
        for number, nats in enumerate(outcome.nats)
    ]
    with disk_errors_are_user_errors(f"writing {path}"):
        write_atomically(local_path(path, "--items"), ("\n".join(lines) + "\n").encode())


def _show(
    output: Output,
    arguments: argparse.Namespace,
    found: _Evaluation,
    figures: Sequence[dict[str, Any]],
) -> None:
    compared = bool(arguments.against)
    names = [Path(one.name).name for one in found.side("runs")]
    several = len(names) > 1
    ours = f"{len(names)} runs" if several else names[0]
    theirs = "against" if several or not compared else Path(arguments.against[0]).name
    heads = ["task", "measure", "units", *([ours, theirs, "difference", ""] if compared else names)]
    heads += ["mean"] if several and not compared else []
    rows = []
    for entry in figures:
        task = f"{entry['task']} {entry['part']}".strip()
        cells = [task, entry["measure"].replace("_per_", "/"), f"{entry['units']:,}"]
        if not compared:
            cells += [_cell(one) for one in entry["runs"]]
            cells += [_cell(entry["mean"])] if several else []
        else:
            cells += [f"{entry[name]['value']:.4f}" for name in ("mean", "mean_against")]
            gap = entry["difference"]
            cells += ["-", ""] if gap is None else [_cell(gap, "+"), gap["verdict"]]
        rows.append(cells)
    output.console.print(shared.table(heads, rows, left=["task", "measure"]))
    if compared:
        over = "units and runs" if several else "units, by bootstrap"
        gaps = [(entry["measure"], entry["difference"]) for entry in figures if entry["difference"]]
        margins = dict.fromkeys(f"{measure} {gap['margin']:g}" for measure, gap in gaps)
        output.say(
            f"in brackets 95 % over {over}; no worse: the interval ends within the margin (--margin); worse: "
            "it lies beyond it; open: neither"
        )
        output.say(f"units: documents, paradigms or items; margins: {', '.join(margins)}")
    else:
        output.say("in brackets 95 % over units, by bootstrap; of a mean over runs too")
    for line in found.notes:
        output.say(visible(f"note: {line}"))


def _cell(one: dict[str, Any], sign: str = "") -> str:
    value, low, high = (one[name] for name in ("value", "low", "high"))
    if any(figure is None or math.isnan(figure) for figure in (low, high)):
        return f"{value:{sign}.4f}"
    return f"{value:{sign}.4f}\n[{low:{sign}.4f}, {high:{sign}.4f}]"


def _check_harness(arguments: argparse.Namespace) -> None:
    for name in _NATIVE:
        if getattr(arguments, name):
            raise UserError("goes without --harness only; leave it out", field=shared.flag(name))
    if len(arguments.runs) > 1:
        text = "takes one RUN; give the others one after another"
        raise UserError(text, field="--harness", value=arguments.harness)


def _run_harness(arguments: argparse.Namespace, output: Output, data: Path | None) -> None:
    from topklm.eval import lm_eval  # noqa: PLC0415 - its package is of an extra

    model, layout = shared.load(argparse.Namespace(run=arguments.runs[0], step=arguments.step))
    with shared.arguments_are_flags(arguments):
        steer = shared.interventions(arguments, model)
        names = [name.strip() for name in arguments.harness.split(",")]
        content = lm_eval.run(
            model, layout, names, data, limit=arguments.limit, steer=steer, topk_k=arguments.topk_k
        )

    def show() -> None:
        rows = [
            [task, measure, f"{value:.4f}"]
            for task, of_task in content["results"].items()
            for measure, value in of_task.items()
        ]
        output.console.print(shared.table(["task", "measure", "value"], rows, left=["task", "measure"]))
        for line in content["notes"]:
            output.say(visible(f"note: {line}"))

    output.give(content, show)
