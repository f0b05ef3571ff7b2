"""One sequence that is decoded beside others, and the sizes that batches of them are rounded up to.

Programs are compiled for these sizes, of batches, prompts and KV caches. `ServingBuckets` are so few that all
can be compiled before traffic comes; `BatchBuckets` are finer, for sequences that begin together.
"""

import bisect
from collections.abc import Iterable
import dataclasses
from typing import Any

import jax.numpy as jnp

from topklm.config import ModelConfig
from topklm.errors import ArgumentError
from topklm.inference.intervention_batch import InterventionBatch, on_rows
from topklm.inference.sampling import Sampling, check_integer
from topklm.inference.tokens import row_of

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
