"""Held-out evaluation: every text token of every held-out document, once."""

from collections.abc import Callable, Iterable
import math
from typing import Any

import jax
import numpy as np

from topklm.training import topk_health


def evaluate(
    eval_step: Callable[[Any, Any], dict[str, Any]],
    params: Any,
    batches: Iterable[Any],
    *,
    n_bytes: int,
    n_topk_layers: int,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Runs the model over the held-out batches.

    Args:
        eval_step: From `step.make_eval_step`.
        params: The parameters.
        batches: Held-out batches that together score every text token once.
        n_bytes: UTF-8 bytes of the held-out text.
        n_topk_layers: S.
        stopped: Asked after every batch whether to give up.

    Returns:
        None if it was given up, else `loss` (nats per token), `perplexity`, `bits_per_byte` (all nats over
        all bytes, in bits), `tokens`, and the three lists of `topk_health.summarize`, one figure per TopK
        layer.
    """
    nll_nats, tokens = 0.0, 0
    health: Any = None
    for batch in batches:
        sums = jax.device_get(eval_step(params, batch))
        nll_nats += float(np.sum(sums["nll_nats"], dtype=np.float64))
        tokens += int(np.sum(sums["tokens"]))
        in_float64 = jax.tree.map(lambda x: np.asarray(x, np.float64), sums["topk_health"])
        health = in_float64 if health is None else jax.tree.map(np.add, health, in_float64)
        if stopped():
            return None
    loss = nll_nats / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # exp overflows a float64 above 709
        "bits_per_byte": nll_nats / math.log(2) / n_bytes,
        "tokens": tokens,
        **topk_health.summarize(health, tokens, n_topk_layers),
    }
