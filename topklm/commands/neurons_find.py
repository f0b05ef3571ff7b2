"""`topklm neurons find`: which neurons are active in a text, or where a pattern or a token stands."""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
from pathlib import Path
import re

import numpy as np
import rich.table
import rich.text

import topklm
from topklm.checkpoint import run_folder
from topklm.commands import shared
from topklm.commands.shared import Output
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError
from topklm.neurons.display import SHOWN_PER_LAYER, Activation, visible
from topklm.neurons.labels import Labels
from topklm.neurons.paths import NeuronsFolder, harvested_steps
from topklm.neurons.search import Matches, RankedNeuron, StoredText, neurons_of_text, rank
from topklm.neurons.store import Store
from topklm.storage.files import as_path, is_bucket

DESCRIPTION = (
    "Shows which neurons are active at each token of a text; or ranks neurons by how well they tell the "
    "tokens that match a pattern, or are a token, from all others that were harvested."
)
EXAMPLE = 'topklm neurons find runs/small --regex "sea|ocean"'

_ID = re.compile("[0-9]+")
_QUOTED_NUMBER = re.compile('"[0-9]+"')

_SHOWN_TEXT = 40  # characters of what was looked for, in a message

LabelOf = Mapping[tuple[int, int], str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    shared.add_run(parser)
    parser.add_argument("text", nargs="?", metavar="TEXT", help="show the active neurons of each token of it")
    parser.add_argument("--regex", metavar="PATTERN", help="rank neurons by the tokens that match")
    parser.add_argument(
        "--token",
        metavar="TOKEN",
        help="rank neurons by this token, with or without a space before it; a number is an id, and a number "
        "in double quotes, '\"19\"', the text of one",
    )
    parser.add_argument("--case", action="store_true", help="--regex: capitals are not small letters")
    parser.add_argument(
        "--ends",
        action="store_true",
        help="--regex: count only the token at which a match ends, where a neuron can first know of it",
    )
    parser.add_argument("--layer", type=int, metavar="L", help="only this layer")
    parser.add_argument(
        "--top",
        type=int,
        default=SHOWN_PER_LAYER,
        metavar="N",
        help="TEXT: strongest neurons of a layer for each token; default %(default)s",
    )
    parser.add_argument(
        "--limit", type=int, default=20, metavar="N", help="neurons that are ranked; default %(default)s"
    )
    shared.add_step(parser, "the newest (with activations)")
    shared.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Carries the verb out."""
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
    model = topklm.load(arguments.run, step=arguments.step)
    n_tokens, most = len(model.to_str_tokens(arguments.text)), model.config.model.context_length
    if n_tokens < 2:
        raise UserError(f"TEXT = {_quoted(arguments.text)}: has no tokens; give other text")
    if n_tokens > most:
        raise UserError(
            f"TEXT = {_quoted(arguments.text)}: has {n_tokens - 1:,} tokens, this model reads at most "
            f"{most - 1:,} and the separator; shorten it"
        )
    # The separator that stands before is no part of the text.
    found = model.active_neurons(arguments.text)
    names, rows = found.tokens[1:], neurons_of_text(found, arguments.layer)[1:]
    labels = (
        {} if is_bucket(arguments.run) else Labels(NeuronsFolder(Path(model.run), model.step).labels).all()
    )
    tokens = [
        {
            "position": position,
            "token": name,
            "n_active": [{"layer": layer, "n_active": len(active)} for layer, active in row.items()],
            "neurons": [
                {**one._asdict(), "label": labels.get(one[:2], "")}
                for active in row.values()
                for one in active[: arguments.top]
            ],
        }
        for position, (name, row) in enumerate(zip(names, rows, strict=True))
    ]
    output = Output(arguments.json)
    facts = {"run": arguments.run, "step": model.step, "text": arguments.text, "tokens": tokens}
    output.give(facts, lambda: _print_rows(output, names, rows, arguments.top, labels))


def _find_in_store(arguments: argparse.Namespace) -> None:
    folder = _folder(arguments.run, arguments.step)
    store = _open_store(folder)
    tokenizer = Tokenizer.load(folder.run / run_folder.TOKENIZER_FILE)
    text, labels = StoredText(store, tokenizer), Labels(folder.labels).all()
    if arguments.regex is not None:
        found = text.matches(arguments.regex, ignore_case=not arguments.case)
        what = {"regex": arguments.regex, "ignore_case": not arguments.case}
    else:
        ids = _ids_of(arguments.token, tokenizer)
        matched = text.tokens_equal(*ids)
        found = Matches(int(matched.sum()), matched, matched)
        what = {"token_ids": ids, "tokens": tokenizer.token_strings(ids)}
    matched = found.ends if arguments.ends else found.touched
    ranked = rank(store, matched, arguments.limit, None if arguments.layer is None else [arguments.layer])
    facts = {
        "run": arguments.run,
        "step": folder.step,
        **what,
        "counted": "ends" if arguments.ends else "touched",
        "n_tokens": store.n_tokens,
        "n_matches": found.count,
        "n_matched_tokens": int(matched.sum()),
        "neurons": [{**dataclasses.asdict(r), "label": labels.get((r.layer, r.neuron), "")} for r in ranked],
    }
    name = " and ".join(map(_quoted, what.get("tokens", [arguments.regex])))
    output = Output(arguments.json)
    output.give(facts, lambda: _print_ranked(output, name, found.count, matched, ranked, labels))


def _folder(run: str, step: int | None) -> NeuronsFolder:
    """Finds the activations of a step, or of the newest that has some."""
    shared.check_on_disk(run)
    folder = Path(as_path(run, "RUN"))
    if not folder.is_dir():
        raise UserError(f"RUN = {run}: there is no such folder; check the path")
    if step is not None:
        return NeuronsFolder(folder, step)
    steps = harvested_steps(folder)
    if not steps:
        raise UserError(f"{run}: there are no activations yet; run topklm neurons harvest {run}")
    return NeuronsFolder(folder, steps[-1])


def _open_store(folder: NeuronsFolder) -> Store:
    if not folder.store.exists():
        raise UserError(
            f"step = {folder.step}: {folder.run} has no activations of this checkpoint; run topklm neurons "
            f"harvest {folder.run} --step {folder.step}"
        )
    store = Store(folder.store)
    if store.metadata.step != folder.step:
        raise UserError(
            f"{folder.store} holds activations of step {store.metadata.step}: delete it, and harvest again"
        )
    if not store.n_tokens:
        raise UserError(f"{folder.store} is empty: run topklm neurons harvest {folder.run}")
    return store


def _ids_of(token: str, tokenizer: Tokenizer) -> list[int]:
    """Finds the tokens that are this text, with and without a space before it; or of this id."""
    if _ID.fullmatch(token):
        if len(token.lstrip("0")) > 9 or int(token) >= tokenizer.vocab_size:
            raise UserError(
                f"--token = {token}: ids are from 0 to {tokenizer.vocab_size - 1}; for the text of a number, "
                f"--token '\"{token}\"'"
            )
        return [int(token)]
    if _QUOTED_NUMBER.fullmatch(token):
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


def _print_rows(
    output: Output,
    names: Sequence[str],
    rows: Sequence[Mapping[int, Sequence[Activation]]],
    top: int,
    labels: LabelOf,
) -> None:
    table = rich.table.Table()
    table.add_column("token", style="cyan", no_wrap=True)
    for layer in rows[0]:
        table.add_column(f"layer {layer}")
    for name, row in zip(names, rows, strict=True):
        cells = []
        for active in row.values():
            more = [f"+{len(active) - top}"] if len(active) > top else []
            cells.append(", ".join([*(_with_label(one, labels) for one in active[:top]), *more]))
        table.add_row(*(rich.text.Text(visible(cell)) for cell in (name, *cells)))
    output.console.print(table)
    output.say("neuron:activation, the strongest first; +N: so many more are active")


def _with_label(active: Activation, labels: LabelOf) -> str:
    label = labels.get((active.layer, active.neuron), "")
    return f"{active.neuron}:{active.value:.3g}" + (f" ({label})" if label else "")


def _print_ranked(
    output: Output,
    name: str,
    n_matches: int,
    matched: np.ndarray,
    ranked: list[RankedNeuron],
    labels: LabelOf,
) -> None:
    n_matched, share = int(matched.sum()), matched.mean()
    line = f"{name}: {n_matches:,} matches, {n_matched:,} of {len(matched):,} tokens ({share:.2%})"
    if not ranked:
        reason = "no neuron is active there" if n_matched else "nothing to rank neurons by"
        output.say(f"{line}; {reason}")
        return
    named = any((r.layer, r.neuron) in labels for r in ranked)
    table = shared.table_of(("layer", "neuron", "F1", "precision", "recall", "firing from", "active at"))
    if named:
        table.add_column("label")
    for r in ranked:
        shares = (f"{figure:.3f}" for figure in (r.f1, r.precision, r.recall))
        label = [rich.text.Text(visible(labels.get((r.layer, r.neuron), "")))] if named else []
        table.add_row(str(r.layer), str(r.neuron), *shares, f"{r.threshold:.3g}", f"{r.n_active:,}", *label)
    output.say(line)
    output.console.print(table)
    output.say(
        "a neuron fires where its activation reaches the threshold that makes its F1 highest here; "
        f"precision: of the tokens at which it fires, the share that matches (by chance {share:.2g}); "
        "recall: of the tokens that match, the share at which it fires"
    )


def _quoted(text: str) -> str:
    return f"'{visible(text if len(text) <= _SHOWN_TEXT else text[:_SHOWN_TEXT] + '...')}'"
