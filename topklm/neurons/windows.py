"""Cuts documents into windows in which every token is read exactly once, and packs those into batches.

A document longer than a window becomes overlapping ones: the first tokens of each but the first are only
there to be looked back at. Dims: B rows, T tokens in a row.
"""

from collections.abc import Iterable, Iterator
import dataclasses

import numpy as np

_OVERLAP = 1 / 4  # of a window: what its first new token can look back at, at least


@dataclasses.dataclass(frozen=True, eq=False)
class Window:
    """A stretch of a document.

    Attributes:
        document: Number of the document.
        inputs: int32[n], n at most T; the document's first window begins with the separator.
        n_known: Leading inputs that are not to be read: the separator, or tokens of the window before.
    """

    document: int
    inputs: np.ndarray
    n_known: int

    @property
    def n_new(self) -> int:
        """Inputs that are to be read; they stand last."""
        return len(self.inputs) - self.n_known


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Windows in rows; N of their tokens are to be read.

    Attributes:
        inputs: int32[R, T], filled up with separators.
        segment_ids: int32[R, T]: 1, 2, ... for the windows of a row, 0 for padding.
        positions: int32[R, T], from 0 in each window.
        places: int32[R, T], which of the N tokens an input is, in the order of the windows; -1: none.
        tokens: int32[N].
        documents: int64[N].
    """

    inputs: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    places: np.ndarray
    tokens: np.ndarray
    documents: np.ndarray


def windows_of(document: int, ids: np.ndarray, separator_id: int, length: int) -> Iterator[Window]:
    """Windows that together read every token of a document once.

    Args:
        document: Its number.
        ids: int32[n], its tokens, without a separator.
        separator_id: Of the token before a document.
        length: T, at least 2.
    """
    inputs = np.concatenate([[separator_id], ids]).astype(np.int32)
    for first, behind, known in cut(len(inputs), length):
        yield Window(document, inputs[first:behind], known - first)


def cut(n_inputs: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Where windows begin and end among the inputs of a document, the separator counted.

    Args:
        n_inputs: How many there are.
        length: T, at least 2.

    Yields:
        The first input of a window, the one behind its last, and the first that is to be read.
    """
    overlap = max(1, int(length * _OVERLAP))
    known, first = 1, 0
    while known < n_inputs:
        behind = min(first + length, n_inputs)
        yield first, behind, known
        known, first = behind, behind - overlap


def stretches(windows: Iterable[Window], n_tokens: int) -> Iterator[list[Window]]:
    """Windows in lists that have at least so many tokens to read; the last may have fewer."""
    stretch: list[Window] = []
    n = 0
    for window in windows:
        stretch.append(window)
        n += window.n_new
        if n >= n_tokens:
            yield stretch
            stretch, n = [], 0
    if stretch:
        yield stretch


def pack(windows: list[Window], length: int, multiple: int, separator_id: int) -> Packed:
    """Puts windows into rows, the longest first, each into the first row with room.

    Args:
        windows: None longer than `length`.
        length: T.
        multiple: The number of rows R is one of this.
        separator_id: What rows are filled up with.
    """
    rows, n_rows = _first_fit([len(window.inputs) for window in windows], length)
    shape = (-(-n_rows // multiple) * multiple, length)
    inputs = np.full(shape, separator_id, np.int32)
    segment_ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    places = np.full(shape, -1, np.int32)
    filled, segments = np.zeros(n_rows, int), np.zeros(n_rows, np.int32)
    done = 0
    for window, row in zip(windows, rows, strict=True):
        begin = filled[row]
        end = filled[row] = begin + len(window.inputs)
        segments[row] += 1
        inputs[row, begin:end] = window.inputs
        segment_ids[row, begin:end] = segments[row]
        positions[row, begin:end] = np.arange(end - begin)
        places[row, begin + window.n_known : end] = np.arange(done, done + window.n_new)
        done += window.n_new
    tokens = np.concatenate([window.inputs[window.n_known :] for window in windows])
    documents = np.repeat([window.document for window in windows], [window.n_new for window in windows])
    return Packed(inputs, segment_ids, positions, places, tokens, documents)


def _first_fit(sizes: list[int], room: int) -> tuple[list[int], int]:
    """The row of each, and how many rows there are."""
    left: list[int] = []
    rows = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((row for row, space in enumerate(left) if space >= sizes[i]), len(left))
        if row == len(left):
            left.append(room)
        left[row] -= sizes[i]
        rows[i] = row
    return rows, len(left)
