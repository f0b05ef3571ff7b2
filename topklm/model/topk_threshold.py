"""TopK by a search for each row's k-th largest entry: it only counts, so its cost does not grow with k.

Written for XLA on CPUs, right on every platform. Rows are searched in blocks that stay in cache; a block is
done when all of its rows are settled, after at most as many passes as a key has bits.
Dims: N rows, R rows of a block, D entries of a row.
"""

import functools
import operator

import jax
import jax.numpy as jnp

# Entries searched together: with their keys they stay in a core's second-level cache (1 MiB or more).
_BLOCK_ENTRIES = 2**18
# A reduction along the row is scalar code; one over this many slices of a row is vector code.
_SLICES = 16

Selected = tuple[jax.Array, jax.Array | None]  # the result of `topk`, and which entries are active, if asked


def order_key(x: jax.Array) -> jax.Array:
    """Integers as wide as x, in the IEEE total order of x: 0 for +0.0, above 0 exactly where x is."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32 if x.dtype == jnp.float32 else jnp.int16)
    magnitude = jnp.array(jnp.iinfo(bits.dtype).max, bits.dtype)
    return jnp.where(bits < 0, bits ^ magnitude, bits)


def keep(x: jax.Array, active: jax.Array, with_mask: bool) -> Selected:
    """Returns the active entries of x, 0 elsewhere; NaN throughout a row that holds a NaN."""
    has_nan = jnp.any(jnp.isnan(x), axis=-1, keepdims=True)
    return _fill(x, active, has_nan), active if with_mask else None


def select(x: jax.Array, k: int, activation: str, with_mask: bool) -> Selected:
    """Computes `topk.topk` of [..., D] for k from 1 to D - 1; not differentiable by itself."""
    x_ND = x.reshape(-1, x.shape[-1])
    n_rows, d = x_ND.shape
    n_blocks = max(1, -(-n_rows * d // _BLOCK_ENTRIES))
    size = -(-n_rows // n_blocks)

    def one_block(i: jax.Array, wholes: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        # The last block ends with the last row; rows that it shares with the one before come out the same.
        start = jnp.minimum(i * size, n_rows - size)
        block_RD = jax.lax.dynamic_slice_in_dim(x_ND, start, size)
        parts = _select_block(block_RD, k, activation)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=0)
            for whole, part in zip(wholes, parts, strict=False)
        )

    if n_blocks == 1:
        y, *mask = _select_block(x_ND, k, activation)
    else:
        wholes = (jnp.zeros_like(x_ND),) + ((jnp.zeros(x_ND.shape, bool),) if with_mask else ())
        y, *mask = jax.lax.fori_loop(0, n_blocks, one_block, wholes)
    return y.reshape(x.shape), mask[0].reshape(x.shape) if with_mask else None


def _fill(x: jax.Array, active: jax.Array, has_nan: jax.Array) -> jax.Array:
    kept = jnp.where(active, x, jnp.zeros_like(x))
    return jnp.where(has_nan, jnp.full_like(x, jnp.nan), kept)


def _select_block(x_RD: jax.Array, k: int, activation: str) -> tuple[jax.Array, jax.Array]:
    # The order of a row is decided on integers: exact, the same on every platform, denormals included.
    own_key = order_key(x_RD)
    key_RD = order_key(jnp.abs(x_RD)) if activation == "abs" else own_key
    winners = _winners(key_RD, k)
    active = winners & (own_key > 0) if activation == "relu" else winners
    magnitude = jnp.maximum(own_key, ~own_key)
    infinity = order_key(jnp.array(jnp.inf, x_RD.dtype))
    return _fill(x_RD, active, _max(magnitude) > infinity), active


def _winners(key_RD: jax.Array, k: int) -> jax.Array:
    """Returns bool[R, D] with exactly k True a row."""
    kth_R1, count_R1 = _kth(key_RD, k)
    return jax.lax.cond(
        jnp.any(count_R1 > k), lambda: _break_ties(key_RD, kth_R1, k), lambda: key_RD >= kth_R1
    )


def _kth(key_RD: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Finds a bound of each row that exactly k keys reach, or its k-th key on a tie; and the count.

    Bisection. Invariant: count(key >= low) = count >= k and count(key > high) < k. A row is settled when
    count = k, or when low = high, which is a tie at the k-th place.
    """
    # At least k entries reach the least of the largest entries of k groups, or more.
    width = key_RD.shape[1]
    while width % 2 == 0 and width // 2 >= k:
        width //= 2
    low = functools.reduce(jnp.maximum, _slices(key_RD, width)).min(axis=-1, keepdims=True).astype(jnp.int32)
    high = _max(key_RD).astype(jnp.int32)
    count = _count_at_least(key_RD, low)

    def unsettled(low: jax.Array, high: jax.Array, count: jax.Array) -> jax.Array:
        return (low < high) & (count != k)

    def halve(state: tuple) -> tuple:
        low, high, count = state
        middle = (low | high) - ((low ^ high) >> 1)  # mean rounded up, without overflow
        reached = _count_at_least(key_RD, middle)
        is_open = unsettled(low, high, count)
        rise, fall = is_open & (reached >= k), is_open & (reached < k)
        return (
            jnp.where(rise, middle, low),
            jnp.where(fall, middle - 1, high),
            jnp.where(rise, reached, count),
        )

    low, _, count = jax.lax.while_loop(lambda state: jnp.any(unsettled(*state)), halve, (low, high, count))
    return low.astype(key_RD.dtype), count


