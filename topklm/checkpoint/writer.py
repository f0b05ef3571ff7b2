"""Writes a checkpoint, and removes old ones; `reader` says how they lie on the disk."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
import concurrent.futures
import fnmatch
import itertools
import json
import pathlib
import time
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp

from topklm.checkpoint import checksums
from topklm.checkpoint.reader import (
    COMMITTED_FILE,
    FACTS,
    FORMAT,
    HAS_RECORD,
    JSON_FILE,
    RECORD_FILE,
    complete_steps,
    describe_arrays,
    json_checksum,
)
from topklm.storage.files import for_tensorstore, fsync, is_bucket, write_atomically

_LONGEST_S = 86_400.0  # of a single checkpoint, for which nobody waits
_TEMPORARY = ".orbax-checkpoint-tmp"

# Small enough that a process reads little besides its shards, and that several are read at the same time;
# large enough for the requests to a bucket to be few. Weights hardly shrink, and compressing them costs ten
# times what writing does.
_CHUNK_BYTES = 16 * 2**20


class CheckpointWriter:
    """A checkpoint that is being written, under a temporary name where the storage can rename.

    In a run of several processes each has its own part; the first one also does what is to be done once.
    """

    def __init__(self, checkpoints: epath.Path, step: int):
        self._final = checkpoints / str(step)
        bucket = is_bucket(checkpoints)
        self._folder = self._final if bucket else self._final.with_name(f"{step}{_TEMPORARY}")
        self._handler = _orbax().PyTreeCheckpointHandler(use_compression=False)
        self._futures: list[Any] = []

    def make_folders(self, items: Sequence[str]) -> None:
        """Makes the folders of the items, for all processes."""
        if self._folder.exists():
            self._folder.rmtree()
        for item in items:
            (self._folder / item).mkdir(parents=True)

    def start_record(self, trees: Mapping[str, Any]) -> None:
        """Begins computing the record of the arrays (nested dicts, by item), which may be donated afterwards.

        All processes of a mesh must call it.
        """
        self._shapes = describe_arrays(trees)
        self._sums = checksums.start(dict(trees))

    def copy(self, trees: Mapping[str, Any]) -> None:
        """Copies this process's part of the arrays to the host and begins to write it."""
        self._items = tuple(trees)
        # In a thread, for the sake of notebooks, in which an event loop runs already.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            self._futures = thread.submit(asyncio.run, self._begin(trees)).result()

    def finish_part(self, timeout_s: float) -> None:
        """Returns when this process's part of the arrays is on the disk, or raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        try:
            for future in self._futures:
                future.result(timeout=max(0.0, deadline - time.monotonic()))
        except TimeoutError as e:
            raise TimeoutError(f"not done after {timeout_s:g} s") from e

    def commit(self, values: Mapping[str, Any]) -> None:
        """Makes the checkpoint complete, with JSON-able values by item, once all processes have finished."""
        for item in self._items:
            self._handler.finalize(self._orbax_folder(item))
        values = {**values, FACTS: {**values[FACTS], FORMAT: HAS_RECORD}}
        for item, value in values.items():
            write_atomically(self._folder / item / JSON_FILE, json.dumps(value).encode())
        sums = checksums.fetch(self._sums)
        record = {
            "arrays": {name: [self._shapes[name], value] for name, value in sums.items()},
            "values": {item: json_checksum(value) for item, value in values.items()},
        }
        write_atomically(self._folder / FACTS / RECORD_FILE, json.dumps(record).encode())
        if is_bucket(self._folder):
            (self._folder / COMMITTED_FILE).write_text("")
        else:
            items = list(self._folder.iterdir())
            (self._folder / COMMITTED_FILE).write_text("")  # for those who copy it into a bucket
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
            save_args = jax.tree.map(lambda _: _orbax().SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
            args = _orbax().args.PyTreeSave(tree, save_args=save_args)
            saves.append(self._handler.async_save(self._orbax_folder(item), args=args))
        return list(itertools.chain.from_iterable(await asyncio.gather(*saves)))


def _orbax() -> Any:
    import orbax.checkpoint  # noqa: PLC0415 - 0.1 s that the start of a run does without

    return orbax.checkpoint


def write_checkpoint(
    checkpoints: epath.Path, step: int, trees: Mapping[str, Any], values: Mapping[str, Any]
) -> None:
    """Writes a checkpoint of one process at once; arrays (nested dicts) and JSON-able values by item."""
    writer = CheckpointWriter(checkpoints, step)
    writer.make_folders([*trees, *values])
    arrays = jax.tree.map(jnp.asarray, dict(trees))
    writer.start_record(arrays)
    writer.copy(arrays)
    writer.finish_part(_LONGEST_S)
    writer.commit(values)


def remove_old(checkpoints: epath.Path, keep: int | None = None) -> None:
    """Removes all but the newest `keep` (None: all) checkpoints, and what is half-written or half-removed.

    Nothing may be written into the folder meanwhile. OSError: the first that came, after all removals have
    been tried.
    """
    kept = complete_steps(checkpoints)[-(keep or 0) :]
    _remove_if(checkpoints, lambda name: name.isdigit() and int(name) not in kept)


def remove(checkpoints: epath.Path, steps: Sequence[int]) -> None:
    """Removes the checkpoints of these steps, and more as `remove_old`; raises as it does."""
    _remove_if(checkpoints, lambda name: name.isdigit() and int(name) in steps)


def _remove_if(checkpoints: epath.Path, unwanted: Callable[[str], bool]) -> None:
    failures = []
    for path in list(checkpoints.iterdir()) if checkpoints.exists() else ():
        if _TEMPORARY in path.name or unwanted(path.name):
            try:
                _remove(path)
            except OSError as e:
                failures.append(e)
    if failures:
        raise failures[0]


def _remove(path: epath.Path) -> None:
    """Removes a checkpoint or a part of one; meanwhile nobody takes the rest of it for a complete one."""
    if is_bucket(path):
        (path / COMMITTED_FILE).unlink(missing_ok=True)
        path.rmtree()
        return
    if _TEMPORARY not in path.name:
        path = path.rename(path.with_name(f"{path.name}.deleted{_TEMPORARY}"))
    if pathlib.Path(path).is_symlink() or not path.is_dir():
        path.unlink()  # not what the link leads to
    else:
        path.rmtree()


class _LiteralPath(type(epath.Path())):  # type: ignore[misc]
    """A folder in whose own path `*`, `?`, `[` and a backslash are no pattern when Orbax looks into it."""

    def glob(self, pattern: str) -> Iterator[epath.Path]:
        """Yields the folder's entries whose names match a pattern."""
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))
