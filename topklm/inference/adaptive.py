"""Experimental: more neurons for tokens at which the model is uncertain of the next one.

A token is run with the model's k. If the entropy of the next token's distribution is then above a threshold,
it is run once more with a higher k, and that run counts: its logits, and the keys and values that later
tokens see. The rule is ours. Everything of it is here; other generation only knows that there may be another
`TokenStep`. Dims: B rows, V vocabulary.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.errors import ArgumentError
from topklm.inference import kv_cache
from topklm.inference.sequence import check_integer
from topklm.inference.steps import CacheInputs, RequestBatch, one_pass
from topklm.model import transformer


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
        """Returns itself; raises ValueError if it does not fit the model."""
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


def with_topk_k(config: ModelConfig, topk_k: int | None, name: str = "topk_k") -> ModelConfig:
    """Returns the model with another k, itself for None; raises ValueError for one that it cannot have."""
    if topk_k is None:
        return config
    if not config.n_topk_layers:
        raise ArgumentError("the model has no layer with TopK; leave it out", field=name, value=repr(topk_k))
    if config.topk_groups:
        text = "the model's neurons compete in groups (model.topk_groups), each with its k; leave it out"
        raise ArgumentError(text, field=name, value=repr(topk_k))
    check_integer(name, topk_k, f"an integer from 1 to {config.d_model}, d_model", 1, config.d_model)
    return dataclasses.replace(config, topk_k=int(topk_k))


def entropy(logits_BV: jax.Array) -> jax.Array:
    """Returns the entropies of the distributions that logits make, in nats, float32[B]."""
    log_p = jax.nn.log_softmax(logits_BV, axis=-1)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
