"""`topklm neurons ablate`: the loss at the tokens of a pattern, and elsewhere, without some neurons."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import TYPE_CHECKING, Any

from rich.text import Text

from topklm.commands import shared
from topklm.commands.shared import Output, Verb
from topklm.errors import UserError, visible
from topklm.imports import when_used
from topklm.inference.interventions import Intervention, load_interventions, save_interventions

with when_used():
    from topklm.neurons import ablate_targets, dictionary, search
    from topklm.steering import survey

if TYPE_CHECKING:
    from topklm.inference.language_model import LanguageModel
    from topklm.neurons.ablate_set import Change, Neuron, Outcome
    from topklm.neurons.ablate_targets import Plan
    from topklm.neurons.search import StoredText
    from topklm.neurons.store import Store

_OF_REGEX = ("count", "layers", "ends", "save")


def _add_ablate(parser: argparse.ArgumentParser) -> None:
    add = shared.flags(parser, "run")
    either = shared.flags(parser.add_mutually_exclusive_group(required=True))
    either("--neurons L:N,...", "ablate these, e.g. 2:106,1:106")
    either("--set FILE", "ablate those of a file of interventions, of topklm neurons select say")
    text = "ablate the neurons that tell its matches best, chosen on one half of the documents"
    either("--regex PATTERN", text)
    add("--targets PATTERN", "tokens whose loss is looked at; default --regex")
    add("--count N,...", "--regex: how many are ablated, of all layers; default 4", type=shared.counts)
    shared.flags(parser, "layers", "case", "ends")
    add("--tokens N", "of the documents that are measured, at most", 50_000)
    add("--random-sets R", "for each set", 10)
    add("--save FILE", "--regex: write the chosen set as interventions, for generate --steer-file")
    shared.flags(parser, "seed", "step", "json")


def _ablate(arguments: argparse.Namespace) -> None:
    if arguments.regex is None:
        shared.check_goes_with(arguments, "regex", *_OF_REGEX)
        if arguments.targets is None:
            raise UserError("--targets is missing: give a pattern of the tokens to look at, such as '\\d+'")
    shared.check_at_least(arguments, 1, "tokens", "random_sets")
    shared.check_at_least(arguments, 0, "seed")
    if arguments.save is not None and len(arguments.count or (1,)) > 1:
        given = ",".join(map(str, arguments.count))
        raise UserError(f"--save with --count = {given}: one set is saved; give one number")
    shared.check_can_write(arguments, "save")
    shared.check_on_disk(arguments.run)
    output = Output(arguments.json)
    model, layout = shared.load(arguments)
    store = shared.open_store(shared.folder_of(model), model)
    dictionary.check_coordinates(store.metadata.dictionary, "ablation")
    with shared.arguments_are_flags(arguments):
        plan = _plan(arguments, model, store)
        text_model = shared.text_model(model, layout)
        with output.progress.phase("measuring losses", plan.n_tokens(arguments.random_sets)) as tell:
            before, outcomes = plan.measure(
                text_model,
                n_random=arguments.random_sets,
                seed=arguments.seed,
                report=lambda tokens: tell(tokens, 0, tokens),
            )
    if arguments.save is not None:
        entries = [Intervention(layer, neuron, mode="ablate") for layer, neuron in plan.sets[0]]
        save_interventions(arguments.save, entries, model=shared.name_of(model))
    facts = {
        "run": arguments.run,
        "step": model.step,
        "regex": arguments.regex,
        "targets": _targets(arguments),
        "source": store.metadata.source,
        **facts_of(plan, before, outcomes),
    }

    def show() -> None:
        show_outcomes(output, plan, before, outcomes, _targets(arguments))
        if arguments.save is not None:
            output.say(f"wrote {arguments.save}: {len(plan.sets[0])} neurons, mode ablate")

    output.give(facts, show)


def _targets(arguments: argparse.Namespace) -> str:
    return arguments.regex if arguments.targets is None else arguments.targets


def _plan(arguments: argparse.Namespace, model: LanguageModel, store: Store) -> Plan:
    text: StoredText = search.StoredText(store, model.tokenizer)
    targets = text.matches(_targets(arguments), ignore_case=not arguments.case)
    if arguments.regex is None:
        neurons: Sequence[Neuron] | None = shared.neurons(arguments.neurons)
        if arguments.set is not None:
            entries = load_interventions(arguments.set, model.cfg)
            neurons = [(entry.layer, entry.neuron) for entry in entries]
        if not neurons:
            raise UserError("--set holds no neuron" if arguments.set else "--neurons names none; give some")
        return ablate_targets.given(store, [neurons], targets, tokens=arguments.tokens)
    matches = text.matches(arguments.regex, ignore_case=not arguments.case)
    return ablate_targets.chosen(
        store,
        matches.ends if arguments.ends else matches.touched,
        targets,
        counts=arguments.count or (4,),
        tokens=arguments.tokens,
        layers=arguments.layers,
        seed=arguments.seed,
    )


def facts_of(plan: Plan, before: Mapping[str, float], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Returns what was measured, for JSON; figures that there are no tokens for are null."""
    return survey.without_nan(
        {
            "documents": {"chosen_on": plan.n_chosen_on, "measured_on": len(plan.documents)},
            "tokens": {name: int(of.sum()) for name, of in plan.groups.items()},
            "loss": before,
            "sets": [
                {
                    **_change(outcome.chosen),
                    "f1": [plan.ranked[n].f1 for n in outcome.chosen.neurons if n in plan.ranked],
                    "random": [_change(one) for one in outcome.random],
                    "p_value": outcome.p_value,
                }
                for outcome in outcomes
            ],
        }
    )


