"""The nearest neurons of a layer: those active at the same tokens, and those that do the same to the logits.

*Co-activation* of two neurons is the cosine of their activations over tokens, values with their signs:

    sum of a[n, i] a[n, j] / sqrt(sum of a[n, i]^2 * sum of a[n, j]^2)

over at most 262,144 tokens: all of a store that has no more, else 64 stretches of 4,096 tokens, spread over
it evenly. Nothing is centred.

*Likeness of effects* is the cosine of their effects on the logits by the averaged Jacobian lens, with
the mean over the vocabulary taken off (`topklm.neurons.statistics.lenses`). Their inner products follow from
the Gram matrix of the unembedding, so no effect is computed.

The definitions are ours. Dims: D neurons of a layer.
"""

from collections.abc import Iterator, Mapping, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from topklm.neurons.statistics.lenses import Lenses
from topklm.neurons.store import Store

SAMPLE_TOKENS = 2**18
NEAREST = 10

_STRETCH = 4096


def coactive_columns(similarities: np.ndarray, begin: int, end: int) -> Mapping[str, Any]:
    """Returns the columns of `table` that are about co-activation, for the neurons from `begin` to `end` - 1.

    A neuron that is active nowhere in the sample has none, and is nobody's neighbour. So has a neuron only
    neighbours with a cosine above 0: of the others there is nothing to be said.

    Args:
        similarities: float[D, D], as `measure` gives them.
        begin: The first neuron.
        end: One after the last.
    """
    found = [nearest(similarities[neuron], neuron) for neuron in range(begin, end)]
    return {
        "coactive": [None if pair is None else pair[0].tolist() for pair in found],
        "coactive_similarity": [None if pair is None else pair[1].tolist() for pair in found],
    }


def nearest(row: np.ndarray, neuron: int, count: int = NEAREST) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the most similar neurons, falling, ties by rising index, and how similar; None for a dead one.

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
    """Returns which stretches of a store of so many tokens are compared: (first, one after the last)."""
    if n_tokens <= SAMPLE_TOKENS:
        return [(begin, min(begin + _STRETCH, n_tokens)) for begin in range(0, n_tokens, _STRETCH)]
    begins = np.linspace(0, n_tokens - _STRETCH, SAMPLE_TOKENS // _STRETCH).astype(np.int64)
    return [(begin, begin + _STRETCH) for begin in begins.tolist()]


def measure(store: Store, layer: int) -> np.ndarray:
    """Returns float32[D, D], the cosine of every two neurons of a layer; rows and columns of dead ones are 0.

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
    """Yields the sample as float32[D, 4096]; a shorter piece is filled up with zeros.

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
        places = reader.token_index(gaps, offsets).astype(np.int32)
        events = scipy.sparse.csr_array((values.astype(np.float32), places, offsets), (d_model, n_tokens))
        for a, b in inside:
            piece = np.zeros((d_model, _STRETCH), np.float32)
            piece[:, : b - a] = events[:, a:b].toarray()
            yield piece


def effect_columns(lenses: Lenses, layer: int, begin: int, end: int) -> dict[str, list]:
    """Returns the columns `similar_effect` and `similar_effect_similarity` of `catalog.schema`.

    Args:
        lenses: Of the model.
        layer: Of the model's layers.
        begin: First neuron.
        end: One after the last.

    Returns:
        For each column a list with the entry of each neuron: the `NEAREST` others of the layer (all, where
        there are fewer) by falling cosine, on a tie by rising number. The cosine with a neuron of no effect
        at all is 0.
    """
    d = len(lenses.scale)
    with jax.default_matmul_precision("float32"):
        cosines, neurons = jax.device_get(
            _nearest_effects(
                lenses.jacobian_rows(layer, begin, end),
                lenses.jacobian_rows(layer, 0, d),
                lenses.gram,
                jnp.arange(begin, end),
                min(NEAREST, d - 1),
            )
        )
    similarity = np.clip(cosines.astype(np.float64), -1.0, 1.0)
    return {"similar_effect": neurons.tolist(), "similar_effect_similarity": similarity.tolist()}


@functools.partial(jax.jit, static_argnums=4)
def _nearest_effects(
    rows_ND: jax.Array, all_rows_DD: jax.Array, gram_DD: jax.Array, own_N: jax.Array, n: int
) -> tuple[jax.Array, jax.Array]:
    """Cosines and neurons, [N, n] each."""
    unit_ND, unit_DD = (_unit(rows, gram_DD) for rows in (rows_ND, all_rows_DD))
    cosines_ND = (unit_ND @ gram_DD) @ unit_DD.T
    is_own = own_N[:, None] == jnp.arange(len(all_rows_DD))
    return jax.lax.top_k(jnp.where(is_own, -jnp.inf, cosines_ND), n)


def _unit(rows_ND: jax.Array, gram_DD: jax.Array) -> jax.Array:
    """Rows whose effects have length 1; those without effect become 0."""
    squares_N1 = jnp.sum((rows_ND @ gram_DD) * rows_ND, axis=1, keepdims=True)
    has_effect = squares_N1 > 0
    return jnp.where(has_effect, rows_ND * jax.lax.rsqrt(jnp.where(has_effect, squares_N1, 1.0)), 0.0)
