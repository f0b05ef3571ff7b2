"""Text and activations around the examples of many neurons, read from any store in little memory."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from topklm.neurons.store import Store

WINDOW = 128  # tokens around an example

_BLOCK_EVENTS = 2**21  # held at once, some 80 MB with all that is made of them
_STRIP = 2**20  # tokens of the store that are read at once


@dataclasses.dataclass(frozen=True)
class Window:
    """Text around an example.

    Attributes:
        begin: Its first token, counted through the store.
        ids: Of each token.
        values: Activation of the neuron at each token.
        losses: Of each token, nats; None where the store has none.
    """

    begin: int
    ids: list[int]
    values: list[float]
    losses: list[float | None]


class Windows:
    """Text around M tokens of a store: of one document, `WINDOW` tokens or all it has, the token well inside.

    Args:
        store: Of the text.
        places: int64[M], the tokens, in any order.
    """

    def __init__(self, store: Store, places: np.ndarray):
        shape = len(places), WINDOW
        self._begins, self._lengths = np.zeros(len(places), np.int64), np.zeros(len(places), np.int64)
        self._ids, self._losses = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        order = np.argsort(places, kind="stable")
        # Strip by strip, so that all of a store is read once at most, and never held.
        for rows in np.split(order, np.flatnonzero(np.diff(places[order] // _STRIP)) + 1):
            if len(rows):
                self._read(store, places[rows], rows)

    def around(self, numbers: slice, tokens: np.ndarray, values: np.ndarray) -> Iterator[Window]:
        """Some of them, with the activations of one neuron.

        Args:
            numbers: Which of the M, from start to stop.
            tokens: int64[E], where in the store the neuron is active, rising.
            values: float32[E].
        """
        begins, lengths = self._begins[numbers], self._lengths[numbers]
        first = np.searchsorted(tokens, begins).tolist()
        behind = np.searchsorted(tokens, begins + lengths).tolist()
        for number, begin, n, a, b in zip(
            range(numbers.start, numbers.stop), begins.tolist(), lengths.tolist(), first, behind, strict=True
        ):
            found = np.zeros(n)
            found[tokens[a:b] - begin] = values[a:b]
            losses = self._losses[number, :n].tolist()
            if not np.isfinite(self._losses[number, :n]).all():
                losses = [loss if np.isfinite(loss) else None for loss in losses]
            yield Window(begin, self._ids[number, :n].tolist(), found.tolist(), losses)

    def _read(self, store: Store, places: np.ndarray, rows: np.ndarray) -> None:
        """Reads those around rising places of one strip."""
        start, end = max(int(places[0]) - WINDOW, 0), int(places[-1]) + WINDOW + 1
        documents = store.documents(start, end)
        # Where a document reaches out of what is read, it reaches further than a window does.
        borders = np.flatnonzero(documents[1:] != documents[:-1]) + 1
        bounds = start + np.concatenate([[0], borders, [len(documents)]])
        document = np.searchsorted(bounds, places, side="right")
        first, behind = bounds[document - 1], bounds[document]
        begins = np.maximum(first, np.minimum(places - WINDOW // 2, behind - WINDOW))
        self._begins[rows], self._lengths[rows] = begins, np.minimum(WINDOW, behind - begins)
        taken = np.minimum(begins[:, None] + np.arange(WINDOW) - start, len(documents) - 1)
        self._ids[rows] = store.tokens(start, end)[taken]
        self._losses[rows] = store.losses(start, end)[taken]


def events(
    store: Store, layer: int, rows: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], np.ndarray, np.ndarray]]:
    """Rows of the statistics with all events of their neurons.

    Neighbours are read at once, as many as fit into memory.

    Args:
        store: Of the activations.
        layer: Of all the rows.
        rows: With `neuron`, rising, and `n_active`.

    Yields:
        A row; the tokens at which its neuron is active, int64[E], rising; and its values there, float32[E].
    """
    begin = 0
    while begin < len(rows):
        end, n_events = begin + 1, rows[begin]["n_active"]
        while end < len(rows) and rows[end]["neuron"] == rows[end - 1]["neuron"] + 1:
            n_events += rows[end]["n_active"]
            if n_events > _BLOCK_EVENTS:
                break
            end += 1
        block = store.block(layer, rows[begin]["neuron"], rows[end - 1]["neuron"] + 1)
        for row, a, b in zip(rows[begin:end], block.offsets[:-1], block.offsets[1:], strict=True):
            yield row, block.tokens[a:b], block.values[a:b]
        begin = end
