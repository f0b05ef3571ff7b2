"""Token streams to batches: shuffled windows for training, packed documents for evaluation.

Gives NumPy arrays on one host. Where they go, and on how many devices, is decided in training.
"""

from collections.abc import Iterator
import dataclasses
from typing import TypedDict

import grain
import numpy as np

from topklm.data.prepare import Dataset
from topklm.data.records import RECORD_TOKENS, TokenStream
from topklm.errors import UserError

_SCAN_TOKENS = 64 * RECORD_TOKENS  # tokens read at a time while looking for document boundaries
_OPEN_ROWS = 64  # rows of a held-out batch that still take pieces


class Batch(TypedDict):
    """What one step sees; a plain dict of arrays of shape [B, T]."""

    inputs: np.ndarray  # int32
    targets: np.ndarray  # int32, the token after each input
    segment_ids: np.ndarray  # int32, 1, 2, ...: a token attends to its own segment; 0: padding
    positions: np.ndarray  # int32, from 0 in each segment
    loss_weights: np.ndarray  # float32, 1: the target is scored, 0: it is not


class WindowSource:
    """Overlapping windows of a stream, as a Grain random-access source.

    Window i is tokens s to s + T, s = min(i T, n - T - 1): neighbours share one token, and the last
    one is moved back to be full, so every token but the stream's first is a target.
    """

    def __init__(self, stream: TokenStream, context_length: int):
        """Raises UserError if the stream does not fill one window of context_length + 1 tokens."""
        if len(stream) < context_length + 1:
            raise UserError(
                f"model.context_length = {context_length}: the training split has only "
                f"{len(stream)} tokens; it must be "
                f"at most {len(stream) - 1}, or give more text in data.source"
            )
        self._stream, self._context_length = stream, context_length

    def __len__(self) -> int:
        return (len(self._stream) - 2) // self._context_length + 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Window `index`, int32[T + 1]."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        length = self._context_length + 1
        start = min(int(index) * self._context_length, len(self._stream) - length)
        return self._stream.read(start, start + length)


def train_stream(
    dataset: Dataset,
    *,
    context_length: int,
    batch_size: int,
    seed: int,
    rows: slice = slice(None),
    threads: int = 2,
) -> grain.DatasetIterator:
    """Endless training batches: every window once per epoch, in a new order each epoch.

    The iterator's state (`get_state`, `set_state`) is `{"next_index": batches given out}`. It does
    not depend on `rows` or `threads`, so a run may continue with other values of both.

    Args:
        dataset: Its training split is read.
        context_length: T, tokens per window.
        batch_size: B, windows per batch over all hosts. An epoch may end inside a batch.
        seed: Of the order.
        rows: The rows of each batch that this host wants; only they are read.
        threads: Threads that read ahead; 0 reads when asked.

    Returns:
        An iterator of `Batch`, with as many rows as `rows` takes from B.

    Raises:
        UserError: If the split is shorter than one window.
    """
    source = WindowSource(dataset.tokens(dataset.train), context_length)
    separator_id = dataset.tokenizer.separator_id

    def read_batch(ids: np.ndarray) -> Batch:
        return windows_to_batch(np.stack([source[i] for i in ids[rows]]), separator_id)

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(1, 4 * threads))
    batches = window_ids(len(source), batch_size=batch_size, seed=seed).map(read_batch)
    return iter(batches.to_iter_dataset(options))


def window_ids(n_windows: int, *, batch_size: int, seed: int) -> grain.MapDataset:
    """The order of training: element b is the int[batch_size] ids of batch b's windows."""
    ids = grain.MapDataset.range(n_windows).seed(seed).shuffle()
    # Repeated before batched: no window is dropped or doubled where an epoch ends.
    return ids.repeat(None, reseed_each_epoch=True).batch(batch_size)


def windows_to_batch(windows: np.ndarray, separator_id: int) -> Batch:
    """Training batch of windows int32[B, T + 1].

    A segment begins at each separator among the inputs; what stands before the first one is the
    rest of a document that began in an earlier window, and is segment 1. Every target is scored,
    the separator too: that is how the model learns to stop.
    """
    inputs, targets = windows[:, :-1], windows[:, 1:]
    begins = inputs == separator_id
    begins[:, 0] = True
    index = np.arange(inputs.shape[1], dtype=np.int32)
    first = np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    return Batch(
        inputs=np.ascontiguousarray(inputs),
        targets=np.ascontiguousarray(targets),
        segment_ids=np.cumsum(begins, axis=1, dtype=np.int32),
        positions=(index - first).astype(np.int32),
        loss_weights=np.ones(inputs.shape, np.float32),
    )


