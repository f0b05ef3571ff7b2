"""Windows of a prepared dataset as a person reads them: text, and where documents begin.

For looking, not for training: what is trained on comes from `topklm.data.stream`.
"""

from collections.abc import Iterator
import dataclasses
import random

import numpy as np

from topklm.data.dataset import Dataset
from topklm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a window holds of one document."""

    begins: bool  # a separator stands before it; otherwise the document began in an earlier window
    text: str


@dataclasses.dataclass(frozen=True)
class Window:
    """Tokens start to stop - 1 of a split."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]

    @property
    def documents(self) -> int:
        """Documents that the window holds something of."""
        return len(self.pieces)


def sample_windows(
    dataset: Dataset, split: str, n_windows: int, context_length: int, seed: int
) -> Iterator[Window]:
    """Decodes random windows of a split, in the split's order; the same seed gives the same ones.

    Window i begins at token i * context_length, as in training; the last is moved back to be full.

    Args:
        dataset: Only the shards that hold the windows are opened.
        split: "train" or "heldout".
        n_windows: Fewer are given where the split has fewer.
        context_length: Tokens per window.
        seed: Of the choice.

    Raises:
        UserError: For a split without tokens, or a shard that is not as it was written.
    """
    tokens = dataset.tokens(dataset.splits[split])
    if not len(tokens):
        raise UserError(f"split = {split}: {dataset.path} has no documents in it; choose the other one")
    n_all = -(-len(tokens) // context_length)
    for number in sorted(random.Random(seed).sample(range(n_all), min(n_windows, n_all))):
        start = max(0, min(number * context_length, len(tokens) - context_length))
        stop = min(start + context_length, len(tokens))
        yield Window(start, stop, tuple(_pieces(dataset, tokens.read(start, stop))))


def _pieces(dataset: Dataset, tokens: np.ndarray) -> Iterator[Piece]:
    begins = np.flatnonzero(tokens == dataset.tokenizer.separator_id)
    for part in np.split(tokens, begins):
        # Before a separator that stands first there is nothing.
        if part.size:
            is_start = bool(part[0] == dataset.tokenizer.separator_id)
            yield Piece(is_start, dataset.tokenizer.decode(part[is_start:]))