def _change(change: Change) -> dict[str, Any]:
    return {
        "neurons": change.neurons,
        "density": change.density,
        "change": {name: dataclasses.asdict(one) for name, one in change.groups.items()},
    }


def show_outcomes(
    output: Output,
    plan: Plan,
    before: Mapping[str, float],
    outcomes: Sequence[Outcome],
    targets: str,
) -> None:
    """Prints what was measured as a table, and what its figures are."""
    n_tokens = {name: int(of.sum()) for name, of in plan.groups.items()}
    said = "; neurons were given, and may have been chosen on this text"
    if plan.n_chosen_on:
        said = f", neurons are chosen on {plan.n_chosen_on:,} others"
    output.say(f"losses of {len(plan.documents):,} documents{said}; targets match {visible(targets)}")
    rows: list[Sequence[Any] | None] = [
        ["tokens", "", *(f"{n:,}" for n in n_tokens.values())],
        ["loss, nats", "", *(f"{loss:.3f}" for loss in before.values())],
    ]
    for outcome in outcomes:
        neurons = outcome.chosen.neurons
        found = [_cell(one.value, one.low, one.high) for one in outcome.chosen.groups.values()]
        spreads = [outcome.spread(name) for name in before]
        by_chance = [_cell(one.mean, one.low, one.high) for one in spreads]
        names = " ".join(f"{layer}:{neuron}" for layer, neuron in neurons[:8])
        names += f" +{len(neurons) - 8}" if len(neurons) > 8 else ""
        rows += [
            None,
            [Text(names), f"{outcome.chosen.density:.2%}", *found],
            [
                f"{len(neurons)} random, {len(outcome.random)} sets",
                f"{outcome.random_density:.2%}",
                *by_chance,
            ],
        ]
    output.console.print(shared.table(["without", "density", *n_tokens], rows, left=["without"]))
    output.say(
        "change of the loss in nats per token; in brackets 95 % by bootstrap over documents, of random sets "
        "where 95 % of them lie; targets after targets are a part of the targets; density: mean share of "
        "tokens at which a neuron of the set is active"
    )
    for outcome in outcomes:
        output.say(
            f"{len(outcome.chosen.neurons)} neurons, targets less elsewhere: {outcome.chosen.gap:+.3f}, as "
            f"large in {outcome.n_as_large} of {len(outcome.random)} random sets (p {outcome.p_value:.2g})"
        )


def _cell(change: float, low: float, high: float) -> str:
    return "-" if math.isnan(change) else f"{change:+.3f}\n[{low:+.3f}, {high:+.3f}]"


ABLATE = Verb(
    "what a model loses at the tokens of a pattern without some neurons",
    "Sets neurons to 0 at every token, and reports by how much the loss rises at the tokens that match a "
    "pattern, at others right after them, and elsewhere, beside random sets of as many neurons of the same "
    "layers and densities. The text is that of topklm neurons harvest.",
    'topklm neurons ablate runs/small --regex "\\d+" --count 1,4',
    _add_ablate,
    _ablate,
)
