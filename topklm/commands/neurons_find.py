"""`topklm neurons find`, `select`, `ablate`: neurons by text, pattern or label, and the loss without some."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import math
from pathlib import Path
import re
from typing import TYPE_CHECKING, Any

import rich.table
from rich.text import Text

from topklm.commands import shared
from topklm.commands.shared import LabelOf, Output, Verb
from topklm.errors import UserError, visible
from topklm.imports import when_used
from topklm.inference.interventions import Intervention, load_interventions, needs_value, save_interventions
from topklm.neurons import SHOWN_PER_LAYER, NeuronsFolder, harvested_steps
from topklm.neurons.labels import Labels
from topklm.storage.files import as_path, local_path

with when_used():
    from topklm.checkpoint import run_folder
    from topklm.data import tokenizer as tokenizer_lib
    from topklm.neurons import ablate_targets, dictionary, search
    from topklm.steering import survey

if TYPE_CHECKING:
    from topklm.data.tokenizer import Tokenizer
    from topklm.inference.language_model import LanguageModel
    from topklm.neurons.ablate_set import Change, Neuron, Outcome
    from topklm.neurons.ablate_targets import Plan
    from topklm.neurons.display import Activation
    from topklm.neurons.search import RankedNeuron, Selected, StoredText
    from topklm.neurons.store import Store

_SHOWN_TEXT = 40  # characters of what was looked for, in a message


def _add_find(parser: argparse.ArgumentParser) -> None:
    add = shared.flags(parser, "run", "step", "case", "ends", "layers", "json")
    add("text TEXT", "show the active neurons of each token of it", nargs="?")
    add("--regex PATTERN", "rank neurons by the tokens that match")
    text = (
        "rank neurons by this token, with or without a space before it; a number is an id, and a number in "
        "double quotes, '\"19\"', the text of one"
    )
    add("--token TOKEN", text)
    add("--top N", "TEXT: strongest neurons of a layer for each token", SHOWN_PER_LAYER)
    add("--limit N", "neurons that are ranked", 20)


def _find(arguments: argparse.Namespace) -> None:
    asked = [a for a in (arguments.text, arguments.regex, arguments.token) if a is not None]
    if len(asked) != 1:
        raise UserError("give one of TEXT, --regex and --token; see topklm neurons find --help")
    if any("\ud800" <= character <= "\udfff" for character in asked[0]):
        raise UserError(f"{_quoted(asked[0])} is no valid UTF-8: give it in UTF-8")
    shared.check_at_least(arguments, 1, "top", "limit")
    if arguments.regex is None:
        shared.check_goes_with(arguments, "regex", "case", "ends")
    if arguments.text is not None:
        _find_in_text(arguments)
    else:
        _find_in_store(arguments)


def _find_in_text(arguments: argparse.Namespace) -> None:
    if not arguments.text:
        raise UserError("TEXT is empty: give at least a character")
    model = shared.load_onto_one_device(arguments.run, arguments.step)
    n_tokens, most = len(model.to_str_tokens(arguments.text)), model.cfg.context_length
    if n_tokens < 2:
        raise UserError(f"TEXT = {_quoted(arguments.text)}: has no tokens; give other text")
    if n_tokens > most:
        raise UserError(
            f"TEXT = {_quoted(arguments.text)}: has {n_tokens - 1:,} tokens, this model reads at most "
            f"{most - 1:,} and the separator; shorten it"
        )
    # The separator that stands before is no part of the text.
    found = model.active_neurons(arguments.text)
    pieces, rows = found.tokens[1:], search.neurons_of_text(found, arguments.layers)[1:]
    labels = shared.labels_of(model)
    tokens = [
        {
            "position": position,
            "token": piece,
            "n_active": [{"layer": layer, "n_active": len(active)} for layer, active in row.items()],
            "neurons": [
                {**one._asdict(), "label": labels.get(one[:2], "")}
                for active in row.values()
                for one in active[: arguments.top]
            ],
        }
        for position, (piece, row) in enumerate(zip(pieces, rows, strict=True))
    ]
    output = Output(arguments.json)
    facts = {"run": arguments.run, "step": model.step, "text": arguments.text, "tokens": tokens}
    output.give(facts, lambda: _print_rows(output, pieces, rows, arguments.top, labels))


def _print_rows(
    output: Output,
    pieces: Sequence[str],
    rows: Sequence[Mapping[int, Sequence[Activation]]],
    top: int,
    labels: LabelOf,
) -> None:
    table = rich.table.Table()
    table.add_column("token", style="cyan", no_wrap=True)
    for layer in rows[0]:
        table.add_column(f"layer {layer}")
    for piece, row in zip(pieces, rows, strict=True):
        cells = [piece]
        for active in row.values():
            shown = []
            for one in active[:top]:
                label = labels.get((one.layer, one.neuron), "")
                shown.append(f"{one.neuron}:{one.value:.3g}" + (f" ({label})" if label else ""))
            more = len(active) - len(shown)
            cells.append(", ".join([*shown, f"+{more}"] if more else shown))
        table.add_row(*(Text(visible(cell)) for cell in cells))
    output.console.print(table)
    output.say("neuron:activation, the strongest first; +N: so many more are active")


def _find_in_store(arguments: argparse.Namespace) -> None:
    folder, store = open_run(arguments.run, arguments.step)
    tokenizer = tokenizer_lib.Tokenizer.load(folder.run / run_folder.TOKENIZER_FILE)
    text, labels = search.StoredText(store, tokenizer), Labels(folder.labels).all()
    if arguments.regex is not None:
        found = text.matches(arguments.regex, ignore_case=not arguments.case)
        what = {"regex": arguments.regex, "ignore_case": not arguments.case}
    else:
        ids = _ids_of(arguments.token, tokenizer)
        of_token = text.tokens_equal(*ids)
        found = search.Matches(int(of_token.sum()), of_token, of_token)
        what = {"token_ids": ids, "tokens": tokenizer.token_strings(ids)}
    matched = found.ends if arguments.ends else found.touched
    n_matched = int(matched.sum())
    ranked = search.rank(store, matched, arguments.limit, arguments.layers)
    facts = {
        "run": arguments.run,
        "step": folder.step,
        **what,
        "counted": "ends" if arguments.ends else "touched",
        "n_tokens": store.n_tokens,
        "n_matches": found.count,
        "n_matched_tokens": n_matched,
        "neurons": shared.with_labels(ranked, labels),
    }
    name = " and ".join(map(_quoted, what.get("tokens", [arguments.regex])))
    share = n_matched / store.n_tokens
    line = f"{name}: {found.count:,} matches, {n_matched:,} of {store.n_tokens:,} tokens ({share:.2%})"
    if not ranked:
        line += "; " + ("no neuron is active there" if n_matched else "nothing to rank neurons by")
    output = Output(arguments.json)
    output.give(facts, lambda: _print_ranked(output, line, share, ranked, labels))


def _print_ranked(
    output: Output, line: str, share: float, ranked: Sequence[RankedNeuron], labels: LabelOf
) -> None:
    output.say(line)
    if not ranked:
        return
    cells = [
        [f"{r.f1:.3f}", f"{r.precision:.3f}", f"{r.recall:.3f}", f"{r.threshold:.3g}", f"{r.n_active:,}"]
        for r in ranked
    ]
    heads = ("F1", "precision", "recall", "firing from", "active at")
    output.console.print(shared.table_of_neurons(heads, ranked, cells, labels))
    output.say(
        "a neuron fires where its activation reaches the threshold that makes its F1 highest here; "
        f"precision: of the tokens at which it fires, the share that matches (by chance {share:.2g}); "
        "recall: of the tokens that match, the share at which it fires"
    )


def open_run(run: str, step: int | None) -> tuple[NeuronsFolder, Store]:
    """Opens the activations of a step of a run, or the newest; UserError if there are none, or damaged."""
    shared.check_on_disk(run)
    path = Path(as_path(run, "RUN"))
    if not path.is_dir():
        raise UserError(f"RUN = {run}: there is no such folder; check the path")
    if step is None:
        if not (steps := harvested_steps(path)):
            raise UserError(f"{run}: there are no activations yet; run topklm neurons harvest {run}")
        step = steps[-1]
    folder = NeuronsFolder(path, step)
    store = shared.open_store(folder)
    if not store.n_tokens:
        raise UserError(f"{folder.store} is empty: run topklm neurons harvest {run}")
    return folder, store


def _ids_of(token: str, tokenizer: Tokenizer) -> list[int]:
    """Finds the tokens that are this text, with and without a space before it; or of this id."""
    if re.fullmatch("[0-9]+", token):
        if len(token.lstrip("0")) > 9 or int(token) >= tokenizer.vocab_size:
            raise UserError(
                f"--token = {token}: ids are from 0 to {tokenizer.vocab_size - 1}; for the text of a number, "
                f"--token '\"{token}\"'"
            )
        return [int(token)]
    if re.fullmatch('"[0-9]+"', token):
        token = token[1:-1]
    if not token:
        raise UserError("--token is empty: give the text of a token, or its id")
    forms = [tokenizer.encode(token), tokenizer.encode(" " + token)]
    ids = sorted({int(form[0]) for form in forms if len(form) == 1})
    if not ids:
        pieces = [_quoted(piece) for piece in tokenizer.token_strings(forms[0][:10])]
        raise UserError(
            f"--token = {_quoted(token)}: is {len(forms[0])} tokens of this model, {', '.join(pieces)}; give "
            "one of them, or use --regex"
        )
    return ids


def _quoted(text: str) -> str:
    return f"'{visible(text if len(text) <= _SHOWN_TEXT else text[:_SHOWN_TEXT] + '...')}'"


def _add_select(parser: argparse.ArgumentParser) -> None:
    add = shared.flags(parser, "run", "layers", "case", "ends", "step", "json")
    add("--regex PATTERN", "those that tell the tokens that match, best first")
    add("--label TEXT", "those whose label holds this")
    add("--contrast-json FILE", "the output of contrast --json: those that came first there")
    add("--top N", "at most", 10)
    add("--min-precision X", "--regex: only neurons of this precision, 0 to 1", float)
    add("--min-recall X", "--regex: only neurons of this recall, 0 to 1", float)
    add("--max-q Q", "--contrast-json: only q-values up to this", float)
    shared.add_mode(add)
    add("--value X", "for all of them; ablate and ban need none, others do", float)
    add("--save FILE", "where to write, e.g. sea.json", required=True)


def _select(arguments: argparse.Namespace) -> None:
    _check_select(arguments)
    mode, value = arguments.mode, arguments.value
    model = shared.load_onto_one_device(arguments.run, arguments.step)
    layers = arguments.layers
    found = (one for one in _chosen(arguments, model) if layers is None or one.layer in layers)
    chosen = list(itertools.islice(found, arguments.top))
    if not chosen:
        raise UserError("no neuron is like that: nothing is written; ask for less")
    entries = [Intervention(one.layer, one.neuron, value or 0.0, mode) for one in chosen]
    for entry in entries:
        with shared.refused_as("--value", value=value):
            entry.check()
        with shared.refused_as(f"neuron {entry.layer}:{entry.neuron}"):
            entry.check(model.cfg)
    save_interventions(arguments.save, entries, model=shared.name_of(model))
    facts = {
        "run": arguments.run,
        "step": model.step,
        "mode": mode,
        "value": value,
        "file": arguments.save,
        "neurons": [dataclasses.asdict(one) for one in chosen],
    }
    output = Output(arguments.json)

    def show() -> None:
        rows = [[str(one.layer), str(one.neuron), Text(visible(one.reason))] for one in chosen]
        heads = ("layer", "neuron", "chosen for")
        output.console.print(shared.table(heads, rows, left=["chosen for"]))
        said = "" if value is None else f", value {value:g}"
        output.say(f"wrote {arguments.save}: {len(chosen)} neurons, mode {mode}{said}")

    output.give(facts, show)


def _check_select(arguments: argparse.Namespace) -> None:
    by = [name for name in ("regex", "label", "contrast_json") if getattr(arguments, name) is not None]
    if len(by) != 1:
        raise UserError("give one of --regex, --label and --contrast-json; see topklm neurons select --help")
    if arguments.regex is None:
        shared.check_goes_with(arguments, "regex", "min_precision", "min_recall", "case", "ends")
    if arguments.contrast_json is None:
        shared.check_goes_with(arguments, "contrast_json", "max_q")
    for name in ("min_precision", "min_recall", "max_q"):
        if (share := getattr(arguments, name)) is not None and not 0 <= share <= 1:
            raise shared.wrong(arguments, name, allowed="from 0 to 1")
    shared.check_at_least(arguments, 1, "top")
    if arguments.label == "":
        raise UserError("--label is empty: give a part of a label")
    if (arguments.value is None) == needs_value(arguments.mode):
        needs = "needs --value, a number" if arguments.value is None else "needs no --value; leave it out"
        raise shared.wrong(arguments, "mode", needs)
    shared.check_on_disk(arguments.run, "activations and labels are kept on a disk; copy the run to one")


def _chosen(arguments: argparse.Namespace, model: LanguageModel) -> list[Selected]:
    folder = shared.folder_of(model)
    if arguments.label is not None:
        return search.by_label(Labels(folder.labels).all(), arguments.label)
    if arguments.contrast_json is not None:
        path, max_q = local_path(arguments.contrast_json, "--contrast-json"), arguments.max_q
        step, found = search.read_contrast(path, 1.0 if max_q is None else max_q)
        if step != model.step:
            text = f"is of step {step}, this checkpoint of {model.step}"
            advice = f"give --step {step}, or contrast again"
            raise shared.wrong(arguments, "contrast_json", text, advice=advice)
        return found
    store = shared.open_store(folder, model)
    if store.metadata.kind not in ("topk", "dense"):
        raise UserError(
            f"{folder.store} holds codes of a dictionary, which no intervention can set: harvest without one"
        )
    matches = search.StoredText(store, model.tokenizer).matches(
        arguments.regex, ignore_case=not arguments.case
    )
    return search.by_matches(
        store,
        matches.ends if arguments.ends else matches.touched,
        arguments.layers,
        arguments.min_precision or 0.0,
        arguments.min_recall or 0.0,
    )


FIND = Verb(
    "which neurons fire on a text, a token or a pattern",
    "Shows which neurons are active at each token of a text; or ranks neurons by how well they tell the "
    "tokens that match a pattern, or are a token, from all others that were harvested.",
    'topklm neurons find runs/small --regex "sea|ocean"',
    _add_find,
    _find,
)
SELECT = Verb(
    "write a set of neurons as interventions",
    "Chooses neurons by a pattern that they stand for in what was harvested, by their labels, or from a "
    "contrast of two texts, and writes what shall be done to them as a file for generate --steer-file.",
    'topklm neurons select runs/small --regex "sea|ocean" --top 3 --mode add --value 2 --save sea.json',
    _add_select,
    _select,
)


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
        with output.progress.phase_of_tokens(
            "measuring losses", plan.n_tokens(arguments.random_sets)
        ) as report:
            before, outcomes = plan.measure(
                text_model,
                n_random=arguments.random_sets,
                seed=arguments.seed,
                report=report,
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
