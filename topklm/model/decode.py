"""Single tokens through a block, the keys and values of the tokens before them kept.

For asking what would follow if the state at a token were another, or the next token not known yet.
Dims: B rows, T places in each, M tokens for each row, K key heads of width d, G query heads for each of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from topklm.model.attention import Attention, Rotation, rotate
from topklm.model.transformer import Block

_MASKED = -1e30  # finite, as in `attention`


class KeysAndValues(NamedTuple):
    """What the attention of a layer keeps of tokens; each [B, T, K, d]."""

    keys: jax.Array
    values: jax.Array


def keys_and_values(block: Block, h_BTD: jax.Array, rotation: Rotation) -> KeysAndValues:
    """Of residual states that enter a block.

    Args:
        block: The layer.
        h_BTD: [B, T, D].
        rotation: Of their positions.
    """
    return _keys_and_values(block.attention, block.attention_norm(h_BTD), rotation)


def step(
    block: Block, h_BMD: jax.Array, rotation: Rotation, past: KeysAndValues, seen_BMT: jax.Array
) -> tuple[jax.Array, jax.Array, KeysAndValues]:
    """Tokens through a block as `Block.__call__` does it, each with its own past and with no other.

    Args:
        block: The layer.
        h_BMD: What enters it at the tokens.
        rotation: Of the tokens' positions, [B, M, ...].
        past: Keys and values of each row's T places.
        seen_BMT: bool[B, M, T], which places of it a token sees besides itself.

    Returns:
        The two terms whose sum is u, [B, M, D] each; and the tokens' own keys and values, [B, M, K, d].
    """
    attention = block.attention
    x_BMD = block.attention_norm(h_BMD)
    own = _keys_and_values(attention, x_BMD, rotation)
    q_BMHd = rotate(_heads(attention, attention.query(x_BMD)), rotation)
    a_BMD = h_BMD + attention.out(_mix(q_BMHd, past, own, seen_BMT))
    return a_BMD, block.mlp(block.mlp_norm(a_BMD)), own


def _mix(q_BMHd: jax.Array, past: KeysAndValues, own: KeysAndValues, seen_BMT: jax.Array) -> jax.Array:
    """softmax(q k / sqrt(d)) v over a token's past and itself, [B, M, H d]; sums in float32."""
    batch, n_tokens, _, width = q_BMHd.shape
    n_key_heads = past.keys.shape[2]
    q = q_BMHd.reshape(batch, n_tokens, n_key_heads, -1, width) * width**-0.5
    scores = jnp.einsum("bmkgd,btkd->bkgmt", q, past.keys, preferred_element_type=jnp.float32)
    own_scores = jnp.einsum("bmkgd,bmkd->bkgm", q, own.keys, preferred_element_type=jnp.float32)
    scores = jnp.where(seen_BMT[:, None, None], scores, _MASKED)
    highest = jnp.maximum(scores.max(axis=-1), own_scores)
    weights, own_weights = jnp.exp(scores - highest[..., None]), jnp.exp(own_scores - highest)
    total = weights.sum(axis=-1) + own_weights
    dtype = past.values.dtype
    mixed = jnp.einsum("bkgmt,btkd->bmkgd", (weights / total[..., None]).astype(dtype), past.values)
    mixed += jnp.einsum("bkgm,bmkd->bmkgd", (own_weights / total).astype(dtype), own.values)
    return mixed.reshape(batch, n_tokens, -1)


def _keys_and_values(attention: Attention, x_BTD: jax.Array, rotation: Rotation) -> KeysAndValues:
    keys = rotate(_heads(attention, attention.key(x_BTD)), rotation)
    return KeysAndValues(keys, _heads(attention, attention.value(x_BTD)))


def _heads(attention: Attention, y: jax.Array) -> jax.Array:
    return y.reshape(*y.shape[:2], -1, attention.head_dim)
