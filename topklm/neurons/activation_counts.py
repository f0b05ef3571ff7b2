"""At how many tokens of each document, or of each piece of one, a neuron is active.

The text is read as `topklm.neurons.harvest` reads it, and nothing is stored: separators and padding do not
count, and of a Base LM a neuron is the positive part of a coordinate. Dims: G units, S layers, D neurons per
layer.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
from typing import cast

from jax.sharding import Mesh
import numpy as np

from topklm.config import ModelConfig
from topklm.model import transformer
from topklm.neurons import harvest as harvest_lib
from topklm.neurons.segment import Segment
from topklm.neurons.store import StoreWriter


@dataclasses.dataclass(frozen=True, eq=False)
class UnitCounts:
    """Counts of a text.

    Attributes:
        layers: The model's layers that were read, S of them.
        active: int32[G, S, D], tokens of a unit at which a neuron is active.
        n_tokens: int64[G], tokens of a unit.
    """

    layers: tuple[int, ...]
    active: np.ndarray
    n_tokens: np.ndarray


def layers_of(config: ModelConfig) -> tuple[int, ...]:
    """Returns the layers that are read: those with TopK or, of a Base LM, all."""
    return harvest_lib.kind_and_layers(config)[1]


def count(
    config: ModelConfig,
    params: transformer.Parameters,
    mesh: Mesh,
    documents: Sequence[np.ndarray],
    *,
    separator_id: int,
    keep: int | None = None,
    piece: int | None = None,
    report: Callable[[int], None] = lambda tokens: None,
) -> UnitCounts:
    """Reads documents.

    Args:
        config: The model.
        params: Its parameters, on the devices of `mesh`.
        mesh: Rows of a batch are split over all its devices.
        documents: Token ids of each, int[n], without separators; none is empty.
        separator_id: The token that stands before documents.
        keep: Of a Base LM, a neuron is active where it is among the K largest of its layer; None: above 0.
        piece: Tokens of a unit, of which the last of a document may have fewer; None: a unit is a document.
        report: Told of the tokens that are done since the last time.
    """
    sizes = unit_sizes([len(ids) for ids in documents], piece)
    layers = layers_of(config)
    counter = _Counter(sizes, len(layers), config.d_model, report)
    # It takes in segments, which is all that a harvest asks of what it writes to.
    harvest_lib.harvest(
        config,
        params,
        mesh,
        _Listed(documents),
        cast(StoreWriter, counter),
        separator_id=separator_id,
        keep=keep,
    )
    return UnitCounts(layers, counter.active, sizes)


def unit_sizes(lengths: Sequence[int], piece: int | None) -> np.ndarray:
    """Returns int64[G], the tokens of each unit of documents of these lengths; see `count`."""
    if piece is None:
        return np.asarray(lengths, np.int64)
    return np.array([min(piece, n - begin) for n in lengths for begin in range(0, n, piece)], np.int64)


class _Listed:
    """Documents that are in memory, as `documents.Documents`."""

    def __init__(self, documents: Sequence[np.ndarray]):
        self.name = "documents"
        self.n_tokens: int | None = sum(map(len, documents))
        self._documents = documents

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self._documents)


class _Counter:
    """Adds up segments, which come in the order of the text."""

    def __init__(self, sizes: np.ndarray, n_layers: int, d_model: int, report: Callable[[int], None]):
        self.n_tokens, self._report = 0, report
        self.active = np.zeros((len(sizes), n_layers, d_model), np.int32)
        self._unit_of_token = np.repeat(np.arange(len(sizes)), sizes)

    def append(self, segment: Segment) -> None:
        n = len(segment.tokens)
        units = self._unit_of_token[self.n_tokens : self.n_tokens + n]
        first, n_units = int(units[0]), int(units[-1] - units[0]) + 1
        n_neurons = len(segment.offsets) - 1
        neurons = np.repeat(np.arange(n_neurons), np.diff(segment.offsets))
        cells = (units[segment.token_index] - first) * n_neurons + neurons
        counts = np.bincount(cells, minlength=n_units * n_neurons).astype(np.int32)
        self.active[first : first + n_units] += counts.reshape(n_units, *self.active.shape[1:])
        self.n_tokens += n
        self._report(n)
