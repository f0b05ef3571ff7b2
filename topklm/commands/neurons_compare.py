"""`topklm neurons contrast` and `ablate-set`: two texts, the neurons that tell them apart, and their loss."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
from pathlib import Path
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from topklm.commands import shared
from topklm.commands.shared import LabelOf, Output, Verb
from topklm.data.dataset import SPLITS
from topklm.errors import UserError, visible
from topklm.imports import when_used
from topklm.inference.interventions import Intervention, save_interventions
from topklm.neurons import contrast as contrast_lib
from topklm.neurons.contrast import Contrast, ContrastedNeuron
from topklm.progress import Progress

with when_used():
    from topklm.neurons import ablate_set
    from topklm.neurons import documents as documents_lib
    from topklm.neurons import harvest as harvest_lib

if TYPE_CHECKING:
    from topklm.inference.language_model import LanguageModel
    from topklm.neurons.ablate_set import Neuron, Outcome
    from topklm.neurons.documents import TextModel
    from topklm.neurons.harvest import UnitCounts

WINDOW = 64  # tokens
_TEXT = "files, globs, URLs of text (.txt, .jsonl, .parquet, ...), or a prepared folder"


@dataclasses.dataclass(frozen=True, eq=False)
class ComparedText:
    """Documents that a user named."""

    name: str  # the text's, "positive" say
    flag: str  # which names the documents, without dashes
    source: str  # as it was written
    documents: Sequence[np.ndarray]  # token ids of each, int32[n], none empty and no two the same
    facts: dict[str, Any]  # for --json
    warnings: list[str]  # the parts that were not read, a line each

    def wrong(self, text: str) -> UserError:
        """Returns the error of its flag."""
        return UserError(text, field=f"--{self.flag}", value=self.source)


def text_flags(
    parser: argparse.ArgumentParser, texts: Mapping[str, str], tokens: int, split: str = "heldout"
) -> Callable[..., None]:
    """Declares the flags of both texts; returns a function for others."""
    add = shared.flags(parser, "run", "layers", "seed", "step", "json", "case")
    for flag, what in texts.items():
        either = shared.flags(parser.add_mutually_exclusive_group())
        either(f"--{flag} TEXT", f"{what}: {_TEXT}")
        either(f"--{flag}-regex PATTERN", f"{what}: documents of the run's own data that match")
    add("--split", "of the run's own data", split, choices=SPLITS)
    add("--tokens N", "read at most so many of each text", tokens)
    return add


def _flags(parser: argparse.ArgumentParser, texts: Mapping[str, str], tokens: int) -> Callable[..., None]:
    """Declares the flags of both texts and of their contrast; returns a function for others."""
    add = text_flags(parser, texts, tokens)
    text = "of a Base LM: a neuron counts as active where it is among the K largest; default: above 0"
    add("--keep K", text, int)
    add(
        "--by",
        "which neurons come first: by the difference of frequencies, or by that in standard deviations "
        "(score), which puts rare neurons before those that are active everywhere",
        "difference",
        choices=contrast_lib.ORDERS,
    )
    text = "ways to deal the documents to the two texts again"
    add("--permutations N", text, contrast_lib.PERMUTATIONS)
    return add


def open_texts(
    arguments: argparse.Namespace, flags: tuple[str, str], *counts: str
) -> tuple[LanguageModel, TextModel, tuple[ComparedText, ComparedText]]:
    """Checks the flags, loads the model onto all devices of this host, and reads both texts.

    Of the arguments, `flags` name the texts, and `counts` must be 1 or more, besides those of all verbs.
    """
    shared.check_at_least(arguments, 1, "tokens", *counts)
    shared.check_at_least(arguments, 0, "seed")
    both = f"--{flags[0]} and --{flags[1]}"
    patterns = _patterns(arguments, flags)
    if patterns is None:
        one, other = (getattr(arguments, flag) for flag in flags)
        if _resolved(one) == _resolved(other):
            raise UserError(f"{both} are both {one}: give two texts that differ")
    model, layout = shared.load(arguments)
    _, layers = harvest_lib.kind_and_layers(model.cfg)
    if not set(arguments.layers or ()) <= set(layers):
        what = "TopK layers" if model.cfg.n_topk_layers else "layers"
        allowed = f"{what}, from {layers[0]} to {layers[-1]}"
        raise UserError(field="--layers", value=",".join(map(str, arguments.layers)), allowed=allowed)
    texts = _text(arguments, flags, 0, patterns, model), _text(arguments, flags, 1, patterns, model)
    known, again = ({ids.tobytes() for ids in text.documents} for text in texts)
    if common := known & again:
        raise UserError(
            f"{both} have {len(common):,} documents in common: each must be in one text only; leave them "
            "out of the other"
        )
    return model, shared.text_model(model, layout), texts


def _resolved(source: str) -> str:
    with contextlib.suppress(OSError, RuntimeError):  # too long for a name; nobody's home is known
        path = Path(source).expanduser()
        return str(path.resolve()) if path.exists() else source
    return source


_Patterns = tuple[re.Pattern[str] | None, re.Pattern[str] | None]


def _patterns(arguments: argparse.Namespace, flags: tuple[str, str]) -> _Patterns | None:
    """Compiles one or both patterns that tell the run's documents apart; None where texts are given."""
    texts = [getattr(arguments, flag) for flag in flags]
    regexes = [getattr(arguments, f"{flag}_regex") for flag in flags]
    if regexes == [None, None]:
        shared.check_goes_with(arguments, f"{flags[0]}_regex", "case")
        for flag, text in zip(flags, texts, strict=True):
            if text is None:
                raise UserError(
                    f"--{flag} is missing: give text, or --{flags[0]}-regex of the run's own data"
                )
        return None
    if regexes[0] is None or texts[1] is not None:
        raise UserError(
            f"--{flags[0]}-regex and --{flags[1]}-regex go together, of the run's own data; the second may "
            "be left out: all that does not match"
        )
    one, other = (
        None if regex is None else shared.compiled(arguments, f"{flag}_regex")
        for flag, regex in zip(flags, regexes, strict=True)
    )
    return one, other


