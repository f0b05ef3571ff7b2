"""The TopK activation: each row keeps its k largest entries, the rest become zero.

A backend finds the winners of every row as a mask of exactly k; activation, NaN and gradient are the same
for all of them. What wins is decided on the row's IEEE total order (-0.0 < +0.0), as `jax.lax.top_k` has
it; on a tie the lowest index wins, in every backend, bit for bit.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from topklm.config import TOPK_ACTIVATIONS, TOPK_BACKENDS

# Rows searched together. The block stays in a core's cache through all passes of the search, and the search
# stops as soon as these rows are settled.
_ROWS_PER_BLOCK = 128


def topk(x: jax.Array, k: int, activation: str = "relu", backend: str = "auto") -> jax.Array:
    """Keeps the k largest entries of every row.

    Args:
        x: [..., D], float32, bfloat16 or float16.
        k: Entries kept per row, 1 or more; k >= D drops none.
        activation: What is kept. "relu": the largest by signed value, clipped at 0. "identity": the same,
            not clipped. "abs": the largest by magnitude, with their sign.
        backend: How the winners are found: "lax" (`jax.lax.top_k`), "threshold" (bisection for the k-th
            value), or "auto". All give the same bits.

    Returns:
        [..., D] in the dtype of x. A row that holds a NaN is NaN throughout, so that a diverged run is seen.
        The gradient, forward and reverse, passes through the active entries and is zero elsewhere; the
        reverse pass keeps one bool per entry and no floats. A row with a NaN has active entries too, see
        `active_mask`: its gradient is theirs, neither NaN nor zero throughout.

    Raises:
        ValueError: If k is below 1, or the activation or backend is unknown.
        TypeError: If x is not of a floating dtype.
    """
    _check(x, k, activation, backend)
    return _topk(x, k, activation, backend)


def active_mask(x: jax.Array, k: int, activation: str = "relu", backend: str = "auto") -> jax.Array:
    """Which entries pass through `topk`; with "relu" only those above 0.

    A NaN competes by its bits, as in IEEE total order: above infinity, or below minus infinity if its sign
    bit is set; with "abs" above infinity either way. So its row still has winners, the same in every backend,
    and they are where the gradient of `topk` passes.

    Args:
        x: As in `topk`.
        k: As in `topk`.
        activation: As in `topk`.
        backend: As in `topk`.

    Returns:
        bool[..., D].

    Raises:
        ValueError: As `topk`.
        TypeError: As `topk`.
    """
    _check(x, k, activation, backend)
    return _active(x, k, activation, backend)


def _check(x: jax.Array, k: int, activation: str, backend: str) -> None:
    if k < 1:
        raise ValueError(f"k = {k}: must be 1 or more")
    if activation not in TOPK_ACTIVATIONS:
        raise ValueError(f"activation = {activation!r}: must be one of {', '.join(TOPK_ACTIVATIONS)}")
    if backend not in TOPK_BACKENDS:
        raise ValueError(f"backend = {backend!r}: must be one of {', '.join(TOPK_BACKENDS)}")
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise TypeError(f"x is {x.dtype}: must be float32, bfloat16 or float16")


# A custom JVP, not VJP: forward mode works too (Jacobian lenses need it), and its transpose is the VJP.
@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _topk(x: jax.Array, k: int, activation: str, backend: str) -> jax.Array:
    return _keep(x, _active(x, k, activation, backend))


@_topk.defjvp
def _topk_jvp(
    k: int, activation: str, backend: str, primals: tuple, tangents: tuple
) -> tuple[jax.Array, jax.Array]:
    (x,), (x_dot,) = primals, tangents
    active = _active(x, k, activation, backend)
    # The zeros are made from an empty slice of the tangent: an ordinary array of zeros would be one more
    # thing that the reverse pass keeps. XLA folds both to a constant.
    padding = [(0, 0)] * (x_dot.ndim - 1) + [(0, x_dot.shape[-1])]
    zeros = jnp.pad(x_dot[..., :0], padding)
    return _keep(x, active), jnp.where(active, x_dot, zeros)


def _keep(x: jax.Array, active: jax.Array) -> jax.Array:
    kept = jnp.where(active, x, jnp.zeros_like(x))
    has_nan = jnp.any(jnp.isnan(x), axis=-1, keepdims=True)
    return jnp.where(has_nan, jnp.full_like(x, jnp.nan), kept)


def _active(x: jax.Array, k: int, activation: str, backend: str) -> jax.Array:
    # The order of a row is decided on integers: exact, the same on every platform, denormals included.
    key = _order_key(x)
    positive = key > 0
    if activation == "abs":
        key = _order_key(jnp.abs(x))
    winners = jnp.ones(x.shape, bool) if k >= x.shape[-1] else _BACKENDS[backend](key, k)
    return winners & positive if activation == "relu" else winners


def _order_key(x: jax.Array) -> jax.Array:
    """int32 that sorts as the IEEE total order of x; 0 for +0.0, above 0 exactly where x is."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32 if x.dtype == jnp.float32 else jnp.int16)
    magnitude = jnp.array(jnp.iinfo(bits.dtype).max, bits.dtype)
    return jnp.where(bits < 0, bits ^ magnitude, bits).astype(jnp.int32)


