"""Causal self-attention inside documents: rotary positions, grouped queries, and the backends of the mixing.

`causal_attention` is the backend for CPUs. It walks the queries in blocks and never touches keys to the right
of a block, so about half of the square is never computed. The kernels for accelerators, after it, never hold
the scores. Which one a program runs is decided where the program is made for its devices
(`backends.ATTENTION.choose`), not while it is lowered: cuDNN's cannot be traced without a GPU, and each keeps
other arrays for its backward pass.

Devices share a sequence along the mesh axis `context` in zigzag order (`zigzag_attention`). Device i of n has
the chunks i and 2 n - 1 - i of 2 n, as `Parallel.balanced` puts them: so all devices compute equally much,
and only within a chunk are scores masked for lying to the right.
"""

import functools
import importlib
from typing import Any, NamedTuple
import warnings

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.model import backends
from topklm.model.layers import Linear, RMSNorm, transposed
from topklm.parallel import ALONE, Parallel, all_gather

# Queries per block. Small blocks skip more of the upper triangle, large ones make better matrix products;
# 64 measured best on CPUs.
_QUERY_BLOCK = 64
_MASKED = -1e30  # finite, so that a row of masked scores gives no NaN

CHECKPOINT_NAME = "attention"  # of what `splash` keeps for its backward pass, in remat policies
_LANES = 128  # a TPU's; the kernels' blocks are multiples of it
_SPLASH_BLOCKS = (512, 256, _LANES)
_TRITON_BLOCK = 64
_CUDNN_MAX_HEAD_DIM = 128

Rotation = tuple[jax.Array, jax.Array]
Heads = tuple[jax.Array, jax.Array, jax.Array]  # queries [B, T, H, d], keys and values [B, T, K, d]

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def rotation_frequencies(config: ModelConfig) -> np.ndarray:
    """Returns the angles by which a token turns each pair of dims of a head, radians, float64[d / 2].

    `rope_scaling` as in Hugging Face's `modeling_rope_utils` ("linear", "llama3").
    """
    width = config.head_width
    frequencies = config.rope_theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    rule, numbers = config.rope_rule
    if rule == "linear":
        return frequencies / numbers[0]
    if rule == "llama3":
        factor, low, high, context = numbers
        turns = context * frequencies / (2 * np.pi)  # of each pair, in the context that was trained on
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return frequencies * (kept + (1 - kept) / factor)
    return frequencies


