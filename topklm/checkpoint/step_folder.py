"""Reads and writes the folder of a step, and removes old ones.

It holds four items: `params` and `optimizer` (nested dicts of arrays; Orbax: OCDBT and Zarr), `data` and
`facts` (JSON: config, tokenizer sha256, step, tokens seen, seconds trained, versions). Beside the facts lies
the record of checksums, which checkpoints of earlier versions lack.

Orbax's own restoring holds each array three times while it reads it: as stored, unpacked, and copied to the
device. Here only a few chunks are held besides the arrays themselves.
"""

import asyncio
import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
import contextlib
import ctypes
import fnmatch
import itertools
import json
import math
import mmap
import os
import pathlib
import time
from typing import Any
import zlib

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from topklm.checkpoint import checksums
from topklm.errors import UserError
from topklm.storage.files import (
    for_tensorstore,
    fsync,
    is_bucket,
    parse_json,
    says_nothing_of_content,
    write_atomically,
)

PARAMS, OPTIMIZER, DATA, FACTS = "params", "optimizer", "data", "facts"

JSON_FILE = "metadata"  # as Orbax's JsonCheckpointHandler has it
RECORD_FILE = "checksums.json"

# A folder in a bucket cannot be renamed into place: a checkpoint is complete once this object is in it.
COMMITTED_FILE = "commit_success.txt"

# Of the facts, which say whether a checkpoint without a record was written by an earlier version.
FORMAT, HAS_RECORD = "format", 2


class DamagedError(Exception):
    """A checkpoint is not as it was written; the message is a phrase that says where."""


# Raised by reading, also by TensorStore, where a file is missing, cut off or changed, or where storage fails.
READ_ERRORS = (DamagedError, OSError, ValueError, KeyError, TypeError)

# Unpacked bytes of the chunks that are read at the same time: at least these, or this share of all there are.
# Each chunk is held once more as it is stored.
_BYTES_IN_FLIGHT = 16 * 2**20
_SHARE_IN_FLIGHT = 1 / 32

# To get memory from the system takes as long as to fill it, and neither uses more than one core.
_ARRAYS_AT_ONCE = 2

_ARRAY_KEY = "/.zarray"  # of the object that describes an array (Zarr, version 2)

# Of the index of a checkpoint, which otherwise is read again for each array.
_CONTEXT = {"cache_pool#ocdbt": {"total_bytes_limit": 100_000_000}}


def complete_steps(checkpoints: epath.Path) -> list[int]:
    """Returns the steps that were written to their end, rising; renamed damaged ones do not count."""
    if not checkpoints.exists():
        return []  # a folder in a bucket is there only while something is in it
    steps = [path for path in checkpoints.iterdir() if path.name.isdigit()]
    return sorted(int(path.name) for path in steps if not is_bucket(path) or (path / COMMITTED_FILE).exists())


def describe_arrays(trees: Mapping[str, Any]) -> dict[str, str]:
    """Returns every array's dtype and shape by its name, as "float32[4, 8]"."""
    arrays = checksums.by_name(dict(trees))
    return {name: f"{array.dtype.name}{list(array.shape)}" for name, array in arrays.items()}


