"""The folder that `topklm sae train` makes.

dictionary.npz   the autoencoders (`topklm.neurons.dictionary`), which say of which model and layers
history.json     figures of training, one entry for each group of batches
state.npz        there while training goes on: what --resume reads (state-J.npz for members of boosting)
"""

from collections.abc import Iterator
import contextlib
import json
from pathlib import Path
from typing import Any

from topklm import distributed
from topklm.checkpoint import checksums, run_folder
from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.inference.language_model import LanguageModel
from topklm.neurons import harvest, saelens
from topklm.neurons.dictionary import Dictionary
from topklm.storage.files import folder_lock, write_atomically

FILE, HISTORY, STATE = "dictionary.npz", "history.json", "state.npz"

# Names of facts of a dictionary.
RUN, STEP, PARAMETERS, LAYERS = "run", "step", "parameters", "layers"


def facts_of(model: LanguageModel, layers: tuple[int, ...]) -> dict[str, Any]:
    """Returns the facts that tell another model or other layers apart."""
    run = Path(str(model.run)).resolve().name
    return {RUN: run, STEP: model.step, PARAMETERS: checksums.fingerprint(model.params), LAYERS: list(layers)}


def is_begun(path: Path) -> bool:
    """Tells whether a folder holds training that was begun; UserError if all of it is done."""
    if (path / FILE).exists():
        raise UserError(f"--out = {path}: holds autoencoders, all trained: delete it, or give another folder")
    return any(path.glob(f"{Path(STATE).stem}*.npz"))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes a folder and holds it while this process trains into it; of several the first does, for all.

    UserError if somebody else holds it, it cannot be written, or a process does not see it.
    """

    def refuse(owner: str) -> None:
        raise UserError(f"--out = {path}: process {owner} trains into it: wait for its end")

    with disk_errors_are_user_errors(f"writing {path}"), contextlib.ExitStack() as stack:
        if distributed.is_primary():
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(folder_lock(path, refuse))
        run_folder.check_shared(path, "--out")
        yield


def finish(path: Path, dictionary: Dictionary, history: list[dict[str, Any]]) -> None:
    """Writes the results, and then removes the states."""
    write_atomically(path / HISTORY, (json.dumps(history) + "\n").encode())
    dictionary.save(path / FILE)
    for state in path.glob(f"{Path(STATE).stem}*.npz"):
        state.unlink()


def load(path: Path, model: LanguageModel, flag: str) -> tuple[Dictionary, tuple[int, ...]]:
    """Reads the autoencoders of a folder, also one of SAELens, and the layers that they are of.

    UserError if there are none, or those of another model than this.
    """
    if not (path / FILE).exists() and not (path / STATE).exists():
        layers = saelens.layers_of(path)
        there = harvest.kind_and_layers(model.cfg)[1]
        if not layers or not set(layers) <= set(there):
            of, among = (", ".join(map(str, some)) for some in (layers, there))
            has = f"SAEs of layers {of}" if layers else f"no {FILE}, and no blocks.N.hook_resid_post"
            allowed = f"give a folder of topklm sae train or of SAELens, of the layers {among}"
            raise UserError(f"has {has}: {allowed}", field=flag, value=str(path))
        return saelens.read_dictionary(path, layers, model.cfg.d_model), layers
    dictionary, layers = load_of_any(path, flag)
    facts = dictionary.facts
    if facts[PARAMETERS] != facts_of(model, ())[PARAMETERS]:
        text = f"is of another model, {facts[RUN]} at step {facts[STEP]}: train one of this model"
        raise UserError(text, field=flag, value=str(path))
    return dictionary, layers


def load_of_any(path: Path, flag: str) -> tuple[Dictionary, tuple[int, ...]]:
    """Reads the autoencoders of `topklm sae train`, of any model, and the layers that they are of.

    UserError if there are none, or it is not known of which model.
    """
    if not (path / FILE).exists():
        text = f"has no {FILE}: give a folder of topklm sae train"
        if (path / STATE).exists():
            text = "training is not finished: run topklm sae train --resume"
        raise UserError(text, field=flag, value=str(path))
    dictionary = Dictionary.load(path / FILE)
    if LAYERS not in dictionary.facts:
        text = "says of no model: train it with topklm sae train"
        raise UserError(text, field=flag, value=str(path))
    return dictionary, tuple(dictionary.facts[LAYERS])