def _text(
    arguments: argparse.Namespace,
    flags: tuple[str, str],
    number: int,
    patterns: _Patterns | None,
    model: LanguageModel,
) -> ComparedText:
    """Reads the text of one of the two flags."""
    flag, data = flags[number], model.config.data
    if patterns is None:
        source = getattr(arguments, flag)
        documents = documents_lib.open_documents(model.tokenizer, data, source, flag=f"--{flag}")
        return _read(flag, flag, source, documents, arguments.tokens)
    own = documents_lib.open_documents(model.tokenizer, data, None, arguments.split)
    pattern, other = patterns[number], patterns[1 - number]
    source = pattern.pattern if pattern else f"all but {getattr(arguments, f'{flags[0]}_regex')}"
    matching = documents_lib.Matching(own, model.tokenizer, pattern, other)
    return _read(flag, f"{flag}-regex", source, matching, arguments.tokens)


def _read(
    name: str, flag: str, source: str, documents: documents_lib.Documents, most_tokens: int
) -> ComparedText:
    taken: dict[bytes, np.ndarray] = {}
    left, n_repeated, is_whole = most_tokens, 0, True
    for ids in filter(len, documents):
        if not left:
            is_whole = False
            break
        part = np.asarray(ids[:left], np.int32)
        is_whole &= len(part) == len(ids)
        if part.tobytes() in taken:
            n_repeated += 1
        else:
            taken[part.tobytes()] = part
            left -= len(part)
    if not taken:
        raise documents_lib.no_text(documents, f"--{flag} = {source}")
    unreadable = {reason: n for reason, n in documents.left_out.items() if reason != documents_lib.COPY}
    n_repeated += documents.left_out.get(documents_lib.COPY, 0)
    n_tokens = most_tokens - left
    facts = {
        "source": source,
        "documents": len(taken),
        "tokens": n_tokens,
        "repeated_documents_left_out": n_repeated,
        "unreadable_documents_left_out": unreadable,
        "is_whole": is_whole,
    }
    warnings = []
    if n_repeated:
        warnings.append(f"--{flag}: {n_repeated:,} repeated documents are left out")
    if unreadable:
        warnings.append(f"--{flag}: left out: {documents_lib.described(unreadable)}")
    if not is_whole:
        warnings.append(f"--{flag}: only the first {n_tokens:,} tokens are read (--tokens)")
    return ComparedText(name, flag, source, [*taken.values()], facts, warnings)


