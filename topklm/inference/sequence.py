"""One sequence that is decoded beside others: how its tokens are drawn, and the sizes that batches have.

The limits of drawing are data of the program, one set for each row, so changing them compiles nothing, and
rows with different ones share a program.

Programs are compiled for the sizes of batches, prompts and KV caches, which are rounded up to these.
`ServingBuckets` are so few that all can be compiled before traffic comes; `BatchBuckets` are finer, for
sequences that begin together. Dims: B rows, V tokens of the vocabulary.
"""

import bisect
from collections import abc
from collections.abc import Callable, Iterable
import dataclasses
import functools
import math
from reprlib import repr as short
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.errors import ArgumentError
from topklm.inference.intervention_batch import InterventionBatch, on_rows
from topklm.inference.tokens import row_of
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
    def of(cls, rows: abc.Sequence[Sampling]) -> "RowSampling":
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


def held(sequences: abc.Sequence[abc.Sequence[int]], vocab_size: int, separator: int) -> np.ndarray:
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


# The ways to go on in a full context. "slide": each further token is predicted from the last `context_length`
# tokens, which are prefilled again for it. "halve": the last half of them is prefilled again, and the rest
# forgotten, so many tokens follow before that happens again. "stop": the sequence ends.
WHEN_FULL = ("slide", "halve", "stop")

_SMALLEST = 16  # tokens
_GROWTH = 4  # from one bucket to the next, when serving
_SHORTEST_PROMPT, _SMALLEST_CACHE = 32, 256  # tokens, when serving
_TOKENS_TOGETHER = 1024  # that are prefilled at a time while others wait for their next token
_MOST_TOGETHER = 8
_MOST_SLOTS = 64
_CACHE_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Token:
    """One new token, with log probabilities (see `steps.Scores`) if they were asked for."""

    id: int
    log_probability: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()  # (token, log probability), the likeliest first


