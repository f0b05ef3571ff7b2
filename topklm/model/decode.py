"""Single tokens through a block, the keys and values of the tokens before them kept.

For the next token of a text, and for asking what would follow if the state at a token were another.
Dims: B rows, T places in each, M tokens for each row, K key heads of width d, G query heads for each of them.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from topklm.model.attention import Rotation
from topklm.model.layers import of_entries, product
from topklm.model.transformer import Block

_MASKED = -1e30  # finite, as in `attention`


class KeysAndValues(NamedTuple):
    """What the attention of a layer keeps of tokens; each [B, K, T, d], as the products read it."""

    keys: jax.Array
    values: jax.Array


# Attention of tokens, given their queries [B, K, G, M, d], scaled, and their own keys and values: what is
# mixed, [B, K, G, M, d], and anything to be handed on.
Attend = Callable[[jax.Array, KeysAndValues], tuple[jax.Array, Any]]


class Joined(NamedTuple):
    """Matrices of a block side by side, for one product in the place of several."""

    query_key_value: jax.Array  # [D, (H + 2 K) d]
    gate_up: jax.Array  # [D, 2 F]


def keys_and_values(block: Block, h_BTD: jax.Array, rotation: Rotation) -> KeysAndValues:
    """Of residual states that enter a block.

    Args:
        block: The layer.
        h_BTD: [B, T, D].
        rotation: Of their positions.
    """
    _, keys, values = block.attention.project(block.attention_norm(h_BTD), rotation)
    return _heads_first(keys, values)


def step(
    block: Block,
    h_BMD: jax.Array,
    rotation: Rotation,
    attend: Attend,
    n_active: int | None = None,
    joined: Joined | None = None,
) -> tuple[jax.Array, jax.Array, Any]:
    """Tokens through a block as `Block.__call__` does it, but for what they attend to.

    Args:
        block: The layer.
        h_BMD: What enters it at the tokens.
        rotation: Of the tokens' positions, [B, M, ...].
        attend: Their attention, e.g. `own_behind` of a past.
        n_active: If at most so many entries of each h are not zero, and queries, keys and values are to be
            made of those rows of the weights alone; the same to rounding, and faster for few tokens.
        joined: The block's own matrices, which are then not looked at in the block.

    Returns:
        The two terms whose sum is u, [B, M, D] each; and what `attend` handed on.
    """
    attention = block.attention
    query, key, value = _projections(block, h_BMD, n_active, joined)
    q_BMHd, *key_value = attention.split_heads(query, key, value, rotation)
    own = _heads_first(*key_value)
    batch, n_tokens, _ = h_BMD.shape
    q_BMKGd = q_BMHd.reshape(batch, n_tokens, own.keys.shape[1], -1, attention.head_dim)
    scaled_BKGMd = jnp.transpose(q_BMKGd, (0, 2, 3, 1, 4)) * attention.head_dim**-0.5
    mixed_BKGMd, handed_on = attend(scaled_BKGMd, own)
    mixed_BMD = jnp.transpose(mixed_BKGMd, (0, 3, 1, 2, 4)).reshape(batch, n_tokens, -1)
    gate_up = None if joined is None else joined.gate_up
    return *block.after_attention(h_BMD, attention.out(mixed_BMD), gate_up=gate_up), handed_on


def own_behind(past: KeysAndValues, seen_BMT: jax.Array) -> Attend:
    """Each token attends to its own past and itself, and to no other token of the step.

    Args:
        past: Of each row's T places.
        seen_BMT: bool[B, M, T], which places of it a token sees besides itself.

    Returns:
        What hands the tokens' own keys and values on.
    """

    def attend(q_BKGMd: jax.Array, own: KeysAndValues) -> tuple[jax.Array, KeysAndValues]:
        scores = _scores(q_BKGMd, past, seen_BMT)
        own_scores = jnp.einsum("bkgmd,bkmd->bkgm", q_BKGMd, own.keys, preferred_element_type=jnp.float32)
        weights, own_weights = _joint_softmax([scores, own_scores[..., None]])
        dtype = own.values.dtype
        mixed = _mix(weights, past)
        mixed += jnp.einsum("bkgm,bkmd->bkgmd", own_weights[..., 0].astype(dtype), own.values)
        return mixed, own

    return attend


class Part(NamedTuple):
    """Some of the keys and values that a token attends to."""

    kept: KeysAndValues
    seen: jax.Array  # bool[B, M, T], which of them a token sees
    is_used: jax.Array | bool = True  # whether any token sees any; one that none sees is not read


def over(q_BKGMd: jax.Array, parts: Sequence[Part]) -> jax.Array:
    """Attention over keys and values that lie in several places.

    Each part has a softmax of its own, and they are put together as in online softmax (Milakov and
    Gimelshein, arXiv:1805.02867).

    Args:
        q_BKGMd: Queries, scaled.
        parts: Of which each token sees something in one at least.

    Returns:
        What is mixed, [B, K, G, M, d].
    """
    of_parts = [_over_part(q_BKGMd, part) for part in parts]
    highest_BKGM = functools.reduce(jnp.maximum, [of_part.highest for of_part in of_parts])
    factors = [jnp.exp(of_part.highest - highest_BKGM) for of_part in of_parts]
    total_BKGM = sum(f * of_part.total for f, of_part in zip(factors, of_parts, strict=True))
    mixed_BKGMd = sum(f[..., None] * of_part.mixed for f, of_part in zip(factors, of_parts, strict=True))
    return (mixed_BKGMd / jnp.expand_dims(total_BKGM, -1)).astype(q_BKGMd.dtype)


class _OfPart(NamedTuple):
    """Attention over a part alone, float32: the highest score, and sums of exponentials below it."""

    highest: jax.Array  # [B, K, G, M]
    total: jax.Array  # [B, K, G, M]
    mixed: jax.Array  # [B, K, G, M, d], of the values, each times its exponential


def _over_part(q_BKGMd: jax.Array, part: Part) -> _OfPart:
    def read() -> _OfPart:
        scores = _scores(q_BKGMd, part.kept, part.seen)
        highest = scores.max(axis=-1)
        exponentials = jnp.exp(scores - highest[..., None])
        mixed = _mix(exponentials, part.kept, jnp.float32)
        return _OfPart(highest, exponentials.sum(axis=-1), mixed)

    def leave() -> _OfPart:
        nothing = jnp.zeros(q_BKGMd.shape, jnp.float32)
        return _OfPart(nothing[..., 0] + _MASKED, nothing[..., 0], nothing)

    return read() if part.is_used is True else jax.lax.cond(part.is_used, read, leave)


def _projections(
    block: Block, h_BMD: jax.Array, n_active: int | None, joined: Joined | None
) -> Sequence[jax.Array]:
    x_BMD, attention = block.attention_norm(h_BMD), block.attention
    if n_active is not None:
        # The norm leaves zeros zero. By magnitude, for interventions and other activations than relu.
        _, indices_BMk = jax.lax.top_k(jnp.abs(h_BMD), n_active)
        x_BMk = jnp.take_along_axis(x_BMD, indices_BMk, axis=-1)
    if joined is None:
        linears = attention.query, attention.key, attention.value
        if n_active is None:
            return [linear(x_BMD) for linear in linears]
        return [of_entries(x_BMk, linear.kernel[...], indices_BMk) for linear in linears]
    if n_active is None:
        together = product(x_BMD, joined.query_key_value)
    else:
        together = of_entries(x_BMk, joined.query_key_value, indices_BMk)
    # Keys and values are equally wide, and queries as wide as what `out` takes.
    n_query = attention.out.kernel.shape[0]
    n_key = (together.shape[-1] - n_query) // 2
    return jnp.split(together, [n_query, n_query + n_key], axis=-1)


def _scores(q_BKGMd: jax.Array, kept: KeysAndValues, seen_BMT: jax.Array) -> jax.Array:
    scores = jnp.einsum("bkgmd,bktd->bkgmt", q_BKGMd, kept.keys, preferred_element_type=jnp.float32)
    return jnp.where(seen_BMT[:, None, None], scores, _MASKED)


def _joint_softmax(scores: Sequence[jax.Array]) -> list[jax.Array]:
    """Of scores in several arrays that differ in their last axis only; in float32."""
    highest = scores[0].max(axis=-1, keepdims=True)
    for more in scores[1:]:
        highest = jnp.maximum(highest, more.max(axis=-1, keepdims=True))
    exponentials = [jnp.exp(one - highest) for one in scores]
    total = sum(one.sum(axis=-1, keepdims=True) for one in exponentials)
    return [one / total for one in exponentials]


def _mix(weights_BKGMT: jax.Array, kept: KeysAndValues, dtype: Any = None) -> jax.Array:
    weights = weights_BKGMT.astype(kept.values.dtype)
    return jnp.einsum("bkgmt,bktd->bkgmd", weights, kept.values, preferred_element_type=dtype)


def _heads_first(keys_BTKd: jax.Array, values_BTKd: jax.Array) -> KeysAndValues:
    return KeysAndValues(jnp.swapaxes(keys_BTKd, 1, 2), jnp.swapaxes(values_BTKd, 1, 2))
