"""Matrix products of bfloat16 the way each platform multiplies them fastest; of float32 the plain ones.

XLA on CPU has a kernel for bfloat16, twice as fast as float32, but takes it only for two row-major matrices
and a float32 result; all else it converts to float32 first. Measured: docs/decisions.md.
"""

import jax
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a @ b` in the dtype of a, sums in float32.

    Args:
        a: [..., N, K].
        b: [..., K, M], same dtype.

    Returns:
        [..., N, M].
    """
    if a.dtype != jnp.bfloat16:
        return a @ b
    return jax.lax.platform_dependent(a, b, cpu=_rounded_product, default=jnp.matmul)


def transposed(x: jax.Array) -> jax.Array:
    """The last two axes exchanged, for use in a product: [..., N, M] -> [..., M, N]."""
    if x.dtype != jnp.bfloat16:
        return x.mT
    return jax.lax.platform_dependent(x, cpu=_row_major_transpose, default=lambda x: x.mT)


def _rounded_product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(a.dtype)


def _row_major_transpose(x: jax.Array) -> jax.Array:
    # Without the constraint XLA would leave the data as it is and multiply a column-major matrix.
    return with_layout_constraint(x.mT, Layout(tuple(range(x.ndim))))