def json_checksum(value: Any) -> int:
    """Returns the CRC-32 of a value that JSON can hold."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


class CheckpointReader:
    """A checkpoint that can be read: its JSON is read, its arrays are open, none is read yet.

    `values` are the content of the JSON items named, `shapes` name -> `jax.ShapeDtypeStruct` of the arrays,
    both by item. DamagedError if the values are not those that were written, or the record does not fit the
    arrays; OSError, ValueError, KeyError, TypeError if something is missing or does not parse.
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
        if self.values[FACTS].pop(FORMAT, 1) >= HAS_RECORD and self._record is None:
            raise DamagedError(f"{RECORD_FILE} is missing")
        if str(step := self.values[FACTS].get("step", folder.name)) != folder.name:
            raise DamagedError(f"it is that of step {step}")
        self._stores = {item: open_arrays(folder / item) for item in arrays}
        self.shapes = {
            item: {name: jax.ShapeDtypeStruct(s.shape, s.dtype.numpy_dtype) for name, s in stores.items()}
            for item, stores in self._stores.items()
        }
        if self._record is not None:
            recorded = {name: shape for name, (shape, _) in self._record["arrays"].items()}
            wanted = {name: recorded[name] for name in recorded if name.partition(".")[0] in arrays}
            if wanted != describe_arrays(self.shapes):
                raise DamagedError("its arrays are not those that were written")

    def read(self, targets: Mapping[str, Any]) -> dict[str, Any]:
        """Reads arrays, each process only those parts that its devices hold.

        `targets` are nested dicts of `jax.ShapeDtypeStruct` with shardings, by item. UserError, naming each
        array, if the checkpoint holds others than these.
        """
        for item, target in targets.items():
            if problems := _mismatches(self.shapes[item], target):
                where = f"checkpoint {self._folder.name} of {self._folder.parent}"
                raise UserError(f"{where} holds another model: {'; '.join(problems)}")
        return {item: read_arrays(self._stores[item], target) for item, target in targets.items()}

    def verify(self, trees: Mapping[str, Any]) -> None:
        """Raises DamagedError if the arrays read (nested dicts, by item) are not those that were written.

        All processes of a mesh must call it.
        """
        if self._record is None:
            return
        saved = {name: value for name, (_, value) in self._record["arrays"].items()}
        if differing := checksums.changed(dict(trees), saved):
            more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            raise DamagedError(f"{differing[0]}{more}: checksum differs")

    def _read_value(self, item: str) -> dict[str, Any]:
        value = parse_json((self._folder / item / JSON_FILE).read_bytes())
        if self._record is not None and self._record["values"][item] != json_checksum(value):
            raise DamagedError(f"{item}: checksum differs")
        return value


def describe_damage(error: Exception) -> str:
    """Describes the damage that one of READ_ERRORS shows; "" if the storage itself may be in trouble."""
    if says_nothing_of_content(error):
        return ""
    line = next(iter(str(error).splitlines()), "")[:200]  # TensorStore adds whole specifications to its own
    says_enough = line and isinstance(error, DamagedError | OSError | ValueError)
    return line if says_enough else f"{type(error).__name__}: {line}"


def _mismatches(saved: Any, wanted: Any) -> list[str]:
    """Names every array that is missing, unexpected or of another shape or dtype, a short phrase each."""
    old, new = checksums.by_name(saved), checksums.by_name(wanted)
    problems = [f"{name} is missing" for name in new if name not in old]
    problems += [f"{name} is not part of this model" for name in old if name not in new]
    for name, needed in new.items():
        held = old.get(name, needed)
        if tuple(held.shape) != tuple(needed.shape):
            problems.append(f"{name} is {list(held.shape)}, this model needs {list(needed.shape)}")
        elif held.dtype != needed.dtype:
            problems.append(f"{name} is {held.dtype}, this model needs {needed.dtype}")
    return problems


def open_arrays(folder: epath.Path) -> dict[str, ts.TensorStore]:
    """Opens every array of an Orbax item (OCDBT, Zarr) in an absolute folder, by dotted name; none is read.

    ValueError if what is stored is missing or damaged.
    """
    context = ts.Context(_CONTEXT)
    index = ts.KvStore.open(_kvstore(folder), context=context).result()
    keys = [key.decode() for key in index.list().result()]
    names = [key.removesuffix(_ARRAY_KEY) for key in keys if key.endswith(_ARRAY_KEY)]
    if not names:
        raise ValueError(f"there are no arrays in {folder}")
    opening = {name: ts.open(_spec(folder, name), open=True, context=context) for name in names}
    return {name: store.result() for name, store in opening.items()}


def read_arrays(stores: Mapping[str, ts.TensorStore], target: Any) -> Any:
    """Reads arrays of `open_arrays` onto devices, whatever devices they were saved from.

    `target` is a nested dict of `jax.ShapeDtypeStruct` with shardings; ValueError if what is stored is
    missing, damaged, or of another shape or dtype. Host memory at its peak: the arrays that stay there, and
    on top a sixteenth of all, 32 MiB or two chunks, whichever is most. On the CPU an array is the very memory
    that was read into.
    """
    leaves = checksums.by_name(target)
    sizes = {name: math.prod(leaf.shape) * leaf.dtype.itemsize for name, leaf in leaves.items()}
    in_flight = max(_BYTES_IN_FLIGHT, int(sum(sizes.values()) * _SHARE_IN_FLIGHT))

    def read(name: str) -> jax.Array:
        array = _read(name, stores[name], leaves[name], in_flight // _ARRAYS_AT_ONCE)
        _return_freed_memory()
        return array

    # The largest first: its chunks in flight then come before the other arrays are there.
    order = sorted(leaves, key=lambda name: -sizes[name])
    with futures.ThreadPoolExecutor(_ARRAYS_AT_ONCE) as threads:
        arrays = dict(zip(order, threads.map(read, order), strict=True))
    return jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name in leaves])


