"""The data of a training run: datasets that `config.data` names, prepared if they have to be.

Text goes into a folder named after a fingerprint of all that shapes it, so that it can be reused without
asking. `topklm.data.building` makes it.
"""

from collections.abc import Callable
import contextlib
import os
from pathlib import Path
import shutil
import time

from topklm.config import DataConfig
from topklm.data.building.build import build
from topklm.data.building.description import DatasetSettings, DatasetSources, fingerprint
from topklm.data.building.encode import Selection
from topklm.data.building.storage import Storage
from topklm.data.building.work_items import LocalEngine, all_cores
from topklm.data.dataset import is_dataset, load_dataset
from topklm.data.mixture import Mixture, open_mixture
from topklm.data.records import sha256_of_file
from topklm.data.sources import SourceFile, corpus_name, find
from topklm.errors import disk_errors_are_user_errors
from topklm.progress import Progress
from topklm.storage.files import check_name, is_locked

_STALE_SECONDS = 24 * 3600  # unfinished work that nobody has touched for this long is given up


def prepare(data: DataConfig, announce: Callable[[str], None] = print) -> Mixture:
    """Opens the prepared datasets that `data` names, or makes one of the text that it names.

    A document is held out when a hash of its text says so, so that a corpus may grow without any document
    changing sides (but see `encode.fitted` for very few); the tokenizer is trained on the training split.

    Args:
        data: Sources and settings.
        announce: Receives a few lines of progress.

    Raises:
        UserError: For text that cannot be read, a split without documents, a disk that refuses, or
            a prepared folder that is damaged.
    """
    if data.mixture:
        return open_mixture(data.mixture)
    folder = Path(os.path.expanduser(data.source))
    if is_dataset(folder):
        dataset = load_dataset(folder)
        announce(f"data: {folder} ({dataset})")
        return Mixture.single(dataset)
    names = [part.strip() for part in data.source.split(",") if part.strip()]
    files = find(names, flag="data.source", say=announce)
    selection = Selection(text_field=data.text_field, heldout_fraction=data.heldout_fraction)
    settings = DatasetSettings(selection, tokenizer=f"train:{data.vocab_size}")
    check_name(data.dir, "data.dir")
    root = Path(os.path.expanduser(data.dir)).absolute()
    with disk_errors_are_user_errors("preparing the data"):
        name = fingerprint([(file.ending, _contents_of(file), False) for file in files], settings)
        _remove_stale(root)
    out = root / f"{corpus_name(files)}-{name[:12]}"
    if is_dataset(out):
        # Its name says what it holds, wherever its sources lay at the time.
        dataset = load_dataset(out)
        announce(f"data: reusing {out} ({dataset})")
        return Mixture.single(dataset)
    with LocalEngine(all_cores(), in_this_process=True) as engine:
        build(DatasetSources(files), settings, Storage(out), engine, Progress(announce), wait=True)
    dataset = load_dataset(out)
    announce(f"data: wrote {out} ({dataset})")
    return Mixture.single(dataset)


def _contents_of(file: SourceFile) -> str:
    """Returns a name of the file's contents: a hash, or facts that a remote store gives."""
    if os.path.isfile(file.url):
        return sha256_of_file(Path(file.url))
    return f"{file.url} {file.size} {file.version}"


def _remove_stale(root: Path) -> None:
    for folder in root.glob(".*.partial"):
        # Another process may remove its folder while we look at it.
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
            if time.time() - newest > _STALE_SECONDS and not is_locked(folder):
                shutil.rmtree(folder, ignore_errors=True)
