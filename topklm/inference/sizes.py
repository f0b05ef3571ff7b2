"""The sizes that programs are compiled for when texts come and go: few, so that all can be compiled early."""

import bisect
from collections.abc import Sequence
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.inference.intervention_batch import InterventionBatch

_GROWTH = 4  # from one size to the next
_SHORTEST, _SMALLEST_ROOM = 32, 256  # tokens
_TOKENS_TOGETHER = 1024  # that are run at a time while others wait for their next token
_MOST_TOGETHER = 8
_ENTRIES = (8, 64)  # the fewest of interventions, on one text and on all texts together
_MORE_ENTRIES = 8  # times as many, where those are too few

MOST_ROWS = 64
_CACHE_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What lengths and numbers are rounded up to.

    Attributes:
        batches: Rows of the batch, rising.
        lengths: Tokens of texts that are run whole, rising; the last is the model's context.
        rooms: Places of the cache, rising; the last is the model's context.
    """

    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    rooms: tuple[int, ...]

    @classmethod
    def of(cls, config: ModelConfig, n_rows: int | None = None) -> "Sizes":
        """For a model.

        Args:
            config: Its shape.
            n_rows: Most rows of the batch; default 64, or fewer (a power of two) if keys and values of that
                many full texts take more than 1 GiB.
        """
        n_rows = n_rows or default_rows(config)
        context = config.context_length
        rooms = _rising(_SMALLEST_ROOM, context)
        short = [size for size in _rising(_SHORTEST, context) if size < rooms[0]]
        return cls(_rising(1, n_rows), (*short, *rooms), rooms)

    @property
    def most_rows(self) -> int:
        """Of the batch."""
        return self.batches[-1]

    def rows(self, n: int) -> int:
        """The size of a batch of n texts."""
        return _up(self.batches, n)

    def length(self, n: int) -> int:
        """The size of texts of n tokens that are run whole."""
        return _up(self.lengths, n)

    def room(self, n: int) -> int:
        """The size of a cache for n tokens of a text."""
        return _up(self.rooms, n)

    def together(self, length: int) -> int:
        """How many texts of a length are run in one call, where there are several."""
        fitting = max(1, _TOKENS_TOGETHER // self.length(length))
        return min(2 ** int(math.log2(fitting)), _MOST_TOGETHER, self.most_rows)

    def groups(self, length: int) -> tuple[int, ...]:
        """The numbers of texts of a length that are run in one call."""
        return tuple(sorted({1, self.together(length)}))


def default_rows(config: ModelConfig) -> int:
    """Most rows of a batch where nobody says how many."""
    numbers = 2 * config.n_layers * config.context_length * config.n_kv_heads * config.head_dim
    fitting = max(1, _CACHE_BYTES // (numbers * jnp.dtype(config.dtype).itemsize))
    return min(MOST_ROWS, 2 ** int(math.log2(fitting)))


def of_rows(
    config: ModelConfig, each: Sequence[tuple[int, InterventionBatch]], n_rows: int
) -> InterventionBatch | None:
    """Interventions on rows of a batch as one, filled up to a few sizes; None without any.

    A single row has a smaller size, for there decoding is faster the fewer neurons may be active.

    Args:
        config: Of the model.
        each: (row, what is done to its text).
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