def halves_of(texts: Sequence[ComparedText], seed: int) -> Iterator[list[list[np.ndarray]]]:
    """Yields of each text the documents to choose on, and those to score on; UserError for one document."""
    for text in texts:
        if len(text.documents) < 2:
            raise text.wrong(
                "is one document: neurons are chosen on some and scored on others; give two or more, a line "
                "each of a .jsonl file say"
            )
    parts = [ablate_set.halves(len(text.documents), seed) for text in texts]
    for half in (0, 1):
        yield [[text.documents[i] for i in part[half]] for text, part in zip(texts, parts, strict=True)]


def _contrast_of(
    arguments: argparse.Namespace,
    model: TextModel,
    texts: Sequence[Sequence[np.ndarray]],
    progress: Progress,
    piece: int | None = None,
) -> tuple[UnitCounts, Contrast]:
    """Reads the activations of documents, in pieces or whole, and compares the two texts."""
    shared.check_keep(model.config, arguments.keep)
    documents = [ids for text in texts for ids in text]
    with progress.phase_of_tokens("reading activations", sum(map(len, documents))) as report:
        counts = harvest_lib.count(
            model,
            documents,
            keep=arguments.keep,
            piece=piece,
            report=report,
        )
    n_positive = len(harvest_lib.unit_sizes([len(ids) for ids in texts[0]], piece))
    found = contrast_lib.contrast(
        counts.active,
        counts.n_tokens,
        np.arange(len(counts.n_tokens)) < n_positive,
        permutations=arguments.permutations,
        seed=arguments.seed,
    )
    return counts, found


_CONTRASTED = ("positive", "negative")


def _add_contrast(parser: argparse.ArgumentParser) -> None:
    texts = {"positive": "text in which neurons are sought", "negative": "what it is compared with"}
    add = _flags(parser, texts, 200_000)
    add("--top N", "neurons of each layer", 10)
    add(
        "--unit",
        "what is dealt again: documents, or windows of them where a text is one document (auto); "
        "neighbouring windows are alike, so their p-values are too low",
        "auto",
        choices=("auto", "document", "window"),
    )
    add("--window N", "tokens of a window", WINDOW)


def _contrast(arguments: argparse.Namespace) -> None:
    output = Output(arguments.json)
    model, text_model, texts = open_texts(arguments, _CONTRASTED, "permutations", "keep", "top", "window")
    unit = arguments.unit
    if unit == "auto":
        unit = "document" if min(len(text.documents) for text in texts) > 1 else "window"
    piece = arguments.window if unit == "window" else None
    for text in texts:
        n = len(harvest_lib.unit_sizes([len(ids) for ids in text.documents], piece))
        if n < 2 and unit == "document":
            raise text.wrong("is one document: give more documents, or --unit window")
        if n < 2:
            raise text.wrong(
                f"{len(text.documents):,} documents, {text.facts['tokens']:,} tokens: makes {n} windows of "
                f"{piece} tokens, must be 2 or more: give more text, or a smaller --window"
            )
    documents = [text.documents for text in texts]
    counts, found = _contrast_of(arguments, text_model, documents, output.progress, piece)
    ranked = contrast_lib.ranked(
        found, counts.layers, only=arguments.layers, top=arguments.top, by=arguments.by
    )
    labels = shared.labels_of(model)
    warnings = [line for text in texts for line in text.warnings]
    if unit == "window":
        warnings.append(
            "windows of one document are alike, and counted as if they were not: p-values are too low"
        )
    if found.lowest_p_value > 0.05:
        warnings.append(
            f"there are only {found.n_permutations:,} ways to deal {sum(found.n_units)} {unit}s: no p-value "
            f"can be below {found.lowest_p_value:.2g}; give more"
        )

    def show() -> None:
        _print_contrast(output, texts, unit, found, ranked, labels)
        for line in warnings:
            output.say(f"note: {line}")

    facts = {
        "run": arguments.run,
        "step": model.step,
        **{text.name: {**text.facts, "units": n} for text, n in zip(texts, found.n_units, strict=True)},
        "by": arguments.by,
        "unit": unit,
        "window": piece,
        "keep": arguments.keep,
        "permutations": found.n_permutations,
        "is_exact": found.is_exact,
        "lowest_p_value": found.lowest_p_value,
        "n_tested": found.n_tested,
        "warnings": warnings,
        "neurons": shared.with_labels(ranked, labels),
    }
    # Its digest is for `topklm neurons select --contrast-json`.
    output.give(facts, show, seal=True)


