"""The places of a cache in parts, of which attention reads those that texts have come to.

A product with the first places of one array would copy them first; parts it reads where they are. They are
32 places, as many again, twice as many, and so on: the longest text leaves less than half of what is read
unused, and a program holds attention over few parts.

Inside `jax.jit`. Dims: B rows, K key heads of width d, C places of the cache, S of a part, N of new tokens.
All functions take arrays with a leading layer axis too.
"""

from collections.abc import Sequence
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from topklm.model.cached_attention import KeysAndValues

Parts = tuple[KeysAndValues, ...]  # [..., B, K, S, d] each

_SHORTEST = 32


def sizes(room: int) -> tuple[int, ...]:
    """Of the parts of a cache with so many places."""
    ends = [0]
    while ends[-1] < room:
        ends.append(min(room, max(_SHORTEST, 2 * ends[-1])))
    return tuple(end - begin for begin, end in itertools.pairwise(ends))


def size(part: KeysAndValues) -> int:
    """S."""
    return part.keys.shape[-2]


def cut(whole: KeysAndValues, sizes: Sequence[int]) -> Parts:
    """Parts of such sizes; places that are missing are zeros, and those beyond are left out.

    Args:
        whole: [..., B, K, any number, d].
        sizes: S of each.
    """

    def cut_array(x: jax.Array) -> list[jax.Array]:
        widths = [(0, 0)] * x.ndim
        widths[-2] = (0, max(0, sum(sizes) - x.shape[-2]))
        return jnp.split(jnp.pad(x, widths)[..., : sum(sizes), :], np.cumsum(sizes)[:-1], axis=-2)

    return tuple(map(KeysAndValues, *map(cut_array, whole)))


def joined(parts: Parts) -> KeysAndValues:
    """The parts as one, [..., B, K, C, d]."""
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=-2), *parts)


def seen(parts: Parts, lengths_B: jax.Array) -> list[tuple[jax.Array, jax.Array | bool]]:
    """Of each part: which places hold a token, bool[B, 1, S]; and whether any does, of the first always.

    Args:
        parts: Of the cache.
        lengths_B: int32[B], tokens of each row.
    """
    longest = lengths_B.max()

    def of_part(begin: int, part: KeysAndValues) -> tuple[jax.Array, jax.Array | bool]:
        places_B1S = (begin + jnp.arange(size(part)) < lengths_B[:, None])[:, None]
        return places_B1S, longest > begin if begin else True

    return [of_part(begin, part) for begin, part in zip(_begins(parts), parts, strict=True)]


def put(parts: Parts, new: KeysAndValues, lengths_B: jax.Array) -> Parts:
    """The parts with new tokens behind each row's text; what has no place is left out.

    Args:
        parts: Of the cache.
        new: [..., B, K, N, d].
        lengths_B: int32[B], tokens of each row that are in the cache.
    """
    return tuple(
        jax.tree.map(lambda x, more, begin=begin: _put(x, more, lengths_B - begin), part, new)
        for begin, part in zip(_begins(parts), parts, strict=True)
    )


def _begins(parts: Parts) -> list[int]:
    """The place in the cache of the first place of each."""
    return [0, *itertools.accumulate(size(part) for part in parts[:-1])]


def _put(x: jax.Array, new: jax.Array, begins_B: jax.Array) -> jax.Array:
    """New places in a part, from one on that may lie outside of it."""

    def of_row(x_KSd: jax.Array, new_KNd: jax.Array, begin: jax.Array) -> jax.Array:
        # Each place is chosen from two. To write where the new ones belong is what XLA does slowly on CPUs.
        which_S = jnp.arange(x_KSd.shape[1]) - begin
        n = new_KNd.shape[1]
        moved_KSd = jnp.take(new_KNd, jnp.clip(which_S, 0, n - 1), axis=1)
        return jnp.where(((which_S >= 0) & (which_S < n))[:, None], moved_KSd, x_KSd)

    of_rows = jax.vmap(of_row)
    return (jax.vmap(of_rows, in_axes=(0, 0, None)) if x.ndim == 5 else of_rows)(x, new, begins_B)
