"""`topklm neurons ablate-set`: measures the losses of two texts without some neurons."""

import argparse
from collections.abc import Sequence
import dataclasses
import re
from typing import Any

import jax
import numpy as np
import rich.table

from topklm.commands import shared, steer_args, text_pair
from topklm.commands.shared import Output
from topklm.commands.text_pair import Text
from topklm.errors import UserError
from topklm.inference.interventions import Intervention, save_interventions
from topklm.inference.language_model import LanguageModel
from topklm.neurons import ablate_set
from topklm.neurons import contrast as contrast_lib
from topklm.neurons.ablate_set import AblatedLosses, Neuron, Outcome, Scored
from topklm.neurons.display import visible
from topklm.progress import Progress

DESCRIPTION = (
    "Chooses the neurons that are active more often in one text than in another, on half of the documents, "
    "ablates them, and reports the losses of the other half: of the text to be forgotten, and of the one to "
    "be retained. Beside them stand random sets of as many neurons of the same layers and densities."
)
EXAMPLE = "topklm neurons ablate-set runs/books --forget sea.jsonl --retain house.jsonl --neurons 8,32"

FLAGS = ("forget", "retain")
TOKENS = 50_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    what = zip(FLAGS, ("text to be forgotten", "text to be known as before"), strict=True)
    text_pair.add_arguments(parser, list(what), TOKENS)
    parser.add_argument(
        "--neurons",
        type=_numbers,
        default=(8, 32),
        metavar="N,...",
        help="how many are ablated, of all layers together; default 8,32",
    )
    parser.add_argument(
        "--random-sets", type=int, default=20, metavar="R", help="for each number; default %(default)s"
    )
    parser.add_argument(
        "--save", metavar="FILE", help="write the chosen set as interventions, for generate --steer-file"
    )


def run(arguments: argparse.Namespace) -> None:
    """Carries the verb out."""
    text_pair.check(arguments, FLAGS, ("tokens", "permutations", "random_sets", "keep"))
    if arguments.save is not None and len(arguments.neurons) > 1:
        given = ",".join(map(str, arguments.neurons))
        raise UserError(f"--save with --neurons = {given}: one set is saved; give one number")
    output = Output(arguments.json)
    progress = output.progress
    model, mesh = text_pair.load(arguments)
    texts = text_pair.read(arguments, FLAGS, model)
    for text in texts:
        if len(text.documents) < 2:
            raise UserError(
                f"--{text.flag} = {text.source}: is one document: neurons are chosen on some and scored on "
                "others; give two or more, a line each of a .jsonl file say"
            )
    parts = [ablate_set.halves(len(text.documents), arguments.seed) for text in texts]
    chosen_on, scored_on = (
        [[text.documents[i] for i in part[half]] for text, part in zip(texts, parts, strict=True)]
        for half in (0, 1)
    )
    both = [ids for documents in chosen_on for ids in documents]
    counts = text_pair.count(model, mesh, both, progress, arguments.keep)
    found = contrast_lib.contrast(
        counts.active,
        counts.n_tokens,
        np.arange(len(both)) < len(chosen_on[0]),
        permutations=arguments.permutations,
        seed=arguments.seed,
    )
    ranked = contrast_lib.ranked(found, counts.layers, layer=arguments.layer)
    # Both texts count alike, however long they are.
    density = found.frequency.mean(axis=0)
    with shared.arguments_are_flags(arguments):
        sets = [ablate_set.strongest(ranked, number, arguments.by) for number in arguments.neurons]
        scored, outcomes = _measure(model, mesh, scored_on, sets, density, counts.layers, arguments, progress)
    q_values = {(r.layer, r.neuron): r.q_value for r in ranked}
    if arguments.save is not None:
        entries = [Intervention(layer, neuron, mode="ablate") for layer, neuron in sets[0]]
        save_interventions(arguments.save, entries, model=steer_args.name_of(model))
    documents = {"chosen_on": [len(d) for d in chosen_on], "scored_on": [len(d) for d in scored_on]}
    facts = {
        "run": arguments.run,
        "step": model.step,
        **{text.flag: text.facts() for text in texts},
        "documents_of_forget_and_retain": documents,
        "by": arguments.by,
        "seed": arguments.seed,
        "keep": arguments.keep,
        "forget_loss": _mean(scored.forget_before, scored.forget),
        "retain_loss": _mean(scored.retain_before, scored.retain),
        "warnings": text_pair.warnings(texts),
        "sets": [_as_json(one, q_values) for one in outcomes],
    }

    def show() -> None:
        _print(output, texts, scored, outcomes, q_values)
        if arguments.save is not None:
            output.say(f"wrote {arguments.save}: {len(sets[0])} neurons, mode ablate")

    output.give(facts, show)


