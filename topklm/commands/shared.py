"""Flags, checks and output that the verbs share: RUN, --step, --json, --steer, tables, errors of flags.

Imports nothing slow, for `--help` imports it.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import glob
import importlib
import importlib.util
import json
import math
from pathlib import Path
import re
import sys
import threading
from types import ModuleType
from typing import TYPE_CHECKING, Any

import rich.console
import rich.table
import rich.text

import topklm
from topklm.config import MeshConfig, ModelConfig
from topklm.errors import ArgumentError, UserError, disk_errors_are_user_errors, one_line, visible
from topklm.imports import versions, when_used
from topklm.inference.interventions import (
    DEFAULT_MODE,
    MODES,
    Intervention,
    in_activations,
    load_interventions,
    needs_value,
    neuron_of,
    times_of,
)
from topklm.neurons import NeuronsFolder
from topklm.neurons.labels import Labels
from topklm.progress import TerminalProgress
from topklm.storage.files import as_path, is_bucket, local_path, parse_json, sealed_json, write_atomically

with when_used():  # they import JAX
    from topklm import layout as layout_lib
    from topklm.runtime import compilation_cache

if TYPE_CHECKING:
    from topklm.inference.language_model import LanguageModel
    from topklm.layout import Layout
    from topklm.neurons.documents import TextModel
    from topklm.neurons.store import Store

_PATIENCE_S = 1.0  # of a person at a terminal who is told nothing

_CROWDED = 10  # columns, too many for blanks beside their cells in a terminal of 80

LabelOf = Mapping[tuple[int, int], str]  # of (layer, neuron)


def layers(text: str) -> tuple[int, ...]:
    """Reads numbers of layers: (0, 2) of "0,2"; UserError for another form. The model is not asked."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,9}", part) for part in parts):
        raise UserError(field="--layers", value=text, allowed="numbers with commas between, e.g. 0,1,2")
    return tuple(sorted(set(map(int, parts))))


def counts(text: str) -> tuple[int, ...]:
    """Reads how many of several: (8, 32) of "8,32", each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,9}", part) and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: must be whole numbers, 1 or more, with commas between")
    return tuple(dict.fromkeys(map(int, parts)))


# Flags of several verbs: arguments of `_add`, and its options.
_COMMON: dict[str, tuple[tuple, dict[str, Any]]] = {
    "run": (("run RUN", "run folder, e.g. runs/small"), {}),
    "step": (("--step N", "which checkpoint; default the newest", int), {}),
    "json": (
        ("--json FILE", "print one JSON object, or write it to a file (.json)"),
        {"nargs": "?", "const": "-"},
    ),
    "layers": (("--layers L,...", "only neurons of these layers, e.g. 0,2; default all"), {"type": layers}),
    "neurons": (("--neurons L:N,...", "only these, e.g. 0:17,2:5; default all"), {}),
    "seed": (("--seed N", "of all that is drawn", 0), {}),
    "case": (("--case", "of patterns: capitals are not small letters", False), {}),
    "ends": (
        (
            "--ends",
            "--regex: count only the token at which a match ends, where a neuron can first know of it",
            False,
        ),
        {},
    ),
}


@dataclasses.dataclass(frozen=True)
class Verb:
    """A verb below another one, as `harvest` of `topklm neurons`."""

    summary: str  # for the list of verbs
    description: str  # for its --help
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def add_verbs(parser: argparse.ArgumentParser, verbs: Mapping[str, Verb], metavar: str) -> None:
    """Declares verbs below the parser's; `call` of the parsed arguments is that of the one given."""
    inner = parser.add_subparsers(title="verbs", required=True, metavar=metavar)
    for name, verb in verbs.items():
        added = inner.add_parser(
            name, help=verb.summary, description=verb.description, epilog=f"example: {verb.example}"
        )
        verb.add_arguments(added)
        added.set_defaults(call=verb.run)


