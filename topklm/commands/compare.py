"""`topklm compare`: two runs on the same text, a TopK LM and its Base twin say."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from topklm.commands import neurons_find, shared
from topklm.commands.shared import Output
from topklm.errors import ArgumentError, UserError, visible
from topklm.imports import when_used
from topklm.storage.files import read_json

with when_used():
    from topklm.eval import tasks
    from topklm.neurons import ablate_targets, dictionary, search
    from topklm.neurons import documents as documents_lib
    from topklm.steering import survey

if TYPE_CHECKING:
    from topklm.eval.tasks import Figure
    from topklm.inference.language_model import LanguageModel
    from topklm.layout import Layout
    from topklm.neurons.store import Store

DESCRIPTION = (
    "Compares two runs on the held-out text of the first: bits per byte, paired over documents; for each "
    "pattern, the best neuron of each layer, and what is lost at the tokens that match and elsewhere without "
    "the best neurons; and their readability cards, where card.json lies in the run folders."
)
EXAMPLE = 'topklm compare runs/small runs/small-base --regex "\\d+"'

CARD_FILE = "card.json"  # in a run folder, as `topklm neurons card RUN --json RUN/card.json` writes it


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    name: str  # as it was given
    model: LanguageModel
    layout: Layout
    store: Store | None  # where patterns are looked for

    @property
    def text_model(self) -> documents_lib.TextModel:
        return shared.text_model(self.model, self.layout)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = shared.flags(parser, "run")
    add("base BASE", "run to compare it with, e.g. runs/small-base")
    text = "look for neurons of these tokens in what was harvested of both; may be given several times"
    add("--regex PATTERN", text, action="append", default=[])
    shared.flags(parser, "case")
    add("--tokens N", "of text, at most, for bits per byte and for each ablation", 50_000)
    add("--count N", "--regex: neurons that are ablated", 4)
    add("--random-sets R", "--regex: random sets beside them", 10)
    shared.flags(parser, "seed", "step")
    add("--base-step N", "which checkpoint of BASE; default the newest", int)
    shared.flags(parser, "json")


def run(arguments: argparse.Namespace) -> None:
    shared.check_at_least(arguments, 1, "tokens", "count", "random_sets")
    shared.check_at_least(arguments, 0, "seed")
    output = Output(arguments.json)
    asked = (arguments.run, arguments.step), (arguments.base, arguments.base_step)
    # Both are opened before the work, which takes long.
    runs = [_open(name, step, bool(arguments.regex)) for name, step in asked]
    notes = _differences(runs)
    bits = _bits(arguments, output, runs)
    patterns = [_pattern(arguments, output, runs, pattern) for pattern in arguments.regex]
    cards = [_card(one, notes) for one in runs]
    facts = survey.without_nan(
        {
            "runs": [{"run": one.name, "step": one.model.step} for one in runs],
            "bits_per_byte": bits,
            "patterns": patterns,
            "cards": cards,
            "notes": notes,
        }
    )
    output.give(facts, lambda: _show(output, facts))


def _open(name: str, step: int | None, with_store: bool) -> _Run:
    model, layout = shared.load(argparse.Namespace(run=name, step=step))
    if not with_store:
        return _Run(name, model, layout, None)
    shared.check_on_disk(name)
    store = shared.open_store(shared.folder_of(model), model)
    dictionary.check_coordinates(store.metadata.dictionary, "compare --regex")
    return _Run(name, model, layout, store)


def _differences(runs: Sequence[_Run]) -> list[str]:
    """Says in which ways what was harvested of two runs cannot be compared."""
    one, other = (run.store for run in runs)
    if one is None or other is None:
        return []
    notes = []
    if (one.metadata.source, one.n_tokens) != (other.metadata.source, other.n_tokens):
        notes.append("different text was harvested of the two: F1 and ablations are of different tokens")
    kept = one.metadata.topk_k, other.metadata.topk_k
    if kept[0] != kept[1]:
        notes.append(
            f"harvested are the {kept[0]} largest activations of a token of the first and {kept[1]} of the "
            f"other: harvest a copy of the Base LM with --keep {min(kept)}"
        )
    return notes


def _bits(arguments: argparse.Namespace, output: Output, runs: Sequence[_Run]) -> dict[str, Any]:
    """Measures bits per byte of the first run's held-out documents, by both."""
    first = runs[0].model
    documents = documents_lib.open_documents(first.tokenizer, first.config.data)
    texts = tasks.beginning(documents, first.tokenizer, arguments.tokens)
    if not texts:
        raise UserError(f"{runs[0].name}: there is no held-out text: nothing can be compared")
    task = tasks.of_text("heldout", texts, documents.name)
    figures: list[Figure] = []
    for one in runs:
        tokenized = tasks.tokenize(task, one.text_model, one.model.tokenizer)
        with output.progress.phase_of_tokens(f"reading with {one.name}", tokenized.n_tokens) as report:
            outcome = tokenized.evaluate(one.text_model, report=report)
        assert outcome is not None  # nothing stops it
        figures += tasks.figures_of(outcome)
    ours, theirs = figures
    gap = tasks.difference([ours], [theirs], seed=arguments.seed)
    return {
        "documents": len(texts),
        "bytes": int(ours.weights.sum()),
        "runs": [dataclasses.asdict(one.estimate(arguments.seed)) for one in figures],
        "difference": {name: getattr(gap, name) for name in ("value", "low", "high")},
    }