def rotation_angles(positions_BT: jax.Array, config: ModelConfig, dtype: Any) -> Rotation:
    """Computes rotary position embedding (Su et al. 2021, eq. 15; Llama's half layout) of int32[B, T].

    Returns cos, and sin with the sign each half needs, [B, T, 1, 2, d / 2] in `dtype`, of angles in float32.
    """
    angles = positions_BT[..., None].astype(jnp.float32) * rotation_frequencies(config).astype(np.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    both_cos = jnp.stack([cos, cos], axis=-2)[:, :, None]
    both_sin = jnp.stack([-sin, sin], axis=-2)[:, :, None]
    return both_cos.astype(dtype), both_sin.astype(dtype)


def rotate(x_BTHd: jax.Array, rotation: Rotation) -> jax.Array:
    """Applies the rotation: `[x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin]`, [B, T, H, d] -> same."""
    cos, sin = rotation
    halves = x_BTHd.reshape(*x_BTHd.shape[:-1], 2, -1)
    return (halves * cos + jnp.flip(halves, axis=-2) * sin).reshape(x_BTHd.shape)


class Attention(nnx.Module):
    """Llama-style attention: no biases, rotary positions, `n_kv_heads` shared by groups of query heads."""

    def __init__(self, config: ModelConfig, *, out_std: float, rngs: nnx.Rngs):
        d, width = config.d_model, config.head_width
        self.query = Linear(d, config.n_heads * width, std=d**-0.5, rngs=rngs)
        self.key = Linear(d, config.n_kv_heads * width, std=d**-0.5, rngs=rngs)
        self.value = Linear(d, config.n_kv_heads * width, std=d**-0.5, rngs=rngs)
        self.out = Linear(config.n_heads * width, d, std=out_std, rngs=rngs)
        self.head_dim = width
        # None, not a norm of scale 1, where there is none: checkpoints hold no array for it.
        self.query_norm = RMSNorm(width, epsilon=config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(width, epsilon=config.norm_eps) if config.qk_norm else None

    def __call__(
        self, x_BTD: jax.Array, rotation: Rotation, segment_ids_BT: jax.Array, parallel: Parallel = ALONE
    ) -> jax.Array:
        """Maps [B, T, D] -> [B, T, D]; tokens see the tokens of their own segment up to themselves.

        Across devices, T are the tokens of this device's tensor group, and the result is its heads' share
        of a sum.
        """
        batch, length, _ = x_BTD.shape
        q, k, v = self.project(x_BTD, rotation)
        if parallel.context is None:
            mixed = backends.ATTENTION[parallel.attention](q, k, v, segment_ids_BT)
        else:
            # The position of the queries among the keys is known only when the program runs, which the
            # kernels of accelerators do not take. Few tokens are on this device; keys and values of all of
            # them are narrower than the activations.
            k, v, key_segments = (all_gather(x, parallel.context, dim=1) for x in (k, v, segment_ids_BT))
            chunks = chunks_of_device(parallel.context)
            mixed = zigzag_attention(q, k, v, segment_ids_BT, key_segments, chunks)
        return self.out(mixed.reshape(batch, length, -1))

    def project(self, x_BTD: jax.Array, rotation: Rotation) -> Heads:
        """Computes queries, keys and values of normed states [B, T, D]: by head, normed if asked, rotated."""
        return self.split_heads(self.query(x_BTD), self.key(x_BTD), self.value(x_BTD), rotation)

    def split_heads(
        self, query_BTE: jax.Array, key_BTE: jax.Array, value_BTE: jax.Array, rotation: Rotation
    ) -> Heads:
        """Does the part of `project` after its matrix products, of [B, T, H d] and twice [B, T, K d]."""
        q, k, v = (y.reshape(*y.shape[:2], -1, self.head_dim) for y in (query_BTE, key_BTE, value_BTE))
        q = q if self.query_norm is None else self.query_norm(q)
        k = k if self.key_norm is None else self.key_norm(k)
        return rotate(q, rotation), rotate(k, rotation), v


@jax.custom_vjp
def causal_attention(
    q_BTHd: jax.Array, k_BTKd: jax.Array, v_BTKd: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """Computes causal attention within segments, [B, T, H, d] in the dtype of q; scores are float32.

    Queries are [B, T, H, d], keys and values [B, T, K, d]; K divides H, query head h reads key head h // (H /
    K). A token attends to equal segment ids only, int32[B, T]. The backward pass keeps the probabilities of
    the lower triangle.
    """
    return _attention_forward(q_BTHd, k_BTKd, v_BTKd, segment_ids_BT)[0]


def _attention_forward(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> tuple:
    # Scores stand with keys as rows: so every product, of the backward pass too, is one of plain row-major
    # matrices, and only arrays as narrow as a head are transposed, never those as wide as the keys.
    queries, keys, values = _columns(_scaled(q), k.shape[2]), _rows(k), _columns(v, v.shape[2])
    outputs, probabilities = [], []
    for start, stop in _query_blocks(q.shape[1], _QUERY_BLOCK):
        of_block = queries[..., start:stop], keys[:, :, :stop]
        p = _probabilities(*of_block, _allowed(segments, start, stop)).astype(q.dtype)
        mixed = _product("bkds,bksn->bkdn", values[:, :, :, 0, :stop], p).astype(q.dtype)
        outputs.append(mixed.reshape(of_block[0].shape))
        probabilities.append(p)
    out = _from_columns(jnp.concatenate(outputs, axis=-1))
    return out, (q, k, v, out, probabilities)


def attention_weights(q_BTHd: jax.Array, k_BTKd: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Computes the weights by which `causal_attention` mixes values, float32[B, H, T, T]: query, then key."""
    batch, length, n_heads, _ = q_BTHd.shape
    queries, keys = _columns(_scaled(q_BTHd), k_BTKd.shape[2]), _rows(k_BTKd)
    p_BKSN = _probabilities(queries, keys, _allowed(segment_ids_BT, 0, length))
    return p_BKSN.mT.reshape(batch, n_heads, length, length)


def _scaled(q: jax.Array) -> jax.Array:
    return q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)


def _probabilities(scaled_BKdGt: jax.Array, keys_BKSd: jax.Array, allowed: jax.Array) -> jax.Array:
    """Computes float32[B, K, S, H/K * t] of scaled queries; `allowed` is that of `_allowed`."""
    scores = _product("bksd,bkdn->bksn", keys_BKSd, _flat(scaled_BKdGt))
    of_group = scores.reshape(*scores.shape[:3], *scaled_BKdGt.shape[3:])
    scores = jnp.where(allowed, of_group, _MASKED).reshape(scores.shape)
    exponentials = jnp.exp(scores - scores.max(axis=2, keepdims=True))
    return exponentials / exponentials.sum(axis=2, keepdims=True)


def _attention_backward(saved: tuple, g_BTHd: jax.Array) -> tuple:
    q, k, v, out, probabilities = saved
    n_kv_heads = k.shape[2]
    key_columns, value_rows = _columns(k, n_kv_heads)[:, :, :, 0], _rows(v)
    query_rows, g_rows = (_rows_of_groups(x, n_kv_heads) for x in (_scaled(q), g_BTHd))
    g_columns = _columns(g_BTHd, n_kv_heads)
    # Row sums of p * dp equal g . out (Dao et al. 2022, FlashAttention, eq. 4), so dp is used once.
    row_sums_BTH = jnp.sum(g_BTHd.astype(jnp.float32) * out, axis=-1, keepdims=True)
    row_sums = _columns(row_sums_BTH, n_kv_heads)
    dq_blocks = []
    dk: jax.Array | None = None
    dv: jax.Array | None = None
    for (start, stop), p in reversed(
        list(zip(_query_blocks(q.shape[1], _QUERY_BLOCK), probabilities, strict=True))
    ):
        rows, seen = slice(start, stop), p.shape[2]
        dp = _product("bksd,bkdn->bksn", value_rows[:, :, :seen], _flat(g_columns[..., rows]))
        ds = (p * (dp - _flat(row_sums[..., rows]))).astype(p.dtype)
        dq_block = _product("bkds,bksn->bkdn", key_columns[..., :seen], ds)
        dq_blocks.append(dq_block.reshape(g_columns[..., rows].shape))
        block_rows = [x[:, :, :, rows].reshape(*x.shape[:2], -1, x.shape[-1]) for x in (query_rows, g_rows)]
        dk_block, dv_block = (
            _product("bksn,bknd->bksd", *pair) for pair in zip((ds, p), block_rows, strict=True)
        )
        # The last queries come first here, and see all keys.
        dk = dk_block if dk is None else dk.at[:, :, :seen].add(dk_block)
        dv = dv_block if dv is None else dv.at[:, :, :seen].add(dv_block)
    assert dk is not None
    assert dv is not None
    dq = _from_columns(jnp.concatenate(dq_blocks[::-1], axis=-1)) * q.shape[-1] ** -0.5
    gradients = (x.astype(g_BTHd.dtype) for x in (dq, _rows(dk), _rows(dv)))
    return *gradients, None


causal_attention.defvjp(_attention_forward, _attention_backward)


def _query_blocks(length: int, size: int) -> list[tuple[int, int]]:
    return [(s, min(s + size, length)) for s in range(0, length, size)]


def _allowed(segments_BT: jax.Array, start: int, stop: int) -> jax.Array:
    """Returns the keys that a block of queries attends to, bool[B, 1, stop, 1, stop - start]."""
    same = segments_BT[:, :stop, None] == segments_BT[:, None, start:stop]
    return (same & (np.arange(stop)[:, None] <= np.arange(start, stop)))[:, None, :, None]


def _rows(x_BTKd: jax.Array) -> jax.Array:
    """Exchanges tokens and heads: [B, T, K, d] -> [B, K, T, d], and back."""
    return jnp.swapaxes(x_BTKd, 1, 2)


def _rows_of_groups(x_BTHd: jax.Array, n_kv_heads: int) -> jax.Array:
    """Reorders [B, T, H, d] -> [B, K, H/K, T, d]."""
    batch, length, _, width = x_BTHd.shape
    return _rows(x_BTHd).reshape(batch, n_kv_heads, -1, length, width)


def _columns(x_BTHd: jax.Array, n_kv_heads: int) -> jax.Array:
    """Reorders [B, T, H, d] -> [B, K, d, H/K, T]."""
    return jnp.moveaxis(transposed(_rows_of_groups(x_BTHd, n_kv_heads)), 3, 2)


def _flat(x_BKdGt: jax.Array) -> jax.Array:
    """Merges the queries of a group: [B, K, d, G, t] -> [B, K, d, G t]."""
    return x_BKdGt.reshape(*x_BKdGt.shape[:3], -1)


def _from_columns(x_BKdGT: jax.Array) -> jax.Array:
    """Reorders [B, K, d, H/K, T] -> [B, T, H, d]."""
    batch, n_kv_heads, width, group, length = x_BKdGT.shape
    return jnp.transpose(x_BKdGT, (0, 4, 1, 3, 2)).reshape(batch, length, n_kv_heads * group, width)


def splash(
    q_BTHd: jax.Array,
    k_BTKd: jax.Array,
    v_BTKd: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Computes `causal_attention` of all tokens by the splash kernel for TPUs that JAX comes with.

    The backward pass keeps the result and the logarithm of each row's sum. With `interpret` it runs on any
    platform, slowly.
    """
    scaled = q_BTHd * q_BTHd.shape[-1] ** -0.5
    # Tokens past the end are hidden from all others by the mask, and their results are cut off.
    q, k, v = (jnp.swapaxes(_padded(x, _LANES), 1, 2) for x in (scaled, k_BTKd, v_BTKd))
    segments = _padded(segment_ids_BT, _LANES)
    kernel = _splash_kernel(q.shape[2], q.shape[1], interpret)
    ids = _jax_kernels("tpu.splash_attention.splash_attention_kernel").SegmentIds(segments, segments)
    return jnp.swapaxes(jax.vmap(kernel)(q, k, v, ids), 1, 2)[:, : q_BTHd.shape[1]]


def triton(
    q_BTHd: jax.Array,
    k_BTKd: jax.Array,
    v_BTKd: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Computes the same by the Pallas kernel for GPUs that JAX comes with."""
    kernels = _jax_kernels("gpu.attention")
    group = q_BTHd.shape[2] // k_BTKd.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k_BTKd, v_BTKd))  # it knows no grouped queries
    out = kernels.mha(
        *(_padded(x, _TRITON_BLOCK) for x in (q_BTHd, k, v, segment_ids_BT)),
        sm_scale=q_BTHd.shape[-1] ** -0.5,
        causal=True,
        block_sizes=kernels.BlockSizes(*[_TRITON_BLOCK] * 6),
        interpret=interpret,
    )
    return out[:, : q_BTHd.shape[1]]


def cudnn(
    q_BTHd: jax.Array,
    k_BTKd: jax.Array,
    v_BTKd: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    implementation: Any = "cudnn",
) -> jax.Array:
    """Computes the same by cuDNN, or without a GPU (`implementation="xla"`), with a mask bool[B, 1, T, T]."""
    same = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q_BTHd, k_BTKd, v_BTKd, mask=same, is_causal=True, implementation=implementation
    )


def cudnn_limits(config: ModelConfig) -> str:
    """Returns what a model needs for `cudnn` and does not have, or ""."""
    width = config.head_width
    fits = width % 8 == 0 and width <= _CUDNN_MAX_HEAD_DIM
    if fits and config.dtype == "bfloat16" and config.context_length % 2 == 0:
        return ""
    return (
        f"needs model.dtype bfloat16 (now {config.dtype}), a head width that 8 divides, at most "
        f"{_CUDNN_MAX_HEAD_DIM} (now {width}), and an even model.context_length (now {config.context_length})"
    )


def splash_block(length: int) -> int:
    """Returns the tokens in a block of splash attention over `length` tokens, a multiple of 128."""
    return next(size for size in _SPLASH_BLOCKS if length % size == 0)


@functools.lru_cache(maxsize=16)
def _splash_kernel(length: int, n_heads: int, interpret: bool) -> Any:
    """Makes the kernel for a causal mask; the cache shares it between layers."""
    kernels = _jax_kernels("tpu.splash_attention.splash_attention_kernel")
    masks = _jax_kernels("tpu.splash_attention.splash_attention_mask")
    block = splash_block(length)
    names = ["block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv"]
    names += ["block_kv_dkv_compute", "block_q_dq", "block_kv_dq"]
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * n_heads)
    with jax.ensure_compile_time_eval():
        kernel = kernels.make_splash_mha_single_device(
            mask,
            block_sizes=kernels.BlockSizes(**dict.fromkeys(names, block)),
            residual_checkpoint_name=CHECKPOINT_NAME,
            interpret=interpret,
        )
    # As NumPy arrays they belong to no device, and become constants of whichever program uses them.
    return jax.tree.map(np.asarray, kernel)


def _jax_kernels(module: str) -> Any:
    """Imports kernels that JAX comes with, only in programs that use them."""
    with warnings.catch_warnings():
        # JAX 0.12 says that those for GPUs will move to a package of their own.
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(f"jax.experimental.pallas.ops.{module}")


def _padded(x: jax.Array, multiple: int) -> jax.Array:
    """Pads [B, T, ...] with zeros at the end, to a multiple of T."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2))


_ZIGZAG_BLOCK = 128  # queries of a chunk that are worked on at a time


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
    scaled = _rows_of_groups(_scaled(q), k.shape[2])
    scaled = _in_chunks(scaled, 3, size)  # [B, K, G, 2, c, d]
    keys, values = (jnp.take(_in_chunks(jnp.swapaxes(x, 1, 2), 2, size), chunks.key, 2) for x in (k, v))
    of_queries = jnp.take(_in_chunks(segments, 1, size), chunks.half, 1)
    of_keys = jnp.take(_in_chunks(key_segments, 1, size), chunks.key, 1)
    outputs, probabilities = [], []
    for start, stop in _query_blocks(size, _ZIGZAG_BLOCK):
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
    g = _in_chunks(_rows_of_groups(g_BTHd, keys.shape[1]), 3, size)
    row_sums = jnp.sum(g.astype(jnp.float32) * out, axis=-1, keepdims=True)  # equal those of p * dp
    dq_blocks, dk, dv = [], jnp.zeros(keys.shape, jnp.float32), jnp.zeros(keys.shape, jnp.float32)
    for (start, stop), p in zip(_query_blocks(size, _ZIGZAG_BLOCK), probabilities, strict=True):
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


def _from_groups(x_BKGTd: jax.Array) -> jax.Array:
    batch, n_kv, group, length, width = x_BKGTd.shape
    return jnp.transpose(x_BKGTd, (0, 3, 1, 2, 4)).reshape(batch, length, n_kv * group, width)