@dataclasses.dataclass(eq=False)
class Sequence:
    """A sequence; its scheduler changes it."""

    tokens: list[int]  # ids, prompt and new ones
    n_prompt: int  # how many of them are the prompt
    limit: int  # ends at so many tokens
    sampling: Sampling
    steer: InterventionBatch | None = None  # on it alone; their rows are ignored
    when_full: str = "stop"  # one of `WHEN_FULL`
    # Likely tokens whose probabilities are reported beside the one that was drawn; None: report none at all.
    n_alternatives: int | None = None
    first: int = 0  # position of the first token that the model sees
    finished: str | None = None  # why it has ended: "stop" (the stop token), "length"

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        prompt: Any,
        sampling: Sampling,
        max_new_tokens: int,
        *,
        steer: InterventionBatch | None = None,
        when_full: str = "stop",
        n_alternatives: int | None = None,
    ) -> "Sequence":
        """Makes a sequence that has not begun; raises ValueError for a value that is not allowed.

        Of the prompt, token ids, at least one, the model sees the last `context_length`.
        """
        tokens, context = row_of(prompt, config.vocab_size, "prompt").tolist(), config.context_length
        if when_full not in WHEN_FULL:
            allowed = f"one of {', '.join(WHEN_FULL)}"
            raise ArgumentError(field="when_full", value=repr(when_full), allowed=allowed)
        check_integer("max_new_tokens", max_new_tokens, "an integer, 0 or more", highest=2**63)
        limit, first = len(tokens) + int(max_new_tokens), max(0, len(tokens) - context)
        if when_full == "stop":
            limit = min(limit, context)
            if first:
                text = f"has {len(tokens)} tokens: must be at most {context}, the model's context"
                advice = "shorten it, or choose when_full = 'slide' or 'halve'"
                raise ArgumentError(text, field="prompt", advice=advice)
        finished = "length" if limit <= len(tokens) else None
        return cls(
            tokens, len(tokens), limit, sampling.check(), steer, when_full, n_alternatives, first, finished
        )

    def visible(self, config: ModelConfig) -> list[int]:
        """Returns the tokens that the model sees."""
        return self.tokens[self.first :][: config.context_length]

    def forget(self, config: ModelConfig) -> bool:
        """Drops the beginning of a full context, as `when_full` says; returns whether it was full."""
        context = config.context_length
        if len(self.tokens) - self.first <= context:
            return False
        self.first = len(self.tokens) - (max(1, context // 2) if self.when_full == "halve" else context)
        return True

    def capacity(self, config: ModelConfig) -> int:
        """Returns how many tokens its KV cache may come to hold."""
        return min(max(self.limit, len(self.tokens)) - self.first, config.context_length)


Row = Sequence | None  # None: a row of a batch that only fills up


def bucket(length: int, context_length: int) -> int:
    """Returns the power of two from 16 up that holds a length, but never more than the context."""
    return min(max(_SMALLEST, 1 << (length - 1).bit_length()), context_length)


def cache_bucket(length: int, context_length: int) -> int:
    """Returns the power of two from 16 up, or 1.5 times one, that holds a length; at most the context.

    Finer than `bucket`, for a cache takes memory, and some of it is read though no sequence has reached it.
    """
    size = bucket(length, context_length)
    return size * 3 // 4 if size > _SMALLEST and length <= size * 3 // 4 else size


@dataclasses.dataclass(frozen=True)
class BatchBuckets:
    """For sequences that begin together: one slot for each, in their order, until the last one ends."""

    context_length: int
    steer: InterventionBatch | None = None  # on all rows or some, by their number

    def prompt(self, n: int) -> int:
        """Returns the size of prompts of n tokens."""
        return bucket(n, self.context_length)

    def cache(self, n: int) -> int:
        """Returns the size of a KV cache for n tokens of a sequence."""
        return cache_bucket(n, self.context_length)

    def groups(self, full: list[Sequence], sequences: list[Sequence]) -> Iterable[list[Sequence]]:
        """Returns the groups that are prefilled again when some sequences are full: all as one."""
        return [sequences] if full else []

    def prefill_rows(self, _sequences: list[Sequence], slots: list[Row], _length: int) -> list[Row]:
        """Returns a row for each slot, so that interventions find theirs."""
        return slots

    def interventions(self, _config: ModelConfig, _rows: list[Row]) -> InterventionBatch | None:
        """Returns the ones that were given."""
        return self.steer


@dataclasses.dataclass(frozen=True)
class ServingBuckets:
    """For sequences that come and go; sizes rise, the last of prompts and caches is the model's context."""

    slots: tuple[int, ...]  # of the batch
    prompts: tuple[int, ...]  # tokens
    caches: tuple[int, ...]  # tokens

    @classmethod
    def of(cls, config: ModelConfig, n_slots: int | None = None) -> "ServingBuckets":
        """Makes those of a model.

        By default there are 64 slots at most, or fewer (a power of two) if the KV cache of that many full
        sequences takes more than 1 GiB.
        """
        context = config.context_length
        caches = _rising(_SMALLEST_CACHE, context)
        short = [size for size in _rising(_SHORTEST_PROMPT, context) if size < caches[0]]
        return cls(_rising(1, n_slots or default_slots(config)), (*short, *caches), caches)

    @property
    def most_slots(self) -> int:
        """Sequences that are decoded together, at most."""
        return self.slots[-1]

    def batch(self, n: int) -> int:
        """Returns the slots of a batch for n sequences."""
        return _up(self.slots, n)

    def prompt(self, n: int) -> int:
        """Returns the size of prompts of n tokens."""
        return _up(self.prompts, n)

    def cache(self, n: int) -> int:
        """Returns the size of a KV cache for n tokens of a sequence."""
        return _up(self.caches, n)

    def together(self, length: int) -> int:
        """Returns how many sequences of a length are prefilled by one call, where there are several."""
        fitting = max(1, _TOKENS_TOGETHER // self.prompt(length))
        return min(_power_of_two(fitting), _MOST_TOGETHER, self.most_slots)

    def prefill_batches(self, length: int) -> tuple[int, ...]:
        """Returns the numbers of rows that sequences of a length are prefilled in."""
        return tuple(sorted({1, self.together(length)}))

    def groups(self, full: list[Sequence], _sequences: list[Sequence]) -> Iterable[list[Sequence]]:
        """Returns the groups that are prefilled again when some sequences are full: only those."""
        size = self.together(self.prompts[-1])
        return (full[begin : begin + size] for begin in range(0, len(full), size))

    def prefill_rows(self, sequences: list[Sequence], _slots: list[Row], length: int) -> list[Row]:
        """Returns the sequences, filled up to one of `prefill_batches`."""
        n = 1 if len(sequences) == 1 else self.together(length)
        return [*sequences, *[None] * (n - len(sequences))]

    def interventions(self, config: ModelConfig, rows: list[Row]) -> InterventionBatch | None:
        """Returns those of the rows' sequences as one batch."""
        steered = [(row, one.steer) for row, one in enumerate(rows) if one and one.steer is not None]
        return on_rows(config, steered, len(rows))


Buckets = BatchBuckets | ServingBuckets


def default_slots(config: ModelConfig) -> int:
    """Returns the most slots of a batch if nobody says how many."""
    numbers = 2 * config.n_layers * config.context_length * config.n_kv_heads * config.head_width
    fitting = _CACHE_BYTES // (numbers * jnp.dtype(config.dtype).itemsize)
    return min(_MOST_SLOTS, _power_of_two(max(1, fitting)))


def _power_of_two(n: int) -> int:
    """Returns the largest that is not above n."""
    return 1 << (n.bit_length() - 1)


def _rising(smallest: int, largest: int) -> tuple[int, ...]:
    sizes = []
    while smallest < largest:
        sizes.append(smallest)
        smallest *= _GROWTH
    return (*sizes, largest)


def _up(sizes: tuple[int, ...], n: int) -> int:
    return sizes[bisect.bisect_left(sizes, n)]
