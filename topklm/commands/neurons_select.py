"""`topklm neurons select`: writes a set of neurons as interventions."""

import argparse
import dataclasses
import json
from pathlib import Path

import rich.console
import rich.table
import rich.text

import topklm
from topklm.commands import steering_arguments
from topklm.errors import UserError
from topklm.inference.interventions import DEFAULT_MODE, MODES, needs_value, save_interventions
from topklm.inference.language_model import LanguageModel
from topklm.neurons import search
from topklm.neurons.display import visible
from topklm.neurons.labels import Labels
from topklm.neurons.paths import NeuronsFolder
from topklm.neurons.search import Selected
from topklm.neurons.store import Store
from topklm.neurons.text_search import StoredText
from topklm.storage.files import is_bucket, local_path

DESCRIPTION = (
    "Chooses neurons by a pattern that they stand for in what was harvested, by their labels, or from a "
    "contrast of two texts, and writes what shall be done to them as a file for generate --steer-file."
)
EXAMPLE = 'topklm neurons select runs/small --regex "sea|ocean" --top 3 --mode add --value 2 --save sea.json'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.add_argument("run", metavar="RUN", help="run folder, e.g. runs/small")
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
        help=f"{steering_arguments.modes_help()}; default %(default)s",
    )
    parser.add_argument(
        "--value", type=float, metavar="X", help="for all of them; ablate and ban need none, others do"
    )
    parser.add_argument("--save", required=True, metavar="FILE", help="where to write, e.g. sea.json")
    parser.add_argument("--step", type=int, help="which checkpoint; default the newest")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Carries the verb out."""
    _check(arguments)
    model = topklm.load(arguments.run, step=arguments.step)
    chosen = _chosen(arguments, model)
    if not chosen:
        raise UserError("no neuron is like that: nothing is written; ask for less")
    config, entries = model.config.model, []
    for one in chosen:
        entry = steering_arguments.intervention(
            one.layer, one.neuron, arguments.mode, arguments.value, f"--value = {arguments.value}"
        )
        try:
            entry.check(config)
        except ValueError as e:
            raise UserError(f"neuron {one.layer}:{one.neuron}: {e}") from e
        entries.append(entry)
    save_interventions(arguments.save, entries, model=steering_arguments.name_of(model))
    if arguments.json:
        neurons = [dataclasses.asdict(one) for one in chosen]
        facts = {"run": arguments.run, "step": model.step, "mode": arguments.mode, "value": arguments.value}
        print(json.dumps({**facts, "file": arguments.save, "neurons": neurons}))
        return
    table = rich.table.Table()
    for column in ("layer", "neuron"):
        table.add_column(column, justify="right")
    table.add_column("chosen for")
    for one in chosen:
        table.add_row(str(one.layer), str(one.neuron), rich.text.Text(visible(one.reason)))
    console = rich.console.Console()
    console.print(table)
    value = "" if arguments.value is None else f", value {arguments.value:g}"
    console.out(
        f"wrote {arguments.save}: {len(chosen)} neurons, mode {arguments.mode}{value}", highlight=False
    )


def _check(arguments: argparse.Namespace) -> None:
    by = [name for name in ("regex", "label", "contrast_json") if getattr(arguments, name) is not None]
    if len(by) != 1:
        raise UserError("give one of --regex, --label and --contrast-json; see topklm neurons select --help")
    belongs = {"min_precision": "regex", "min_recall": "regex", "case": "regex", "ends": "regex"}
    for name, to in {**belongs, "max_q": "contrast_json"}.items():
        value = getattr(arguments, name)
        if value not in (None, False) and by != [to]:
            flag, goes_with = (f"--{n.replace('_', '-')}" for n in (name, to))
            raise UserError(f"{flag}: goes with {goes_with} only; leave it out")
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"--{name.replace('_', '-')} = {value}: must be from 0 to 1")
    if arguments.top < 1:
        raise UserError(f"--top = {arguments.top}: must be 1 or more")
    if arguments.label == "":
        raise UserError("--label is empty: give a part of a label")
    if (arguments.value is None) == needs_value(arguments.mode):
        needs = "needs --value, a number" if arguments.value is None else "needs no --value; leave it out"
        raise UserError(f"--mode = {arguments.mode}: {needs}")
    if is_bucket(arguments.run):
        raise UserError(
            f"RUN = {arguments.run}: activations and labels are kept on a disk; copy the run to one"
        )


def _chosen(arguments: argparse.Namespace, model: LanguageModel) -> list[Selected]:
    folder = NeuronsFolder(Path(model.run), model.step)
    narrowed = {"layer": arguments.layer, "top": arguments.top}
    if arguments.label is not None:
        return search.by_label(Labels(folder.labels).all(), arguments.label, **narrowed)
    if arguments.contrast_json is not None:
        saved = search.read_contrast(local_path(arguments.contrast_json, "--contrast-json"))
        if saved.step != model.step:
            raise UserError(
                f"--contrast-json = {arguments.contrast_json}: is of step {saved.step}, this checkpoint of "
                f"{model.step}; give --step {saved.step}, or contrast anew"
            )
        max_q = 1.0 if arguments.max_q is None else arguments.max_q
        return search.by_contrast(saved, **narrowed, max_q=max_q)
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
        **narrowed,
        min_precision=arguments.min_precision or 0.0,
        min_recall=arguments.min_recall or 0.0,
    )