def _pattern(
    arguments: argparse.Namespace, output: Output, runs: Sequence[_Run], pattern: str
) -> dict[str, Any]:
    """Finds and ablates the neurons of a pattern in both runs."""
    found = []
    for one in runs:
        assert one.store is not None  # a pattern is asked for
        text = search.StoredText(one.store, one.model.tokenizer)
        matches = text.matches(pattern, ignore_case=not arguments.case)
        best = ablate_targets.best_neurons(one.store, matches.touched, arguments.seed)
        with _of_pattern(pattern), shared.arguments_are_flags(arguments):
            plan = ablate_targets.chosen(
                one.store,
                matches.touched,
                matches,
                counts=[arguments.count],
                tokens=arguments.tokens,
                seed=arguments.seed,
            )
            n_tokens = plan.n_tokens(arguments.random_sets)
            with output.progress.phase_of_tokens(f"ablating neurons of {one.name}", n_tokens) as report:
                before, outcomes = plan.measure(
                    one.text_model,
                    n_random=arguments.random_sets,
                    seed=arguments.seed,
                    report=report,
                )
        found.append(
            {
                "best": [dataclasses.asdict(neuron) for neuron in best],
                "ablation": neurons_find.facts_of(plan, before, outcomes),
            }
        )
    return {"regex": pattern, "runs": found}


@contextlib.contextmanager
def _of_pattern(pattern: str) -> Iterator[None]:
    """Names the pattern that an error of the block is about, one among several."""
    try:
        yield
    except ArgumentError as e:
        raise e.within("--regex", pattern) from e


def _card(one: _Run, notes: list[str]) -> dict[str, Any] | None:
    """Reads the run's part of the card in its folder; None where there is none of this checkpoint."""
    path = Path(one.name) / CARD_FILE
    if not path.is_file():
        return None
    try:
        content = read_json(path, f"delete it, or run topklm neurons card {one.name} --json {path}")
        for entry in content["runs"]:
            if Path(entry["run"]).name == Path(one.name).resolve().name and entry["step"] == one.model.step:
                return {"run": one.name, "bases": entry["bases"]}
    except (KeyError, TypeError) as e:
        raise UserError(f"{path} is no readability card ({e}): delete it") from e
    notes.append(f"{path} holds no card of step {one.model.step} of {one.name}")
    return None


