"""Excerpts of stored text that end at chosen tokens, as a model is given them."""

import dataclasses

import numpy as np

from topklm.neurons.store import Store

NO_TOKEN = -1

# Tokens of the store that are read at once.
_STRIP = 1 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class Excerpts:
    """N excerpts of T tokens. A shorter one stands to the right, so all of them end in the last column.

    Attributes:
        tokens: int32[N, T].
        segments: int32[N, T], 1; 0 where nothing stands, which no token of the excerpt attends to.
        positions: int32[N, T], 0 for an excerpt's first token.
        following: int32[N], the token that follows in the document; `NO_TOKEN` where the document ends.
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    following: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | np.ndarray) -> "Excerpts":
        """Returns some of them, by a slice, a mask or their numbers."""
        return Excerpts(self.tokens[rows], self.segments[rows], self.positions[rows], self.following[rows])


def ending_at(store: Store, ends: np.ndarray, length: int, separator_id: int) -> Excerpts:
    """Returns the last `length` tokens of: the separator, then the document up to and with a token.

    So an excerpt begins with the separator where the document begins in it, and holds one document only.

    Args:
        store: Of the text.
        ends: int64[N], tokens of the store, in any order.
        length: T, 1 or more.
        separator_id: Of the tokenizer.
    """
    tokens = np.full((len(ends), length), separator_id, np.int32)
    segments = np.zeros((len(ends), length), np.int32)
    following = np.full(len(ends), NO_TOKEN, np.int32)
    # Strip by strip, so that a store of any size is read in little memory.
    order = np.argsort(ends, kind="stable")
    borders = np.flatnonzero(np.diff(ends[order] // _STRIP)) + 1
    for rows in np.split(order, borders):
        if len(rows) == 0:
            continue
        first = ends[rows[0]] - length
        ids, documents = _read(store, int(first), int(ends[rows[-1]]) + 2)
        last = ends[rows] - first
        places = last[:, None] + np.arange(1 - length, 1)
        inside = documents[places] == documents[last][:, None]
        tokens[rows] = np.where(inside, ids[places], separator_id)
        # The place before a document's first token is the separator's.
        begins = np.zeros_like(inside)
        begins[:, :-1] = ~inside[:, :-1] & inside[:, 1:]
        segments[rows] = inside | begins
        goes_on = documents[last + 1] == documents[last]
        following[rows] = np.where(goes_on, ids[last + 1], NO_TOKEN)
    n_missing = length - segments.sum(axis=1, keepdims=True)
    positions = np.maximum(np.arange(length) - n_missing, 0).astype(np.int32)
    return Excerpts(tokens, segments, positions, following)


def spread_ends(n_tokens: int, n: int, seed: int) -> np.ndarray:
    """Tokens drawn evenly over a store, one from each n-th of it.

    Returns:
        int64[min(n, n_tokens)], rising.
    """
    n = min(n, n_tokens)
    shares = np.arange(n) + np.random.default_rng(seed).random(n)
    return np.minimum((shares * n_tokens / max(n, 1)).astype(np.int64), n_tokens - 1)


def _read(store: Store, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and documents, int64[end - begin]; outside of the store the document is -1."""
    inside = slice(max(begin, 0) - begin, min(end, store.n_tokens) - begin)
    ids, documents = np.zeros(end - begin, np.int64), np.full(end - begin, -1, np.int64)
    ids[inside] = store.tokens(begin, end)
    documents[inside] = store.documents(begin, end)
    return ids, documents
