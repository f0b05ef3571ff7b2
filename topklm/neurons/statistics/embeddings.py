"""Embeddings of tokens and of their contexts, clusters of tokens, and monosemanticity.

The embedding of a token is its row of the unembedding, scaled to unit length. Clusters, for semantic entropy,
are those of k-means: its start is k-means++, its steps SciPy's `kmeans2`.

The embedding of a context, for monosemanticity, is the mean of the unit unembedding rows, reduced to their
first 64 principal directions, of the last 16 tokens of its document up to and including a token; then the
mean over the store is taken off, and the rest is scaled to unit length.

Where a sentence encoder is given, it stands for both. The window of a token is its text with up to 8
tokens on either side, of its document; its embedding is the encoder's of that, scaled to unit length.
Semantic entropy then merges *tokens of the text* whose windows fall into one cluster (k-means, fixed seed),
not tokens of the vocabulary: the same word may count as several things, and several words as one. A window
holds the text after the token, too, which the model did not see.

*Monosemanticity*, how alike the contexts are in which neuron j is active, is the mean cosine of the contexts
of all pairs of different tokens, each pair weighed by the product of the neuron's activations there:

    MS(j) = (||A^T e||^2 - sum of a^2 |e|^2) / ((sum of a)^2 - sum of a^2)

where a[n] is the neuron's strength (`activity`) at token n, and e[n] the context embedding of that token. It
is exact, over all pairs, without going through them, and does not depend on the scale of activations. Beside
it stands the score with the contexts permuted over the whole store: the value of the same activations by
chance.

The paper names the scores, its formulas are unknown to us: the definitions are ours. Dims: N tokens of the
store, V of the vocabulary, D width, d width of an embedding, S layers, E events.
"""

import abc
from collections.abc import Callable
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
from topklm.neurons.statistics import activity
from topklm.neurons.store import Store

WINDOW = 16  # tokens
DIRECTIONS = 64
SIDE = 8  # tokens of a window on either side

_STEPS = 25
_SAME = 1e-6  # squared distance of unit rows that rounding alone can make
_STRETCH = 65_536  # tokens at a time
_NOTHING = 1e-6  # length of what rounding leaves where there is nothing
_BATCH = 512  # windows given to the encoder at once
_CLUSTERED = 65_536  # windows that k-means sees; the others fall to the nearest cluster
_NEAREST_STRETCH = 16_384  # windows whose nearest cluster is found at once
_DENSE = 1 / 4  # share of activations that are not 0 from which on a dense product is the faster one


