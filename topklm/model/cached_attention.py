"""One decode step of a block with a KV cache.

Used for the next token of a sequence, and to ask what would follow if the state at a token were another.
Dims: B rows, T positions in each, M tokens of each row, K key heads of width d, G query heads for each.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from topklm.model.attention import Rotation
from topklm.model.block import Block, TokenInput
from topklm.model.layers import product, sparse_matmul

_MASKED = -1e30  # finite, as in `attention`


class KeysAndValues(NamedTuple):
    """The KV cache of a layer, in the order in which the products read it."""

    keys: jax.Array  # [B, K, T, d]
    values: jax.Array  # [B, K, T, d]


# Attention of tokens: (scaled queries [B, K, G, M, d], their own keys and values) -> (the mixed values
# [B, K, G, M, d], anything to be handed on).
Attend = Callable[[jax.Array, KeysAndValues], tuple[jax.Array, Any]]


class FusedWeights(NamedTuple):
    """Matrices of a block side by side, for one product in place of several."""

    query_key_value: jax.Array  # [D, (H + 2 K) d]
    gate_up: jax.Array  # [D, 2 F]


def keys_and_values(
    block: Block, h_BTD: jax.Array, rotation: Rotation, token: TokenInput | None = None
) -> KeysAndValues:
    """Computes the KV cache of residual states [B, T, D] that enter a block, given their rotation."""
    _, keys, values = block.attention.project(block.normed_input(h_BTD, token), rotation)
    return _heads_first(keys, values)


def decode_step(
    block: Block,
    h_BMD: jax.Array,
    rotation: Rotation,
    attend: Attend,
    n_active: int | None = None,
    fused: FusedWeights | None = None,
    token: TokenInput | None = None,
) -> tuple[jax.Array, jax.Array, Any]:
    """Runs tokens through a block as `Block.__call__` does, with attention of their own.

    `attend` is that, `attend_to_past(...)` say; `fused` are the block's matrices, read in place of its own.
    At most `n_active` entries of a state are not zero, if known and nothing is read beside it: queries, keys
    and values are then made of those rows of the weights alone, the same to rounding, and faster for few
    tokens. Returns the two terms of u, [B, M, D] each, for `end_layer`; and what `attend` handed on.
    """
    attention = block.attention
    x_BMD = block.normed_input(h_BMD, token)
    query, key, value = _projections(block, h_BMD, x_BMD, n_active, fused)
    q_BMHd, *key_value = attention.split_heads(query, key, value, rotation)
    own = _heads_first(*key_value)
    batch, n_tokens, _ = h_BMD.shape
    q_BMKGd = q_BMHd.reshape(batch, n_tokens, own.keys.shape[1], -1, attention.head_dim)
    scaled_BKGMd = jnp.transpose(q_BMKGd, (0, 2, 3, 1, 4)) * attention.head_dim**-0.5
    mixed_BKGMd, handed_on = attend(scaled_BKGMd, own)
    mixed_BMD = jnp.transpose(mixed_BKGMd, (0, 3, 1, 2, 4)).reshape(batch, n_tokens, -1)
    gate_up = None if fused is None else fused.gate_up
    ends = block.after_attention(h_BMD, attention.out(mixed_BMD), gate_up=gate_up, token=token)
    return *ends, handed_on


def attend_to_past(past: KeysAndValues, seen_BMT: jax.Array) -> Attend:
    """Makes attention in which each token sees itself and some of its row's T positions, `seen_BMT`.

    It hands the tokens' own keys and values on.
    """

    def attend(q_BKGMd: jax.Array, own: KeysAndValues) -> tuple[jax.Array, KeysAndValues]:
        # One softmax, in float32, over the past and the token itself.
        scores = _scores(q_BKGMd, past, seen_BMT)
        own_score = jnp.einsum("bkgmd,bkmd->bkgm", q_BKGMd, own.keys, preferred_element_type=jnp.float32)
        highest = jnp.maximum(scores.max(axis=-1), own_score)
        weights, own_weight = jnp.exp(scores - highest[..., None]), jnp.exp(own_score - highest)
        total = weights.sum(axis=-1) + own_weight
        mixed = _mix(weights / total[..., None], past)
        own_weight = (own_weight / total).astype(own.values.dtype)
        return mixed + jnp.einsum("bkgm,bkmd->bkgmd", own_weight, own.values), own

    return attend


class KVBlock(NamedTuple):
    """Some of the keys and values that tokens attend to."""

    kept: KeysAndValues
    seen: jax.Array  # bool[B, M, T], which of them a token sees
    is_used: jax.Array | bool = True  # whether any token sees any; a block that none sees is not read


def attend_over(q_BKGMd: jax.Array, blocks: Sequence[KVBlock]) -> jax.Array:
    """Computes attention [B, K, G, M, d] of scaled queries over keys and values in several blocks.

    Each block has a softmax of its own, and they are joined as in online softmax (Milakov and Gimelshein,
    arXiv:1805.02867). Each token sees something in one block at least.
    """
    highest, totals, mixed = zip(*[_attend_to_block(q_BKGMd, block) for block in blocks], strict=True)
    highest_BKGM = functools.reduce(jnp.maximum, highest)
    factors = [jnp.exp(each - highest_BKGM) for each in highest]
    total_BKGM = sum(factor * total for factor, total in zip(factors, totals, strict=True))
    mixed_BKGMd = sum(factor[..., None] * part for factor, part in zip(factors, mixed, strict=True))
    return (mixed_BKGMd / jnp.expand_dims(total_BKGM, -1)).astype(q_BKGMd.dtype)


def _attend_to_block(q_BKGMd: jax.Array, block: KVBlock) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the highest score, the sum of exponentials below it, and of values times these, float32."""

    def read() -> tuple[jax.Array, jax.Array, jax.Array]:
        scores = _scores(q_BKGMd, block.kept, block.seen)
        highest = scores.max(axis=-1)
        exponentials = jnp.exp(scores - highest[..., None])
        return highest, exponentials.sum(axis=-1), _mix(exponentials, block.kept, jnp.float32)

    def leave() -> tuple[jax.Array, jax.Array, jax.Array]:
        nothing = jnp.zeros(q_BKGMd.shape, jnp.float32)
        return nothing[..., 0] + _MASKED, nothing[..., 0], nothing

    return read() if block.is_used is True else jax.lax.cond(block.is_used, read, leave)