def _measure(
    model: LanguageModel,
    mesh: jax.sharding.Mesh,
    documents: Sequence[Sequence[np.ndarray]],
    sets: Sequence[Sequence[Neuron]],
    density: np.ndarray,
    layers: Sequence[int],
    arguments: argparse.Namespace,
    progress: Progress,
) -> tuple[Scored, list[Outcome]]:
    forget, retain = (
        AblatedLosses(
            model.config.model, model.params, mesh, of_text, separator_id=model.tokenizer.separator_id
        )
        for of_text in documents
    )
    n_tokens = int(forget.n_tokens.sum() + retain.n_tokens.sum())
    total = n_tokens * (1 + len(sets) * (1 + arguments.random_sets))
    with progress.phase("measuring losses", total) as tell:

        def report(tokens: int) -> None:
            tell(tokens, 0, tokens)

        before = (text.sums(report=report) for text in (forget, retain))
        scored = Scored(forget, retain, *before)
        return scored, ablate_set.measure(
            scored,
            sets,
            density,
            layers,
            n_random=arguments.random_sets,
            seed=arguments.seed,
            report=report,
        )


def _mean(sums: np.ndarray, text: AblatedLosses) -> float:
    return float(sums.sum() / text.n_tokens.sum())


def _as_json(outcome: Outcome, q_values: dict[Neuron, float]) -> dict[str, Any]:
    chosen = outcome.chosen
    return {
        "n_neurons": len(chosen.neurons),
        **dataclasses.asdict(chosen),
        "q_values": [q_values[neuron] for neuron in chosen.neurons],
        "random": {
            "sets": len(outcome.random),
            "density": outcome.spread("density").mean,
            "forget": dataclasses.asdict(outcome.spread("forget")),
            "retain": dataclasses.asdict(outcome.spread("retain")),
        },
        "p_value": outcome.p_value,
    }


def _print(
    output: Output,
    texts: Sequence[Text],
    scored: Scored,
    outcomes: Sequence[Outcome],
    q_values: dict[Neuron, float],
) -> None:
    for text, part in zip(texts, (scored.forget, scored.retain), strict=True):
        n_chosen_on = len(text.documents) - len(part.n_tokens)
        output.say(
            f"{text.flag}: {visible(text.source)}: neurons are chosen on {n_chosen_on:,} documents, losses "
            f"are of {len(part.n_tokens):,} others, {part.n_tokens.sum():,} tokens"
        )
    before = _mean(scored.forget_before, scored.forget), _mean(scored.retain_before, scored.retain)
    table = rich.table.Table()
    table.add_column("ablated")
    for column in ("density", "forget", "change", "95 %", "retain", "change", "95 %"):
        table.add_column(column, justify="right")
    table.add_row("nothing", "", f"{before[0]:.3f}", "", "", f"{before[1]:.3f}")
    for outcome in outcomes:
        chosen, n = outcome.chosen, len(outcome.chosen.neurons)
        table.add_section()
        table.add_row(
            f"{n} chosen",
            f"{chosen.density:.2%}",
            *_cells(before[0], chosen.forget, *chosen.forget_interval),
            *_cells(before[1], chosen.retain, *chosen.retain_interval),
        )
        density = outcome.spread("density").mean
        random = [dataclasses.astuple(outcome.spread(text)) for text in ("forget", "retain")]
        cells = [cell for loss, spread in zip(before, random, strict=True) for cell in _cells(loss, *spread)]
        table.add_row(f"{n} random, {len(outcome.random)} sets", f"{density:.2%}", *cells)
    output.console.print(table)
    output.say(
        "losses and changes in nats per token; density: mean share of tokens at which a neuron of the set is "
        "active; 95 %: of chosen sets by bootstrap over documents, of random ones where 95 % of the sets lie"
    )
    for outcome in outcomes:
        chosen = outcome.chosen
        layers = [layer for layer, _ in chosen.neurons]
        n_by_layer = ", ".join(f"{layers.count(layer)} of layer {layer}" for layer in sorted(set(layers)))
        n_sure = sum(q_values[neuron] <= 0.05 for neuron in chosen.neurons)
        n_as_large = sum(one.gap >= chosen.gap for one in outcome.random)
        output.say(
            f"{len(layers)} chosen: {n_by_layer}; {n_sure} with q at most 0.05; forget less retain: "
            f"{chosen.gap:+.3f}, as large in {n_as_large} of {len(outcome.random)} random sets "
            f"(p {outcome.p_value:.2g})"
        )
    for line in text_pair.warnings(texts):
        output.say(f"note: {line}")


def _cells(before: float, change: float, low: float, high: float) -> tuple[str, str, str]:
    return f"{before + change:.3f}", f"{change:+.3f}", f"{low:+.3f} to {high:+.3f}"


def _numbers(text: str) -> tuple[int, ...]:
    """Reads "8,32"."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,9}", part) and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: must be whole numbers, 1 or more, with commas between")
    return tuple(dict.fromkeys(map(int, parts)))
