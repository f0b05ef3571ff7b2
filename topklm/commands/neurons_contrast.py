"""`topklm neurons contrast`: which neurons are active more often in one text than in another."""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np
import rich.text

from topklm.commands import shared, text_pair
from topklm.commands.shared import Output
from topklm.commands.text_pair import Text
from topklm.errors import UserError
from topklm.neurons import contrast as contrast_lib
from topklm.neurons.contrast import Contrast, ContrastedNeuron
from topklm.neurons.display import visible
from topklm.neurons.harvest import unit_sizes
from topklm.storage.files import sealed_json

DESCRIPTION = (
    "Ranks the neurons of each layer by how much more often they are active in one text than in another, and "
    "says how often chance would come as far: whole documents are dealt to the two texts anew. Swap the two "
    "for neurons of the other text. A .txt file is cut into documents of some 16 KiB; where documents are "
    "parts of one book, they are not independent, and p-values are too low."
)
EXAMPLE = "topklm neurons contrast runs/books --positive sea.jsonl --negative house.jsonl"

FLAGS = ("positive", "negative")
UNITS = ("auto", "document", "window")
WINDOW = 64  # tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    what = zip(FLAGS, ("text in which neurons are sought", "what it is compared with"), strict=True)
    text_pair.add_arguments(parser, list(what), text_pair.TOKENS)
    parser.add_argument(
        "--top", type=int, default=10, metavar="N", help="neurons of each layer; default %(default)s"
    )
    parser.add_argument(
        "--unit",
        choices=UNITS,
        default="auto",
        help="what is dealt anew: documents, or windows of them where a text is one document (auto); "
        "neighbouring windows are alike, so their p-values are too low; default %(default)s",
    )
    parser.add_argument(
        "--window", type=int, default=WINDOW, metavar="N", help="tokens of a window; default %(default)s"
    )


def run(arguments: argparse.Namespace) -> None:
    """Carries the verb out."""
    text_pair.check(arguments, FLAGS, ("tokens", "top", "permutations", "window", "keep"))
    output = Output(arguments.json)
    model, mesh = text_pair.load(arguments)
    texts = text_pair.read(arguments, FLAGS, model)
    unit = _unit(arguments.unit, texts)
    piece = arguments.window if unit == "window" else None
    n_units = tuple(len(unit_sizes([len(ids) for ids in text.documents], piece)) for text in texts)
    if min(n_units) < 2:
        raise UserError(_too_few(texts, n_units, unit, arguments.window))
    documents = [ids for text in texts for ids in text.documents]
    counts = text_pair.count(model, mesh, documents, output.progress, arguments.keep, piece)
    found = contrast_lib.contrast(
        counts.active,
        counts.n_tokens,
        np.arange(sum(n_units)) < n_units[0],
        permutations=arguments.permutations,
        seed=arguments.seed,
    )
    ranked = contrast_lib.ranked(
        found, counts.layers, layer=arguments.layer, top=arguments.top, by=arguments.by
    )
    labels = text_pair.labels(arguments, model)
    if arguments.json:
        facts = {
            "run": arguments.run,
            "step": model.step,
            **{text.flag: {**text.facts(), "units": n} for text, n in zip(texts, found.n_units, strict=True)},
            "by": arguments.by,
            "unit": unit,
            "window": piece,
            "keep": arguments.keep,
            "permutations": found.n_permutations,
            "is_exact": found.is_exact,
            "lowest_p_value": found.lowest_p_value,
            "n_tested": found.n_tested,
            "warnings": _warnings(texts, unit, found),
        }
        neurons = [{**dataclasses.asdict(r), "label": labels.get((r.layer, r.neuron), "")} for r in ranked]
        # Its digest is for `topklm neurons select --contrast-json`.
        print(sealed_json({**facts, "neurons": neurons}).decode(), end="")
        return
    _print(output, texts, unit, found, ranked, labels)


def _unit(asked: str, texts: Sequence[Text]) -> str:
    if asked != "auto":
        return asked
    return "document" if min(len(text.documents) for text in texts) > 1 else "window"


def _too_few(texts: Sequence[Text], n_units: Sequence[int], unit: str, window: int) -> str:
    number = int(np.argmin(n_units))
    text = texts[number]
    size = f"{len(text.documents):,} documents, {text.n_tokens:,} tokens"
    if unit == "document":
        return f"--{text.flag} = {text.source}: is one document: give more documents, or --unit window"
    return (
        f"--{text.flag} = {text.source}: {size}: makes {n_units[number]} windows of {window} tokens, must be "
        "2 or more: give more text, or a smaller --window"
    )


def _warnings(texts: Sequence[Text], unit: str, found: Contrast) -> list[str]:
    """Lists the reasons to distrust the p-values."""
    lines = text_pair.warnings(texts)
    if unit == "window":
        lines.append(
            "windows of one document are alike, and counted as if they were not: p-values are too low"
        )
    if found.lowest_p_value > 0.05:
        lines.append(
            f"there are only {found.n_permutations:,} ways to deal {sum(found.n_units)} {unit}s: no p-value "
            f"can be below {found.lowest_p_value:.2g}; give more"
        )
    return lines


def _print(
    output: Output,
    texts: Sequence[Text],
    unit: str,
    found: Contrast,
    ranked: Sequence[ContrastedNeuron],
    labels: Mapping[tuple[int, int], str],
) -> None:
    for text, n_units, n_tokens in zip(texts, found.n_units, found.n_tokens, strict=True):
        output.say(f"{text.flag}: {visible(text.source)}: {n_units:,} {unit}s, {n_tokens:,} tokens")
    heads = ("layer", "neuron", *FLAGS, "difference", "score", "p", "q", "family-wise p")
    table = shared.table_of(heads)
    named = any((r.layer, r.neuron) in labels for r in ranked)
    if named:
        table.add_column("label")
    for before, r in zip([None, *ranked], ranked, strict=False):
        if before is not None and before.layer != r.layer:
            table.add_section()
        shares = (f"{share:.2%}" for share in (r.frequency_positive, r.frequency_negative))
        corrected = [f"{r.score:+.1f}", *(f"{p:.2g}" for p in (r.p_value, r.q_value, r.family_p_value))]
        label = [rich.text.Text(visible(labels.get((r.layer, r.neuron), "")))] if named else []
        table.add_row(str(r.layer), str(r.neuron), *shares, f"{r.difference:+.2%}", *corrected, *label)
    output.console.print(table)
    how = "all" if found.is_exact else "drawn"
    output.say(
        "positive, negative: share of the tokens at which the neuron is active; score: the difference in "
        f"standard deviations; p: share of {found.n_permutations:,} ways ({how}) to deal the {unit}s to the "
        "two texts that are as extreme, of this neuron alone; q: false discovery rate over the "
        f"{found.n_tested:,} neurons that are active; family-wise p: share in which the score of any is "
        "as extreme"
    )
    for line in _warnings(texts, unit, found):
        output.say(f"note: {line}")