def _show(output: Output, facts: dict[str, Any]) -> None:
    names = [one["run"] for one in facts["runs"]]
    bits = facts["bits_per_byte"]
    rows = [
        [name, f"{one['value']:.4f}", f"{one['low']:.4f} to {one['high']:.4f}"]
        for name, one in zip(names, bits["runs"], strict=True)
    ]
    gap = bits["difference"]
    rows.append(["difference", f"{gap['value']:+.4f}", _reach(gap)])
    output.console.print(shared.table(["run", "bits per byte", "95 %"], rows, left=["run"]))
    output.say(
        f"of {bits['documents']:,} held-out documents of {names[0]}, {bits['bytes']:,} bytes; 95 %: by "
        "bootstrap over documents, of the difference paired"
    )
    for pattern in facts["patterns"]:
        _show_pattern(output, names, pattern)
    cards = [card for card in facts["cards"] if card is not None]
    if cards:
        _show_cards(output, cards)
    else:
        output.say(
            visible(f"no readability cards: topklm neurons card {names[0]} --json {names[0]}/{CARD_FILE}")
        )
    for line in facts["notes"]:
        output.say(visible(f"note: {line}"))


def _reach(gap: dict[str, Any]) -> str:
    return "-" if gap["low"] is None else f"{gap['low']:+.4f} to {gap['high']:+.4f}"


def _show_pattern(output: Output, names: Sequence[str], pattern: dict[str, Any]) -> None:
    title = Text(visible(pattern["regex"]))
    best = [{one["layer"]: one for one in run["best"]} for run in pattern["runs"]]
    rows: list[Sequence[Any] | None] = []
    for layer in sorted(set(itertools.chain(*best))):
        cells = [str(layer)]
        for of_run in best:
            one = of_run.get(layer)
            cells += ["", ""] if one is None else [str(one["neuron"]), _interval(one, "f1", "{:.3f}")]
        rows.append(cells)
    heads = ["layer", *itertools.chain(*([name, "F1"] for name in names))]
    output.console.print(shared.table(heads, rows, title=title))
    output.say(
        "the neuron of a layer with the highest F1 on one half of the documents, and its F1 on the other "
        "half at the same threshold"
    )
    rows = []
    for name, run in zip(names, pattern["runs"], strict=True):
        (chosen,) = run["ablation"]["sets"]
        changes = [_interval(one, "value", "{:+.3f}") for one in chosen["change"].values()]
        rows.append([name, *changes, f"{chosen['p_value']:.2g}"])
    heads = ["without", *pattern["runs"][0]["ablation"]["tokens"], "p"]
    output.console.print(shared.table(heads, rows, left=["without"]))
    n = len(pattern["runs"][0]["ablation"]["sets"][0]["neurons"])
    output.say(
        f"change of the loss, nats per token, without the {n} neurons of the highest F1 on the first half; "
        "p: share of random sets in which targets rise as far above elsewhere (topklm neurons ablate)"
    )


def _show_cards(output: Output, cards: Sequence[dict[str, Any]]) -> None:
    """Prints the measures of the runs' own neurons, a column for each layer."""
    # They need packages of the extra.
    from topklm.commands import neurons_card  # noqa: PLC0415
    from topklm.neurons import card as card_lib  # noqa: PLC0415

    layers = [
        (f"{card['run']} {layer['layer']}", layer)
        for card in cards
        for basis in card["bases"]
        if basis["name"] == "own"
        for layer in basis["layers"]
    ]
    rows = [
        [one.title, *(neurons_card.cell(layer.get(one.name), one.text) for _, layer in layers)]
        for one in card_lib.MEASURES
    ]
    heads = ["readability card", *(name for name, _ in layers)]
    output.console.print(shared.table(heads, rows, left=heads[:1]))
    output.say("medians over neurons of a layer, ±: half of a 95 % interval (topklm neurons card)")


def _interval(one: dict[str, Any], name: str, text: str) -> str:
    figures = [one[key] for key in (name, "low", "high")]
    if any(figure is None or math.isnan(figure) for figure in figures):
        return "-"
    value, low, high = (text.format(figure) for figure in figures)
    return f"{value}\n[{low}, {high}]"
