"""The view from inside one device's program (`jax.shard_map`), and its collectives.

Each device runs the model on its part: some rows of the batch, two runs of their tokens (axis `context`),
some heads, MLP columns and vocabulary (axis `tensor`). Between attention and MLP the residual stream is split
by token over both, never by D, so norms and TopK see whole rows and need no communication (Korthikanti et al.
2022, "Reducing Activation Recomputation", section 4.2.2). `topklm.layout` says where the parts come from.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


def _as_it_is(parameters: Any) -> Any:
    return parameters


@dataclasses.dataclass(frozen=True)
class Parallel:
    """The mesh axes of one device's program, and how it computes; an axis with one device is None."""

    context: str | None = None
    tensor: str | None = None
    # Makes a tree of this device's parts of parameters (a block's, say) whole along fsdp, at use.
    gather: Callable[[Any], Any] = _as_it_is
    # How its devices compute attention, a name of `backends.ATTENTION`.
    attention: str = "blocked"
    # How they run layers if `config.layer_stack` is "auto": one block scanned, which compiles in a time that
    # does not grow with depth, or unrolled, which XLA makes faster on CPUs.
    scan_layers: bool = False

    def gather_tokens(self, x_BTD: jax.Array) -> jax.Array:
        """Gathers residual tokens to all tokens that the tensor group works on."""
        return all_gather(x_BTD, self.tensor, dim=1)

    def scatter_tokens(self, x_BTD: jax.Array) -> jax.Array:
        """Sums partial sums of all tokens over the tensor group; each device keeps its residual tokens."""
        if self.tensor is None:
            return x_BTD
        return jax.lax.psum_scatter(x_BTD, self.tensor, scatter_dimension=1, tiled=True)

    def balanced(self, batch: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
        """Exchanges the tokens of arrays [B, T] along `context`, so that all devices attend to equally many.

        Of the 2 n chunks of a sequence, device i of n has 2 i and 2 i + 1 before, i and 2 n - 1 - i after
        ("zigzag"). Sums over tokens stay the same.
        """
        if self.context is None:
            return batch
        n, axis = jax.lax.axis_size(self.context), self.context

        def exchanged(x_BT: jax.Array) -> jax.Array:
            even, odd = (  # chunks of even and of odd numbers: a device gets one of each
                jax.lax.ppermute(half, axis, [(i, min(2 * i + h, 2 * n - 1 - 2 * i - h)) for i in range(n)])
                for h, half in enumerate(jnp.split(x_BT, 2, axis=1))
            )
            even_first = jax.lax.axis_index(axis) % 2 == 0
            return jnp.concatenate(
                [jnp.where(even_first, even, odd), jnp.where(even_first, odd, even)], axis=1
            )

        return {name: exchanged(x) for name, x in batch.items()}

    def residual_tokens(self, x_BT: jax.Array) -> jax.Array:
        """Returns this device's residual tokens of an array that the tensor group has in common."""
        if self.tensor is None:
            return x_BT
        size = x_BT.shape[1] // jax.lax.axis_size(self.tensor)
        return jax.lax.dynamic_slice_in_dim(x_BT, jax.lax.axis_index(self.tensor) * size, size, axis=1)


ALONE = Parallel()


def all_gather(x: jax.Array, axis: str | None, dim: int) -> jax.Array:
    """Joins the parts of all devices along a mesh axis on a dim; returns `x` where the axis is None."""
    return x if axis is None else jax.lax.all_gather(x, axis, axis=dim, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather_parameter(part: jax.Array, axis: str, dim: int, dtype: jnp.dtype) -> jax.Array:
    """Joins the float32 parts of a parameter, split on `dim` along a mesh axis, in the compute dtype.

    The gather moves `dtype`, the sum of its gradient over devices float32: hundreds of bfloat16 gradients
    added up one after another would lose the small ones.
    """
    return all_gather(part.astype(dtype), axis, dim)


def _gather_forward(part: jax.Array, axis: str, dim: int, dtype: jnp.dtype) -> tuple[jax.Array, None]:
    return gather_parameter(part, axis, dim, dtype), None


def _gather_backward(axis: str, dim: int, dtype: jnp.dtype, saved: None, g: jax.Array) -> tuple[jax.Array]:
    del dtype, saved
    return (jax.lax.psum_scatter(g.astype(jnp.float32), axis, scatter_dimension=dim, tiled=True),)


gather_parameter.defvjp(_gather_forward, _gather_backward)
