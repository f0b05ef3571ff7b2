"""Experimental: more neurons for tokens at which the model is uncertain of the next one.

A token is run with the model's k. If the entropy of the next token's distribution is then above a threshold,
it is run once more with a higher k, and that run counts: its logits, and the keys and values that later
tokens see. The rule is ours. Everything of it is here; other generation only knows that there may be another
`TokenStep`. Dims: B rows, T tokens, V vocabulary.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.errors import ArgumentError
from topklm.inference import kv_cache
from topklm.inference.kv_cache import STEPS
from topklm.inference.sampling import check_integer
from topklm.inference.steps import CacheInputs, RequestBatch, one_pass
from topklm.inference.tokens import joined, rows_of
from topklm.model import transformer
from topklm.model.block import NO_HOOKS


@dataclasses.dataclass(frozen=True)
class AdaptiveK:
    """When a token gets more neurons, and how many.

    Attributes:
        high_k: Entries that TopK keeps at an uncertain token.
        entropy: A token is uncertain if the next token's distribution, run with the model's k, has an entropy
            above this, in nats. 0 makes nearly every token uncertain, infinity none.
    """

    high_k: int
    entropy: float

    def check(self, config: ModelConfig) -> "AdaptiveK":
        """Returns itself.

        Raises:
            ValueError: If it does not fit the model, in one line.
        """
        with_topk_k(config, self.high_k, name="adaptive.high_k")
        if self.high_k < config.topk_k:
            allowed = f"at least {config.topk_k}, the k of other tokens"
            raise ArgumentError(field="adaptive.high_k", value=self.high_k, allowed=allowed)
        if isinstance(self.entropy, bool | str) or not self.entropy >= 0:
            allowed = "a number of nats, 0 or more"
            raise ArgumentError(field="adaptive.entropy", value=repr(self.entropy), allowed=allowed)
        return self

    def token_step(self) -> dict[str, Any]:
        """Returns the arguments of a `Scheduler` whose sequences are decoded by this rule."""
        return {"token_step": AdaptiveStep(self.high_k), "step_inputs": np.float32(self.entropy)}


@dataclasses.dataclass(frozen=True)
class AdaptiveStep:
    """Is the `TokenStep` of the rule; the threshold is data, so that another one compiles nothing."""

    high_k: int

    def __call__(
        self, config: ModelConfig, params: transformer.Parameters, batch: RequestBatch, at: CacheInputs
    ) -> tuple[jax.Array, kv_cache.Buffer, jax.Array]:
        """Returns logits of the next token, the buffer, and which rows were uncertain, bool[B]."""
        once = one_pass(config, params, batch, at)
        uncertain_B = entropy(once[0]) > batch.step_inputs

        def again() -> tuple[jax.Array, kv_cache.Buffer]:
            high = one_pass(dataclasses.replace(config, topk_k=self.high_k), params, batch, at)
            # A leaf of the buffer may have a layer axis before the rows, and always three after them.
            which_B111 = uncertain_B[:, None, None, None]
            buffer = jax.tree.map(functools.partial(jnp.where, which_B111), high[1], once[1])
            return jnp.where(uncertain_B[:, None], high[0], once[0]), buffer

        # Without an uncertain token the second run would be for nothing.
        return *jax.lax.cond(jnp.any(uncertain_B), again, lambda: once), uncertain_B


class TokenLosses(NamedTuple):
    """Of texts run token by token, [B, T - 1]; entry t is of token t + 1, given those before."""

    losses: Any  # float32, nats
    k: Any  # int32, entries kept at token t


def with_topk_k(config: ModelConfig, topk_k: int | None, name: str = "topk_k") -> ModelConfig:
    """Returns the model with another k; itself for None.

    Raises:
        ValueError: For a k that its layers do not have, or a model without TopK.
    """
    if topk_k is None:
        return config
    if not config.n_topk_layers:
        raise ArgumentError("the model has no layer with TopK; leave it out", field=name, value=repr(topk_k))
    check_integer(name, topk_k, f"an integer from 1 to {config.d_model}, d_model", 1, config.d_model)
    return dataclasses.replace(config, topk_k=int(topk_k))


def entropy(logits_BV: jax.Array) -> jax.Array:
    """Returns the entropies of the distributions that logits make, in nats, float32[B]."""
    log_p = jax.nn.log_softmax(logits_BV, axis=-1)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


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
