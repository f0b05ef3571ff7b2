"""Neurons of the same layer that are active at the same tokens.

The similarity of two neurons is the cosine of their activations over tokens, values with their signs:

    sum of a[n, i] a[n, j] / sqrt(sum of a[n, i]^2 * sum of a[n, j]^2)

over at most 262,144 tokens: all of a store that has no more, else 64 stretches of 4,096 tokens, spread over
it evenly. Nothing is centred. The definition is ours. Dims: D neurons of a layer.
"""

from collections.abc import Iterator, Mapping, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from topklm.neurons.store import Store

SAMPLE_TOKENS = 2**18
NEAREST = 10

_STRETCH = 4096


def columns(similarities: np.ndarray, begin: int, end: int) -> Mapping[str, Any]:
    """The columns of `table` that are about co-activation, for the neurons from `begin` to `end` - 1.

    A neuron that is active nowhere in the sample has none, and is nobody's neighbour. So has a neuron only
    neighbours with a cosine above 0: of the others there is nothing to be said.

    Args:
        similarities: float[D, D], as `measure` gives them.
        begin: The first neuron.
        end: The one behind the last.
    """
    found = [nearest(similarities[neuron], neuron) for neuron in range(begin, end)]
    return {
        "coactive": [None if pair is None else pair[0].tolist() for pair in found],
        "coactive_similarity": [None if pair is None else pair[1].tolist() for pair in found],
    }


def nearest(row: np.ndarray, neuron: int, count: int = NEAREST) -> tuple[np.ndarray, np.ndarray] | None:
    """The most similar neurons, falling, equal ones by rising index, and how similar; None for a dead one.

    Args:
        row: float[D], a row of what `measure` gives.
        neuron: Which row.
        count: How many; fewer where fewer are above 0.
    """
    if row[neuron] == 0:
        return None
    others = np.flatnonzero(row > 0)
    others = others[others != neuron]
    chosen = others[np.argsort(-row[others], kind="stable")][:count]
    return chosen, row[chosen].astype(np.float64)


def sample(n_tokens: int) -> Sequence[tuple[int, int]]:
    """Which stretches of a store of so many tokens are compared: (first, the one behind the last)."""
    if n_tokens <= SAMPLE_TOKENS:
        return [(begin, min(begin + _STRETCH, n_tokens)) for begin in range(0, n_tokens, _STRETCH)]
    begins = np.linspace(0, n_tokens - _STRETCH, SAMPLE_TOKENS // _STRETCH).astype(np.int64)
    return [(begin, begin + _STRETCH) for begin in begins.tolist()]


def measure(store: Store, layer: int) -> np.ndarray:
    """float32[D, D], the cosine of every two neurons of a layer; rows and columns of dead ones are 0.

    Runs on the accelerator where there is one; takes three times D^2 * 4 bytes.

    Args:
        store: Of activations.
        layer: One of its layers.
    """
    d_model = store.metadata.d_model
    gram = jnp.zeros((d_model, d_model), jnp.float32)
    for piece in _pieces(store, layer):
        gram = _add(gram, piece)
    products = np.array(gram)
    lengths = np.sqrt(np.diagonal(products))
    scale = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    return products * scale * scale[:, None]


@functools.partial(jax.jit, donate_argnums=0)
def _add(gram: jax.Array, piece: np.ndarray) -> jax.Array:
    return gram + jnp.matmul(piece, piece.T, precision=jax.lax.Precision.HIGHEST)


def _pieces(store: Store, layer: int) -> Iterator[np.ndarray]:
    """What the sample holds, as float32[D, 4096]; zeros behind a piece that is shorter.

    Of one shape, so that one program does for all.
    """
    d_model = store.metadata.d_model
    first = store.metadata.layers.index(layer) * d_model
    stretches = sample(store.n_tokens)
    start = 0
    for reader in store.segments:
        n_tokens = reader.n_tokens
        inside = [(max(a - start, 0), min(b - start, n_tokens)) for a, b in stretches]
        inside = [(a, b) for a, b in inside if a < b]
        start += n_tokens
        if not inside:
            continue
        gaps, values = map(reader.result, reader.start_reading(first, first + d_model))
        offsets = reader.offsets[first : first + d_model + 1] - reader.offsets[first]
        places = reader.places(gaps, offsets).astype(np.int32)
        events = scipy.sparse.csr_array((values.astype(np.float32), places, offsets), (d_model, n_tokens))
        for a, b in inside:
            piece = np.zeros((d_model, _STRETCH), np.float32)
            piece[:, : b - a] = events[:, a:b].toarray()
            yield piece
