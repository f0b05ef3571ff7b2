"""A stretch of text with all its activations, on disk as compressed arrays that are sorted by neuron.

A segment holds the events (token, value) of every neuron one after another, tokens rising. So one neuron's
events are a slice, and one document's are found by a pass over a segment, which is why segments are short.
Dims: S TopK layers, D neurons per layer, N tokens, E events.

On disk, a folder of zarr3 arrays (TensorStore): `tokens`, `documents`, `losses` of [N]; `offsets` [S D + 1],
where each neuron's events begin; `gaps` [E], an event's distance in tokens from the neuron's event before (or
from the start), and `values` [E], bfloat16. Gaps are small, and bytes of one kind lie together, so both
compress well.
"""

from collections.abc import Iterable
import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from topklm.errors import UserError

ARRAYS = ("tokens", "documents", "losses", "offsets", "gaps", "values")

_CHUNK = 16_384  # what is read at least, elements: some 20 kB
_LEVEL = 3  # of zstd: higher ones take twice the time for 2 %


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """The content of one segment.

    Attributes:
        tokens: int[N], ids.
        documents: int[N], the document of each token, rising.
        losses: float[N], of the token itself given those before it, in nats; NaN where nothing stands before.
        offsets: int64[S D + 1], where the events of each neuron begin, layer by layer.
        places: int[E], which of the N tokens, rising for each neuron.
        values: [E], not 0.
    """

    tokens: np.ndarray
    documents: np.ndarray
    losses: np.ndarray
    offsets: np.ndarray
    places: np.ndarray
    values: np.ndarray


def from_dense(
    tokens: np.ndarray, documents: np.ndarray, losses: np.ndarray, layers: Iterable[np.ndarray]
) -> Segment:
    """Sorts activations by neuron.

    Args:
        tokens: As in `Segment`, as the next two.
        documents: int[N].
        losses: float[N].
        layers: What each TopK layer hands on, [N, D]; taken one after another.
    """
    offsets, places, values = [np.zeros(1, np.int64)], [], []
    for layer in layers:
        # What is not 0 in the transpose comes in the right order: nothing has to be sorted.
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
        values: [S, N, k]; those that are 0 are left out.
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


def write(folder: Path, segment: Segment) -> None:
    """Writes all arrays into a new folder; see the module's description."""
    gaps = np.diff(segment.places, prepend=0)
    # Where a neuron begins, the distance is from the start of the segment.
    counts = np.diff(segment.offsets)
    first = segment.offsets[:-1][counts > 0]
    gaps[first] = segment.places[first]
    arrays = {
        "tokens": _smallest(segment.tokens),
        "documents": segment.documents.astype(np.uint32),
        "losses": segment.losses.astype(np.float16),
        "offsets": segment.offsets.astype(np.uint64),
        "gaps": _smallest(gaps),
        "values": segment.values.astype(ml_dtypes.bfloat16),
    }
    writing = []
    for name, array in arrays.items():
        store = ts.open(_creating(folder / name, array)).result()
        writing.append(store.write(array))
    for written in writing:
        written.result()


class SegmentReader:
    """A segment on disk; arrays are opened when they are first needed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._opened: dict[str, ts.TensorStore] = {}
        self._offsets: np.ndarray | None = None

    @property
    def offsets(self) -> np.ndarray:
        """int64[S D + 1]; kept, once read."""
        if self._offsets is None:
            self._offsets = self.result(self.array("offsets").read()).astype(np.int64)
        return self._offsets

    def array(self, name: str) -> ts.TensorStore:
        """One of `ARRAYS`, not read yet."""
        if name not in self._opened:
            self._opened[name] = self.result(ts.open(_opening(self.folder / name)))
        return self._opened[name]

    def result(self, future: ts.Future) -> Any:
        """Waits for something of this segment.

        Raises:
            UserError: If it cannot be read.
        """
        try:
            return future.result()
        except (ValueError, OSError) as e:  # TensorStore's own errors are ValueErrors
            raise UserError(f"{self.folder} is damaged ({e}): delete it, and harvest again") from e

    def start_reading(self, first: int, behind: int) -> tuple[ts.Future, ts.Future]:
        """Begins to read the gaps and values of neighbouring neurons, numbered through all layers."""
        begin, end = self.offsets[first], self.offsets[behind]
        return self.array("gaps")[begin:end].read(), self.array("values")[begin:end].read()

    def read(self) -> Segment:
        """All of it."""
        reading = {name: self.array(name).read() for name in ARRAYS}
        arrays = {name: self.result(future) for name, future in reading.items()}
        offsets = arrays["offsets"].astype(np.int64)
        places = places_of(arrays["gaps"], offsets)
        return Segment(
            arrays["tokens"], arrays["documents"], arrays["losses"], offsets, places, arrays["values"]
        )


def places_of(gaps: np.ndarray, offsets: np.ndarray | None = None) -> np.ndarray:
    """int64[E], the places of events from their gaps; `offsets` say where each of several neurons begins."""
    total = np.cumsum(gaps, dtype=np.int64)
    if offsets is None:
        return total
    # Every neuron's sum begins at 0 again: what came before its first event is taken off.
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


def _opening(path: Path) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}, "open": True}


def _creating(path: Path, array: np.ndarray) -> dict[str, Any]:
    """All chunks in one file, so that a segment is a few files whatever it holds."""
    n_chunks = max(-(-array.size // _CHUNK), 1)
    size = array.dtype.itemsize
    shuffled = {"cname": "zstd", "clevel": _LEVEL, "shuffle": "shuffle", "typesize": size, "blocksize": 0}
    inner = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "blosc", "configuration": shuffled},
    ]
    sharded = {"chunk_shape": [_CHUNK], "codecs": inner}
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "metadata": {
            "shape": [array.size],
            "data_type": array.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [n_chunks * _CHUNK]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharded}],
        },
        "create": True,
        "delete_existing": True,
    }
