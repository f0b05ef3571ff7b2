"""Draws the next token from logits: the most likely one, or one drawn under limits.

The limits are data of the program, one set for each row, so changing them compiles nothing, and rows with
different ones share a program. Dims: B rows, V tokens of the vocabulary.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from reprlib import repr as short
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topklm.errors import ArgumentError
from topklm.model.topk_threshold import order_key

_SEED_BITS = 64
_COLDEST = 1e-10  # temperature, other than 0
_LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The way in which tokens of one sequence are drawn.

    In this order: the repetition penalty changes logits, the temperature divides them, `top_k`, then `top_p`
    of what that leaves, then `min_p` take tokens out; one of those left is drawn. Ties at a limit stay in.

    Attributes:
        temperature: 0 takes the most likely token, the lowest of several; then only the penalty matters. So
            does less than 1e-10, by which logits cannot be divided in float32.
        top_k: Only the k most likely tokens; 0: all.
        top_p: Only the fewest most likely tokens whose probabilities sum to this or more; 1: all.
        min_p: Only tokens at least this fraction as probable as the most likely one; 0: all.
        repetition_penalty: Logits of tokens that the text holds already, the prompt's included and the
            separator excepted, are divided by this where they are positive and multiplied where not
            (Keskar et al. 2019, section 4.1); 1: nothing changes.
        seed: The same seed gives the same text, whatever other texts are made beside it.
        index: Further texts of the same prompt and seed, each with an index of its own.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    index: int = 0

    def check(self) -> "Sampling":
        """Returns itself; raises ValueError for a value that is not allowed, also once rounded to float32."""
        _check_number("temperature", self.temperature, "0 or more, and finite", lambda x: x >= 0)
        check_integer("top_k", self.top_k, "an integer, 1 or more, or 0 for all tokens")
        _check_number("top_p", self.top_p, "above 0 and at most 1", lambda x: 0 < x <= 1)
        _check_number("min_p", self.min_p, "from 0 to 1", lambda x: 0 <= x <= 1)
        _check_number("repetition_penalty", self.repetition_penalty, "above 0, and finite", lambda x: x > 0)
        limit = 2 ** (_SEED_BITS - 1)
        check_integer("seed", self.seed, "an integer of 64 bits", -limit, 2 * limit - 1)
        check_integer("index", self.index, "an integer, 0 or more")
        return self


class RowSampling(NamedTuple):
    """`Sampling` of each row as arrays [B], in float32 and int32; the seed as two words, uint32[B, 2]."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    seed: Any
    sample: Any  # `Sampling.index`

    @classmethod
    def of(cls, rows: Sequence[Sampling]) -> "RowSampling":
        """Makes one of checked ones."""

        def column(name: str, dtype: type = np.float32) -> np.ndarray:
            return np.array([getattr(row, name) for row in rows], dtype)

        temperature = column("temperature")
        temperature[temperature < _COLDEST] = 0
        words = [(row.seed & 0xFFFFFFFF, row.seed >> 32 & 0xFFFFFFFF) for row in rows]
        return cls(
            temperature,
            column("top_k", np.int32),
            column("top_p"),
            column("min_p"),
            column("repetition_penalty"),
            np.array(words, np.uint32).reshape(-1, 2),
            column("index", np.int32),
        )

    def keys(self) -> jax.Array:
        """Returns the random key of each row, [B]."""

        def key(seed: jax.Array, index: jax.Array) -> jax.Array:
            # Small seeds have no second word; folded in all the same, so that one rule holds for all.
            return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed[0]), seed[1]), index)

        return jax.vmap(key)(self.seed, self.sample)


def held(sequences: Sequence[Sequence[int]], vocab_size: int, separator: int) -> np.ndarray:
    """Returns which tokens sequences hold, bool[B, vocab_size], for the repetition penalty.

    Never the separator: it stands before every text, and to penalise it would keep sequences from ending.
    """
    present_BV = np.zeros((len(sequences), vocab_size), bool)
    for row, tokens in enumerate(sequences):
        present_BV[row, list(tokens)] = True
    if 0 <= separator < vocab_size:
        present_BV[:, separator] = False
    return present_BV