def _count_at_least(key_RD: jax.Array, bound_R1: jax.Array) -> jax.Array:
    bound_R1 = bound_R1.astype(key_RD.dtype)

    def count(part: jax.Array) -> jax.Array:
        return (part >= bound_R1).astype(key_RD.dtype)

    width = key_RD.shape[1] // _SLICES
    whole, rest = key_RD[:, : width * _SLICES], key_RD[:, width * _SLICES :]
    total = count(rest).sum(axis=-1, keepdims=True, dtype=jnp.int32)
    if width:
        partial = functools.reduce(operator.add, map(count, _slices(whole, width)))
        total += partial.sum(axis=-1, keepdims=True, dtype=jnp.int32)
    return total


def _max(key_RD: jax.Array) -> jax.Array:
    width = key_RD.shape[1] // _SLICES
    if width == 0:
        return key_RD.max(axis=-1, keepdims=True)
    parts = functools.reduce(jnp.maximum, _slices(key_RD[:, : width * _SLICES], width))
    return jnp.concatenate([parts, key_RD[:, width * _SLICES :]], axis=-1).max(axis=-1, keepdims=True)


def _slices(x_RD: jax.Array, width: int) -> list[jax.Array]:
    return [x_RD[:, i : i + width] for i in range(0, x_RD.shape[1], width)]


def _break_ties(key_RD: jax.Array, kth_R1: jax.Array, k: int) -> jax.Array:
    """Takes the keys above the k-th, and of those equal to it as many of the first as complete k."""
    d = key_RD.shape[1]
    above, tied = key_RD > kth_R1, key_RD == kth_R1
    places_left = k - _count_at_least(above.astype(key_RD.dtype), jnp.ones_like(kth_R1))
    dtype = key_RD.dtype if d <= jnp.iinfo(key_RD.dtype).max else jnp.int32
    # No two ranks of tied keys are equal: a search for the last of them is cheaper than a running sum.
    rank_RD = jnp.where(tied, d - jnp.arange(d, dtype=dtype), jnp.zeros((), dtype))

    def set_bit(i: jax.Array, bound: jax.Array) -> jax.Array:
        higher = bound | (1 << (d.bit_length() - 1 - i))
        return jnp.where(_count_at_least(rank_RD, higher) >= places_left, higher, bound)

    last = jax.lax.fori_loop(0, d.bit_length(), set_bit, jnp.zeros_like(places_left))
    return above | (tied & (rank_RD >= last.astype(dtype)))
