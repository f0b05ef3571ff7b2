"""A stretch of text with all its activations, on disk as compressed arrays that are sorted by neuron.

A segment holds the events (token, value) of every neuron one after another, tokens rising. So one neuron's
events are a slice, and one document's are found by a pass over a segment, which is why segments are short.
Dims: S TopK layers, D neurons per layer, N tokens, E events.

On disk, a folder of zarr3 arrays (TensorStore): `tokens`, `documents`, `losses` of [N]; `offsets` [S D + 1],
where each neuron's events begin; `gaps` [E], an event's distance in tokens from the neuron's event before (or
from the start), and `values` [E], bfloat16. Gaps are small, and bytes of one kind lie together, so both
compress well.

All reading is checked: each chunk carries a CRC-32C, a chunk that is not there is damage, and so is a file
of another array or segment, for each carries its own tag. An array's type and
length are not taken from its `zarr.json`, which is there for other readers.
"""

from collections.abc import Collection, Iterable, Mapping
import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from topklm.neurons.paths import damage_is_a_user_error
from topklm.storage.files import for_tensorstore, fsync

ARRAYS = ("tokens", "documents", "losses", "offsets", "gaps", "values")

_CHUNK = 16_384  # elements, the least that is read: some 20 kB
_LEVEL = 3  # of zstd: higher ones take twice the time for 2 %
_SHARD = "c/0"  # the one file of all chunks, under an array's folder


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """The content of one segment.

    Attributes:
        tokens: int[N], ids.
        documents: int[N], the document of each token, rising.
        losses: float[N], of the token itself given those before it, in nats; NaN where nothing stands before.
        offsets: int64[S D + 1], where the events of each neuron begin, layer by layer.
        token_index: int[E], which of the N tokens, rising for each neuron.
        values: [E], not 0.
    """

    tokens: np.ndarray
    documents: np.ndarray
    losses: np.ndarray
    offsets: np.ndarray
    token_index: np.ndarray
    values: np.ndarray


def from_dense(
    tokens: np.ndarray, documents: np.ndarray, losses: np.ndarray, layers: Iterable[np.ndarray]
) -> Segment:
    """Sorts activations by neuron.

    Args:
        tokens: As in `Segment`, as the next two.
        documents: int[N].
        losses: float[N].
        layers: The outputs of the TopK layers, [N, D] each; taken one after another.
    """
    offsets, places, values = [np.zeros(1, np.int64)], [], []
    for layer in layers:
        # Nonzero entries of the transpose come in the right order: nothing has to be sorted.
        by_neuron = np.ascontiguousarray(layer.T)
        active = _is_not_zero(by_neuron)
        places.append(np.flatnonzero(active) % len(layer))
        values.append(by_neuron[active])
        offsets.append(offsets[-1][-1] + np.cumsum(active.sum(axis=1)))
    return Segment(
        tokens, documents, losses, np.concatenate(offsets), np.concatenate(places), np.concatenate(values)
    )


