"""Monosemanticity: how alike the contexts are in which a neuron is active.

The score of neuron j is the mean cosine of the contexts of all pairs of different tokens, each pair weighed
by the product of the neuron's activations there:

    MS(j) = (||A^T e||^2 - sum of a^2 |e|^2) / ((sum of a)^2 - sum of a^2)

where a[n] is the neuron's strength (`activity`) at token n, and e[n] the context embedding of that token
(`embeddings`: mean-centred, of unit length, or 0). It is exact, over all pairs, without going through them.
Activations are to be scaled to [0, 1] first: divided by the neuron's largest, as its smallest is 0 (which is
assumed of a neuron that is active everywhere, too). The score is the same without, so none is. The paper's
formula is unknown to us, and this one is ours.

Beside it stands the score with the contexts permuted over the whole store: the value of the same
activations by chance. Dims: S layers, D neurons per layer, N tokens, d embedding.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np
import scipy.sparse

from topklm.neurons.statistics import activity
from topklm.neurons.statistics.embeddings import Embeddings
from topklm.neurons.store import Store

_DENSE = 1 / 4  # share of activations that are not 0 from which on a dense product is the faster one


@dataclasses.dataclass(frozen=True)
class MonosemanticityScores:
    """Scores of all neurons of a store.

    Attributes:
        layers: The model's layers, S of them.
        score: float64[S, D]; NaN for a neuron that is active at fewer than two tokens.
        shuffled: float64[S, D], with contexts permuted.
    """

    layers: tuple[int, ...]
    score: np.ndarray
    shuffled: np.ndarray


def columns(scores: MonosemanticityScores, layer: int, begin: int, end: int) -> Mapping[str, Any]:
    """Returns the columns about monosemanticity, for the neurons from `begin` to `end` - 1."""
    number = scores.layers.index(layer)
    return {
        "monosemanticity": activity.or_null(scores.score[number, begin:end]),
        "monosemanticity_shuffled": activity.or_null(scores.shuffled[number, begin:end]),
    }


def measure(store: Store, contexts: Embeddings, seed: int = 0) -> MonosemanticityScores:
    """Returns the scores of all neurons, in one pass over the store, segment by segment.

    Memory is that of a segment, and 4 bytes for each token of the store: the permutation.

    Args:
        store: Of activations.
        contexts: Of the same store's tokens.
        seed: Of the permutation.
    """
    layers, d_model = store.metadata.layers, store.metadata.d_model
    order = np.random.default_rng(seed).permutation(_numbers(store.n_tokens))
    pairs = Pairs(len(layers) * d_model, 2, contexts.width)
    begin = 0
    for reader in store.segments:
        segment = reader.read()
        end = begin + len(segment.tokens)
        own, dealt = contexts.at(np.arange(begin, end)), contexts.at(order[begin:end])
        strengths = np.abs(segment.values.astype(np.float32))
        pairs.add(strengths, segment.token_index, segment.offsets, np.stack([own, dealt], axis=1))
        begin = end
    scores = pairs.scores().reshape(len(layers), d_model, 2)
    return MonosemanticityScores(layers, scores[..., 0], scores[..., 1])


class Pairs:
    """Sums over all pairs of tokens for each neuron; filled stretch by stretch.

    Args:
        n_neurons: However many.
        n_kinds: Of embeddings, side by side.
        width: d.
    """

    def __init__(self, n_neurons: int, n_kinds: int, width: int):
        self._vectors = np.zeros((n_neurons, n_kinds, width))  # A^T e
        self._own = np.zeros((n_neurons, n_kinds))  # a^2 |e|^2
        self._total, self._squares = np.zeros(n_neurons), np.zeros(n_neurons)
        self._counts = np.zeros(n_neurons, np.int64)

    def add(
        self, strengths: np.ndarray, places: np.ndarray, offsets: np.ndarray, embeddings: np.ndarray
    ) -> None:
        """Adds the events of a stretch of text.

        Args:
            strengths: float32[E], neuron by neuron.
            places: int[E], tokens of the stretch.
            offsets: int64[n_neurons + 1], where each neuron's events begin.
            embeddings: float32[N, n_kinds, d], of the stretch's tokens.
        """
        shape = len(offsets) - 1, len(embeddings)
        events = scipy.sparse.csr_array((strengths, places.astype(np.int32), offsets), shape)
        self._vectors += _product(events, embeddings.reshape(len(embeddings), -1)).reshape(
            self._vectors.shape
        )
        events.data = np.square(strengths, dtype=np.float64)
        self._own += events @ np.square(embeddings, dtype=np.float64).sum(axis=-1)
        self._squares += activity.sums(events.data, offsets)
        self._total += activity.sums(strengths, offsets)
        self._counts += np.diff(offsets)

    def scores(self) -> np.ndarray:
        """Returns float64[n_neurons, n_kinds]; NaN where there are no pairs."""
        pairs = np.square(self._vectors).sum(axis=-1) - self._own
        weights = np.square(self._total) - self._squares
        weights[(self._counts < 2) | (weights <= 0)] = np.nan
        return pairs / weights[:, None]


def _product(events: scipy.sparse.csr_array, embeddings: np.ndarray) -> np.ndarray:
    n_rows, n_tokens = events.shape
    if events.nnz < _DENSE * n_rows * n_tokens:
        return events @ embeddings
    return events.toarray() @ embeddings


def _numbers(n_tokens: int) -> np.ndarray:
    """Returns from 0 to n_tokens - 1, in the smallest type."""
    return np.arange(n_tokens, dtype=np.min_scalar_type(max(n_tokens - 1, 0)))
