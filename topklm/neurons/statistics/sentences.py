"""Embeddings of the text around each token by a sentence encoder, where one is installed.

The window of a token is its text with up to 8 tokens on either side, of its document; its embedding is what
the encoder makes of that, scaled to unit length. Semantic entropy then merges *places* whose windows fall
into one cluster (k-means, fixed seed), and not tokens whose unembedding does: the same word may count as
several things, and several words as one. A window holds what follows the token, too, which the model did not
see. The definition is ours. Dims: N tokens of the store, d width of the embedding.
"""

from collections.abc import Callable
import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from scipy.cluster import vq

from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError
from topklm.neurons.statistics import embeddings
from topklm.neurons.store import Store

SIDE = 8  # tokens of a window on either side

_BATCH = 512  # windows given to the encoder at once
_CLUSTERED = 65_536  # windows that k-means sees; the others fall to the nearest cluster
_STRETCH = 16_384  # windows at a time


class SentenceEncoder(Protocol):
    """The interface of an encoder: the `encode` of the package sentence-transformers, among others."""

    def encode(self, sentences: list[str], /) -> Any:
        """Embeddings [n, d] of texts, as something that NumPy makes an array of."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
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
        return embeddings.unit_or_zero(self.vectors[places] - self._centre)

    def clusters(self, n_clusters: int, seed: int = 0) -> np.ndarray:
        """Returns int32[N], the cluster of each window, from 0 to C - 1; each of the C clusters has one.

        Args:
            n_clusters: At most how many.
            seed: The same seed gives the same clusters.
        """
        n = len(self.vectors)
        seen = np.unique(np.linspace(0, n - 1, min(n, _CLUSTERED)).astype(np.int64))
        centroids, _ = embeddings.k_means(self.vectors[seen], min(n_clusters, len(seen)), seed)
        parts = [vq.vq(self.vectors[a : a + _STRETCH], centroids, False)[0] for a in range(0, n, _STRETCH)]
        return np.unique(np.concatenate(parts), return_inverse=True)[1].astype(np.int32)


def load(name: str) -> SentenceEncoder:
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


def embed(
    store: Store,
    tokenizer: Tokenizer,
    encoder: SentenceEncoder,
    name: str,
    report: Callable[[int], None] = lambda n: None,
) -> Windows:
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
    bounds = embeddings.document_bounds(store)
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
        parts.append(embeddings.unit_or_zero(found))
        report(len(texts))
    return Windows(name, np.concatenate(parts))
