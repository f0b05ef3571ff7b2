"""Context embeddings: where in the text a token stands, as a vector, from the model's own unembedding.

The embedding of a token is the mean of the unit unembedding rows, reduced to their first 64 principal
directions, of the last 16 tokens of its document up to and including itself; then the mean over the store is
taken off, and what is left is scaled to unit length. That is our choice, not the paper's, whose formulas are
unknown to us. Nothing has to be downloaded for it. Dims: N tokens of the store, V of the vocabulary, D width.
"""

from typing import Protocol

import numpy as np
import scipy.sparse

from topklm.neurons.statistics import clusters
from topklm.neurons.store import Store

WINDOW = 16  # tokens
DIRECTIONS = 64

_STRETCH = 65_536  # tokens at a time
_NOTHING = 1e-6  # length of what rounding leaves where there is nothing


def token_vectors(unembedding_DV: np.ndarray) -> np.ndarray:
    """float32[V, min(D, 64)], the unit unembedding rows along their first principal directions.

    Up to a vector that all share, which is taken off later anyway. With D of 64 or less, the rows themselves.

    Args:
        unembedding_DV: float32[D, V].
    """
    rows = clusters.unit_rows(unembedding_DV)
    if rows.shape[1] <= DIRECTIONS:
        return rows
    centred = rows - rows.mean(axis=0)
    _, directions = np.linalg.eigh(centred.T @ centred)  # by rising variance
    return centred @ np.ascontiguousarray(directions[:, -DIRECTIONS:])


def document_bounds(store: Store) -> np.ndarray:
    """int64[documents + 1], where each document of a store begins, and its end; read in stretches."""
    bounds = [np.zeros(1, np.int64)]
    for begin in range(0, store.n_tokens, _STRETCH):
        documents = store.documents(max(begin - 1, 0), begin + _STRETCH)
        bounds.append(np.flatnonzero(np.diff(documents.astype(np.int64))) + max(begin - 1, 0) + 1)
    return np.unique(np.concatenate([*bounds, [store.n_tokens]]))


class Embeddings(Protocol):
    """Of the text at any token of a store."""

    @property
    def width(self) -> int:
        """d, numbers in an embedding."""
        ...

    def at(self, places: np.ndarray) -> np.ndarray:
        """float32[n, d], mean-centred and of unit length or 0, for int[n] tokens of the store."""
        ...


def unit_or_zero(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to unit length; 0 where there is but what rounding leaves of nothing."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    there = lengths > _NOTHING
    return np.where(there, rows, 0) / np.where(there, lengths, 1)


class Contexts:
    """The context embedding of any token of a store, computed when asked for: none is kept.

    Args:
        token_ids: uint[N], of the whole store.
        bounds: int64[documents + 1], as `document_bounds` gives them.
        vectors: float32[V, d], as `token_vectors` gives them.
    """

    def __init__(self, token_ids: np.ndarray, bounds: np.ndarray, vectors: np.ndarray):
        self._token_ids, self._bounds, self._vectors = token_ids, bounds, vectors
        total = np.zeros(vectors.shape[1])
        for begin in range(0, self.n_tokens, _STRETCH):
            places = np.arange(begin, min(begin + _STRETCH, self.n_tokens))
            total += self._means(places).sum(axis=0, dtype=np.float64)
        self._centre = (total / max(self.n_tokens, 1)).astype(np.float32)

    @property
    def n_tokens(self) -> int:
        """N."""
        return len(self._token_ids)

    @property
    def width(self) -> int:
        """d, numbers in an embedding."""
        return self._vectors.shape[1]

    def at(self, places: np.ndarray) -> np.ndarray:
        """float32[n, d], embeddings of unit length; 0 where a context is the mean of all.

        Args:
            places: int[n], tokens of the store, in any order.
        """
        return unit_or_zero(self._means(places) - self._centre)

    def _means(self, places: np.ndarray) -> np.ndarray:
        places = places.astype(np.int64)
        first = self._bounds[np.searchsorted(self._bounds, places, side="right") - 1]
        lengths = np.minimum(places - first + 1, WINDOW)
        # Row by row the tokens of a window, as a matrix of [n, V] that is almost all 0.
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        window = np.repeat(places + 1 - lengths - offsets[:-1], lengths) + np.arange(offsets[-1])
        weights = np.repeat((1 / lengths).astype(np.float32), lengths)
        shape = len(places), len(self._vectors)
        rows = scipy.sparse.csr_array((weights, self._token_ids[window].astype(np.int32), offsets), shape)
        return rows @ self._vectors
