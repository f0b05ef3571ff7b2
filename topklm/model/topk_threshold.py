"""TopK by a search for each row's k-th largest entry: it only counts, so its cost hardly grows with k.

Written for XLA on CPUs, right on every platform. Rows are searched in blocks that stay in cache, and the
search hands on two numbers a row; one pass over all rows then keeps the winners. A block is done when all of
its rows are settled, after at most about as many passes as a key has bits.
Dims: N rows, R rows of a block, D entries of a row.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

# Entries searched together: they stay in a core's second-level cache (1 MiB or more).
_BLOCK_ENTRIES = 2**18
# A reduction along the row is scalar code; one over this many slices of a row is vector code.
_SLICES = 16
# Up to so many winners are close to the largest entries of `D / _SLICES` groups.
_FEW = 16
# So many keys or fewer above k are dropped one at a time; those of 16 bits settle faster by halving.
_LAST_KEYS = 3

Selected = tuple[jax.Array, jax.Array | None]  # the result of `topk`, and which entries are active, if asked
Bracket = tuple[jax.Array, jax.Array, jax.Array]  # low, high and count(key >= low) of `_halve`, int32[R, 1]


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32 if x.dtype == jnp.float32 else jnp.int16)


def _magnitude(bits: jax.Array) -> jax.Array:
    return bits & jnp.array(jnp.iinfo(bits.dtype).max, bits.dtype)


def order_key(x: jax.Array) -> jax.Array:
    """Integers as wide as x, in the IEEE total order of x: 0 for +0.0, above 0 exactly where x is."""
    return _in_total_order(_bits(x))


def _in_total_order(bits: jax.Array) -> jax.Array:
    return jnp.where(bits < 0, bits ^ jnp.array(jnp.iinfo(bits.dtype).max, bits.dtype), bits)


# The order in which entries compete, from their bits. Below zero, "relu" keeps none: any order will do.
_KEYS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": lambda bits: bits,
    "identity": _in_total_order,
    "abs": _magnitude,
}


def keep(x: jax.Array, active: jax.Array, with_mask: bool) -> Selected:
    """Returns the active entries of x, 0 elsewhere; NaN throughout a row that holds a NaN."""
    has_nan = jnp.any(jnp.isnan(x), axis=-1, keepdims=True)
    return _fill(x, active, has_nan), active if with_mask else None


def _fill(x: jax.Array, active: jax.Array, has_nan: jax.Array) -> jax.Array:
    kept = jnp.where(active, x, jnp.zeros_like(x))
    return jnp.where(has_nan, jnp.full_like(x, jnp.nan), kept)


def select(x: jax.Array, k: int, activation: str, with_mask: bool) -> Selected:
    """Computes `topk.topk` of [..., D] for k from 1 to D - 1; not differentiable by itself."""
    d = x.shape[-1]
    x_ND = x.reshape(-1, d)
    kth_N1, last_N1, has_nan_N1 = _search_in_blocks(x_ND, k, activation)
    key_ND = _KEYS[activation](_bits(x_ND))
    kth_N1 = kth_N1.astype(key_ND.dtype)
    active = (key_ND > kth_N1) | ((key_ND == kth_N1) & (_ranks(d, key_ND.dtype) >= last_N1))
    active = active & (key_ND > 0) if activation == "relu" else active
    y = _fill(x_ND, active, has_nan_N1)
    return y.reshape(x.shape), active.reshape(x.shape) if with_mask else None


def _search_in_blocks(x_ND: jax.Array, k: int, activation: str) -> tuple[jax.Array, ...]:
    """Finds each row's k-th key, the least rank that wins among keys equal to it, and whether it has a NaN.

    int32[N, 1], integers[N, 1], bool[N, 1].
    """
    n_rows, d = x_ND.shape
    n_blocks = max(1, -(-n_rows * d // _BLOCK_ENTRIES))
    size = -(-n_rows // n_blocks)
    # XLA for CPUs slices 16-bit floats by way of float32.
    source = x_ND if x_ND.dtype == jnp.float32 else _bits(x_ND)

    def search(part: jax.Array) -> tuple[jax.Array, ...]:
        bits_RD = _bits(part) if part.dtype == jnp.float32 else part
        key_RD = _KEYS[activation](bits_RD)
        infinity = _bits(jnp.array(jnp.inf, x_ND.dtype))
        has_nan = _along_rows(jnp.maximum, bits_RD, _magnitude) > infinity
        return *_kth(key_RD, k), has_nan

    if n_blocks == 1:
        return search(source)

    def one_block(i: jax.Array, wholes: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        # The last block ends with the last row; rows that it shares with the one before come out the same.
        start = jnp.minimum(i * size, n_rows - size)
        parts = search(jax.lax.dynamic_slice_in_dim(source, start, size))
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return tuple(map(update, wholes, parts))

    shapes = jax.eval_shape(search, source[:size])
    wholes = tuple(jnp.zeros((n_rows, 1), part.dtype) for part in shapes)
    return jax.lax.fori_loop(0, n_blocks, one_block, wholes)


def _kth(key_RD: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Finds each row's k-th key, or a bound that exactly k keys reach, and the least of `_ranks` that wins.

    int32[R, 1] and integers[R, 1]. A rank decides among keys equal to the k-th only.
    """
    d = key_RD.shape[1]
    if is_few := k <= _FEW and d % _SLICES == 0:
        groups = _fold(jnp.maximum, key_RD, d // _SLICES)
        high = _along_rows(jnp.maximum, groups)
        least = jnp.array(jnp.iinfo(key_RD.dtype).min, key_RD.dtype)

        def next_largest(_: Any, bound: jax.Array) -> jax.Array:
            return _along_rows(jnp.maximum, groups, lambda part: jnp.where(part < bound, part, least))

        # The k-th largest of the groups' largest entries: at least k entries reach it, and hardly more.
        low = jax.lax.fori_loop(0, k - 1, next_largest, high)
    else:
        # At least k entries reach the least of the largest entries of k groups, or more.
        width = d
        while width % 2 == 0 and width // 2 >= k and d // width < _SLICES:
            width //= 2
        groups = _fold(jnp.maximum, key_RD, width)
        high, low = (_along_rows(op, groups) for op in (jnp.maximum, jnp.minimum))
    low, high = low.astype(jnp.int32), high.astype(jnp.int32)
    bracket = low, high, _count(jnp.greater_equal, key_RD, low)
    one_by_one = is_few and key_RD.dtype == jnp.int32
    bracket = _halve(key_RD, k, bracket, spare=_LAST_KEYS if one_by_one else 0)
    kth_R1, _, count_R1 = _drop_lowest(key_RD, k, bracket) if one_by_one else bracket
    last_R1 = jax.lax.cond(
        jnp.any(count_R1 > k),
        lambda: _break_ties(key_RD, kth_R1, k),
        lambda: jnp.zeros((len(key_RD), 1), _ranks(d, key_RD.dtype).dtype),
    )
    return kth_R1, last_R1


def _halve(key_RD: jax.Array, k: int | jax.Array, bracket: Bracket, spare: int = 0) -> Bracket:
    """Bisects until at most k + `spare` keys of a row reach `low`, or low = high, which is a tie there.

    Invariant: count(key >= low) = count >= k and count(key > high) < k. k may be int32[R, 1].
    """

    def unsettled(low: jax.Array, high: jax.Array, count: jax.Array) -> jax.Array:
        return (low < high) & (count > k + spare)

    def halve(bracket: Bracket) -> Bracket:
        low, high, count = bracket
        middle = (low | high) - ((low ^ high) >> 1)  # mean rounded up, without overflow
        reached = _count(jnp.greater_equal, key_RD, middle)
        is_open = unsettled(low, high, count)
        rise, fall = is_open & (reached >= k), is_open & (reached < k)
        return (
            jnp.where(rise, middle, low),
            jnp.where(fall, middle - 1, high),
            jnp.where(rise, reached, count),
        )

    return jax.lax.while_loop(lambda bracket: jnp.any(unsettled(*bracket)), halve, bracket)


def _drop_lowest(key_RD: jax.Array, k: int, bracket: Bracket) -> Bracket:
    """Goes on where `_halve` stopped: drops the lowest of the keys that reach `low` until k are left."""

    def unsettled(low: jax.Array, high: jax.Array, count: jax.Array) -> jax.Array:
        return (low < high) & (count > k)

    def drop(bracket: Bracket) -> Bracket:
        low, high, count = bracket
        bound, top = low.astype(key_RD.dtype), jnp.array(jnp.iinfo(key_RD.dtype).max, key_RD.dtype)
        lowest = _along_rows(jnp.minimum, key_RD, lambda part: jnp.where(part >= bound, part, top))
        lowest = lowest.astype(jnp.int32)
        left = _count(jnp.greater, key_RD, lowest)
        is_open = unsettled(low, high, count)
        drops, is_tie = is_open & (left >= k), is_open & (left < k)
        low = jnp.where(drops, lowest + 1, jnp.where(is_tie, lowest, low))
        return low, jnp.where(is_tie, lowest, high), jnp.where(drops, left, count)

    return jax.lax.while_loop(lambda bracket: jnp.any(unsettled(*bracket)), drop, bracket)


def _break_ties(key_RD: jax.Array, kth_R1: jax.Array, k: int) -> jax.Array:
    """Finds the least rank that wins among keys equal to the k-th: as many of the first as complete k."""
    rank_D = _ranks(key_RD.shape[1], key_RD.dtype)
    tied = key_RD == kth_R1.astype(key_RD.dtype)
    places_left = k - _count(jnp.greater, key_RD, kth_R1)
    # No two ranks of tied keys are equal: a search for the last of them is cheaper than a running sum.
    rank_RD = jnp.where(tied, rank_D, jnp.zeros((), rank_D.dtype))
    first = jnp.ones_like(kth_R1)
    bracket = first, first * len(rank_D), _count(jnp.greater_equal, rank_RD, first)
    return _halve(rank_RD, places_left, bracket)[0].astype(rank_D.dtype)


def _ranks(d: int, dtype: Any) -> jax.Array:
    """Returns D .. 1 by place, in a dtype that holds D: on a tie the highest wins, which is the first."""
    return jnp.arange(d, 0, -1, dtype=dtype if d <= jnp.iinfo(dtype).max else jnp.int32)


def _count(compare: Callable[..., jax.Array], key_RD: jax.Array, bound_R1: jax.Array) -> jax.Array:
    """Counts each row's keys that compare so with the bound, int32[R, 1]."""
    bound_R1 = bound_R1.astype(key_RD.dtype)
    return _along_rows(jnp.add, key_RD, lambda part: compare(part, bound_R1).astype(key_RD.dtype))


def _along_rows(
    op: Any, x_RD: jax.Array, of: Callable[[jax.Array], jax.Array] = lambda part: part
) -> jax.Array:
    """Reduces `of(x)`, an elementwise function, along its rows, [R, D] -> [R, 1]; sums are int32."""
    width = x_RD.shape[1] // _SLICES
    if width < 2:
        return op.reduce(of(x_RD), axis=-1, keepdims=True)
    # `of` is applied to slices: XLA would write its result for whole rows to memory.
    partial = _fold(op, x_RD[:, : width * _SLICES], width, of)
    total = _along_rows(op, partial.astype(jnp.int32) if op is jnp.add else partial)
    rest = x_RD[:, width * _SLICES :]
    return op(total, op.reduce(of(rest), axis=-1, keepdims=True)) if rest.shape[1] else total


def _fold(
    op: Any, x_RD: jax.Array, width: int, of: Callable[[jax.Array], jax.Array] = lambda part: part
) -> jax.Array:
    """Combines the slices of `width` entries, of which a row is made: [R, D] -> [R, width]."""
    return functools.reduce(op, [of(x_RD[:, i : i + width]) for i in range(0, x_RD.shape[1], width)])
