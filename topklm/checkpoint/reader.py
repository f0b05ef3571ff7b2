"""Reads a checkpoint, and says how one lies on the disk.

A step's folder holds four items: `params` and `optimizer` (nested dicts of arrays; Orbax: OCDBT and Zarr),
`data` and `facts` (JSON: config, tokenizer sha256, step, tokens seen, seconds trained, versions). Beside the
facts lies the record of checksums, which checkpoints of earlier versions lack.

Orbax's own restoring holds each array three times while it reads it: as stored, unpacked, and copied to the
device. Here only a few chunks are held besides the arrays themselves.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
import contextlib
import ctypes
import itertools
import json
import math
import mmap
import os
from typing import Any
import zlib

from etils import epath
import jax
import numpy as np
import tensorstore as ts

from topklm.checkpoint import checksums
from topklm.errors import UserError
from topklm.storage.errors import says_nothing_of_content
from topklm.storage.files import for_tensorstore, is_bucket, parse_json

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