def heldout_batches(dataset: Dataset, *, context_length: int, batch_size: int) -> Iterator[Batch]:
    """Batches that score every text token of every held-out document exactly once.

    The first token of a document is predicted from the separator, which itself is never scored. A
    document of more than T tokens becomes overlapping pieces, T // 2 apart, so that every scored
    token but its first T sees at least T / 2 tokens before it. Pieces share rows; the last batch is
    filled up with rows of padding.

    Args:
        dataset: Its held-out split is read.
        context_length: T, tokens per row.
        batch_size: B, rows per batch; the same for all batches.
    """
    separator_id = dataset.tokenizer.separator_id
    pieces = _heldout_pieces(dataset.tokens(dataset.heldout), separator_id, context_length)
    rows: list[_Row] = []
    for row in _pack(pieces, context_length):
        rows.append(row)
        if len(rows) == batch_size:
            yield _rows_to_batch(rows, batch_size, context_length, separator_id)
            rows = []
    if rows:
        yield _rows_to_batch(rows, batch_size, context_length, separator_id)


@dataclasses.dataclass(frozen=True)
class _Piece:
    tokens: np.ndarray  # int32[n + 1]: n inputs, and each one's next token
    n_context: int  # leading targets that an earlier piece has scored


@dataclasses.dataclass(eq=False)  # a row is itself, not its contents
class _Row:
    room: int  # tokens
    pieces: list[_Piece] = dataclasses.field(default_factory=list)


def _heldout_pieces(stream: TokenStream, separator_id: int, length: int) -> Iterator[_Piece]:
    stride = max(1, length // 2)
    for start, stop in _document_bounds(stream, separator_id):
        scored = start + 1  # the first token not yet scored; tokens[start] is the separator
        first = start
        while scored < stop:
            last = min(first + length, stop - 1)
            yield _Piece(stream.read(first, last + 1), n_context=scored - (first + 1))
            scored, first = last + 1, first + stride


def _document_bounds(stream: TokenStream, separator_id: int) -> Iterator[tuple[int, int]]:
    start = 0
    for offset in range(0, len(stream), _SCAN_TOKENS):
        tokens = stream.read(offset, min(offset + _SCAN_TOKENS, len(stream)))
        for position in offset + np.flatnonzero(tokens == separator_id):
            if position:  # the stream's first token is a separator
                yield start, int(position)
            start = int(position)
    if len(stream):
        yield start, len(stream)


def _pack(pieces: Iterator[_Piece], length: int) -> Iterator[_Row]:
    """First fit into rows of `length`; when too many are open, the fullest is given out."""
    rows: list[_Row] = []
    for piece in pieces:
        n = piece.tokens.size - 1
        row = next((row for row in rows if row.room >= n), None)
        if row is None:
            if len(rows) == _OPEN_ROWS:
                yield rows.pop(min(range(len(rows)), key=lambda i: rows[i].room))
            row = _Row(room=length)
            rows.append(row)
        row.pieces.append(piece)
        row.room -= n
        if row.room == 0:
            rows.remove(row)
            yield row
    yield from rows


def _rows_to_batch(rows: list[_Row], batch_size: int, length: int, separator_id: int) -> Batch:
    shape = (batch_size, length)
    batch = Batch(
        inputs=np.full(shape, separator_id, np.int32),
        targets=np.full(shape, separator_id, np.int32),
        segment_ids=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        loss_weights=np.zeros(shape, np.float32),
    )
    for b, row in enumerate(rows):
        begin = 0
        for segment, piece in enumerate(row.pieces, start=1):
            end = begin + piece.tokens.size - 1
            batch["inputs"][b, begin:end] = piece.tokens[:-1]
            batch["targets"][b, begin:end] = piece.tokens[1:]
            batch["segment_ids"][b, begin:end] = segment
            batch["positions"][b, begin:end] = np.arange(end - begin)
            batch["loss_weights"][b, begin + piece.n_context : end] = 1
            begin = end
    return batch
