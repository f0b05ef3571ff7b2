"""A stretch of text with all its activations, on disk as compressed arrays that are sorted by neuron.

A segment holds the events (token, value) of every neuron one after another, tokens rising. So one neuron's
events are a slice, and one document's are found by a pass over a segment, which is why segments are short.
Dims: S TopK layers, D neurons per layer, N tokens, E events.

On disk, a folder of zarr3 arrays (TensorStore): `tokens`, `documents`, `losses` of [N]; `offsets` [S D + 1],
where each neuron's events begin; `gaps` [E], an event's distance in tokens from the neuron's event before (or
from the start), and `values` [E], bfloat16. Gaps are small, and bytes of one kind lie together, so both
compress well. Beside them, `segment.json` holds `Facts`.

All reading is checked: each chunk carries a CRC-32C, a chunk that is not there is damage, and so is a file
of another array or segment, for each carries its own tag. An array's type and length are not taken from its
`zarr.json`, which is there for other readers. Stores of format 1 had neither tags nor CRCs, and no chunks in
which all is 0.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from topklm.neurons import damage_is_a_user_error
from topklm.storage.files import for_tensorstore, fsync, read_json, sealed_json, write_atomically

ARRAYS = ("tokens", "documents", "losses", "offsets", "gaps", "values")

_FACTS = "segment.json"
_CHUNK = 16_384  # elements, the least that is read: some 20 kB
_LEVEL = 3  # of zstd: higher ones take twice the time for 2 %
_SHARD = "c/0"  # the one file of all chunks, under an array's folder


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """The content of one segment."""

    tokens: np.ndarray  # int[N], ids
    documents: np.ndarray  # int[N], the document of each token, rising
    # float[N], of the token itself given those before it, in nats; NaN where nothing stands before.
    losses: np.ndarray
    offsets: np.ndarray  # int64[S D + 1], where the events of each neuron begin, layer by layer
    token_index: np.ndarray  # int[E], which of the N tokens, rising for each neuron
    values: np.ndarray  # [E], not 0


def from_dense(
    tokens: np.ndarray, documents: np.ndarray, losses: np.ndarray, layers: Iterable[np.ndarray]
) -> Segment:
    """Sorts the outputs [N, D] of TopK layers by neuron; they are taken one after another."""

    def by_neuron(layer: np.ndarray) -> tuple[np.ndarray, ...]:
        # Nonzero entries of the transpose come in the right order: nothing has to be sorted.
        transposed = np.ascontiguousarray(layer.T)
        active = _is_not_zero(transposed)
        return active.sum(axis=1), np.flatnonzero(active) % len(layer), transposed[active]

    return _joined(tokens, documents, losses, map(by_neuron, layers))


def from_sparse(
    tokens: np.ndarray,
    documents: np.ndarray,
    losses: np.ndarray,
    indices: np.ndarray,
    values: np.ndarray,
    d_model: int,
) -> Segment:
    """Sorts sparse outputs of TopK layers by neuron: indices int[S, N, k], distinct for a token, and values.

    Values [S, N, k] that are zero are left out; all else is as in `Segment`.
    """

    def by_neuron(indices: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, ...]:
        at = np.flatnonzero(_is_not_zero(values))
        neurons = indices.reshape(-1)[at]
        at = at[np.argsort(neurons, kind="stable")]  # so that tokens go on rising
        return np.bincount(neurons, minlength=d_model), at // indices.shape[1], values.reshape(-1)[at]

    return _joined(tokens, documents, losses, map(by_neuron, indices, values))


def _joined(
    tokens: np.ndarray, documents: np.ndarray, losses: np.ndarray, layers: Iterable[tuple[np.ndarray, ...]]
) -> Segment:
    """Makes a segment of each layer's number of events by neuron, and of its events' tokens and values."""
    counts, token_index, values = map(np.concatenate, zip(*layers, strict=True))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return Segment(tokens, documents, losses, offsets, token_index, values)


@dataclasses.dataclass(frozen=True)
class Facts:
    """The figures of a segment that are known without opening its arrays."""

    n_tokens: int  # N
    n_events: int  # E
    first_document: int  # of its first token
    last_document: int  # of its last
    store: str = ""  # `Store.sha256`; as the rest empty in stores of format 1
    part: int = 0  # whose it is
    number: int = 0  # which of the part's segments, from 0
    begin: int = 0  # tokens of the part that come before it
    # By name: "dtype" and "size".
    arrays: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def tag(self, kind: str) -> bytes:
        """Returns bytes that tell the file of one array from all others, of other stores too."""
        return hashlib.sha256(f"{self.store} {self.part} {self.number} {kind}".encode()).digest()


def write(folder: Path, segment: Segment, store: str, part: int, number: int, begin: int) -> Facts:
    """Writes a segment into a new folder; the last four arguments as in `Facts`."""
    gaps = np.diff(segment.token_index, prepend=0)
    # Where a neuron begins, the distance is from the start of the segment.
    first = segment.offsets[:-1][np.diff(segment.offsets) > 0]
    gaps[first] = segment.token_index[first]
    arrays = {
        "tokens": _smallest(segment.tokens),
        "documents": segment.documents.astype(np.uint32),
        "losses": segment.losses.astype(np.float16),
        "offsets": segment.offsets.astype(np.uint64),
        "gaps": _smallest(gaps),
        "values": segment.values.astype(ml_dtypes.bfloat16),
    }
    known = {kind: {"dtype": array.dtype.name, "size": array.size} for kind, array in arrays.items()}
    creating = {"create": True, "delete_existing": True, "store_data_equal_to_fill_value": True}
    writing = [
        ts.open({**_spec(folder / kind, array.dtype.name, array.size), **creating}).result().write(array)
        for kind, array in arrays.items()
    ]
    for written in writing:
        written.result()
    documents = int(segment.documents[0]), int(segment.documents[-1])
    facts = Facts(arrays["tokens"].size, gaps.size, *documents, store, part, number, begin, known)
    for kind, array in arrays.items():
        if array.size:
            _put_tag(folder / kind / _SHARD, array.size, facts.tag(kind))
    write_atomically(folder / _FACTS, sealed_json(dataclasses.asdict(facts)))
    return facts


def read_facts(folder: Path, advice: str, sealed: bool) -> Facts:
    """Reads a segment's facts, sealed unless of format 1; UserError, which ends in `advice`, if damaged."""
    with damage_is_a_user_error(folder, advice, TypeError):
        facts = Facts(**read_json(folder / _FACTS, advice, sealed=sealed))
        counts = (facts.n_tokens, facts.n_events, facts.first_document, facts.last_document)
        if not all(type(n) is int and n >= 0 for n in counts):
            raise ValueError("counts that are none")
        return facts


