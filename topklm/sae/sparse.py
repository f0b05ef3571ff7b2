"""Products with the kept codes alone, for CPUs: work follows their number and not M, forward and back.

Kept codes are listed in C chunks of N: which code each is, and of which token; where that is None, chunk c
holds the c-th kept code of every token. Each product is a loop over chunks, whose step reads one row of the
dictionary for each entry: XLA on CPUs makes vector code of it, unlike of one gather of all rows.
Dims: T tokens, M codes, D d_model.
"""

import functools

import jax
import jax.numpy as jnp

from topklm.model.topk import topk

# Codes of a token that are looked at for the largest of a batch: so many times k, and as many at least.
CAP, LEAST_CAP = 4, 64

Kept = tuple[jax.Array, jax.Array | None]  # codes int32[C, N]; their tokens, int32[C, N] or None


def largest_of_tokens(pre_TM: jax.Array, k: int) -> Kept:
    """Lists the k largest entries of each row, those of `topklm.model.topk`; k chunks of T."""
    return jax.lax.top_k(pre_TM, k)[1].T, None


def largest_of_batch(pre_TM: jax.Array, k: int) -> tuple[Kept, jax.Array, jax.Array]:
    """Lists the T k largest entries of all, as far as they are positive; k chunks of T.

    Returns beside them bool[C, N], which entries of the list count, and whether the list is complete: it is
    not if a token has as many as were looked at (`CAP`).
    """
    n_tokens, width = pre_TM.shape
    cap = min(width, max(CAP * k, LEAST_CAP))
    values, codes = jax.lax.top_k(pre_TM, cap)
    is_kept = topk(values.reshape(-1), n_tokens * k) > 0
    (at,) = jnp.nonzero(is_kept, size=n_tokens * k, fill_value=0)
    counts = jnp.arange(n_tokens * k) < jnp.sum(is_kept)
    is_complete = (cap == width) | ~jnp.any(is_kept.reshape(n_tokens, cap)[:, -1])
    listed = codes.reshape(-1)[at], at // cap, counts
    code, token, counts = (x.reshape(k, n_tokens) for x in listed)
    return (code, token), counts, is_complete


def _rows_of(x_TD: jax.Array, token: jax.Array | None) -> jax.Array:
    return x_TD if token is None else x_TD[token]


def _decode(values: jax.Array, kept: Kept, rows_MD: jax.Array, n_tokens: int) -> jax.Array:
    def add(total_TD: jax.Array, chunk: tuple) -> tuple[jax.Array, None]:
        value_N, (code_N, token_N) = chunk
        found_ND = value_N[:, None] * rows_MD[code_N]
        return (total_TD + found_ND if token_N is None else total_TD.at[token_N].add(found_ND)), None

    return jax.lax.scan(add, jnp.zeros((n_tokens, rows_MD.shape[1])), (values, kept))[0]


def _of_rows(values: jax.Array, kept: Kept, x_TD: jax.Array, width: int) -> jax.Array:
    """Returns float32[M, D], the sum over entries of value times x: the gradient of rows."""

    def add(total_MD: jax.Array, chunk: tuple) -> tuple[jax.Array, None]:
        value_N, (code_N, token_N) = chunk
        return total_MD.at[code_N].add(value_N[:, None] * _rows_of(x_TD, token_N)), None

    return jax.lax.scan(add, jnp.zeros((width, x_TD.shape[1])), (values, kept))[0]


def _dots(x_TD: jax.Array, kept: Kept, rows_MD: jax.Array) -> jax.Array:
    """Returns float32[C, N], the products of tokens with the rows of their codes."""

    def dot(_: None, chunk: Kept) -> tuple[None, jax.Array]:
        return None, jnp.sum(_rows_of(x_TD, chunk[1]) * rows_MD[chunk[0]], axis=1)

    return jax.lax.scan(dot, None, kept)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def combine(values: jax.Array, kept: Kept, rows_MD: jax.Array, n_tokens: int) -> jax.Array:
    """Decodes: returns float32[T, D], for each token the sum of rows, each times its value."""
    return _decode(values, kept, rows_MD, n_tokens)


def _combine_forward(values: jax.Array, kept: Kept, rows: jax.Array, n_tokens: int) -> tuple:
    return combine(values, kept, rows, n_tokens), (values, kept, rows)


def _combine_backward(n_tokens: int, residual: tuple, gradient_TD: jax.Array) -> tuple:
    del n_tokens
    values, kept, rows = residual
    return _dots(gradient_TD, kept, rows), None, _of_rows(values, kept, gradient_TD, len(rows))


combine.defvjp(_combine_forward, _combine_backward)


@jax.custom_vjp
def encode(x_TD: jax.Array, encoder_MD: jax.Array, bias_M: jax.Array, kept: Kept) -> jax.Array:
    """Returns float32[C, N], the pre-activations of kept codes, clipped at 0."""
    return jnp.maximum(_dots(x_TD, kept, encoder_MD) + bias_M[kept[0]], 0)


def _encode_forward(x: jax.Array, encoder: jax.Array, bias: jax.Array, kept: Kept) -> tuple:
    values = encode(x, encoder, bias, kept)
    return values, (x, encoder, values > 0, kept)


def _encode_backward(residual: tuple, gradient: jax.Array) -> tuple:
    x, encoder, is_active, kept = residual
    gradient = jnp.where(is_active, gradient, 0)
    of_bias = jnp.zeros(len(encoder)).at[kept[0]].add(gradient)
    of_x = _decode(gradient, kept, encoder, len(x))
    return of_x, _of_rows(gradient, kept, x, len(encoder)), of_bias, None


encode.defvjp(_encode_forward, _encode_backward)
