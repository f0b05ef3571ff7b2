"""Embeddings of tokens and of their contexts, from the model's own unembedding, and clusters of tokens.

The embedding of a token is its row of the unembedding, scaled to unit length. Clusters, for semantic entropy,
are those of k-means: its start is k-means++, its steps SciPy's `kmeans2`.

The embedding of a context, for monosemanticity, is the mean of the unit unembedding rows, reduced to their
first 64 principal directions, of the last 16 tokens of its document up to and including a token; then the
mean over the store is taken off, and the rest is scaled to unit length.

Nothing has to be downloaded for either. They are our choices, not the paper's, whose formulas are unknown to
us.

Where a sentence encoder is installed, it may stand for both. The window of a token is its text with up to 8
tokens on either side, of its document; its embedding is the encoder's of that, scaled to unit length.
Semantic entropy then merges *places* whose windows fall into one cluster (k-means, fixed seed), and not
tokens whose unembedding does: the same word may count as several things, and several words as one. A window
holds the text after the token, too, which the model did not see. The definition is ours.

Dims: N tokens of the store, V of the vocabulary, D width, d width of an embedding.
"""

from collections.abc import Callable
import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Any, Protocol
import warnings

import numpy as np
from scipy.cluster import vq
import scipy.sparse

from topklm.data.tokenizer import Tokenizer
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
        bounds: int64[documents + 1], as `Store.document_bounds` gives them.
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


SIDE = 8  # tokens of a window on either side

_BATCH = 512  # windows given to the encoder at once
_CLUSTERED = 65_536  # windows that k-means sees; the others fall to the nearest cluster
_NEAREST_STRETCH = 16_384  # windows whose nearest cluster is found at once


class SentenceEncoder(Protocol):
    """The interface of an encoder: the `encode` of the package sentence-transformers, among others."""

    def encode(self, sentences: list[str], /) -> Any:
        """Embeddings [n, d] of texts, as something that NumPy makes an array of."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedWindows:
    """Embeddings of all windows of a store.

    Attributes:
        name: Of the encoder.
        vectors: float32[N, d], of unit length; 0 where the encoder gives nothing.
    """

    name: str
    vectors: np.ndarray

    @property
    def embedding(self) -> str:
        """Which embedding it is, in words."""
        return f"the sentence encoder {self.name}, on each token with up to {SIDE} tokens on either side"

    @property
    def width(self) -> int:
        """Numbers in an embedding, d."""
        return self.vectors.shape[1]

    @functools.cached_property
    def _centre(self) -> np.ndarray:
        return self.vectors.mean(axis=0, dtype=np.float64).astype(np.float32)

    def at(self, places: np.ndarray) -> np.ndarray:
        """As `Contexts.at`: float32[n, d], less the mean over the store and scaled to unit length."""
        return unit_or_zero(self.vectors[places] - self._centre)

    def clusters(self, n_clusters: int, seed: int = 0) -> np.ndarray:
        """Returns int32[N], the cluster of each window, from 0 to C - 1; each of the C clusters has one.

        Args:
            n_clusters: At most how many.
            seed: The same seed gives the same clusters.
        """
        n = len(self.vectors)
        seen = np.unique(np.linspace(0, n - 1, min(n, _CLUSTERED)).astype(np.int64))
        centroids, _ = k_means(self.vectors[seen], min(n_clusters, len(seen)), seed)
        parts = [
            vq.vq(self.vectors[a : a + _NEAREST_STRETCH], centroids, False)[0]
            for a in range(0, n, _NEAREST_STRETCH)
        ]
        return np.unique(np.concatenate(parts), return_inverse=True)[1].astype(np.int32)


def load_encoder(name: str) -> SentenceEncoder:
    """Returns a model of the package sentence-transformers.

    Args:
        name: Its folder, or its name where the package finds it, also NAME@REVISION: a branch, a tag, or the
            hash of a commit, which alone always names the same files.

    Raises:
        UserError: If the package is not installed, or has no such model.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise UserError(
            f"--encoder = {name}: needs the package sentence-transformers, which is not installed: run pip "
            "install sentence-transformers"
        )
    # No part of any extra of ours: it brings PyTorch.
    import sentence_transformers  # noqa: PLC0415

    try:
        path = Path(name).expanduser()
        model, at, revision = name.rpartition("@")
        if at and not path.exists():
            return sentence_transformers.SentenceTransformer(model, revision=revision)
        return sentence_transformers.SentenceTransformer(str(path))
    except Exception as e:  # whatever the package, and what it asks for models, may raise
        why = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise UserError(
            f"--encoder = {name}: sentence-transformers cannot load it ({why}): give a model's folder, or a "
            "name that it knows"
        ) from e


def embed_windows(
    store: Store,
    tokenizer: Tokenizer,
    encoder: SentenceEncoder,
    name: str,
    report: Callable[[int], None] = lambda n: None,
) -> EncodedWindows:
    """Embeds the window of every token of a store; takes 4 N d bytes.

    Args:
        store: Of activations.
        tokenizer: That made its tokens.
        encoder: Gives the embeddings.
        name: Of the encoder, in tables and on pages.
        report: Told how many more are done.

    Raises:
        UserError: If the encoder gives anything but one vector of finite numbers for each text.
    """
    token_ids = store.tokens(0, store.n_tokens)
    bounds = store.document_bounds()
    places = np.arange(len(token_ids))
    document = np.searchsorted(bounds, places, side="right")
    begins = np.maximum(places - SIDE, bounds[document - 1])
    ends = np.minimum(places + SIDE + 1, bounds[document])
    parts: list[np.ndarray] = []
    for first in range(0, len(places), _BATCH):
        chosen = slice(first, first + _BATCH)
        texts = [tokenizer.decode(token_ids[a:b]) for a, b in zip(begins[chosen], ends[chosen], strict=True)]
        found = np.asarray(encoder.encode(texts), np.float32)
        if found.ndim != 2 or len(found) != len(texts) or not np.isfinite(found).all():
            raise UserError(
                f"--encoder = {name}: must give a vector of finite numbers for each text, not an array of "
                f"{found.shape} for {len(texts)}"
            )
        parts.append(unit_or_zero(found))
        report(len(texts))
    return EncodedWindows(name, np.concatenate(parts))
