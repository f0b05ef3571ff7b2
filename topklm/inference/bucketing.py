"""Sizes that batches, prompts and KV caches are rounded up to, so that few programs are compiled.

`ServingBuckets` are so few that all can be compiled before traffic comes; `BatchBuckets` are finer, for a
batch of sequences that begin together.
"""

import bisect
from collections.abc import Iterable
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.inference.intervention_batch import InterventionBatch
from topklm.inference.sequence import Sequence

_SMALLEST = 16  # tokens
_GROWTH = 4  # from one bucket to the next, when serving
_SHORTEST_PROMPT, _SMALLEST_CACHE = 32, 256  # tokens, when serving
_TOKENS_TOGETHER = 1024  # that are prefilled at a time while others wait for their next token
_MOST_TOGETHER = 8
_ENTRIES = (8, 64)  # the fewest of interventions, on one slot and on several together
_MORE_ENTRIES = 8  # times as many, where those are too few

MOST_SLOTS = 64
_CACHE_BYTES = 2**30

Row = Sequence | None  # None: a row of a batch that only fills up


def bucket(length: int, context_length: int) -> int:
    """Returns the power of two from 16 up that holds a length, but never more than the context."""
    size = _SMALLEST
    while size < length:
        size *= 2
    return min(size, context_length)


def cache_bucket(length: int, context_length: int) -> int:
    """Returns the power of two from 16 up, or 1.5 times one, that holds a length; at most the context.

    Finer than `bucket`, for a cache takes memory, and some of it is read though no sequence has reached it.
    """
    size = bucket(length, context_length)
    return size * 3 // 4 if size > _SMALLEST and length <= size * 3 // 4 else size


@dataclasses.dataclass(frozen=True)
class BatchBuckets:
    """For sequences that begin together: one slot for each, in their order, until the last one ends.

    Attributes:
        context_length: Of the model.
        steer: On all rows or some, by their number.
    """

    context_length: int
    steer: InterventionBatch | None = None

    def prompt(self, n: int) -> int:
        """Returns the size of prompts of n tokens."""
        return bucket(n, self.context_length)

    def cache(self, n: int) -> int:
        """Returns the size of a KV cache for n tokens of a sequence."""
        return cache_bucket(n, self.context_length)

    def groups(self, full: list[Sequence], sequences: list[Sequence]) -> Iterable[list[Sequence]]:
        """Returns the groups that are prefilled again when some sequences are full: all as one."""
        return [sequences] if full else []

    def prefill_rows(self, sequences: list[Sequence], slots: list[Row], length: int) -> list[Row]:
        """Returns a row for each slot, so that interventions find theirs."""
        del sequences, length
        return slots

    def interventions(self, config: ModelConfig, rows: list[Row]) -> InterventionBatch | None:
        """Returns the ones that were given."""
        del config, rows
        return self.steer


@dataclasses.dataclass(frozen=True)
class ServingBuckets:
    """For sequences that come and go.

    Attributes:
        slots: Slots of the batch, rising.
        prompts: Tokens of prompts, rising; the last is the model's context.
        caches: Tokens of a KV cache, rising; the last is the model's context.
    """

    slots: tuple[int, ...]
    prompts: tuple[int, ...]
    caches: tuple[int, ...]

    @classmethod
    def of(cls, config: ModelConfig, n_slots: int | None = None) -> "ServingBuckets":
        """Makes those of a model.

        Args:
            config: Its shape.
            n_slots: Most slots of the batch; default 64, or fewer (a power of two) if the KV cache of that
                many full sequences takes more than 1 GiB.
        """
        n_slots = n_slots or default_slots(config)
        context = config.context_length
        caches = _rising(_SMALLEST_CACHE, context)
        short = [size for size in _rising(_SHORTEST_PROMPT, context) if size < caches[0]]
        return cls(_rising(1, n_slots), (*short, *caches), caches)

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
        return min(2 ** int(math.log2(fitting)), _MOST_TOGETHER, self.most_slots)

    def prefill_batches(self, length: int) -> tuple[int, ...]:
        """Returns the numbers of rows that sequences of a length are prefilled in."""
        return tuple(sorted({1, self.together(length)}))

    def groups(self, full: list[Sequence], sequences: list[Sequence]) -> Iterable[list[Sequence]]:
        """Returns the groups that are prefilled again when some sequences are full: only those."""
        del sequences
        size = self.together(self.prompts[-1])
        return (full[begin : begin + size] for begin in range(0, len(full), size))

    def prefill_rows(self, sequences: list[Sequence], slots: list[Row], length: int) -> list[Row]:
        """Returns the sequences, filled up to one of `prefill_batches`."""
        del slots
        n = 1 if len(sequences) == 1 else self.together(length)
        return [*sequences, *[None] * (n - len(sequences))]

    def interventions(self, config: ModelConfig, rows: list[Row]) -> InterventionBatch | None:
        """Returns those of the rows' sequences as one batch."""
        steered = [(row, one.steer) for row, one in enumerate(rows) if one and one.steer is not None]
        return on_rows(config, steered, len(rows))


Buckets = BatchBuckets | ServingBuckets


def default_slots(config: ModelConfig) -> int:
    """Returns the most slots of a batch if nobody says how many."""
    numbers = 2 * config.n_layers * config.context_length * config.n_kv_heads * config.head_dim
    fitting = max(1, _CACHE_BYTES // (numbers * jnp.dtype(config.dtype).itemsize))
    return min(MOST_SLOTS, 2 ** int(math.log2(fitting)))


def on_rows(
    config: ModelConfig, each: list[tuple[int, InterventionBatch]], n_rows: int
) -> InterventionBatch | None:
    """Joins interventions on rows of a batch, filled up to a few sizes; returns None without any.

    A single row has a smaller size, for there decoding is faster the fewer neurons may be active.

    Args:
        config: Of the model.
        each: (row, interventions on its sequence).
        n_rows: Of the batch.
    """
    if not each:
        return None
    parts = [_on_row(interventions, row) for row, interventions in each]
    size, n = _ENTRIES[n_rows > 1], sum(len(part.layer) for part in parts)
    while size < n:
        size *= _MORE_ENTRIES
    empty = InterventionBatch.of(config, {})  # whose entries only fill up
    filling = jax.tree.map(lambda x: np.resize(x, (size - n, *x.shape[1:])), empty)
    return jax.tree.map(lambda *columns: np.concatenate(columns), *parts, filling)


def _on_row(interventions: InterventionBatch, row: int) -> InterventionBatch:
    used = np.asarray(interventions.layer) >= 0
    kept = jax.tree.map(lambda x: np.asarray(x)[used], interventions)
    return dataclasses.replace(kept, row=np.full_like(kept.row, row))


def _rising(smallest: int, largest: int) -> tuple[int, ...]:
    sizes = []
    while smallest < largest:
        sizes.append(smallest)
        smallest *= _GROWTH
    return (*sizes, largest)


def _up(sizes: tuple[int, ...], n: int) -> int:
    return sizes[bisect.bisect_left(sizes, n)]
