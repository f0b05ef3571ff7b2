"""Clusters of tokens that a model treats alike, for semantic entropy; nothing has to be downloaded for them.

The embedding of a token is its row of the model's own unembedding, scaled to unit length. Clusters are those
of k-means: its start is k-means++, its steps SciPy's `kmeans2`. That is our choice; the paper's clusters are
unknown to us. Dims: D width, V tokens.
"""

import warnings

import numpy as np
from scipy.cluster import vq

from topklm.errors import UserError

_STEPS = 25
_SAME = 1e-6  # squared distance of unit rows that rounding alone can make


def default_count(vocab_size: int) -> int:
    """How many clusters there are where nobody says: 16 tokens in each on average, and 1024 at most."""
    return max(2, min(1024, vocab_size // 16))


def of_tokens(unembedding_DV: np.ndarray, n_clusters: int | None = None, seed: int = 0) -> np.ndarray:
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
    """float32[V, D], the unembedding of each token scaled to unit length; what is 0 stays 0."""
    rows = np.ascontiguousarray(unembedding_DV.T, dtype=np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


def _spread(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++: some of the rows, each drawn with odds as its squared distance from those drawn before.

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
