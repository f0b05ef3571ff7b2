"""Losses of texts under adaptive k (`topklm.inference.adaptive`), token by token: for `loss_against_k`.

Dims: B rows, T tokens.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.errors import ArgumentError
from topklm.inference import kv_cache
from topklm.inference.adaptive import AdaptiveK, AdaptiveStep
from topklm.inference.kv_cache import STEPS
from topklm.inference.steps import CacheInputs, RequestBatch
from topklm.inference.tokens import joined, rows_of
from topklm.model import transformer
from topklm.model.block import NO_HOOKS


class TokenLosses(NamedTuple):
    """Of texts run token by token, [B, T - 1]; entry t is of token t + 1, given those before."""

    losses: Any  # float32, nats
    k: Any  # int32, entries kept at token t


def token_losses(
    config: ModelConfig, params: transformer.Parameters, tokens_BT: Any, adaptive: AdaptiveK
) -> TokenLosses:
    """Computes losses of texts, int32[B, T], where each token's k depends on the model's uncertainty there.

    Raises:
        ValueError: For a rule that does not fit the model, less than two tokens, or more than the context.
    """
    adaptive.check(config)
    rows, _ = rows_of(tokens_BT, config.vocab_size, encode=None)
    tokens_BT, lengths = joined([row.ids for row in rows], fill=0)
    if (lengths < tokens_BT.shape[1]).any() or not 2 <= tokens_BT.shape[1] <= config.context_length:
        text = f"has shape {tokens_BT.shape}: must be [B, T], T from 2 to {config.context_length}"
        raise ArgumentError(text, field="tokens")
    layers = kv_cache.by_layer(config, params)
    losses, k = _token_losses(
        config, int(adaptive.high_k), params, layers, tokens_BT, np.float32(adaptive.entropy)
    )
    n = tokens_BT.shape[1] - 1
    return TokenLosses(losses[:, :n], k[:, :n])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _token_losses(
    config: ModelConfig,
    high_k: int,
    params: transformer.Parameters,
    layers: kv_cache.Layers,
    tokens_BT: jax.Array,
    threshold: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Runs token by token; returns float32 and int32 [B, T rounded up]. Full buffers go into the cache."""
    model, rule = transformer.bind(config, params), AdaptiveStep(high_k)
    unused: Any = None
    request = RequestBatch(unused, 0, unused, unused, interventions=None, step_inputs=threshold)
    batch, length = tokens_BT.shape
    n_parts = -(-length // STEPS)
    padded_BP = jnp.pad(tokens_BT, ((0, 0), (0, n_parts * STEPS + 1 - length)))
    empty = jax.eval_shape(lambda: kv_cache.prefill(model, tokens_BT, jnp.ones(batch, int), NO_HOOKS)[1])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty)
    cache = kv_cache.with_capacity(config, zeros, n_parts * STEPS)

    def part(cache: kv_cache.Cache, begin: jax.Array) -> tuple[kv_cache.Cache, tuple[jax.Array, jax.Array]]:
        lengths_B = jnp.full((batch,), begin)

        def token(new: kv_cache.Buffer, number: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            at = begin + number
            one_B = jax.lax.dynamic_index_in_dim(padded_BP, at, axis=1, keepdims=False)
            target_B = jax.lax.dynamic_index_in_dim(padded_BP, at + 1, axis=1, keepdims=False)
            inputs = CacheInputs(layers, cache, new, one_B, lengths_B, number)
            logits_BV, new, uncertain_B = rule(config, params, request, inputs)
            log_p = jax.nn.log_softmax(logits_BV, axis=-1)
            loss_B = -jnp.take_along_axis(log_p, target_B[:, None], axis=-1)[:, 0]
            return new, (loss_B, jnp.where(uncertain_B, high_k, config.topk_k))

        new, found = jax.lax.scan(token, kv_cache.empty_buffer(cache), jnp.arange(STEPS))
        return kv_cache.append_buffer(cache, new, lengths_B), found

    _, (losses, k) = jax.lax.scan(part, cache, jnp.arange(n_parts) * STEPS)
    return losses.reshape(-1, batch).T, k.reshape(-1, batch).T
