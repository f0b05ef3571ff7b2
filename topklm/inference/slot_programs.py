"""The programs that move rows of a batch: texts into it, and those that are there to other places.

Dims: B rows, N texts that come, C places of the cache.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from topklm.inference import cache as cache_lib
from topklm.inference.programs import Plan, State


@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def put(plan: Plan, state: State, new: State, targets_N: jax.Array) -> State:
    """The rows of `new` in place of some of `state`'s; none for targets behind the last."""

    def set_rows(x: jax.Array, rows: jax.Array) -> jax.Array:
        return x.at[targets_N].set(rows, mode="drop")

    def set_cache(x: jax.Array, rows: jax.Array) -> jax.Array:
        return set_rows(x, rows) if x.ndim == 4 else x.at[:, targets_N].set(rows, mode="drop")

    rest = jax.tree.map(set_rows, state._replace(cache=None), new._replace(cache=None))
    return _whole(plan, rest._replace(cache=jax.tree.map(set_cache, state.cache, new.cache)))


@functools.partial(jax.jit, static_argnums=(0, 3))
def rearranged(plan: Plan, state: State, order_B: jax.Array, n_places: int) -> State:
    """These rows of a state, with so many places in the cache, at least those that texts have taken."""
    cache = jax.tree.map(lambda x: jnp.take(x, order_B, axis=x.ndim - 4), state.cache)
    rest = jax.tree.map(lambda x: jnp.take(x, order_B, axis=0), state._replace(cache=None))
    return _whole(plan, rest._replace(cache=cache_lib.resized(plan.config, cache, n_places)))


def _whole(plan: Plan, tree: Any) -> Any:
    """Whole on every device, as `programs` has its results."""
    return tree if plan.replicated is None else jax.lax.with_sharding_constraint(tree, plan.replicated)
