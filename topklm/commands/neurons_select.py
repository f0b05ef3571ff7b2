"""`topklm neurons select`: writes a set of neurons as interventions."""

import argparse
import dataclasses
import itertools
from pathlib import Path

import rich.text

import topklm
from topklm.commands import shared, steer_args
from topklm.commands.shared import Output
from topklm.errors import UserError
from topklm.inference.interventions import DEFAULT_MODE, MODES, needs_value, save_interventions
from topklm.inference.language_model import LanguageModel
from topklm.neurons import search
from topklm.neurons.display import visible
from topklm.neurons.labels import Labels
from topklm.neurons.paths import NeuronsFolder
from topklm.neurons.search import Selected, StoredText
from topklm.neurons.store import Store
from topklm.storage.files import local_path

DESCRIPTION = (
    "Chooses neurons by a pattern that they stand for in what was harvested, by their labels, or from a "
    "contrast of two texts, and writes what shall be done to them as a file for generate --steer-file."
)
EXAMPLE = 'topklm neurons select runs/small --regex "sea|ocean" --top 3 --mode add --value 2 --save sea.json'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    shared.add_run(parser)
    parser.add_argument(
        "--regex", metavar="PATTERN", help="those that tell the tokens that match, best first"
    )
    parser.add_argument("--label", metavar="TEXT", help="those whose label holds this")
    parser.add_argument(
        "--contrast-json", metavar="FILE", help="the output of contrast --json: those that came first there"
    )
    parser.add_argument("--layer", type=int, metavar="L", help="only this layer")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="at most; default %(default)s")
    parser.add_argument(
        "--min-precision", type=float, metavar="X", help="--regex: only neurons of this precision, 0 to 1"
    )
    parser.add_argument(
        "--min-recall", type=float, metavar="X", help="--regex: only neurons of this recall, 0 to 1"
    )
    parser.add_argument("--max-q", type=float, metavar="Q", help="--contrast-json: only q-values up to this")
    parser.add_argument("--case", action="store_true", help="--regex: capitals are not small letters")
    parser.add_argument(
        "--ends",
        action="store_true",
        help="--regex: count only the token at which a match ends, where a neuron can first know of it",
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        default=DEFAULT_MODE,
        help=f"{steer_args.modes_help()}; default %(default)s",
    )
    parser.add_argument(
        "--value", type=float, metavar="X", help="for all of them; ablate and ban need none, others do"
    )
    parser.add_argument("--save", required=True, metavar="FILE", help="where to write, e.g. sea.json")
    shared.add_step(parser)
    shared.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Carries the verb out."""
    _check(arguments)
    model = topklm.load(arguments.run, step=arguments.step)
    found = (one for one in _chosen(arguments, model) if arguments.layer in (None, one.layer))
    chosen = list(itertools.islice(found, arguments.top))
    if not chosen:
        raise UserError("no neuron is like that: nothing is written; ask for less")
    done = arguments.mode, arguments.value, "--value", arguments.value
    entries = [steer_args.intervention(one.layer, one.neuron, *done) for one in chosen]
    for entry in entries:
        try:
            entry.check(model.config.model)
        except ValueError as e:
            raise UserError(str(e), field=f"neuron {entry.layer}:{entry.neuron}") from e
    save_interventions(arguments.save, entries, model=steer_args.name_of(model))
    facts = {
        "run": arguments.run,
        "step": model.step,
        "mode": arguments.mode,
        "value": arguments.value,
        "file": arguments.save,
        "neurons": [dataclasses.asdict(one) for one in chosen],
    }
    output = Output(arguments.json)

    def show() -> None:
        table = shared.table_of(("layer", "neuron"))
        table.add_column("chosen for")
        for one in chosen:
            table.add_row(str(one.layer), str(one.neuron), rich.text.Text(visible(one.reason)))
        output.console.print(table)
        value = "" if arguments.value is None else f", value {arguments.value:g}"
        output.say(f"wrote {arguments.save}: {len(chosen)} neurons, mode {arguments.mode}{value}")

    output.give(facts, show)


def _check(arguments: argparse.Namespace) -> None:
    by = [name for name in ("regex", "label", "contrast_json") if getattr(arguments, name) is not None]
    if len(by) != 1:
        raise UserError("give one of --regex, --label and --contrast-json; see topklm neurons select --help")
    belongs = {"min_precision": "regex", "min_recall": "regex", "case": "regex", "ends": "regex"}
    for name, to in {**belongs, "max_q": "contrast_json"}.items():
        value = getattr(arguments, name)
        if value not in (None, False) and by != [to]:
            shared.check_goes_with(arguments, to, name)
        if value is not None and not 0 <= value <= 1:
            raise shared.wrong(arguments, name, allowed="from 0 to 1")
    shared.check_at_least(arguments, 1, "top")
    if arguments.label == "":
        raise UserError("--label is empty: give a part of a label")
    if (arguments.value is None) == needs_value(arguments.mode):
        needs = "needs --value, a number" if arguments.value is None else "needs no --value; leave it out"
        raise shared.wrong(arguments, "mode", needs)
    shared.check_on_disk(arguments.run, "activations and labels are kept on a disk; copy the run to one")


def _chosen(arguments: argparse.Namespace, model: LanguageModel) -> list[Selected]:
    folder = NeuronsFolder(Path(model.run), model.step)
    if arguments.label is not None:
        return search.by_label(Labels(folder.labels).all(), arguments.label)
    if arguments.contrast_json is not None:
        saved = search.read_contrast(local_path(arguments.contrast_json, "--contrast-json"))
        if saved.step != model.step:
            text = f"is of step {saved.step}, this checkpoint of {model.step}"
            advice = f"give --step {saved.step}, or contrast again"
            raise shared.wrong(arguments, "contrast_json", text, advice=advice)
        max_q = 1.0 if arguments.max_q is None else arguments.max_q
        return search.by_contrast(saved, max_q)
    if not folder.store.exists():
        raise UserError(
            f"{arguments.run} has no activations of step {model.step}: run topklm neurons harvest "
            f"{arguments.run} --step {model.step}"
        )
    store = Store(folder.store)
    if store.metadata.kind not in ("topk", "dense"):
        raise UserError(
            f"{folder.store} holds codes of a dictionary, which no intervention can set: harvest without one"
        )
    matches = StoredText(store, model.tokenizer).matches(arguments.regex, ignore_case=not arguments.case)
    return search.by_matches(
        store,
        matches.ends if arguments.ends else matches.touched,
        None if arguments.layer is None else [arguments.layer],
        arguments.min_precision or 0.0,
        arguments.min_recall or 0.0,
    )
