"""How the devices of a step select codes: each those of its own tokens, without moving pre-activations.

Left to itself XLA would send parts of a batch's search from device to device, some hundred times a step.
Dims: N tokens of a step, of one device in the programs of `_apart`; M codes.
"""

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from topklm.layout import BATCH_AXES, ROWS
from topklm.model.topk import topk
from topklm.model.topk_threshold import order_key

_BITS = 31  # of a key above 0


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a step."""

    is_sparse: bool = False  # with products of kept codes alone
    mesh: Mesh | None = None  # tokens are split over its batch axes; None: they are on one device

    def topk(self, pre_NM: jax.Array, k: int, activation: str = "relu") -> jax.Array:
        """Keeps the k largest entries of each row, as `topklm.model.topk`."""
        return self._apart(functools.partial(topk, k=k, activation=activation))(pre_NM)

    def batch_topk(self, pre_NM: jax.Array, k: int) -> jax.Array:
        """Keeps the N k largest of all entries, clipped at 0; on a tie the lowest index wins."""
        n = len(pre_NM) * k
        if self.mesh is None:
            return topk(pre_NM.reshape(-1), n).reshape(pre_NM.shape)
        is_kept = self._apart(functools.partial(_are_largest, n))
        return jnp.where(is_kept(jax.lax.stop_gradient(pre_NM)), pre_NM, 0)

    def _apart(self, of_device: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
        """Makes a function of a device's rows one of all rows."""
        if self.mesh is None:
            return of_device
        return jax.shard_map(of_device, mesh=self.mesh, in_specs=ROWS, out_specs=ROWS, check_vma=False)


def _are_largest(n: int, pre_NM: jax.Array) -> jax.Array:
    """Returns bool[N, M], which entries are above 0 and among the n largest on all devices."""
    key_NM = jnp.maximum(order_key(pre_NM), 0)

    def count(is_one: jax.Array) -> jax.Array:
        return jax.lax.psum(jnp.sum(is_one, dtype=jnp.int32), BATCH_AXES)

    def with_bit(i: jax.Array, kth: jax.Array) -> jax.Array:
        higher = kth | jnp.left_shift(1, _BITS - 1 - i)
        return jnp.where(count(key_NM >= higher) >= n, higher, kth)

    kth = jax.lax.fori_loop(0, _BITS, with_bit, jnp.int32(0))  # the n-th largest key, or 0
    is_equal = key_NM == kth
    spare = n - count(key_NM > kth)
    n_equal = jax.lax.all_gather(jnp.sum(is_equal, dtype=jnp.int32), BATCH_AXES)
    before = jnp.sum(jnp.where(jnp.arange(n_equal.size) < jax.lax.axis_index(BATCH_AXES), n_equal, 0))

    def first() -> jax.Array:
        rank_NM = before + jnp.cumsum(is_equal.reshape(-1), dtype=jnp.int32).reshape(is_equal.shape)
        return is_equal & (rank_NM <= spare)

    is_tied = (kth > 0) & (jnp.sum(n_equal) > spare)
    return ((key_NM > kth) | jax.lax.cond(is_tied, first, lambda: is_equal)) & (key_NM > 0)