def _kvstore(folder: epath.Path) -> dict[str, Any]:
    # Not as a URL, in which some characters of a path would mean something else.
    if is_bucket(folder):
        _, _, bucket, path = os.fspath(folder).split("/", 3)
        base = {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}
    else:
        base = {"driver": "file", "path": f"{for_tensorstore(folder)}/"}
    return {"driver": "ocdbt", "base": base, "cache_pool": "cache_pool#ocdbt"}


def _spec(folder: epath.Path, name: str) -> dict[str, Any]:
    return {
        "driver": "zarr",
        "kvstore": _kvstore(folder) | {"path": f"{name}/"},
        # A chunk that is not there would otherwise read as zeros.
        "fill_missing_data_reads": False,
        # A checkpoint does not change; otherwise a bucket is asked before each chunk whether its index did.
        "recheck_cached_data": "open",
    }


def _read(name: str, store: ts.TensorStore, target: jax.ShapeDtypeStruct, in_flight: int) -> jax.Array:
    if (store.shape, store.dtype.numpy_dtype) != (target.shape, target.dtype):
        raise ValueError(
            f"{name} is {store.dtype.name}{list(store.shape)}, not {target.dtype}{list(target.shape)}"
        )
    boxes: dict[tuple[tuple[int, int], ...], list[jax.Device]] = collections.defaultdict(list)
    for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
        bounds = (part.indices(size) for part, size in zip(index, target.shape, strict=True))
        boxes[tuple((start, stop) for start, stop, _ in bounds)].append(device)
    shards = []
    for box, devices in boxes.items():
        content = _read_box(store, box, in_flight)
        shards += [jax.device_put(content, device) for device in devices]
    array = jax.make_array_from_single_device_arrays(target.shape, target.sharding, shards)
    return array.block_until_ready()


def _read_box(store: ts.TensorStore, box: tuple[tuple[int, int], ...], in_flight: int) -> np.ndarray:
    """Reads [start, stop) of each dim, chunk by chunk, at most `in_flight` bytes at the same time."""
    content = _empty([stop - start for start, stop in box], store.dtype.numpy_dtype)
    destination = ts.array(content).translate_to[[start for start, _ in box]] if box else ts.array(content)
    copies: collections.deque[tuple[ts.WriteFutures, int]] = collections.deque()
    n_bytes = 0
    for part in _chunks(box, store.chunk_layout.read_chunk_template.shape):
        size = math.prod(part.shape) * content.itemsize
        while copies and n_bytes + size > in_flight:
            copy, copy_size = copies.popleft()
            copy.result()
            n_bytes -= copy_size
        copies.append((destination[part].write(store[part]), size))
        n_bytes += size
    for copy, _ in copies:
        copy.result()
    return content


def _chunks(box: tuple[tuple[int, int], ...], chunk: tuple[int, ...]) -> Iterator[ts.IndexDomain]:
    """Yields the parts of a box that lie in one chunk each."""
    cuts = [range(start // size * size, stop, size) for (start, stop), size in zip(box, chunk, strict=True)]
    for corner in itertools.product(*cuts):
        yield ts.IndexDomain(
            inclusive_min=[max(at, start) for at, (start, _) in zip(corner, box, strict=True)],
            exclusive_max=[
                min(at + size, stop) for at, (_, stop), size in zip(corner, box, chunk, strict=True)
            ],
        )


def _empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Allocates an array at the start of a page, which the CPU device takes over without a copy.

    Linux gives all its pages at once, which takes half as long as one after another when they are written.
    """
    size = max(math.prod(shape) * dtype.itemsize, 1)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype, count=math.prod(shape)).reshape(shape)


def _return_freed_memory() -> None:
    """Gives back what the threads that read have freed but kept (glibc; elsewhere there is nothing to do)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


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
        with futures.ThreadPoolExecutor(1) as thread:
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
