"""The layout of a checkpoint on the disk, and the checkpoints of a folder.

A step's folder holds four items: `params` and `optimizer` (nested dicts of arrays; Orbax: OCDBT and Zarr),
`data` and `facts` (JSON: config, tokenizer sha256, step, tokens seen, seconds trained, versions). Beside the
facts lies the record of checksums, which checkpoints of earlier versions lack. `writer` writes all of it, and
`reader` reads it; `manager` decides when to save, and which checkpoint to restore.
"""

from collections.abc import Callable, Mapping
import functools
import json
import pathlib
from typing import Any
import zlib

from etils import epath

from topklm.checkpoint.checksums import by_name
from topklm.storage.files import beside, is_bucket

PARAMS, OPTIMIZER, DATA, FACTS = "params", "optimizer", "data", "facts"

JSON_FILE = "metadata"  # as Orbax's JsonCheckpointHandler has it
RECORD_FILE = "checksums.json"

# A folder in a bucket cannot be renamed into place: a checkpoint is complete once this object is in it.
COMMITTED_FILE = "commit_success.txt"
TEMPORARY = ".orbax-checkpoint-tmp"

# Of the facts, which say whether a checkpoint without a record was written by an earlier version.
FORMAT, HAS_RECORD = "format", 2


class DamagedError(Exception):
    """A checkpoint is not as it was written; the message is a phrase that says where."""


def complete_steps(checkpoints: epath.Path) -> list[int]:
    """Returns the steps that were written to their end, rising; renamed damaged ones do not count."""
    if not checkpoints.exists():
        return []  # a folder in a bucket is there only while something is in it
    steps = [path for path in checkpoints.iterdir() if path.name.isdigit()]
    return sorted(int(path.name) for path in steps if not is_bucket(path) or (path / COMMITTED_FILE).exists())


def remove_old(checkpoints: epath.Path, keep: int | None = None) -> None:
    """Removes all but the newest `keep` checkpoints, and what was left half-written or half-removed.

    Args:
        checkpoints: The folder of checkpoints; nothing may be written into it meanwhile.
        keep: By default all that are complete.

    Raises:
        OSError: The first that came, after all removals have been tried.
    """
    steps = complete_steps(checkpoints)
    complete = {str(step) for step in steps}
    removals: list[Callable[[], None]] = [
        functools.partial(_remove_tree, path)
        for path in (checkpoints.iterdir() if checkpoints.exists() else ())
        if TEMPORARY in path.name or (path.name.isdigit() and path.name not in complete)
    ]
    old = steps[:-keep] if keep else []
    removals += [functools.partial(_remove, checkpoints / str(step)) for step in old]
    failures = []
    for remove in removals:
        try:
            remove()
        except OSError as e:
            failures.append(e)
    if failures:
        raise failures[0]


def _remove(folder: epath.Path) -> None:
    """Removes a checkpoint; meanwhile nobody takes the rest of it for a complete one."""
    if is_bucket(folder):
        (folder / COMMITTED_FILE).unlink(missing_ok=True)
    else:
        folder = folder.rename(folder.with_name(f"{folder.name}.deleted{TEMPORARY}"))
    _remove_tree(folder)


def _remove_tree(path: epath.Path) -> None:
    """Removes a folder and all in it; of a symbolic link or a file only that."""
    local = not is_bucket(path)
    if local and (pathlib.Path(path).is_symlink() or not path.is_dir()):
        path.unlink()
    else:
        path.rmtree()


def quarantine(folder: epath.Path) -> None:
    """Renames a damaged checkpoint to `<step>.damaged-<n>`, so that it no longer counts as one."""
    folder.rename(beside(folder, "damaged"))


def describe_arrays(trees: Mapping[str, Any]) -> dict[str, str]:
    """Returns every array's dtype and shape by its name, as "float32[4, 8]"."""
    arrays = by_name(dict(trees))
    return {name: f"{array.dtype.name}{list(array.shape)}" for name, array in arrays.items()}


def json_checksum(value: Any) -> int:
    """Returns the CRC-32 of a value that JSON can hold."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())
