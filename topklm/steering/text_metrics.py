"""Figures of generated texts: how often a concept comes, how fluent and how varied they are.

    rate           hits of a concept (`concepts.Concept`) for each generated token
    perplexity     exp of the unsteered model's mean loss, nats, of the generated tokens, each given the
                   prompt and those before; low is not always good: a text that repeats itself has little
    distinct-n     distinct n-grams of a text's tokens for each of its tokens (Li et al. 2016,
                   arXiv:1510.03055), of each text by itself, since steering may make one repeat itself;
                   n-grams do not reach into the prompt

Each figure of many texts is a ratio of sums over texts (for distinct-n, the mean over texts). Intervals are
the middle 95 % of `RESAMPLES` ratios of texts drawn with replacement (percentile bootstrap), in whole
groups: all texts of a prompt are drawn together, for they have much in common.
"""

from collections.abc import Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.inference.sequence import bucket
from topklm.model import transformer

RESAMPLES = 2000
_MAX_LOGITS = 1 << 25


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval.

    Attributes:
        value: NaN where there is nothing to take it of.
        low: NaN, as `high`, where there are fewer than two groups to draw from.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def distinct(tokens: Sequence[int], n: int) -> float:
    """Returns distinct-n of one text; NaN without tokens."""
    if not len(tokens):
        return float("nan")
    grams = {tuple(tokens[first : first + n]) for first in range(len(tokens) - n + 1)}
    return len(grams) / len(tokens)


def ratio(numerators: np.ndarray, denominators: np.ndarray, groups: np.ndarray, seed: int = 0) -> Estimate:
    """Returns the sum of numerators over that of denominators, with its interval.

    Args:
        numerators: float64[n], one for each text.
        denominators: float64[n].
        groups: int[n], from 0: texts that are drawn together.
        seed: Of the draws.
    """
    total = denominators.sum()
    value = float(numerators.sum() / total) if total else float("nan")
    count = int(groups.max()) + 1 if len(groups) else 0
    if count < 2 or not total:
        return Estimate(value, float("nan"), float("nan"))
    above = np.bincount(groups, numerators, count)
    below = np.bincount(groups, denominators, count)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = (drawn @ above) / (drawn @ below)
    low, high = np.nanquantile(ratios, (0.025, 0.975))
    return Estimate(value, float(low), float(high))


def exp(estimate: Estimate) -> Estimate:
    """Turns a mean loss into the perplexity."""
    return Estimate(*(float(np.exp(figure)) for figure in dataclasses.astuple(estimate)))


def losses(
    config: ModelConfig,
    params: transformer.Parameters,
    texts: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
) -> list[np.ndarray]:
    """Returns the unsteered model's loss of each token after the prompt, float64[n_i], nats.

    Args:
        config: The model's shape.
        params: Its parameters.
        texts: Token ids, prompt first; none longer than the model's context.
        prompt_lengths: Tokens of each prompt, at least 1.
    """
    longest = max(len(text) for text in texts)
    length = bucket(longest, config.context_length)
    at_once = min(len(texts), max(1, _MAX_LOGITS // (length * config.vocab_size)))
    found: list[np.ndarray] = []
    for first in range(0, len(texts), at_once):
        rows = np.zeros((at_once, length), np.int32)
        part = texts[first : first + at_once]
        for row, text in enumerate(part):
            rows[row, : len(text)] = text
        of_next = np.asarray(_losses(config, params, rows), np.float64)
        found += [
            of_next[row, prompt_lengths[first + row] - 1 : len(text) - 1] for row, text in enumerate(part)
        ]
    return found


@functools.partial(jax.jit, static_argnums=0)
def _losses(config: ModelConfig, params: transformer.Parameters, tokens_BT: jax.Array) -> jax.Array:
    """Returns the loss of each token but the first, given those before, float32[B, T - 1]."""
    log_p = jax.nn.log_softmax(transformer.bind(config, params)(tokens_BT[:, :-1]))
    return -jnp.take_along_axis(log_p, tokens_BT[:, 1:, None], axis=-1)[..., 0]