def _winners_lax(key: jax.Array, k: int) -> jax.Array:
    _, index = jax.lax.top_k(key, k)
    return jnp.put_along_axis(jnp.zeros(key.shape, bool), index, True, axis=-1, inplace=False)


def _winners_threshold(key: jax.Array, k: int) -> jax.Array:
    """Walks the rows in blocks; a last block that is not full repeats its first row."""
    rows = key.reshape(-1, key.shape[-1])
    n_rows = rows.shape[0]
    if n_rows <= _ROWS_PER_BLOCK:
        return _search(rows, k).reshape(key.shape)
    n_blocks = -(-n_rows // _ROWS_PER_BLOCK)
    missing = n_blocks * _ROWS_PER_BLOCK - n_rows
    padded = jnp.concatenate([rows, rows[:missing]]) if missing else rows
    blocks = padded.reshape(n_blocks, _ROWS_PER_BLOCK, -1)
    winners = jax.lax.map(functools.partial(_search, k=k), blocks)
    return winners.reshape(-1, key.shape[-1])[:n_rows].reshape(key.shape)


def _search(key_RD: jax.Array, k: int) -> jax.Array:
    """bool[R, D] with exactly k True a row, by bisection for each row's k-th largest key.

    Invariant: count(key >= low) >= k and count(key > high) < k. A row is settled when exactly k keys reach
    `low`, or when low = high, which is a tie at the k-th place.
    """
    low, high = _lower_bound(key_RD, k), key_RD.max(axis=-1, keepdims=True)
    count = _count_at_least(key_RD, low)

    def unsettled(state: tuple) -> jax.Array:
        low, high, count = state
        return jnp.any((low < high) & (count != k))

    def halve(state: tuple) -> tuple:
        low, high, count = state
        middle = (low | high) - ((low ^ high) >> 1)  # mean rounded up, without overflow
        reached = _count_at_least(key_RD, middle)
        enough = reached >= k
        settled = count == k
        return (
            jnp.where(enough & ~settled, middle, low),
            jnp.where(enough | settled, high, middle - 1),
            jnp.where(enough & ~settled, reached, count),
        )

    low, _, count = jax.lax.while_loop(unsettled, halve, (low, high, count))
    return jax.lax.cond(jnp.any(count > k), lambda: _break_ties(key_RD, low, k), lambda: key_RD >= low)


def _lower_bound(key_RD: jax.Array, k: int) -> jax.Array:
    """A key that at least k entries reach: with k groups, each one's largest reaches the least of them."""
    rows, d = key_RD.shape
    if d % k:
        return key_RD.min(axis=-1, keepdims=True)
    return key_RD.reshape(rows, d // k, k).max(axis=1).min(axis=-1, keepdims=True)


def _count_at_least(key_RD: jax.Array, bound_R1: jax.Array) -> jax.Array:
    # In float32, exact below 2^24 and faster to reduce on CPUs than int32.
    return jnp.sum((key_RD >= bound_R1).astype(jnp.float32), axis=-1, keepdims=True)


def _break_ties(key_RD: jax.Array, kth_R1: jax.Array, k: int) -> jax.Array:
    above, tied = key_RD > kth_R1, key_RD == kth_R1
    places_left = k - above.sum(axis=-1, keepdims=True)
    return above | (tied & (jnp.cumsum(tied, axis=-1) <= places_left))


_BACKENDS: dict[str, Callable[[jax.Array, int], jax.Array]] = {
    "lax": _winners_lax,
    "threshold": _winners_threshold,
    "auto": _winners_threshold,
}