def flags(parser: argparse._ActionsContainer, *common: str) -> Callable[..., None]:
    """Declares flags that several verbs have, by their names in `_COMMON`; returns `_add` for others."""
    add = functools.partial(_add, parser)
    for name in common:
        flag, options = _COMMON[name]
        add(*flag, **options)
    return add


def former(parser: argparse._ActionsContainer, flag: str, dest: str, kind: Callable[[str], Any]) -> None:
    """Declares the former name of a flag, which goes on working and which no help shows."""
    parser.add_argument(flag, dest=dest, type=kind, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _add(parser: argparse._ActionsContainer, flag: str, text: str, value: Any = None, **options: Any) -> None:
    """Declares an argument, for example `add("--top N", "neurons of each layer", 10)`.

    `flag` ends in its metavar; `value` is the default, which the help is given too, or the type; False makes
    a switch.
    """
    name, _, metavar = flag.partition(" ")
    if metavar:
        options["metavar"] = metavar
    if value is False:
        options["action"] = "store_true"
    elif isinstance(value, type):
        options["type"] = value
    elif value is not None:
        options = {"type": type(value), "default": value, **options}
        text = f"{text}; default {f'{value:g}' if isinstance(value, float) else value}".removeprefix("; ")
    action = parser.add_argument(name, help=text, **options)
    if metavar == "RUN":
        action.completer = run_folders  # type: ignore[attr-defined]  # argcomplete looks for it


def run_folders(prefix: str, **_: Any) -> list[str]:
    """Lists the folders that a RUN may go on to, those in runs/ among them; shells ask for it."""
    found = {*Path().glob("runs/*"), *map(Path, glob.glob(f"{glob.escape(prefix)}*") if prefix else ())}
    return sorted(str(path) for path in found if str(path).startswith(prefix) and path.is_dir())


def add_mode(add: Callable[..., None], flag: str = "--mode", text: str = "") -> None:
    """Declares a flag for the mode of interventions, with the effect of each."""
    modes = [f"{mode.name}: {mode.help.format(value='the value')}" for mode in MODES.values()]
    add(flag, text + "; ".join(modes), DEFAULT_MODE, choices=MODES)


def add_steering(parser: argparse.ArgumentParser) -> None:
    """Declares --steer, --steer-mode and --steer-file."""
    add = flags(parser)
    text = (
        "set neuron N of layer L to X, e.g. 3:117=4; 3:117=0.7x: to 0.7 times its largest activation in the "
        "harvested text; may be given several times"
    )
    add("--steer L:N=X", text, action="append")
    add_mode(add, "--steer-mode", "of --steer; ")
    text = "interventions as JSON, of topklm neurons select or ablate-set; they come on top of --steer"
    add("--steer-file FILE", text)


class Output:
    """Standard output of a verb: one JSON object, or tables and lines for a person.

    `json` is that of `--json [FILE]`: "-" prints the object; a file gets it, and a person is shown the rest;
    None. UserError if the file's folder is not there: make it before the work whose results it is to hold.
    """

    def __init__(self, json: str | None = None):
        if json is not None:
            check_can_write(argparse.Namespace(json=json), "json")
        self._json = json
        self.console = rich.console.Console(stderr=json == "-")  # for a person
        self.progress = TerminalProgress(self.console)

    def give(self, facts: Mapping[str, Any], show: Callable[[], object], *, seal: bool = False) -> None:
        """Prints or writes the object, and calls what shows it to a person; `seal` adds its digest."""
        if self._json != "-":
            show()
        if self._json is None:
            return
        text = sealed_json(facts).decode() if seal else json.dumps(facts) + "\n"
        if self._json == "-":
            print(text, end="")
            return
        with disk_errors_are_user_errors(f"writing {self._json}"):
            write_atomically(local_path(self._json, "--json"), text.encode())

    def say(self, line: str) -> None:
        """Prints a line as it is, without colours or wrapping."""
        self.console.out(line, highlight=False)


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[Any] | None],
    title: str | rich.text.Text | None = None,
    left: Sequence[str] = (),
) -> rich.table.Table:
    """Returns a table; columns are aligned to the right but for those in `left`; a row of None is a line."""
    padding = (0, 0 if len(heads) >= _CROWDED else 1)
    made = rich.table.Table(title=title, title_justify="left", padding=padding)
    for head in heads:
        made.add_column(head, justify="left" if head in left else "right", overflow="fold")
    for row in rows:
        if row is None:
            made.add_section()
        else:
            made.add_row(*row)
    return made