def from_sparse(
    tokens: np.ndarray,
    documents: np.ndarray,
    losses: np.ndarray,
    indices: np.ndarray,
    values: np.ndarray,
    d_model: int,
) -> Segment:
    """Sorts activations by neuron, like `from_dense`.

    Args:
        tokens: As in `Segment`, as the next two.
        documents: int[N].
        losses: float[N].
        indices: int[S, N, k], neurons, distinct for each token.
        values: [S, N, k]; zeros are left out.
        d_model: D.
    """
    offsets, places, kept = [np.zeros(1, np.int64)], [], []
    for layer_indices, layer_values in zip(indices, values, strict=True):
        active = _is_not_zero(layer_values).reshape(-1)
        neurons = layer_indices.reshape(-1)[active]
        order = np.argsort(neurons, kind="stable")  # so that tokens go on rising
        at = np.flatnonzero(active)[order]
        places.append(at // layer_indices.shape[1])
        kept.append(layer_values.reshape(-1)[at])
        offsets.append(offsets[-1][-1] + np.cumsum(np.bincount(neurons, minlength=d_model)))
    return Segment(
        tokens, documents, losses, np.concatenate(offsets), np.concatenate(places), np.concatenate(kept)
    )


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a segment, as far as it must be known before it is read."""

    dtype: str
    size: int


def write(folder: Path, segment: Segment, name: str) -> dict[str, Array]:
    """Writes all arrays into a new folder; see the module's description.

    Args:
        folder: To be made.
        segment: Its content.
        name: Tells this segment from all others, of other stores too; goes into every file.

    Returns:
        The type and size of each of `ARRAYS`, for a `SegmentReader`.
    """
    gaps = np.diff(segment.token_index, prepend=0)
    # Where a neuron begins, the distance is from the start of the segment.
    counts = np.diff(segment.offsets)
    first = segment.offsets[:-1][counts > 0]
    gaps[first] = segment.token_index[first]
    arrays = {
        "tokens": _smallest(segment.tokens),
        "documents": segment.documents.astype(np.uint32),
        "losses": segment.losses.astype(np.float16),
        "offsets": segment.offsets.astype(np.uint64),
        "gaps": _smallest(gaps),
        "values": segment.values.astype(ml_dtypes.bfloat16),
    }
    known = {kind: Array(array.dtype.name, array.size) for kind, array in arrays.items()}
    writing = []
    for kind, array in arrays.items():
        store = ts.open(_creating(folder / kind, known[kind])).result()
        writing.append(store.write(array))
    for written in writing:
        written.result()
    for kind, about in known.items():
        if about.size:
            _put_tag(folder / kind / _SHARD, about, _tag(name, kind))
    return known


class SegmentReader:
    """A segment on disk; arrays are opened when they are first needed.

    Args:
        folder: Of the segment.
        n_tokens: N.
        n_events: E.
        n_neurons: S D.
        advice: Ends the message for damage.
        name: As it was written with; None for one of an earlier version, which wrote neither tags nor CRCs,
            and no chunks in which all is 0.
        arrays: From `write`; none for one of an earlier version.
        zeros: Of an earlier version, which of `ARRAYS` may be 0 throughout.
    """

    def __init__(
        self,
        folder: Path,
        n_tokens: int,
        n_events: int,
        n_neurons: int,
        advice: str,
        name: str | None = None,
        arrays: Mapping[str, Array] | None = None,
        zeros: Collection[str] = (),
    ):
        self.folder, self.n_tokens, self.n_events = folder, n_tokens, n_events
        self._advice, self._name, self._arrays, self._zeros = advice, name, arrays or {}, zeros
        lengths = [n_tokens] * 3 + [n_neurons + 1] + [n_events] * 2
        self._lengths = dict(zip(ARRAYS, lengths, strict=True))
        self._opened: dict[str, ts.TensorStore] = {}
        self._offsets: np.ndarray | None = None

    @property
    def offsets(self) -> np.ndarray:
        """int64[S D + 1]; kept, once read."""
        if self._offsets is None:
            self._offsets = self._checked_offsets(self.result(self.array("offsets").read()))
        return self._offsets

    def array(self, kind: str) -> ts.TensorStore:
        """Opens one of `ARRAYS`; nothing is read yet.

        Raises:
            UserError: If it is not what was written there.
        """
        if kind not in self._opened:
            with damage_is_a_user_error(self.folder, self._advice):
                if self._name is None:
                    array = ts.open(self._opening_of_old(kind)).result()
                else:
                    if self._lengths[kind]:
                        _check_tag(self.folder / kind / _SHARD, self._arrays[kind], _tag(self._name, kind))
                    array = ts.open(_opening(self.folder / kind, self._arrays[kind])).result()
                if array.shape != (self._lengths[kind],):
                    raise ValueError(f"{kind}: {list(array.shape)} elements, not {self._lengths[kind]}")
                self._opened[kind] = array
        return self._opened[kind]

    def result(self, future: ts.Future) -> Any:
        """Waits for something of this segment.

        Raises:
            UserError: If it cannot be read, or is not what was written there.
        """
        with damage_is_a_user_error(self.folder, self._advice):
            return future.result()

    def start_reading(self, first: int, stop: int) -> tuple[ts.Future, ts.Future]:
        """Begins to read the gaps and values of neighbouring neurons, numbered through all layers."""
        begin, end = self.offsets[first], self.offsets[stop]
        return self.array("gaps")[begin:end].read(), self.array("values")[begin:end].read()

    def token_index(self, gaps: np.ndarray, offsets: np.ndarray | None = None) -> np.ndarray:
        """Computes `token_index_of`, all of them among the N tokens.

        Raises:
            UserError: If they are not.
        """
        places = token_index_of(gaps, offsets)
        with damage_is_a_user_error(self.folder, self._advice):
            if len(places) and not 0 <= places.min() <= places.max() < self.n_tokens:
                raise ValueError("an event lies outside of its text")
        return places

    def read(self) -> Segment:
        """Reads all of it.

        Raises:
            UserError: If it cannot be read, or is not what was written there.
        """
        reading = {kind: self.array(kind).read() for kind in ARRAYS}
        arrays = {kind: self.result(future) for kind, future in reading.items()}
        offsets = self._checked_offsets(arrays["offsets"])
        places = self.token_index(arrays["gaps"], offsets)
        return Segment(
            arrays["tokens"], arrays["documents"], arrays["losses"], offsets, places, arrays["values"]
        )

    def _checked_offsets(self, stored: np.ndarray) -> np.ndarray:
        offsets = stored.astype(np.int64)
        with damage_is_a_user_error(self.folder, self._advice):
            if offsets[0] or offsets[-1] != self.n_events or (np.diff(offsets) < 0).any():
                raise ValueError("offsets: they are not where events begin")
        return offsets

    def _opening_of_old(self, kind: str) -> dict[str, Any]:
        fill = kind in self._zeros or (self.folder / kind / _SHARD).is_file()
        kvstore = _kvstore(self.folder / kind)
        return {"driver": "zarr3", "kvstore": kvstore, "open": True, "fill_missing_data_reads": fill}


def token_index_of(gaps: np.ndarray, offsets: np.ndarray | None = None) -> np.ndarray:
    """Returns int64[E], the places of events from their gaps; each of several neurons begins at an offset."""
    total = np.cumsum(gaps, dtype=np.int64)
    if offsets is None:
        return total
    # Every neuron's sum begins at 0 again: the sum before its first event is taken off.
    before = np.concatenate([[0], total])[offsets[:-1]]
    return total - np.repeat(before, np.diff(offsets))


def _is_not_zero(array: np.ndarray) -> np.ndarray:
    if array.dtype != ml_dtypes.bfloat16:
        return array != 0
    # NumPy compares bfloat16 numbers one by one; all but the sign is 0 in a zero.
    return (array.view(np.uint16) << 1) != 0


def _smallest(array: np.ndarray) -> np.ndarray:
    """As the smallest unsigned type that holds all of it."""
    return array.astype(np.min_scalar_type(int(array.max(initial=0))))


def _opening(path: Path, array: Array) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": _kvstore(path),
        "metadata": _metadata(array),
        "open": True,
        "assume_metadata": True,
        # A chunk that is not there would otherwise read as zeros.
        "fill_missing_data_reads": False,
    }


def _creating(path: Path, array: Array) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": _kvstore(path),
        "metadata": _metadata(array),
        "create": True,
        "delete_existing": True,
        "store_data_equal_to_fill_value": True,
    }


def _kvstore(path: Path) -> dict[str, str]:
    return {"driver": "file", "path": f"{for_tensorstore(path)}/"}


def _metadata(array: Array) -> dict[str, Any]:
    """Returns all chunks in one file, so that a segment is a few files whatever it holds."""
    size = np.dtype(array.dtype).itemsize
    shuffled = {"cname": "zstd", "clevel": _LEVEL, "shuffle": "shuffle", "typesize": size, "blocksize": 0}
    inner = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "blosc", "configuration": shuffled},
        {"name": "crc32c"},
    ]
    sharded = {"chunk_shape": [_CHUNK], "codecs": inner}
    return {
        "shape": [array.size],
        "data_type": array.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [_n_chunks(array) * _CHUNK]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharded}],
    }


def _n_chunks(array: Array) -> int:
    return max(-(-array.size // _CHUNK), 1)


# Tags: between its chunks and their index, which is at its end, a shard may hold anything.


def _tag(segment: str, kind: str) -> bytes:
    return hashlib.sha256(f"{segment} {kind}".encode()).digest()


def _index_bytes(array: Array) -> int:
    return 16 * _n_chunks(array) + 4  # where each chunk begins and how long it is, and a CRC


def _put_tag(shard: Path, array: Array, tag: bytes) -> None:
    with shard.open("r+b") as file:
        file.seek(-_index_bytes(array), os.SEEK_END)
        index = file.read()
        file.seek(-len(index), os.SEEK_END)
        file.write(tag + index)
    fsync(shard)


def _check_tag(shard: Path, array: Array, tag: bytes) -> None:
    n_bytes = len(tag) + _index_bytes(array)
    with shard.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(size - n_bytes, 0))
        if size < n_bytes or file.read(len(tag)) != tag:
            raise ValueError(f"{shard.parent.parent.name}: the file of another array, or cut off")