def draw(
    logits_BV: jax.Array, present_BV: jax.Array, sampling: RowSampling, keys_B: jax.Array, number_B: jax.Array
) -> jax.Array:
    """Draws the next token of each row, int32[B], from logits float32[B, V] with keys of `RowSampling.keys`.

    `present_BV` are the tokens that the row holds already, from `held`; `number_B`, int32[B], how many tokens
    were drawn in the row before: each has a random number of its own.
    """
    penalty_B1 = sampling.repetition_penalty[:, None]

    def penalised(logits: jax.Array) -> jax.Array:
        changed = jnp.where(logits > 0, logits / penalty_B1, logits * penalty_B1)
        return jnp.where(present_BV, changed, logits)

    # Computed only if a row asks for it; for rows that do not, it changes nothing.
    logits_BV = jax.lax.cond(jnp.any(penalty_B1 != 1), penalised, lambda x: x, logits_BV)
    most_likely_B = _first_highest(logits_BV)
    warm_B = sampling.temperature > 0

    def sampled() -> jax.Array:
        scaled_BV = logits_BV / jnp.where(warm_B, sampling.temperature, 1.0)[:, None]
        limited_B = (sampling.top_k > 0) | (sampling.top_p < 1)
        scaled_BV = jax.lax.cond(
            jnp.any(limited_B), functools.partial(_within, sampling=sampling), lambda x: x, scaled_BV
        )
        # Of 0, minus infinity: everything passes.
        lowest_B1 = scaled_BV.max(axis=-1, keepdims=True) + jnp.log(sampling.min_p)[:, None]
        scaled_BV = jnp.where(scaled_BV >= lowest_B1, scaled_BV, -jnp.inf)
        step_keys = jax.vmap(jax.random.fold_in)(keys_B, number_B)
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, scaled_BV.shape[-1:]))(step_keys)
        # As `jax.random.categorical` draws.
        return jnp.where(warm_B, _first_highest(scaled_BV + noise_BV), most_likely_B)

    return jax.lax.cond(jnp.any(warm_B), sampled, lambda: most_likely_B)


def _first_highest(x_BV: jax.Array) -> jax.Array:
    """Computes `jnp.argmax` of rows without NaN by two reductions, which XLA vectorizes on CPUs."""
    index = jax.lax.broadcasted_iota(jnp.int32, x_BV.shape, 1)
    highest_B1 = x_BV.max(axis=-1, keepdims=True)
    return jnp.where(x_BV == highest_B1, index, x_BV.shape[-1] - 1).min(axis=-1)


def _within(scaled_BV: jax.Array, sampling: RowSampling) -> jax.Array:
    """Replaces logits that `top_k` and `top_p` take out by minus infinity."""
    key_BV = order_key(scaled_BV)
    size = scaled_BV.shape[-1]
    kept_B = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, size), size)
    of_k_B1 = _limit(key_BV, jnp.ones_like(scaled_BV), kept_B.astype(jnp.float32))
    scaled_BV = jnp.where(key_BV >= of_k_B1, scaled_BV, -jnp.inf)
    probabilities_BV = jax.nn.softmax(scaled_BV, axis=-1)
    of_p_B1 = _limit(key_BV, probabilities_BV, sampling.top_p)
    # Rounding may bring the sum of all below 1; a row that asked for all of them gets them.
    stays_BV = (key_BV >= of_p_B1) | (sampling.top_p >= 1)[:, None]
    return jnp.where(stays_BV, scaled_BV, -jnp.inf)


def _limit(key_BV: jax.Array, weight_BV: jax.Array, wanted_B: jax.Array) -> jax.Array:
    """Finds, bit by bit, the highest key from which on weights sum to `wanted_B`, int32[B, 1]."""

    def enough(limit_B: jax.Array) -> jax.Array:
        return jnp.where(key_BV >= limit_B[:, None], weight_BV, 0.0).sum(axis=-1) >= wanted_B

    lowest_B = jnp.full(wanted_B.shape, jnp.iinfo(jnp.int32).min, jnp.int32)
    limit_B = jnp.where(enough(jnp.zeros_like(lowest_B)), 0, lowest_B)

    def one_bit(bit: jax.Array, limit_B: jax.Array) -> jax.Array:
        higher_B = limit_B + jnp.left_shift(jnp.int32(1), 30 - bit)
        return jnp.where(enough(higher_B), higher_B, limit_B)

    return jax.lax.fori_loop(0, 31, one_bit, limit_B)[:, None]


def _check_number(name: str, value: Any, allowed: str, holds: Callable[[float], bool]) -> None:
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    rounded = float(np.float32(value)) if real and abs(value) <= _LARGEST else math.inf
    if not (math.isfinite(rounded) and holds(rounded)):
        raise ArgumentError(field=name, value=short(value), allowed=allowed)


def check_integer(name: str, value: Any, allowed: str, lowest: int = 0, highest: int = 2**31 - 1) -> None:
    """Raises ValueError for an argument that is no integer in a range."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not (whole and lowest <= value <= highest):
        raise ArgumentError(field=name, value=short(value), allowed=allowed)
