"""Products with the kept codes alone, for CPUs: work follows their number and not M, forward and back.

`kept` lists the codes of each token, row c the c-th of every one. Each product is a loop over these rows,
whose step reads one row of the dictionary for each token: XLA on CPUs makes vector code of it, unlike of one
gather of all rows. Dims: C codes of a token, T tokens, M codes, D d_model.
"""

import jax
import jax.numpy as jnp


def largest(pre_TM: jax.Array, k: int) -> jax.Array:
    """Lists the k largest entries of each row, those of `topklm.model.topk`: int32[C, T]."""
    return jax.lax.top_k(pre_TM, k)[1].T


def _decode(values_CT: jax.Array, kept_CT: jax.Array, rows_MD: jax.Array) -> jax.Array:
    def add(total_TD: jax.Array, entries: tuple) -> tuple[jax.Array, None]:
        value_T, code_T = entries
        return total_TD + value_T[:, None] * rows_MD[code_T], None

    zero_TD = jnp.zeros((kept_CT.shape[1], rows_MD.shape[1]))
    return jax.lax.scan(add, zero_TD, (values_CT, kept_CT))[0]


def _of_rows(values_CT: jax.Array, kept_CT: jax.Array, x_TD: jax.Array, width: int) -> jax.Array:
    """Returns float32[M, D], the sum over entries of value times x: the gradient of rows."""

    def add(total_MD: jax.Array, entries: tuple) -> tuple[jax.Array, None]:
        value_T, code_T = entries
        return total_MD.at[code_T].add(value_T[:, None] * x_TD), None

    return jax.lax.scan(add, jnp.zeros((width, x_TD.shape[1])), (values_CT, kept_CT))[0]


def _dots(x_TD: jax.Array, kept_CT: jax.Array, rows_MD: jax.Array) -> jax.Array:
    """Returns float32[C, T], the products of tokens with the rows of their codes."""
    return jax.lax.map(lambda code_T: jnp.sum(x_TD * rows_MD[code_T], axis=1), kept_CT)


@jax.custom_vjp
def combine(values_CT: jax.Array, kept_CT: jax.Array, rows_MD: jax.Array) -> jax.Array:
    """Decodes: returns float32[T, D], for each token the sum of rows, each times its value."""
    return _decode(values_CT, kept_CT, rows_MD)


def _combine_forward(values: jax.Array, kept: jax.Array, rows: jax.Array) -> tuple:
    return combine(values, kept, rows), (values, kept, rows)


def _combine_backward(residual: tuple, gradient_TD: jax.Array) -> tuple:
    values, kept, rows = residual
    return _dots(gradient_TD, kept, rows), None, _of_rows(values, kept, gradient_TD, len(rows))


combine.defvjp(_combine_forward, _combine_backward)


@jax.custom_vjp
def encode(x_TD: jax.Array, encoder_MD: jax.Array, bias_M: jax.Array, kept_CT: jax.Array) -> jax.Array:
    """Returns float32[C, T], the pre-activations of kept codes, clipped at 0."""
    return jnp.maximum(_dots(x_TD, kept_CT, encoder_MD) + bias_M[kept_CT], 0)


def _encode_forward(x: jax.Array, encoder: jax.Array, bias: jax.Array, kept: jax.Array) -> tuple:
    values = encode(x, encoder, bias, kept)
    return values, (x, encoder, values > 0, kept)


def _encode_backward(residual: tuple, gradient: jax.Array) -> tuple:
    x, encoder, is_active, kept = residual
    gradient = jnp.where(is_active, gradient, 0)
    of_bias = jnp.zeros(len(encoder)).at[kept].add(gradient)
    return _decode(gradient, kept, encoder), _of_rows(gradient, kept, x, len(encoder)), of_bias, None


encode.defvjp(_encode_forward, _encode_backward)
