"""Causal attention of a sequence that devices share along the mesh axis `context`, in zigzag order.

Device i of n has the chunks i and 2 n - 1 - i of 2 n, as `Parallel.balanced` puts them: so all devices
compute equally much, and only within a chunk are scores masked for lying to the right. A sequence on one
device goes through `topklm.model.attention`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_QUERY_BLOCK = 128  # queries of a chunk that are worked on at a time
_MASKED = -1e30  # finite, so that a row of masked scores gives no NaN

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class Chunks(NamedTuple):
    """The J = 2 n + 1 pairs of chunks of queries and keys that one of n devices computes."""

    half: jax.Array  # int32[J], 0 or 1: the queries' chunk, of the two of the device
    key: jax.Array  # int32[J]: the index of the keys' chunk in the gathered array
    is_causal: jax.Array  # bool[J]: both are the same chunk; other keys lie before all queries


def chunks_of_device(axis: str) -> Chunks:
    """Returns the pairs of this device of a mesh axis, whose tokens lie as `Parallel.balanced` puts them."""
    n, device = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    pair = jnp.arange(2 * n + 1)
    is_first = pair <= device  # chunk i of queries sees the keys 0 to i, chunk 2 n - 1 - i all others
    number = jnp.where(is_first, pair, pair - device - 1)
    key = jnp.where(number < n, 2 * number, 4 * n - 1 - 2 * number)
    return Chunks(jnp.where(is_first, 0, 1), key, (pair == device) | (pair == 2 * n))


@jax.custom_vjp
def zigzag_attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKd: jax.Array,
    segment_ids_BT: jax.Array,
    key_segment_ids_BS: jax.Array,
    chunks: Chunks,
) -> jax.Array:
    """Computes `causal_attention` of two chunks of queries, of the 2 n that a sequence of S = n T tokens has.

    Queries are [B, T, H, d], keys and values of all devices [B, S, K, d], one device after the other. The two
    chunks of device i see 2 n + 1 chunks of keys in all, whatever i is: only these are computed, in place of
    4 n. The result is [B, T, H, d] in the dtype of q, scores are float32. The backward pass keeps the
    probabilities.
    """
    return _zigzag_forward(q_BTHd, k_BSKd, v_BSKd, segment_ids_BT, key_segment_ids_BS, chunks)[0]


def _zigzag_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, key_segments: jax.Array, chunks: Chunks
) -> tuple:
    size = q.shape[1] // 2
    scaled = _to_groups(q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), k.shape[2])
    scaled = _in_chunks(scaled, 3, size)  # [B, K, G, 2, c, d]
    keys, values = (jnp.take(_in_chunks(jnp.swapaxes(x, 1, 2), 2, size), chunks.key, 2) for x in (k, v))
    of_queries = jnp.take(_in_chunks(segments, 1, size), chunks.half, 1)
    of_keys = jnp.take(_in_chunks(key_segments, 1, size), chunks.key, 1)
    outputs, probabilities = [], []
    for start, stop in _query_blocks(size):
        scores = _product("bkgjtd,bkjsd->bkgjts", jnp.take(scaled[..., start:stop, :], chunks.half, 3), keys)
        same = of_queries[:, :, start:stop, None] == of_keys[:, :, None]
        before = np.arange(start, stop)[:, None] >= np.arange(size)
        allowed = same & (before | ~chunks.is_causal[:, None, None])
        scores = jnp.where(allowed[:, None, None], scores, _MASKED)
        largest = jnp.max(scores, axis=-1)[:, :, :, None]
        largest = jnp.where(_is_of_half(chunks)[..., None], largest, _MASKED).max(axis=4)
        exponentials = jnp.exp(scores - jnp.take(largest, chunks.half, 3)[..., None])
        sums = _sum_of_halves(exponentials.sum(axis=-1, keepdims=True), chunks)
        p = (exponentials / jnp.take(sums, chunks.half, 3)).astype(q.dtype)
        outputs.append(_sum_of_halves(_product("bkgjts,bkjsd->bkgjtd", p, values), chunks).astype(q.dtype))
        probabilities.append(p)
    out = jnp.concatenate(outputs, axis=4) if len(outputs) > 1 else outputs[0]
    return _from_groups(_joined(out, 3)), (scaled, keys, values, out, probabilities, chunks)


def _zigzag_backward(saved: tuple, g_BTHd: jax.Array) -> tuple:
    scaled, keys, values, out, probabilities, chunks = saved
    size = out.shape[4]
    g = _in_chunks(_to_groups(g_BTHd, keys.shape[1]), 3, size)
    row_sums = jnp.sum(g.astype(jnp.float32) * out, axis=-1, keepdims=True)  # equal those of p * dp
    dq_blocks, dk, dv = [], jnp.zeros(keys.shape, jnp.float32), jnp.zeros(keys.shape, jnp.float32)
    for (start, stop), p in zip(_query_blocks(size), probabilities, strict=True):
        rows = (jnp.take(x[..., start:stop, :], chunks.half, 3) for x in (g, row_sums, scaled))
        g_rows, sums, queries = rows
        ds = p * (_product("bkgjtd,bkjsd->bkgjts", g_rows, values) - sums)
        ds = ds.astype(p.dtype)
        dq_blocks.append(_sum_of_halves(_product("bkgjts,bkjsd->bkgjtd", ds, keys), chunks))
        dk += _product("bkgjts,bkgjtd->bkjsd", ds, queries)
        dv += _product("bkgjts,bkgjtd->bkjsd", p, g_rows)
    dq = _from_groups(_joined(jnp.concatenate(dq_blocks, axis=4), 3)) * keys.shape[-1] ** -0.5
    n_chunks = keys.shape[2] - 1

    def of_all_keys(x: jax.Array) -> jax.Array:  # the first chunks are seen by both halves
        whole = jnp.zeros((*x.shape[:2], n_chunks, *x.shape[3:]), x.dtype).at[:, :, chunks.key].add(x)
        return _joined(whole, 2).swapaxes(1, 2)

    gradients = (x.astype(g_BTHd.dtype) for x in (dq, of_all_keys(dk), of_all_keys(dv)))
    return *gradients, None, None, None


zigzag_attention.defvjp(_zigzag_forward, _zigzag_backward)


def _in_chunks(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Splits an axis into chunks of a size, and their tokens."""
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def _joined(x: jax.Array, axis: int) -> jax.Array:
    """Undoes `_in_chunks`."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _is_of_half(chunks: Chunks) -> jax.Array:
    """Tells which pairs have queries of a half, bool[2, J]."""
    return chunks.half == jnp.arange(2)[:, None]


def _sum_of_halves(x: jax.Array, chunks: Chunks) -> jax.Array:
    """Sums [B, K, G, J, t, d] over the pairs of each half of the queries, [B, K, G, 2, t, d]."""
    return _product("hj,bkgjtd->bkghtd", _is_of_half(chunks).astype(x.dtype), x)


def _to_groups(x_BTHd: jax.Array, n_kv_heads: int) -> jax.Array:
    """Reorders [B, T, H, d] -> [B, K, H/K, T, d]."""
    batch, length, _, width = x_BTHd.shape
    return jnp.transpose(x_BTHd.reshape(batch, length, n_kv_heads, -1, width), (0, 2, 3, 1, 4))


def _from_groups(x_BKGTd: jax.Array) -> jax.Array:
    batch, n_kv, group, length, width = x_BKGTd.shape
    return jnp.transpose(x_BKGTd, (0, 3, 1, 2, 4)).reshape(batch, length, n_kv * group, width)


def _query_blocks(length: int) -> list[tuple[int, int]]:
    return [(s, min(s + _QUERY_BLOCK, length)) for s in range(0, length, _QUERY_BLOCK)]
