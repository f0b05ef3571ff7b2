"""Embeddings of tokens and of their contexts, from the model's own unembedding, and clusters of tokens.

The embedding of a token is its row of the unembedding, scaled to unit length. Clusters, for semantic entropy,
are those of k-means: its start is k-means++, its steps SciPy's `kmeans2`.

The embedding of a context, for monosemanticity, is the mean of the unit unembedding rows, reduced to their
first 64 principal directions, of the last 16 tokens of its document up to and including a token; then the
mean over the store is taken off, and the rest is scaled to unit length.

Nothing has to be downloaded for either. They are our choices, not the paper's, whose formulas are unknown to
us. Dims: N tokens of the store, V of the vocabulary, D width.
"""

from typing import Protocol
import warnings

import numpy as np
from scipy.cluster import vq
import scipy.sparse

from topklm.errors import UserError
from topklm.neurons.store import Store

_STEPS = 25
_SAME = 1e-6  # squared distance of unit rows that rounding alone can make


def default_count(vocab_size: int) -> int:
    """Returns the default number of clusters: 16 tokens in each on average, and 1024 clusters at most."""
    return max(2, min(1024, vocab_size // 16))


def cluster_tokens(unembedding_DV: np.ndarray, n_clusters: int | None = None, seed: int = 0) -> np.ndarray:
    """Groups the tokens of a vocabulary by k-means.

    Args:
        unembedding_DV: float32[D, V], the model's.
        n_clusters: At most how many; None: `default_count`. There are fewer where tokens have fewer distinct
            embeddings, or where k-means leaves one empty.
        seed: The same seed gives the same clusters.

    Returns:
        int32[V], from 0 to C - 1; each of the C clusters has a token.

    Raises:
        UserError: If there cannot be as many.
    """
    rows = unit_rows(unembedding_DV)
    n_clusters = min(default_count(len(rows)), len(rows)) if n_clusters is None else n_clusters
    if not 1 <= n_clusters <= len(rows):
        raise UserError(f"n_clusters = {n_clusters}: must be from 1 to {len(rows)}, the vocabulary's size")
    _, labels = k_means(rows, n_clusters, seed)
    return np.unique(labels, return_inverse=True)[1].astype(np.int32)


def k_means(rows: np.ndarray, n_clusters: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Centroids float32[C, D] and the nearest one of each row, int[V]; some may be nearest to none.

    Args:
        rows: float32[V, D].
        n_clusters: C, at most; fewer where fewer rows differ.
        seed: The same seed gives the same clusters.
    """
    start = _spread(rows, n_clusters, np.random.default_rng(seed))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="One of the clusters is empty")
        return vq.kmeans2(rows, start, iter=_STEPS, minit="matrix", check_finite=False)


def unit_rows(unembedding_DV: np.ndarray) -> np.ndarray:
    """Returns float32[V, D], the unembedding of each token scaled to unit length; 0 stays 0."""
    rows = np.ascontiguousarray(unembedding_DV.T, dtype=np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


def _spread(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draws rows for k-means++, each with odds as its squared distance from those drawn before.

    SciPy's own compares all rows with all those drawn before every time, which for thousands of rows and
    hundreds of clusters takes longer than k-means.
    """
    squares = np.einsum("vd,vd->v", rows, rows)
    chosen = [int(rng.integers(len(rows)))]
    distances = np.full(len(rows), np.inf)
    while len(chosen) < count:
        last = chosen[-1]
        distances = np.minimum(distances, squares + squares[last] - 2 * (rows @ rows[last]))
        distances[distances < _SAME] = 0
        total = np.cumsum(distances)
        if total[-1] == 0:
            break  # every row is one of the chosen
        chosen.append(int(np.searchsorted(total, rng.random() * total[-1], side="right")))
    return rows[chosen]


WINDOW = 16  # tokens
DIRECTIONS = 64

_STRETCH = 65_536  # tokens at a time
_NOTHING = 1e-6  # length of what rounding leaves where there is nothing


def token_vectors(unembedding_DV: np.ndarray) -> np.ndarray:
    """Returns float32[V, min(D, 64)], the unit unembedding rows along their first principal directions.

    Up to a vector that all share, which is taken off later anyway. With D of 64 or less, the rows themselves.

    Args:
        unembedding_DV: float32[D, V].
    """
    rows = unit_rows(unembedding_DV)
    if rows.shape[1] <= DIRECTIONS:
        return rows
    centred = rows - rows.mean(axis=0)
    _, directions = np.linalg.eigh(centred.T @ centred)  # by rising variance
    return centred @ np.ascontiguousarray(directions[:, -DIRECTIONS:])


def document_bounds(store: Store) -> np.ndarray:
    """Returns int64[documents + 1], where each document of a store begins, and its end; read in stretches."""
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
        """Returns float32[n, d], mean-centred and of unit length or 0, for int[n] tokens of the store."""
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
        """Returns float32[n, d], embeddings of unit length; 0 where a context is the mean of all.

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
