"""Neurons of a layer that do the same to the logits: by the cosine between their effects.

Effects are those of the averaged Jacobian lens, with the mean over the vocabulary taken off
(`topklm.neurons.statistics.lenses`). Their inner products follow from the Gram matrix of the unembedding, so
no effect is computed. The definition is ours.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from topklm.neurons.statistics.lenses import Lenses

N_NEAREST = 10


def columns(lenses: Lenses, layer: int, begin: int, end: int) -> dict[str, list]:
    """The columns `similar_effect` and `similar_effect_similarity` of `catalog.schema`.

    Args:
        lenses: Of the model.
        layer: Of the model's layers.
        begin: First neuron.
        end: Behind the last.

    Returns:
        For each column a list with the entry of each neuron: the `N_NEAREST` others of the layer (all, where
        there are fewer) by falling cosine, on a tie by rising number. The cosine with a neuron of no effect
        at all is 0.
    """
    d = len(lenses.scale)
    with jax.default_matmul_precision("float32"):
        cosines, neurons = jax.device_get(
            _nearest(
                lenses.jacobian_rows(layer, begin, end),
                lenses.jacobian_rows(layer, 0, d),
                lenses.gram,
                jnp.arange(begin, end),
                min(N_NEAREST, d - 1),
            )
        )
    similarity = np.clip(cosines.astype(np.float64), -1.0, 1.0)
    return {"similar_effect": neurons.tolist(), "similar_effect_similarity": similarity.tolist()}


@functools.partial(jax.jit, static_argnums=4)
def _nearest(
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