def _projections(
    block: Block, h_BMD: jax.Array, x_BMD: jax.Array, n_active: int | None, fused: FusedWeights | None
) -> Sequence[jax.Array]:
    attention = block.attention
    if n_active is not None:
        # The norm leaves zeros zero. By magnitude, for interventions and other activations than relu.
        _, indices_BMk = jax.lax.top_k(jnp.abs(h_BMD), n_active)
        x_BMk = jnp.take_along_axis(x_BMD, indices_BMk, axis=-1)
    if fused is None:
        linears = attention.query, attention.key, attention.value
        if n_active is None:
            return [linear(x_BMD) for linear in linears]
        return [sparse_matmul(x_BMk, linear.kernel[...], indices_BMk) for linear in linears]
    if n_active is None:
        together = product(x_BMD, fused.query_key_value)
    else:
        together = sparse_matmul(x_BMk, fused.query_key_value, indices_BMk)
    # Keys and values are equally wide, and queries as wide as what `out` takes.
    n_query = attention.out.kernel.shape[0]
    n_key = (together.shape[-1] - n_query) // 2
    return jnp.split(together, [n_query, n_query + n_key], axis=-1)


def _scores(q_BKGMd: jax.Array, kept: KeysAndValues, seen_BMT: jax.Array) -> jax.Array:
    scores = jnp.einsum("bkgmd,bktd->bkgmt", q_BKGMd, kept.keys, preferred_element_type=jnp.float32)
    return jnp.where(seen_BMT[:, None, None], scores, _MASKED)


def _mix(weights_BKGMT: jax.Array, kept: KeysAndValues, dtype: Any = None) -> jax.Array:
    weights = weights_BKGMT.astype(kept.values.dtype)
    return jnp.einsum("bkgmt,bktd->bkgmd", weights, kept.values, preferred_element_type=dtype)


def _heads_first(keys_BTKd: jax.Array, values_BTKd: jax.Array) -> KeysAndValues:
    return KeysAndValues(jnp.swapaxes(keys_BTKd, 1, 2), jnp.swapaxes(values_BTKd, 1, 2))
