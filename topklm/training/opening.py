"""What happens before the first step: the run folder is taken, the data prepared, and both checked.

On several hosts the first process does each thing, and the others make sure that they see the same.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
from hashlib import sha256
import json
from typing import Any

from topklm import distributed
from topklm.checkpoint import run_folder
from topklm.config import Config
from topklm.data.mixture import Mixture
from topklm.data.prepare import prepare
from topklm.errors import UserError
from topklm.storage.errors import storage_errors_are_user_errors
from topklm.storage.files import AnyPath, write_atomically
from topklm.training.console import Console

# The first process may prepare a large corpus while the others wait; if it fails they hear of it at once.
_DATA_PATIENCE_SECONDS = 24 * 3600.0
_PATIENCE_SECONDS = 600.0


@contextlib.contextmanager
def opened(config: Config, folder: AnyPath, console: Console) -> Iterator[tuple[Config, Mixture]]:
    """Holds the run folder; gives the config with its vocabulary filled in, and the data.

    Raises:
        UserError: If the folder is in use, not shared by all hosts or holds another run, or for data that
            cannot be trained on.
    """
    with contextlib.ExitStack() as stack:
        if distributed.is_primary():
            stack.enter_context(run_folder.owned(folder, console.say))
        _check_shared(folder)
        mixture = _prepare_in_turn(config, console)
        config = _with_vocabulary(config, mixture)
        if not mixture.heldout_text_tokens:
            raise UserError(
                "data.source, data.mixture: no dataset has held-out text to evaluate on; prepare one with "
                "--heldout or --heldout-fraction"
            )
        if distributed.is_primary():
            _describe(config, folder, mixture)
        distributed.barrier("run folder", _PATIENCE_SECONDS)
        yield config, mixture


def _describe(config: Config, folder: AnyPath, mixture: Mixture) -> None:
    """Checks that the folder holds this run or none, and writes what makes it self-contained."""
    if run_folder.has_checkpoint(folder):
        run_folder.check_same_run(folder, config)
        _check_tokenizer(folder, mixture)
    with storage_errors_are_user_errors(f"writing to the run folder {folder}", folder):
        write_atomically(folder / run_folder.CONFIG_FILE, _pretty(config.to_dict()).encode())
        write_atomically(folder / run_folder.TOKENIZER_FILE, mixture.tokenizer.to_bytes())
        if mixture.tokenizer.kind == "huggingface":
            about = mixture.tokenizer.config(config.model.context_length)
            write_atomically(folder / run_folder.TOKENIZER_CONFIG_FILE, _pretty(about).encode())


def _check_shared(folder: AnyPath) -> None:
    if distributed.process_count() == 1:
        return
    marker = run_folder.write_marker(folder) if distributed.is_primary() else None
    marker = distributed.broadcast("marker", marker, _PATIENCE_SECONDS)
    run_folder.check_marker(folder, marker)
    distributed.barrier("marker", _PATIENCE_SECONDS)
    if distributed.is_primary():
        run_folder.remove_marker(folder, marker)


def _prepare_in_turn(config: Config, console: Console) -> Mixture:
    """The first process prepares; the others then find it done, or do the same on a disk of their own."""
    if distributed.is_primary():
        mixture = prepare(config.data, console.say)
    distributed.barrier("data of the first process", _DATA_PATIENCE_SECONDS)
    if not distributed.is_primary():
        mixture = prepare(config.data, console.say)
    fingerprints = distributed.gather("data", mixture.fingerprint, _DATA_PATIENCE_SECONDS)
    if len(set(fingerprints)) > 1:
        other = next(i for i, found in enumerate(fingerprints) if found != fingerprints[0])
        raise UserError(
            f"data.source, data.mixture: process {other} has other data than process 0 (fingerprint "
            f"{fingerprints[other][:12]}, not {fingerprints[0][:12]}): give all hosts the same"
        )
    return mixture


def _with_vocabulary(config: Config, mixture: Mixture) -> Config:
    """Fills in model.vocab_size from the tokenizer."""
    size, asked = mixture.tokenizer.vocab_size, config.model.vocab_size
    if asked not in (0, size):
        raise UserError(f"model.vocab_size = {asked}: must be 0 (the tokenizer's) or the tokenizer's {size}")
    model = dataclasses.replace(config.model, vocab_size=size)
    return dataclasses.replace(config, model=model)


def _check_tokenizer(folder: AnyPath, mixture: Mixture) -> None:
    path = folder / run_folder.TOKENIZER_FILE
    with storage_errors_are_user_errors(f"reading {path}", path):
        differs = path.exists() and sha256(path.read_bytes()).hexdigest() != mixture.tokenizer.sha256
    if differs:
        raise UserError(
            f"{path} is not the tokenizer of the data (the text or its settings changed, or the file is "
            "damaged): restore the data, or start a new run with --workdir; a damaged file is written again "
            "once it is deleted"
        )


def _pretty(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"
