"""Exact selection of the k largest numbers of a row on bit planes, as the Pallas TopK kernels do it.

32 entries of a row share a word: bit c of word j stands for entry `c * width + j`. One bit plane holds one
bit of all of a row's numbers, so that one AND and one population count judge 32 entries.
"""

from collections.abc import Callable, Sequence
import functools
import operator

import jax
import jax.numpy as jnp

WORD = 32  # entries in a word
_ALL = -1  # a word with all bits set

# For s = 16 ... 1: the bits of a word whose position has bit s unset.
_EVEN = {16: 0x0000FFFF, 8: 0x00FF00FF, 4: 0x0F0F0F0F, 2: 0x33333333, 1: 0x55555555}


def bit_planes(numbers: Sequence[jax.Array], n_bits: int) -> list[jax.Array]:
    """Transposes 32 numbers of 16 or 32 bits at every position.

    Swaps ever smaller blocks of the bit matrix (Warren 2013, Hacker's Delight, section 7-3); 16-bit numbers
    go through it two to a word.

    Args:
        numbers: 32 of int32[...], the upper bits zero if n_bits is 16.
        n_bits: 16 or 32.

    Returns:
        n_bits of int32[...], from the lowest bit up: bit c of plane b is bit b of numbers[c].
    """
    words = list(numbers)
    if n_bits == 16:
        words = [low | (high << 16) for low, high in zip(words[:16], words[16:], strict=True)]
    for shift, even in _EVEN.items():
        if shift >= n_bits:
            continue
        for i in range(n_bits):
            if i & shift == 0:
                a, b = words[i], words[i + shift]
                words[i] = (a & even) | ((b & even) << shift)
                words[i + shift] = (jax.lax.shift_right_logical(a, shift) & even) | (b & ~even)
    return words


def order_planes(planes: Sequence[jax.Array], *, by_magnitude: bool) -> list[jax.Array]:
    """Planes of an unsigned key that sorts as the IEEE total order of the floats, from the highest bit down.

    Args:
        planes: Of the floats' bits, from the lowest up; the last one is the sign.
        by_magnitude: Order by absolute value instead.
    """
    *magnitude, sign = planes
    if by_magnitude:
        return magnitude[::-1]
    return [~sign, *(plane ^ sign for plane in magnitude[::-1])]


def positive(planes: Sequence[jax.Array]) -> jax.Array:
    """Finds the floats above 0 in total order, as bits of words; a NaN without sign is one."""
    *magnitude, sign = planes
    return functools.reduce(operator.or_, magnitude) & ~sign


def is_nan(planes: Sequence[jax.Array], n_mantissa_bits: int) -> jax.Array:
    """Finds the floats that are NaN, as bits of words: exponent all ones, mantissa not 0."""
    mantissa, exponent = planes[:n_mantissa_bits], planes[n_mantissa_bits:-1]
    return functools.reduce(operator.and_, exponent) & functools.reduce(operator.or_, mantissa)


def valid(d: int, shape: tuple[int, ...]) -> jax.Array:
    """Sets the bits that stand for one of the d entries of a row, int32[shape], shape = (R, width)."""
    full, rest = divmod(d, shape[1])
    return jnp.where(_position(shape) < rest, _lowest(full + 1), _lowest(full))


def select(
    planes: Sequence[jax.Array], k: int, among: jax.Array, count: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Finds the k largest keys of every row, the lowest index first among equals.

    Fixes the bits of the k-th largest key from the highest down. Where more entries tie at it than are
    wanted, the search goes on over the bits of their index, inverted so that a lower one ranks higher: with
    these, no two keys are equal.

    Args:
        planes: Of the keys, from the highest bit down, int32[R, width].
        k: 1 or more, and no more than any row of `among` has bits set.
        among: int32[R, width], the entries to choose from.
        count: int32[R, width] -> int32[R, 1], bits set in a row.

    Returns:
        int32[R, width] with exactly k bits set a row.
    """
    state = (jnp.zeros_like(among), among, jnp.full((among.shape[0], 1), k, jnp.int32))
    chosen, candidates, places = _descend(planes, state, count)

    def break_ties() -> jax.Array:
        first, last, _ = _descend(_index_planes(among.shape), (chosen, candidates, places), count)
        return first | last

    has_ties = jnp.max(count(candidates) - places) > 0
    return jax.lax.cond(has_ties, break_ties, lambda: chosen | candidates)


def _descend(planes: Sequence[jax.Array], state: tuple, count: Callable[[jax.Array], jax.Array]) -> tuple:
    """Fixes one bit at a time. State: entries sure to be among the k, those still equal, and how many."""
    chosen, candidates, places = state
    for plane in planes:
        hits = candidates & plane
        n_hits = count(hits)
        too_few = n_hits < places
        keep = jnp.where(too_few, _ALL, 0)  # then all hits are in, and the k-th has this bit unset
        chosen = chosen | (hits & keep)
        candidates = candidates & (plane ^ keep)
        places = jnp.where(too_few, places - n_hits, places)
    return chosen, candidates, places


def _index_planes(shape: tuple[int, ...]) -> list[jax.Array]:
    """Makes planes of the inverted index c * width + j, from the highest bit that can differ down."""
    j = _position(shape)
    of_c = [jnp.full(shape, even, jnp.int32) for even in _EVEN.values()]
    of_j = [jnp.where(j & (1 << b) == 0, _ALL, 0) for b in reversed(range((shape[1] - 1).bit_length()))]
    return of_c + of_j


def _position(shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _lowest(n: int) -> int:
    """Returns a word with its n lowest bits set."""
    return _ALL if n >= WORD else (1 << n) - 1