def table_of_neurons(
    heads: Sequence[str],
    neurons: Sequence[Any],
    cells: Sequence[Sequence[str]],
    labels: LabelOf,
    *,
    by_layer: bool = False,
) -> rich.table.Table:
    """Returns a table of neurons with their figures, and with their labels if any has one."""
    is_named = any((n.layer, n.neuron) in labels for n in neurons)
    rows: list[Sequence[Any] | None] = []
    for before, n, figures in zip([None, *neurons], neurons, cells, strict=False):
        if by_layer and before is not None and before.layer != n.layer:
            rows.append(None)  # a line between layers
        label = [rich.text.Text(visible(labels.get((n.layer, n.neuron), "")))] if is_named else []
        rows.append([str(n.layer), str(n.neuron), *figures, *label])
    return table(["layer", "neuron", *heads, *(["label"] if is_named else [])], rows, left=["label"])


def with_labels(neurons: Sequence[Any], labels: LabelOf) -> list[dict[str, Any]]:
    """Returns the fields of dataclasses of neurons, each with its label, for JSON."""
    return [{**dataclasses.asdict(n), "label": labels.get((n.layer, n.neuron), "")} for n in neurons]


def flag(name: str) -> str:
    """Returns the flag that sets an argument: "--max-tokens" of "max_tokens"."""
    return f"--{name.replace('_', '-')}"


def wrong(arguments: argparse.Namespace, name: str, text: str = "", **parts: str) -> UserError:
    """Returns the error of a flag's value; `text` and `parts` as of `UserError`."""
    return UserError(text, field=flag(name), value=getattr(arguments, name), **parts)


def compiled(arguments: argparse.Namespace, name: str) -> re.Pattern[str]:
    """Compiles the pattern of a flag, as --case says; raises UserError for none."""
    try:
        return re.compile(getattr(arguments, name) or "", 0 if arguments.case else re.IGNORECASE)
    except re.error as e:
        raise wrong(arguments, name, f"is no regular expression ({e}); mend it") from e


def check_at_least(arguments: argparse.Namespace, least: int, *names: str) -> None:
    """Raises UserError for a flag that was given, and is less, or not finite."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not least <= value < math.inf:
            raise wrong(arguments, name, allowed=f"{least} or more")


def check_goes_with(arguments: argparse.Namespace, other: str, *names: str) -> None:
    """Raises UserError for a flag that was given, and only means something with another one."""
    for name in names:
        if getattr(arguments, name) not in (None, False):
            raise UserError(f"goes with {flag(other)} only; leave it out", field=flag(name))


@contextlib.contextmanager
def arguments_are_flags(arguments: argparse.Namespace) -> Iterator[None]:
    """Names an argument of the Python interface that the block refuses by its flag."""
    try:
        yield
    except ArgumentError as e:
        raise (e.named(flag(e.field)) if e.field in vars(arguments) else e) from e


@contextlib.contextmanager
def refused_as(field: str, **value: Any) -> Iterator[None]:
    """Turns a ValueError of the block into the error of a field, and of its value if one is given."""
    try:
        yield
    except ValueError as e:
        raise UserError(str(e), field=field, **value) from e


def check_installed(verb: str, packages: Sequence[str]) -> None:
    """Raises UserError if a package of the extra `explore` is missing."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(f"{verb} needs {', '.join(missing)}: run pip install 'topklm[explore]'")