def _print_contrast(
    output: Output,
    texts: Sequence[ComparedText],
    unit: str,
    found: Contrast,
    ranked: Sequence[ContrastedNeuron],
    labels: LabelOf,
) -> None:
    for text, n_units, n_tokens in zip(texts, found.n_units, found.n_tokens, strict=True):
        output.say(f"{text.name}: {visible(text.source)}: {n_units:,} {unit}s, {n_tokens:,} tokens")
    cells = [
        [
            f"{r.frequency_positive:.2%}",
            f"{r.frequency_negative:.2%}",
            f"{r.difference:+.2%}",
            f"{r.score:+.1f}",
            *(f"{p:.2g}" for p in (r.p_value, r.q_value, r.family_p_value)),
        ]
        for r in ranked
    ]
    heads = ("pos", "neg", "diff", "score", "p", "q", "p fw")
    output.console.print(shared.table_of_neurons(heads, ranked, cells, labels, by_layer=True))
    how = "all" if found.is_exact else "drawn"
    output.say(
        "pos, neg: share of the tokens of the positive and the negative text at which the neuron is active; "
        "diff: their difference; score: that in "
        f"standard deviations; p: share of {found.n_permutations:,} ways ({how}) to deal the {unit}s to the "
        "two texts that are as extreme, of this neuron alone; q: false discovery rate over the "
        f"{found.n_tested:,} neurons that are active; p fw: family-wise, the share in which the score of any "
        "is as extreme"
    )


_ABLATED = ("forget", "retain")


def _add_ablate_set(parser: argparse.ArgumentParser) -> None:
    texts = {"forget": "text to be forgotten", "retain": "text to be known as before"}
    add = _flags(parser, texts, 50_000)
    text = "how many are ablated, of all layers together; default 8,32"
    add("--count N,...", text, type=shared.counts, default=(8, 32))
    shared.former(parser, "--neurons", "count", shared.counts)
    add("--random-sets R", "for each number", 20)
    add("--save FILE", "write the chosen set as interventions, for generate --steer-file")


def _ablate_set(arguments: argparse.Namespace) -> None:
    if arguments.save is not None and len(arguments.count) > 1:
        given = ",".join(map(str, arguments.count))
        raise UserError(f"--save with --count = {given}: one set is saved; give one number")
    output = Output(arguments.json)
    model, text_model, texts = open_texts(arguments, _ABLATED, "permutations", "keep", "random_sets")
    chosen_on, scored_on = halves_of(texts, arguments.seed)
    counts, found = _contrast_of(arguments, text_model, chosen_on, output.progress)
    ranked = contrast_lib.ranked(found, counts.layers, only=arguments.layers)
    # Both texts count alike, however long they are.
    density = found.frequency.mean(axis=0)
    n_tokens = [sum(map(len, documents)) for documents in scored_on]
    losses = [
        ablate_set.AblatedLosses(text_model, documents, {name: np.ones(n, bool)})
        for name, documents, n in zip(_ABLATED, scored_on, n_tokens, strict=True)
    ]
    with shared.arguments_are_flags(arguments):
        sets = [ablate_set.strongest(ranked, number, arguments.by) for number in arguments.count]
        with output.progress.phase_of_tokens(
            "measuring losses", sum(n_tokens) * (1 + len(sets) * (1 + arguments.random_sets))
        ) as report:
            before, outcomes = ablate_set.measure(
                losses,
                sets,
                density,
                counts.layers,
                n_random=arguments.random_sets,
                seed=arguments.seed,
                report=report,
            )
    if arguments.save is not None:
        entries = [Intervention(layer, neuron, mode="ablate") for layer, neuron in sets[0]]
        save_interventions(arguments.save, entries, model=shared.name_of(model))
    q_values = {(r.layer, r.neuron): r.q_value for r in ranked}
    warnings = [line for text in texts for line in text.warnings]
    facts = {
        "run": arguments.run,
        "step": model.step,
        **{text.name: text.facts for text in texts},
        "documents_of_forget_and_retain": {
            "chosen_on": [len(d) for d in chosen_on],
            "scored_on": [len(d) for d in scored_on],
        },
        "by": arguments.by,
        "seed": arguments.seed,
        "keep": arguments.keep,
        "forget_loss": before["forget"],
        "retain_loss": before["retain"],
        "warnings": warnings,
        "sets": [_set_facts(one, q_values) for one in outcomes],
    }

    def show() -> None:
        for text, documents, n in zip(texts, scored_on, n_tokens, strict=True):
            output.say(
                f"{text.name}: {visible(text.source)}: neurons are chosen on "
                f"{len(text.documents) - len(documents):,} documents, losses are of {len(documents):,} "
                f"others, {n:,} tokens"
            )
        _print_outcomes(output, before, outcomes, q_values)
        for line in warnings:
            output.say(f"note: {line}")
        if arguments.save is not None:
            output.say(f"wrote {arguments.save}: {len(sets[0])} neurons, mode ablate")

    output.give(facts, show)


