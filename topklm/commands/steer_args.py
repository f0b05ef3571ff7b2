"""How a command line names neurons and what is done to them: `3:117`, and `3:117=4`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
import re
import sys
from typing import TYPE_CHECKING, Any

from topklm.config import ModelConfig
from topklm.errors import UserError, one_line
from topklm.inference.interventions import DEFAULT_MODE, MODES, Intervention, load_interventions, needs_value
from topklm.storage.files import as_path, parse_json

if TYPE_CHECKING:
    from topklm.inference.language_model import LanguageModel

_NEURON = re.compile(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*")


def neuron(text: str, flag: str = "--neuron") -> tuple[int, int]:
    """Returns layer and neuron: (3, 117) of "3:117"; whether a model has it is for the caller to check.

    Raises:
        UserError: For another form.
    """
    found = _NEURON.fullmatch(text)
    if not found:
        raise UserError(field=flag, value=text, allowed="LAYER:NEURON, e.g. 3:117")
    return int(found[1]), int(found[2])


def steered_neuron(
    text: str, mode: str, flag: str = "--steer", config: ModelConfig | None = None
) -> Intervention:
    """Reads what is done to a neuron, from "3:117=4", or for a mode that needs no value "3:117".

    Raises:
        UserError: As `intervention`, and for another form.
    """
    name, has_value, value = text.partition("=")
    layer, number = neuron(name, flag)
    if not has_value and needs_value(mode):
        allowed = f"LAYER:NEURON=VALUE for mode {mode}, e.g. 3:117=4"
        raise UserError(field=flag, value=text, allowed=allowed)
    return intervention(layer, number, mode, value if has_value else None, flag, text, config)


def intervention(
    layer: int,
    number: int,
    mode: str,
    value: str | float | None,
    flag: str,
    said: Any,
    config: ModelConfig | None = None,
) -> Intervention:
    """Makes one on a neuron.

    Args:
        layer: Of the model.
        number: Of the neuron.
        mode: One of `MODES`.
        value: As it was written; None where the mode needs none.
        flag: By which the user gave it, for errors.
        said: The value of the flag.
        config: Of the model, if it is known.

    Raises:
        UserError: For a mode that there is not, a value that is no finite number, and a neuron that the
            model does not have.
    """
    try:
        one = Intervention(layer, number, 0.0 if value is None else float(value), mode)
    except ValueError as e:
        raise UserError(f"{value!r} is no number", field=flag, value=said) from e
    try:
        one.check(config)
    except ValueError as e:
        raise UserError(str(e), field=flag, value=said) from e
    return one


def modes_help() -> str:
    """Describes each mode, for the help of a flag."""
    return "; ".join(f"{mode.name}: {mode.help.format(value='the value')}" for mode in MODES.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares --steer, --steer-mode and --steer-file."""
    parser.add_argument(
        "--steer",
        action="append",
        default=[],
        metavar="L:N=X",
        help="set neuron N of layer L to X, e.g. 3:117=4; may be given several times",
    )
    parser.add_argument(
        "--steer-mode",
        choices=MODES,
        default=DEFAULT_MODE,
        help=f"of --steer; {modes_help()}; default %(default)s",
    )
    parser.add_argument(
        "--steer-file",
        metavar="FILE",
        help="interventions as JSON, of topklm neurons select or ablate-set; they come on top of --steer",
    )


def interventions(arguments: argparse.Namespace, config: ModelConfig) -> Sequence[Intervention] | None:
    """Reads the interventions that the arguments name; None for none.

    Raises:
        UserError: For what is no intervention, or does not fit the model.
    """
    given = [steered_neuron(text, arguments.steer_mode, config=config) for text in arguments.steer]
    if arguments.steer_file is not None:
        given += load_interventions(arguments.steer_file, config)
    return given or None


def name_of(model: "LanguageModel") -> dict[str, Any]:
    """Describes the model whose neurons interventions are on, for their file."""
    from topklm.checkpoint.checksums import fingerprint  # noqa: PLC0415 - needs JAX, which --help does without

    return {
        "run": Path(model.run).name,
        "step": model.step,
        "n_layers": model.config.model.n_layers,
        "d_model": model.config.model.d_model,
        "parameters": fingerprint(model.params),
    }


def warn_of_another_model(arguments: argparse.Namespace, model: "LanguageModel") -> None:
    """Prints a line to standard error if --steer-file was made for other parameters than these.

    A neuron's number means something else in another model. Files that people write, and those of earlier
    versions, name none.

    Raises:
        UserError: If the file names its model in another way than `name_of`.
    """
    if arguments.steer_file is None:
        return
    flag = f"--steer-file = {arguments.steer_file}"
    made_for = parse_json(as_path(arguments.steer_file, "--steer-file").read_bytes()).get("model")
    if made_for is None:
        return
    needed = "run", "step", "parameters"
    if not isinstance(made_for, dict) or not made_for.keys() >= set(needed):
        raise UserError(f"{flag}: model: must be an object with {', '.join(needed)}; or leave it out")
    here = name_of(model)
    if made_for["parameters"] != here["parameters"]:
        there, this = (f"{one['run']}, step {one['step']}" for one in (made_for, here))
        line = f"warning: {flag}: its neurons are of {there}; in this model, {this}, they mean other things"
        print(one_line(line), file=sys.stderr)