def default_count(vocab_size: int) -> int:
    """Returns the default number of clusters: 16 tokens in each on average, and 1024 clusters at most."""
    return max(2, min(1024, vocab_size // 16))


def cluster_tokens(unembedding_DV: np.ndarray, n_clusters: int | None = None, seed: int = 0) -> np.ndarray:
    """Groups the tokens of a vocabulary by k-means: int32[V], from 0 to C - 1, each of which has a token.

    By the unembedding, float32[D, V]. At most so many clusters, None: `default_count`; there are fewer where
    tokens have fewer distinct embeddings, or k-means leaves one empty. UserError if there cannot be as many.
    """
    rows = unit_rows(unembedding_DV)
    n_clusters = min(default_count(len(rows)), len(rows)) if n_clusters is None else n_clusters
    if not 1 <= n_clusters <= len(rows):
        raise UserError(f"n_clusters = {n_clusters}: must be from 1 to {len(rows)}, the vocabulary's size")
    _, labels = k_means(rows, n_clusters, seed)
    return np.unique(labels, return_inverse=True)[1].astype(np.int32)


def k_means(rows: np.ndarray, n_clusters: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns centroids float32[C, D], C at most `n_clusters`, and the nearest of each row, int[V].

    There are fewer where fewer rows differ, and some may be nearest to none.
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


def token_vectors(unembedding_DV: np.ndarray) -> np.ndarray:
    """Returns float32[V, min(D, 64)], the unit unembedding rows along their first principal directions.

    Up to a vector that all share, which is taken off later anyway. With D of 64 or less, the rows themselves.
    """
    rows = unit_rows(unembedding_DV)
    if rows.shape[1] <= DIRECTIONS:
        return rows
    centred = rows - rows.mean(axis=0)
    _, directions = np.linalg.eigh(centred.T @ centred)  # by rising variance
    return centred @ np.ascontiguousarray(directions[:, -DIRECTIONS:])


def _unit_or_zero(rows: np.ndarray) -> np.ndarray:
    """Scales rows to unit length; 0 where there is but what rounding leaves of nothing."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    there = lengths > _NOTHING
    return np.where(there, rows, 0) / np.where(there, lengths, 1)


class Embeddings(abc.ABC):
    """Embeddings, of d = `width` numbers, of the text at any of the N tokens of a store."""

    def __init__(self, n_tokens: int, width: int):
        self.n_tokens, self.width = n_tokens, width

    @abc.abstractmethod
    def rows(self, places: np.ndarray) -> np.ndarray:
        """Returns embeddings float32[n, d] of int[n] tokens of the store, in any order."""

    @functools.cached_property
    def _centre(self) -> np.ndarray:
        total = np.zeros(self.width)
        for begin in range(0, self.n_tokens, _STRETCH):
            places = np.arange(begin, min(begin + _STRETCH, self.n_tokens))
            total += self.rows(places).sum(axis=0, dtype=np.float64)
        return (total / max(self.n_tokens, 1)).astype(np.float32)

    def at(self, places: np.ndarray) -> np.ndarray:
        """Returns `rows` less the mean over the store, of unit length; 0 where one is the mean of all."""
        return _unit_or_zero(self.rows(places) - self._centre)


class Contexts(Embeddings):
    """The context embedding of any token of a store, computed when asked for: none is kept.

    Of ids uint[N], documents' bounds as of `Store.document_bounds`, and vectors float32[V, d] as of
    `token_vectors`.
    """

    def __init__(self, token_ids: np.ndarray, bounds: np.ndarray, vectors: np.ndarray):
        super().__init__(len(token_ids), vectors.shape[1])
        self._token_ids, self._bounds, self._vectors = token_ids, bounds, vectors

    def rows(self, places: np.ndarray) -> np.ndarray:
        """Returns the mean of the tokens' vectors in the window that ends at each."""
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


class SentenceEncoder(Protocol):
    """The interface of an encoder: the `encode` of the package sentence-transformers, among others."""

    def encode(self, sentences: list[str], /) -> Any:
        """Embeddings [n, d] of texts, as something that NumPy makes an array of."""
        ...


class EncodedWindows(Embeddings):
    """Embeddings of all windows of a store, float32[N, d], of unit length; 0 where the encoder gives none."""

    def __init__(self, name: str, vectors: np.ndarray):
        super().__init__(*vectors.shape)
        self.vectors = vectors
        self.embedding = f"the sentence encoder {name}, on each token with up to {SIDE} tokens on either side"

    def rows(self, places: np.ndarray) -> np.ndarray:
        """Returns the vectors of these tokens."""
        return self.vectors[places]

    def clusters(self, n_clusters: int, seed: int = 0) -> np.ndarray:
        """Returns the cluster of each window, int32[N], from 0 to C - 1, C at most `n_clusters`."""
        n = len(self.vectors)
        seen = np.unique(np.linspace(0, n - 1, min(n, _CLUSTERED)).astype(np.int64))
        centroids, _ = k_means(self.vectors[seen], min(n_clusters, len(seen)), seed)
        parts = [
            vq.vq(self.vectors[a : a + _NEAREST_STRETCH], centroids, False)[0]
            for a in range(0, n, _NEAREST_STRETCH)
        ]
        return np.unique(np.concatenate(parts), return_inverse=True)[1].astype(np.int32)


def load_encoder(name: str) -> SentenceEncoder:
    """Returns a model of the package sentence-transformers; UserError without the package or the model.

    `name` is its folder, or its name where the package finds it, also NAME@REVISION: a branch, a tag, or the
    hash of a commit, which alone always names the same files.
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

    The name is that of the encoder in tables and on pages; `report` is told how many more are done. UserError
    if the encoder gives anything but one vector of finite numbers for each text.
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
        parts.append(_unit_or_zero(found))
        report(len(texts))
    return EncodedWindows(name, np.concatenate(parts))


def monosemanticity(store: Store, contexts: Embeddings, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns the columns `monosemanticity*` of all neurons, float64[S, D] each.

    NaN for a neuron that is active at fewer than two tokens. Reads the store once, segment by segment; takes
    the memory of a segment, and 4 bytes for each token of the store: the permutation.

    The contexts are those of the store's tokens, and the seed is that of the permutation.
    """
    layers, d_model, n_tokens = store.metadata.layers, store.metadata.d_model, store.n_tokens
    numbers = np.arange(n_tokens, dtype=np.min_scalar_type(max(n_tokens - 1, 0)))
    order = np.random.default_rng(seed).permutation(numbers)
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
    return {"monosemanticity": scores[..., 0], "monosemanticity_shuffled": scores[..., 1]}


class Pairs:
    """Sums over all pairs of tokens for each neuron, of `n_kinds` embeddings each; filled by stretches."""

    def __init__(self, n_neurons: int, n_kinds: int, width: int):
        self._vectors = np.zeros((n_neurons, n_kinds, width))  # A^T e
        self._own = np.zeros((n_neurons, n_kinds))  # a^2 |e|^2
        self._total, self._squares = np.zeros(n_neurons), np.zeros(n_neurons)
        self._counts = np.zeros(n_neurons, np.int64)

    def add(
        self, strengths: np.ndarray, places: np.ndarray, offsets: np.ndarray, embeddings: np.ndarray
    ) -> None:
        """Adds the events of a stretch of text, strengths float32[E], neuron by neuron, at its tokens int[E].

        Each neuron's begin at `offsets`, int64[n_neurons + 1]; embeddings of its tokens are float32[N,
        n_kinds, d].
        """
        shape = len(offsets) - 1, len(embeddings)
        events = scipy.sparse.csr_array((strengths, places.astype(np.int32), offsets), shape)
        is_dense = len(strengths) >= _DENSE * shape[0] * shape[1]
        vectors = (events.toarray() if is_dense else events) @ embeddings.reshape(len(embeddings), -1)
        self._vectors += vectors.reshape(self._vectors.shape)
        events.data = np.square(strengths, dtype=np.float64)
        self._own += events @ np.square(embeddings, dtype=np.float64).sum(axis=-1)
        self._squares += activity.reduced(np.add, events.data, offsets)
        self._total += activity.reduced(np.add, strengths, offsets)
        self._counts += np.diff(offsets)

    def scores(self) -> np.ndarray:
        """Returns float64[n_neurons, n_kinds]; NaN where there are no pairs."""
        pairs = np.square(self._vectors).sum(axis=-1) - self._own
        weights = np.square(self._total) - self._squares
        weights[(self._counts < 2) | (weights <= 0)] = np.nan
        return pairs / weights[:, None]