class SegmentReader:
    """A segment on disk; arrays are opened when they are first needed.

    Of S D neurons, with facts from `read_facts`. Methods raise UserError, which `advice` ends, for arrays
    that cannot be read, or are not as they were written.
    """

    def __init__(self, folder: Path, facts: Facts, n_neurons: int, advice: str):
        self.folder, self.facts, self._advice = folder, facts, advice
        self.n_tokens, self.n_events = facts.n_tokens, facts.n_events
        lengths = [self.n_tokens] * 3 + [n_neurons + 1] + [self.n_events] * 2
        self._lengths = dict(zip(ARRAYS, lengths, strict=True))
        self._opened: dict[str, ts.TensorStore] = {}

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """int64[S D + 1]."""
        offsets = self.result(self.array("offsets").read()).astype(np.int64)
        with damage_is_a_user_error(self.folder, self._advice):
            if offsets[0] or offsets[-1] != self.n_events or (np.diff(offsets) < 0).any():
                raise ValueError("offsets: they are not where events begin")
        return offsets

    def array(self, kind: str) -> ts.TensorStore:
        """Opens one of `ARRAYS`; nothing is read yet."""
        if kind not in self._opened:
            with damage_is_a_user_error(self.folder, self._advice):
                array = ts.open(self._opening(kind)).result()
                if array.shape != (self._lengths[kind],):
                    raise ValueError(f"{kind}: {list(array.shape)} elements, not {self._lengths[kind]}")
                self._opened[kind] = array
        return self._opened[kind]

    def result(self, future: ts.Future) -> Any:
        """Waits for something of this segment."""
        with damage_is_a_user_error(self.folder, self._advice):
            return future.result()

    def start_reading(self, first: int, stop: int) -> tuple[ts.Future, ts.Future]:
        """Begins to read the gaps and values of neighbouring neurons, numbered through all layers."""
        begin, end = self.offsets[first], self.offsets[stop]
        return self.array("gaps")[begin:end].read(), self.array("values")[begin:end].read()

    def token_index(self, gaps: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Returns which of the N tokens the events of neighbouring neurons are at, int64[E].

        `offsets` say where the events of each begin among the gaps, and their number.
        """
        total = np.cumsum(gaps, dtype=np.int64)
        # Every neuron's sum begins at 0 again: the sum before its first event is taken off.
        before = np.concatenate([[0], total])[offsets[:-1]]
        index = total - np.repeat(before, np.diff(offsets))
        with damage_is_a_user_error(self.folder, self._advice):
            if len(index) and not 0 <= index.min() <= index.max() < self.n_tokens:
                raise ValueError("an event lies outside of its text")
        return index

    def read(self) -> Segment:
        """Reads all of it."""
        reading = {kind: self.array(kind).read() for kind in ARRAYS if kind != "offsets"}
        arrays = {kind: self.result(future) for kind, future in reading.items()}
        index = self.token_index(arrays.pop("gaps"), self.offsets)
        return Segment(**arrays, offsets=self.offsets, token_index=index)

    def _opening(self, kind: str) -> dict[str, Any]:
        path, size = self.folder / kind, self._lengths[kind]
        if not self.facts.store:
            # Of format 1: arrays of which no chunk was written, for all of them is 0.
            zeros = {
                "gaps": self.n_tokens == 1,
                "documents": not self.facts.last_document,
                "offsets": not self.n_events,
            }
            fill = zeros.get(kind, False) or (path / _SHARD).is_file()
            return {
                "driver": "zarr3",
                "kvstore": _kvstore(path),
                "open": True,
                "fill_missing_data_reads": fill,
            }
        if size:
            _check_tag(path / _SHARD, size, self.facts.tag(kind))
        # Without the last option, a chunk that is not there would read as zeros.
        options = {"open": True, "assume_metadata": True, "fill_missing_data_reads": False}
        return {**_spec(path, **self.facts.arrays[kind]), **options}


def _is_not_zero(array: np.ndarray) -> np.ndarray:
    if array.dtype != ml_dtypes.bfloat16:
        return array != 0
    # NumPy compares bfloat16 numbers one by one; all but the sign is 0 in a zero.
    return (array.view(np.uint16) << 1) != 0


def _smallest(array: np.ndarray) -> np.ndarray:
    """As the smallest unsigned type that holds all of it."""
    return array.astype(np.min_scalar_type(int(array.max(initial=0))))


def _kvstore(path: Path) -> dict[str, str]:
    return {"driver": "file", "path": f"{for_tensorstore(path)}/"}


def _spec(path: Path, dtype: str, size: int) -> dict[str, Any]:
    """Describes an array with all chunks in one file, so that a segment is a few files whatever it holds."""
    item = np.dtype(dtype).itemsize
    shuffled = {"cname": "zstd", "clevel": _LEVEL, "shuffle": "shuffle", "typesize": item, "blocksize": 0}
    inner = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "blosc", "configuration": shuffled},
        {"name": "crc32c"},
    ]
    sharded = {"chunk_shape": [_CHUNK], "codecs": inner}
    metadata = {
        "shape": [size],
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [_n_chunks(size) * _CHUNK]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharded}],
    }
    return {"driver": "zarr3", "kvstore": _kvstore(path), "metadata": metadata}


def _n_chunks(size: int) -> int:
    return max(-(-size // _CHUNK), 1)


# Tags: between its chunks and their index, which is at its end, a shard may hold anything.


def _index_bytes(size: int) -> int:
    return 16 * _n_chunks(size) + 4  # where each chunk begins and how long it is, and a CRC


def _put_tag(shard: Path, size: int, tag: bytes) -> None:
    with shard.open("r+b") as file:
        file.seek(-_index_bytes(size), os.SEEK_END)
        index = file.read()
        file.seek(-len(index), os.SEEK_END)
        file.write(tag + index)
    fsync(shard)


def _check_tag(shard: Path, size: int, tag: bytes) -> None:
    n_bytes = len(tag) + _index_bytes(size)
    with shard.open("rb") as file:
        there = os.fstat(file.fileno()).st_size
        file.seek(max(there - n_bytes, 0))
        if there < n_bytes or file.read(len(tag)) != tag:
            raise ValueError(f"{shard.parent.parent.name}: the file of another array, or cut off")