def _set_facts(outcome: Outcome, q_values: Mapping[Neuron, float]) -> dict[str, Any]:
    chosen = outcome.chosen
    return {
        "n_neurons": len(chosen.neurons),
        "neurons": chosen.neurons,
        "density": chosen.density,
        **{name: chosen.groups[name].value for name in _ABLATED},
        **{f"{name}_interval": (chosen.groups[name].low, chosen.groups[name].high) for name in _ABLATED},
        "q_values": [q_values[neuron] for neuron in chosen.neurons],
        "random": {
            "sets": len(outcome.random),
            "density": outcome.random_density,
            **{name: dataclasses.asdict(outcome.spread(name)) for name in _ABLATED},
        },
        "p_value": outcome.p_value,
    }


def _print_outcomes(
    output: Output,
    before: Mapping[str, float],
    outcomes: Sequence[Outcome],
    q_values: Mapping[Neuron, float],
) -> None:
    forget, retain = (before[name] for name in _ABLATED)
    rows: list[Sequence[str] | None] = [("nothing", "", f"{forget:.3f}", "", "", f"{retain:.3f}")]
    for outcome in outcomes:
        chosen, n, n_random = outcome.chosen, len(outcome.chosen.neurons), len(outcome.random)
        by_chance = [dataclasses.astuple(outcome.spread(text)) for text in _ABLATED]
        found = [dataclasses.astuple(chosen.groups[text]) for text in _ABLATED]
        rows += [
            None,
            (f"{n} chosen", f"{chosen.density:.2%}", *_cells(forget, *found[0]), *_cells(retain, *found[1])),
            (
                f"{n} random, {n_random} sets",
                f"{outcome.random_density:.2%}",
                *_cells(forget, *by_chance[0]),
                *_cells(retain, *by_chance[1]),
            ),
        ]
    heads = ("ablated", "density", "forget", "change", "95 %", "retain", "change", "95 %")
    output.console.print(shared.table(heads, rows, left=["ablated"]))
    output.say(
        "losses and changes in nats per token; density: mean share of tokens at which a neuron of the set is "
        "active; 95 %: of chosen sets by bootstrap over documents, of random ones where 95 % of the sets lie"
    )
    for outcome in outcomes:
        chosen = outcome.chosen
        layers = [layer for layer, _ in chosen.neurons]
        n_by_layer = ", ".join(f"{layers.count(layer)} of layer {layer}" for layer in sorted(set(layers)))
        n_sure = sum(q_values[neuron] <= 0.05 for neuron in chosen.neurons)
        output.say(
            f"{len(layers)} chosen: {n_by_layer}; {n_sure} with q at most 0.05; forget less retain: "
            f"{chosen.gap:+.3f}, as large in {outcome.n_as_large} of {len(outcome.random)} random sets "
            f"(p {outcome.p_value:.2g})"
        )


def _cells(before: float, change: float, low: float, high: float) -> tuple[str, str, str]:
    return f"{before + change:.3f}", f"{change:+.3f}", f"{low:+.3f} to {high:+.3f}"


CONTRAST = Verb(
    "which neurons are more often active in one text than in another",
    "Ranks the neurons of each layer by how much more often they are active in one text than in another, and "
    "says how often chance would come as far: whole documents are dealt to the two texts again. Swap the two "
    "for neurons of the other text. A .txt file is cut into documents of some 16 KiB; where documents are "
    "parts of one book, they are not independent, and p-values are too low.",
    "topklm neurons contrast runs/books --positive sea.jsonl --negative house.jsonl",
    _add_contrast,
    _contrast,
)
ABLATE_SET = Verb(
    "what a model loses of two texts without some neurons",
    "Chooses the neurons that are active more often in one text than in another, on half of the documents, "
    "ablates them, and reports the losses of the other half: of the text to be forgotten, and of the one to "
    "be retained. Beside them stand random sets of as many neurons of the same layers and densities.",
    "topklm neurons ablate-set runs/books --forget sea.jsonl --retain house.jsonl --count 8,32",
    _add_ablate_set,
    _ablate_set,
)