def check_can_write(arguments: argparse.Namespace, *names: str) -> None:
    """Raises UserError, before the work, for a file ("-": none) that a flag names in a missing folder."""
    for name in names:
        file = getattr(arguments, name)
        if file not in (None, "-") and not (folder := local_path(file, flag(name)).parent).is_dir():
            raise wrong(arguments, name, f"there is no folder {folder}; make it, or choose another")


def check_on_disk(run: str, text: str = "activations are kept on a disk; copy the run folder to one") -> None:
    """Raises UserError for a run folder in a bucket."""
    if is_bucket(run):
        raise UserError(text, field="RUN", value=run)


def check_keep(config: ModelConfig, keep: int | None) -> None:
    """Raises UserError for a --keep that the model's layers do not have."""
    if keep is not None and config.n_topk_layers:
        text = f"is for Base LMs; this model's layers keep {config.topk_k} already"
        raise UserError(text, field="--keep", value=keep)
    if keep is not None and keep > config.d_model:
        raise UserError(field="--keep", value=keep, allowed=f"at most d_model = {config.d_model}")


def print_versions() -> None:
    """Prints topklm, the libraries that decide what it computes, and the devices, a line each."""
    for package, version in versions("topklm", "jax", "jaxlib", "flax").items():
        print(f"{package} {version}", flush=True)
    print(f"devices: {local_layout().describe_devices()}")


def import_jax() -> ModuleType:
    """Imports JAX; UserError if that cannot be."""
    try:
        return importlib.import_module("jax")
    except ImportError as e:
        text = f"JAX cannot be imported ({e}): install topklm again, into a fresh virtual environment"
        raise UserError(text) from e


def local_layout() -> "Layout":
    """Returns the layout over all devices of this host; raises UserError if JAX cannot be imported."""
    local_devices = import_jax().local_devices()
    return layout_lib.make_layout(MeshConfig(), local_devices)


@contextlib.contextmanager
def compiling() -> Iterator[Callable[[], None]]:
    """Keeps the programs that the block compiles, and tells a person who waits for them what is done.

    Yields a function that ends the waiting before the block does, for output that comes bit by bit.
    """
    kept = "kept for next time" if compilation_cache.enable() else "not kept"

    def tell() -> None:
        print(f"compiling, some 10 s; {kept}", file=sys.stderr, flush=True)

    waiting = threading.Timer(_PATIENCE_S, tell)
    if sys.stderr.isatty():
        waiting.start()
    try:
        yield waiting.cancel
    finally:
        waiting.cancel()


def load(arguments: argparse.Namespace) -> "tuple[LanguageModel, Layout]":
    """Loads the model of RUN and --step onto all devices of this host, and keeps what is compiled."""
    layout = local_layout()
    compilation_cache.enable()
    return topklm.load(arguments.run, step=arguments.step, mesh=layout.mesh), layout


def text_model(model: "LanguageModel", layout: "Layout") -> "TextModel":
    """Returns a loaded model as it is run over texts."""
    from topklm.neurons.documents import TextModel  # noqa: PLC0415 - needs JAX, which --help does without

    return TextModel(model.cfg, model.params, layout, model.tokenizer.separator_id)


def load_onto_one_device(run: str, step: int | None) -> "LanguageModel":
    """Loads the model of a run's checkpoint, the newest where `step` is None; keeps what is compiled."""
    compilation_cache.enable()
    return topklm.load(run, step=step)


def folder_of(model: "LanguageModel") -> NeuronsFolder:
    """Returns the paths of what is known of the model's neurons."""
    return NeuronsFolder(Path(model.run), model.step)


def labels_of(model: "LanguageModel") -> LabelOf:
    """Returns the labels of the model's neurons; a run in a bucket has none."""
    return {} if is_bucket(model.run) else Labels(folder_of(model).labels).all()


def open_store(folder: NeuronsFolder, model: "LanguageModel | None" = None) -> "Store":
    """Opens a checkpoint's activations; UserError if there are none, or of another checkpoint or `model`."""
    from topklm.neurons.store import Store  # noqa: PLC0415 - imports TensorStore

    store = Store.of_step(folder)
    if model is not None:
        from topklm.checkpoint.checksums import fingerprint  # noqa: PLC0415 - needs JAX

        store.check_model(model.tokenizer.sha256, fingerprint(model.params))
    return store


