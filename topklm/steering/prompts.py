"""Neutral prompts: pieces of stored text that no neuron's concept was read from."""

import dataclasses

import numpy as np

from topklm.errors import UserError
from topklm.neurons.store import Store


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """C prompts of T tokens.

    Attributes:
        tokens: int32[C, T], the separator first, as before every prompt of `generate`.
        following: int32[C], the token that follows in the text.
    """

    tokens: np.ndarray
    following: np.ndarray

    def with_prefix(self, prefix: np.ndarray) -> np.ndarray:
        """int32[C, T + m], with m token ids between the separator and the text."""
        middle = np.broadcast_to(prefix.astype(np.int32), (len(self.tokens), len(prefix)))
        return np.concatenate([self.tokens[:, :1], middle, self.tokens[:, 1:]], axis=1)


def neutral(store: Store, n: int, length: int, separator_id: int, seed: int) -> Prompts:
    """Pieces of the documents of odd number, drawn evenly over them.

    Args:
        store: Of the text.
        n: C.
        length: T, the separator counted; 2 or more.
        separator_id: Of the tokenizer.
        seed: Of the draw.

    Raises:
        UserError: If there are not so many pieces.
    """
    documents = store.documents(0, store.n_tokens)
    # The text of a prompt, and the token behind it, are of one document.
    last = length - 1
    fits = documents[: max(len(documents) - last, 0)] == documents[last:]
    starts = np.flatnonzero(fits & (documents[: len(fits)] % 2 == 1))
    if len(starts) < n:
        raise UserError(
            f"{store.folder} has {len(starts):,} places for a prompt of {last} tokens in its documents of "
            f"odd number, {n} are needed: harvest more text"
        )
    shares = (np.arange(n) + np.random.default_rng(seed).random(n)) / n
    chosen = starts[(shares * len(starts)).astype(np.int64)]
    stored = store.tokens(0, store.n_tokens)
    text = stored[chosen[:, None] + np.arange(length)].astype(np.int32)
    separators = np.full((n, 1), separator_id, np.int32)
    return Prompts(np.concatenate([separators, text[:, :-1]], axis=1), text[:, -1])
