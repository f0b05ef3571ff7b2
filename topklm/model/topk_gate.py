"""TopK between two layers in two halves, so that its gradient keeps nothing and computes nothing twice.

With "relu" the entries that a TopK lets through are those above 0 behind it. Where layers are computed again,
the next layer keeps just these for its own backward pass: its `gate` does what is left to do.
"""

import functools

import jax
import jax.numpy as jnp

from topklm.model.topk import topk
from topklm.model.topk_threshold import order_key


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def relu_topk(
    x: jax.Array, residual: jax.Array, applies: jax.Array | None, k: int, backend: str
) -> jax.Array:
    """`topk(x + residual, k, "relu", backend)`, but its gradient is that of the sum: `gate` must follow.

    Args:
        x: [..., D].
        residual: [..., D], same dtype.
        applies: As in `topk`.
        k: As in `topk`.
        backend: As in `topk`.

    Returns:
        [..., D].
    """
    return topk(x, k, "relu", backend, residual=residual, applies=applies)


def _relu_topk_forward(
    x: jax.Array, residual: jax.Array, applies: jax.Array | None, k: int, backend: str
) -> tuple[jax.Array, None]:
    return relu_topk(x, residual, applies, k, backend), None


def _relu_topk_backward(k: int, backend: str, saved: None, g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    del k, backend, saved
    return g, g, None


relu_topk.defvjp(_relu_topk_forward, _relu_topk_backward)


@jax.custom_vjp
def gate(h: jax.Array, is_sparse: jax.Array) -> jax.Array:
    """Its input; where a `relu_topk` made it, gradient passes through what that let through.

    Args:
        h: [..., D].
        is_sparse: bool scalar, whether a `relu_topk` made it that applied; False: all gradient passes.

    Returns:
        [..., D].
    """
    del is_sparse
    return h


def _gate_forward(h: jax.Array, is_sparse: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return h, (h, is_sparse)


def _gate_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, None]:
    h, is_sparse = saved
    # Decided on integers, as the TopK itself is: some devices take the smallest floats for 0.
    passes = (order_key(h) > 0) | ~is_sparse
    return jnp.where(passes, g, jnp.zeros((), g.dtype)), None


gate.defvjp(_gate_forward, _gate_backward)