# Neurons and interventions, as command lines name them: `3:117`, and `3:117=4`.


def neurons(text: str | None) -> list[tuple[int, int]] | None:
    """Reads --neurons, layers and neurons with commas between; None, as of "all", stands for all."""
    if text is None or text == "all":
        return None
    try:
        return [neuron(part) for part in text.split(",")]
    except UserError as e:
        allowed = "all, or LAYER:NEURON with commas between, e.g. 0:17,2:5"
        raise UserError(field="--neurons", value=text, allowed=allowed) from e


def neuron(text: str, flag: str = "--neuron") -> tuple[int, int]:
    """Returns (3, 117) of "3:117"; UserError for another form. Whether a model has it is not checked."""
    try:
        return neuron_of(text)
    except ArgumentError as e:
        raise UserError(field=flag, value=text, allowed="LAYER:NEURON, e.g. 3:117") from e


def interventions(arguments: argparse.Namespace, model: "LanguageModel") -> Sequence[Intervention] | None:
    """Reads --steer and --steer-file, None for none; UserError for anything that does not fit the model."""
    given = [_steered(text, arguments.steer_mode, model) for text in arguments.steer or ()]
    if arguments.steer_file is not None:
        given += load_interventions(arguments.steer_file, model.cfg)
    return given or None


def _steered(text: str, mode: str, model: "LanguageModel") -> Intervention:
    """Reads what is done to a neuron, from "3:117=4" or "3:117=0.7x", or without a value "3:117"."""
    name, equals, value = text.partition("=")
    layer, number = neuron(name, "--steer")
    if not equals and needs_value(mode):
        allowed = f"LAYER:NEURON=VALUE for mode {mode}, e.g. 3:117=4"
        raise UserError(field="--steer", value=text, allowed=allowed)
    given: float | str = 0.0
    if equals and times_of(value) is None:
        try:
            given = float(value)
        except ValueError as e:
            raise UserError(f"{value!r} is no number", field="--steer", value=text) from e
    elif equals:
        given = value
    one = Intervention(layer, number, given, mode)
    with refused_as("--steer", value=text):
        dataclasses.replace(one, value=0.0).check(model.cfg)  # before its largest activation is looked for
        one = in_activations(one, model.largest_activation)
        one.check(model.cfg)
    return one


def name_of(model: "LanguageModel") -> dict[str, Any]:
    """Describes the model whose neurons interventions are on, for their file."""
    from topklm.checkpoint.checksums import fingerprint  # noqa: PLC0415 - needs JAX, which --help does without

    return {
        "run": Path(model.run).name,
        "step": model.step,
        "n_layers": model.cfg.n_layers,
        "d_model": model.cfg.d_model,
        "parameters": fingerprint(model.params),
    }


def warn_of_another_model(arguments: argparse.Namespace, model: "LanguageModel") -> None:
    """Prints a line to standard error if --steer-file was made for other parameters than these.

    A neuron's number means something else in another model. Files that people write, and those of earlier
    versions, name none. UserError if the file names its model in another way than `name_of`.
    """
    if arguments.steer_file is None:
        return
    said = f"--steer-file = {arguments.steer_file}"
    made_for = parse_json(as_path(arguments.steer_file, "--steer-file").read_bytes()).get("model")
    if made_for is None:
        return
    needed = "run", "step", "parameters"
    if not isinstance(made_for, dict) or not made_for.keys() >= set(needed):
        raise UserError(f"{said}: model: must be an object with {', '.join(needed)}; or leave it out")
    here = name_of(model)
    if made_for["parameters"] != here["parameters"]:
        there, this = (f"{one['run']}, step {one['step']}" for one in (made_for, here))
        line = f"warning: {said}: its neurons are of {there}; in this model, {this}, they mean other things"
        print(one_line(line), file=sys.stderr)
