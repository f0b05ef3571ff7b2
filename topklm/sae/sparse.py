"""Products with k of M codes, for CPUs: work is proportional to k, forward and back.

Each product is a loop over the k kept codes, whose step reads one row of the decoder for each token: XLA on
CPUs makes vector code of it, unlike of one gather of all rows. Dims: N tokens, K kept codes, M codes, D.
"""

import functools

import jax
import jax.numpy as jnp


def _sum_of_rows(values_NK: jax.Array, index_NK: jax.Array, rows_MD: jax.Array) -> jax.Array:
    def add(total_ND: jax.Array, code: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        value_N, index_N = code
        return total_ND + value_N[:, None] * rows_MD[index_N], None

    start = jnp.zeros((len(values_NK), rows_MD.shape[1]))
    return jax.lax.scan(add, start, (values_NK.T, index_NK.T))[0]


def _outer(values_NK: jax.Array, index_NK: jax.Array, x_ND: jax.Array, width: int) -> jax.Array:
    """Returns float32[M, D], the sum over tokens of codes times x: the gradient of rows."""

    def add(total_MD: jax.Array, code: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        value_N, index_N = code
        return total_MD.at[index_N].add(value_N[:, None] * x_ND), None

    return jax.lax.scan(add, jnp.zeros((width, x_ND.shape[1])), (values_NK.T, index_NK.T))[0]


def _dots(x_ND: jax.Array, index_NK: jax.Array, rows_MD: jax.Array) -> jax.Array:
    """Returns float32[N, K], the products of x with the rows of kept codes."""

    def dot(_: None, index_N: jax.Array) -> tuple[None, jax.Array]:
        return None, jnp.sum(x_ND * rows_MD[index_N], axis=1)

    return jax.lax.scan(dot, None, index_NK.T)[1].T


@jax.custom_vjp
def combine(values_NK: jax.Array, index_NK: jax.Array, rows_MD: jax.Array) -> jax.Array:
    """Decodes kept codes: returns float32[N, D], the sum of rows, each times its value."""
    return _sum_of_rows(values_NK, index_NK, rows_MD)


def _combine_forward(values: jax.Array, index: jax.Array, rows: jax.Array) -> tuple[jax.Array, tuple]:
    return combine(values, index, rows), (values, index, rows)


def _combine_backward(kept: tuple, gradient_ND: jax.Array) -> tuple:
    values, index, rows = kept
    return _dots(gradient_ND, index, rows), None, _outer(values, index, gradient_ND, len(rows))


combine.defvjp(_combine_forward, _combine_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def winners(x_ND: jax.Array, encoder_MD: jax.Array, bias_M: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Encodes: returns the k largest pre-activations of each token, clipped at 0, and which codes they are.

    Float32[N, K] and int32[N, K]; the winners are those of `topklm.model.topk`, the lowest index on a tie.
    """
    values, index = jax.lax.top_k(x_ND @ encoder_MD.T + bias_M, k)
    return jnp.maximum(values, 0), index


def _winners_forward(x: jax.Array, encoder: jax.Array, bias: jax.Array, k: int) -> tuple[tuple, tuple]:
    values, index = winners(x, encoder, bias, k)
    return (values, index), (x, encoder, values > 0, index)


def _winners_backward(k: int, kept: tuple, gradients: tuple) -> tuple:
    del k
    x, encoder, is_active, index = kept
    of_values = jnp.where(is_active, gradients[0], 0)
    of_bias = jnp.zeros(len(encoder)).at[index].add(of_values)
    return _sum_of_rows(of_values, index, encoder), _outer(of_values, index, x, len(encoder)), of_bias


winners.defvjp(_winners_forward, _winners_backward)
