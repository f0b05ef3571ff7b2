"""What a checkpoint is made of, for those who write one and those who read one; the one user of Orbax.

A step's folder holds four items: `params` and `optimizer` (nested dicts of arrays; Orbax: OCDBT and Zarr),
`data` and `facts` (JSON: config, tokenizer sha256, step, tokens seen, seconds trained, versions). Beside the
facts lies the record of checksums, which checkpoints of earlier versions lack. When to save, what to do about
failures and which checkpoint to take is the affair of `topklm.checkpoint.manager`.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
import concurrent.futures
import fnmatch
import functools
import itertools
import json
import pathlib
import time
from typing import Any
import zlib

from etils import epath
import jax
import orbax.checkpoint as ocp

from topklm import sharding
from topklm.checkpoint import checksums
from topklm.checkpoint.arrays import open_arrays, read_arrays
from topklm.storage.files import beside, for_tensorstore, fsync, is_bucket, parse_json, write_atomically

PARAMS, OPTIMIZER, DATA, FACTS = "params", "optimizer", "data", "facts"

_JSON_FILE = "metadata"  # as Orbax's JsonCheckpointHandler has it
RECORD_FILE = "checksums.json"

# A folder in a bucket cannot be renamed into place: a checkpoint is complete once this object is in it.
_COMMITTED = "commit_success.txt"
_TEMPORARY = ".orbax-checkpoint-tmp"

# Small enough that a process reads little besides its shards, and that several are read at the same time;
# large enough for the requests to a bucket to be few. Weights hardly shrink, and compressing them costs ten
# times what writing does.
_CHUNK_BYTES = 16 * 2**20


# Of the facts, which say whether a checkpoint without a record was written by an earlier version.
_FORMAT, _HAS_RECORD = "format", 2


class DamagedError(Exception):
    """A checkpoint is not as it was written; its text is a phrase that says where."""


# Folders


def complete_steps(checkpoints: epath.Path) -> list[int]:
    """Steps that were written to their end, rising; those set aside do not count."""
    if not checkpoints.exists():
        return []  # a folder in a bucket is there only while something is in it
    steps = [path for path in checkpoints.iterdir() if path.name.isdigit()]
    return sorted(int(path.name) for path in steps if not is_bucket(path) or (path / _COMMITTED).exists())


def remove_old(checkpoints: epath.Path, keep: int | None = None) -> None:
    """Removes all but the newest `keep` checkpoints, and what was left half-written or half-removed.

    Args:
        checkpoints: The folder of checkpoints; nothing may be written into it meanwhile.
        keep: By default all that are complete.

    Raises:
        OSError: The first of those that came, after all removals have been tried.
    """
    steps = complete_steps(checkpoints)
    complete = {str(step) for step in steps}
    removals: list[Callable[[], None]] = [
        functools.partial(_remove_tree, path)
        for path in (checkpoints.iterdir() if checkpoints.exists() else ())
        if _TEMPORARY in path.name or (path.name.isdigit() and path.name not in complete)
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
    """Removes a checkpoint; nobody takes what is left of it meanwhile for a whole one."""
    if is_bucket(folder):
        (folder / _COMMITTED).unlink(missing_ok=True)
    else:
        folder = folder.rename(folder.with_name(f"{folder.name}.deleted{_TEMPORARY}"))
    _remove_tree(folder)


def _remove_tree(path: epath.Path) -> None:
    """Removes a folder and all in it; of a symbolic link or a file only that."""
    local = not is_bucket(path)
    if local and (pathlib.Path(path).is_symlink() or not path.is_dir()):
        path.unlink()
    else:
        path.rmtree()


def set_aside(folder: epath.Path) -> epath.Path:
    """Renames a checkpoint so that it no longer counts as one; returns its new place."""
    return folder.rename(beside(folder, "damaged"))


# Writing


class Writing:
    """A checkpoint that is being written, under a temporary name where the storage can rename.

    In a run of several processes each has its own part; the first one also does what is to be done once.
    """

    def __init__(self, checkpoints: epath.Path, step: int):
        self._final = checkpoints / str(step)
        bucket = is_bucket(checkpoints)
        self._folder = self._final if bucket else self._final.with_name(f"{step}{_TEMPORARY}")
        self._handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        self._futures: list[Any] = []

    def make_folders(self, items: Sequence[str]) -> None:
        """Makes room, for all processes."""
        if self._folder.exists():
            self._folder.rmtree()
        for item in items:
            (self._folder / item).mkdir(parents=True)

    def copy(self, trees: Mapping[str, Any]) -> None:
        """Copies this process's part of the arrays to the host and begins to write it.

        Args:
            trees: Nested dicts of arrays, by item. They may be donated once this returns.
        """
        self._trees = tuple(trees)
        self._futures = _run(self._begin(trees))

    def finish_part(self, timeout_s: float) -> None:
        """Returns when this process's part of the arrays is on the disk."""
        deadline = time.monotonic() + timeout_s
        try:
            for future in self._futures:
                future.result(timeout=max(0.0, deadline - time.monotonic()))
        except TimeoutError as e:
            raise TimeoutError(f"not done after {timeout_s:g} s") from e

    def commit(self, values: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Makes the checkpoint whole, once all processes have finished their parts.

        Args:
            values: What JSON can hold, by item.
            record: From `make_record`.
        """
        for item in self._trees:
            self._handler.finalize(self._orbax_folder(item))
        for item, value in _with_format(values).items():
            write_atomically(self._folder / item / _JSON_FILE, json.dumps(value).encode())
        write_atomically(self._folder / FACTS / RECORD_FILE, json.dumps(record).encode())
        if is_bucket(self._folder):
            (self._folder / _COMMITTED).write_text("")
        else:
            items = list(self._folder.iterdir())
            (self._folder / _COMMITTED).write_text("")  # for those who copy it into a bucket
            for folder in (*items, self._folder):
                fsync(folder)
            self._folder.rename(self._final)
            fsync(self._final.parent)

    def abandon(self) -> None:
        """Removes what was written so far."""
        if self._folder.exists():
            self._folder.rmtree()

    def _orbax_folder(self, item: str) -> epath.Path:
        folder = self._folder / item
        return _LiteralPath(folder if is_bucket(folder) else for_tensorstore(folder))

    async def _begin(self, trees: Mapping[str, Any]) -> list[Any]:
        saves = []
        for item, tree in trees.items():
            save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
            args = ocp.args.PyTreeSave(tree, save_args=save_args)
            saves.append(self._handler.async_save(self._orbax_folder(item), args=args))
        return list(itertools.chain.from_iterable(await asyncio.gather(*saves)))


class _LiteralPath(type(epath.Path())):  # type: ignore[misc]
    """A folder in whose own path `*`, `?`, `[` and a backslash are no pattern when Orbax looks into it."""

    def glob(self, pattern: str) -> Iterator[epath.Path]:
        """Yields what the folder holds by names of this pattern."""
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))


def make_record(trees: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Begins computing what `Contents.check` needs; the arrays may be donated at once.

    Returns:
        From the JSON items to the record; it waits for the checksums of the arrays.
    """
    shapes = _described(trees)
    sums = checksums.start(dict(trees))

    def finish(values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "arrays": {name: [shapes[name], value] for name, value in checksums.fetch(sums).items()},
            "values": {item: _json_checksum(value) for item, value in _with_format(values).items()},
        }

    return finish


def _run(coroutine: Any) -> Any:
    """Runs it to its end, also where an event loop is running already, as in a notebook."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


# Reading


class Contents:
    """A checkpoint that can be read: its JSON is read, its arrays are open, none is read yet.

    Attributes:
        values: What the JSON items hold, by item.
        shapes: Name -> `jax.ShapeDtypeStruct` of the arrays, by item.

    Args:
        folder: The checkpoint's.
        arrays: Which items of arrays are to be read.
        values: Which items of JSON are to be read.

    Raises:
        DamagedError: If the values are not those that were written, or the record does not fit the arrays.
        OSError, ValueError, KeyError, TypeError: If something is missing or does not parse.
    """

    def __init__(
        self,
        folder: epath.Path,
        arrays: Sequence[str] = (PARAMS, OPTIMIZER),
        values: Sequence[str] = (DATA, FACTS),
    ):
        self._folder = folder
        path = folder / FACTS / RECORD_FILE
        self._record = parse_json(path.read_bytes()) if path.exists() else None
        self.values = {item: self._read_value(item) for item in dict.fromkeys((*values, FACTS))}
        if self.values[FACTS].pop(_FORMAT, 1) >= _HAS_RECORD and self._record is None:
            raise DamagedError(f"{RECORD_FILE} is missing")
        if str(step := self.values[FACTS].get("step", folder.name)) != folder.name:
            raise DamagedError(f"it is that of step {step}")
        self._stores = {item: open_arrays(folder / item) for item in arrays}
        self.shapes = {
            item: {name: jax.ShapeDtypeStruct(s.shape, s.dtype.numpy_dtype) for name, s in stores.items()}
            for item, stores in self._stores.items()
        }
        if self._record is not None:
            recorded = {
                name: shape
                for name, (shape, _) in self._record["arrays"].items()
                if name.partition(".")[0] in arrays
            }
            if recorded != _described(self.shapes):
                raise DamagedError("its arrays are not those that were written")

    def read(self, item: str, target: Any) -> Any:
        """Reads arrays, each process only those parts that its devices hold.

        Args:
            item: PARAMS or OPTIMIZER.
            target: Nested dict of `jax.ShapeDtypeStruct` with shardings.
        """
        return read_arrays(self._stores[item], target)

    def check(
        self,
        trees: Mapping[str, Any],
        changed: Callable[[Any, Mapping[str, int]], list[str]] = checksums.changed,
    ) -> None:
        """Makes sure that the arrays read are those that were written; all processes of a mesh must call it.

        Args:
            trees: Nested dicts of arrays, by item.
            changed: Compares the arrays with the checksums of all that were written.

        Raises:
            DamagedError: If they are not.
        """
        if self._record is None:
            return
        saved = {name: value for name, (_, value) in self._record["arrays"].items()}
        if differing := changed(dict(trees), saved):
            more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            raise DamagedError(f"{differing[0]}{more}: checksum differs")

    def _read_value(self, item: str) -> dict[str, Any]:
        value = parse_json((self._folder / item / _JSON_FILE).read_bytes())
        if self._record is not None and self._record["values"][item] != _json_checksum(value):
            raise DamagedError(f"{item}: checksum differs")
        return value


def placed(abstract: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shapes and dtypes with the layout on a mesh of every leaf, the target of a reading."""
    shardings = sharding.parameter_shardings(abstract, mesh)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)


def mismatches(saved: Any, wanted: Any) -> list[str]:
    """Names every array that is missing, unexpected or of another shape or dtype, a short phrase each."""
    old, new = checksums.named(saved), checksums.named(wanted)
    problems = [f"{name} is missing" for name in new if name not in old]
    problems += [f"{name} is not part of this model" for name in old if name not in new]
    for name in (name for name in new if name in old):
        held, needed = old[name], new[name]
        if tuple(held.shape) != tuple(needed.shape):
            problems.append(f"{name} is {list(held.shape)}, this model needs {list(needed.shape)}")
        elif held.dtype != needed.dtype:
            problems.append(f"{name} is {held.dtype}, this model needs {needed.dtype}")
    return problems


def _described(trees: Mapping[str, Any]) -> dict[str, str]:
    """Every array's dtype and shape, as "float32[4, 8]"."""
    arrays = checksums.named(dict(trees))
    return {name: f"{array.dtype.name}{list(array.shape)}" for name, array in arrays.items()}


def _with_format(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON items as they are stored: the facts say that a record belongs to them."""
    return {**values, FACTS: {**values[FACTS], _FORMAT: _HAS_RECORD}}


def _json_checksum(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())
