"""Token streams to batches: shuffled windows for training, packed documents for evaluation.

Gives NumPy arrays on one host. Where they go, and on how many devices, is decided in training; `Feed` hands
the next ones on while a step runs.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import itertools
import sys
import time
from typing import Any, TypedDict

import numpy as np

from topklm.data.dataset import Dataset, Mixture
from topklm.data.records import RECORD_TOKENS, TokenStream
from topklm.errors import UserError
from topklm.imports import without
from topklm.storage.remote import RemoteFolder

with without("orbax"):  # in which Grain would register what is not used here
    import grain
    from grain.experimental import index_shuffle

_SCAN_TOKENS = 64 * RECORD_TOKENS  # tokens read at a time while looking for document boundaries
_OPEN_ROWS = 64  # rows of a held-out batch that still take pieces
_SHUFFLE_ROUNDS = 4  # of Grain's index shuffle; another number is another order


class Batch(TypedDict):
    """The input of one step; a plain dict of arrays of shape [B, T]."""

    inputs: np.ndarray  # int32
    targets: np.ndarray  # int32, the token after each input
    segment_ids: np.ndarray  # int32, 1, 2, ...: a token attends to its own segment; 0: padding
    positions: np.ndarray  # int32, from 0 in each segment
    loss_weights: np.ndarray  # float32, 1: the target is scored, 0: it is not


class WindowSource:
    """Overlapping windows of a dataset's training split, each found by arithmetic.

    Window i is tokens s to s + T, s = min(i T, n - T - 1): neighbours share one token, and the last
    one is moved back to be full, so every token but the split's first is a target.
    """

    def __init__(self, dataset: Dataset, context_length: int):
        """Raises UserError if the split does not fill one window of context_length + 1 tokens."""
        stream = dataset.tokens(dataset.train)
        if len(stream) < context_length + 1:
            raise UserError(
                f"model.context_length = {context_length}: the training split of {dataset.path} has only "
                f"{len(stream)} tokens; it must be at most {len(stream) - 1}, or give that dataset more text"
            )
        self._stream, self._context_length = stream, context_length

    def __len__(self) -> int:
        return (len(self._stream) - 2) // self._context_length + 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns window `index`, int32[T + 1]."""
        return self.read([index])[0]

    def read(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Returns these windows, int32[T + 1] each; from a bucket all are read at the same time."""
        spans = []
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"window {index} of {len(self)}")
            length = self._context_length + 1
            start = min(index * self._context_length, len(self._stream) - length)
            spans.append((start, start + length))
        return self._stream.read_many(spans)


def train_stream(
    mixture: Mixture,
    *,
    context_length: int,
    batch_size: int,
    seed: int,
    rows: slice | np.ndarray = slice(None),
    threads: int | None = None,
) -> grain.DatasetIterator:
    """Yields training batches without end: the windows that `window_ids` names, each epoch in a new order.

    The iterator's state (`get_state`, `set_state`) is `{"next_index": batches given out}`. It does not depend
    on `rows` or `threads`, so a run may continue with other values of both. A batch has B windows of T tokens
    over all hosts, of the training splits of the mixture, in exactly its proportions; an epoch may end inside
    one. `rows`, a slice or numbers, are those that this host wants, and only they are read, ahead by
    `threads` threads (2, from a bucket 4), each a batch at a time; 0 reads when asked. UserError if a split
    is shorter than one window, naming its folder.
    """
    sources = [WindowSource(dataset, context_length) for dataset in mixture.datasets]
    separator_id = mixture.tokenizer.separator_id

    def read_batch(ids: np.ndarray) -> Batch:
        windows = np.empty((len(ids), context_length + 1), np.int32)
        for number, source in enumerate(sources):
            rows_of = np.flatnonzero(ids[:, 0] == number)
            for row, window in zip(rows_of, source.read(ids[rows_of, 1].tolist()), strict=True):
                windows[row] = window
        return windows_to_batch(windows, separator_id)

    sizes = {"context_length": context_length, "batch_size": batch_size}
    batches = window_ids(mixture, **sizes, seed=seed, rows=rows).map(read_batch)
    if threads is None:
        threads = 4 if any(isinstance(d.path, RemoteFolder) for d in mixture.datasets) else 2
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(1, 4 * threads))
    return iter(batches.to_iter_dataset(options))


def window_ids(
    mixture: Mixture,
    *,
    context_length: int,
    batch_size: int,
    seed: int,
    rows: slice | np.ndarray = slice(None),
) -> grain.MapDataset:
    """Orders the windows of training: which stands in which row of which batch.

    Batch b holds windows b B to b B + B - 1 of the mixture's turns. A dataset gives each of its windows once
    per epoch of its own, each in another order. The order follows from `seed` and its position in the mixture
    alone, so that one more dataset at the end changes nothing about the others' order. Arguments and errors
    are those of `train_stream`. Element b of the endless result is int64[R, 2], the number of the dataset and
    of its window (see `WindowSource`) for each of the wanted rows of batch b.
    """
    n_windows = [len(WindowSource(dataset, context_length)) for dataset in mixture.datasets]
    seeds = [_shuffle_seed(seed, i) for i in range(len(mixture.datasets))]
    wanted = np.arange(batch_size)[rows]

    def ids_of(batch: int) -> np.ndarray:
        datasets, given = mixture.picks(batch * batch_size + wanted)
        windows = [
            _shuffled(n, n_windows[i], seeds[i])
            for i, n in zip(datasets.tolist(), given.tolist(), strict=True)
        ]
        return np.stack([datasets, np.array(windows, np.int64)], axis=1)

    return grain.MapDataset.range(sys.maxsize).map(ids_of)


def _shuffle_seed(seed: int, dataset: int) -> int:
    # For the first dataset, what Grain's `MapDataset.range(n).seed(seed).shuffle()` makes of the seed:
    # the order that runs on one dataset had before there were mixtures.
    sequence = np.random.SeedSequence([seed, 1], spawn_key=(dataset,) if dataset else ())
    return int(sequence.generate_state(1, np.uint32)[0])


def _shuffled(n: int, n_windows: int, seed: int) -> int:
    """Finds window number n of an endless run through a dataset, as Grain's `shuffle().repeat()` does."""
    epoch, position = divmod(n, n_windows)
    return index_shuffle(
        position, max_index=n_windows - 1, seed=(seed + epoch) % 2**32, rounds=_SHUFFLE_ROUNDS
    )


def windows_to_batch(windows: np.ndarray, separator_id: int) -> Batch:
    """Makes a training batch of windows int32[B, T + 1].

    A segment begins at each separator among the inputs; tokens before the first one are the
    rest of a document that began in an earlier window, and are segment 1. Every target is scored,
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


@dataclasses.dataclass(frozen=True)
class HeldoutPart:
    """The beginning of each dataset's held-out text."""

    stops: tuple[int, ...]  # tokens of each held-out stream, separators too
    utf8_bytes: int  # of the text of all parts


def heldout_part(mixture: Mixture, max_tokens: int) -> HeldoutPart:
    """Finds the part of the held-out text that an evaluation on few tokens scores.

    It is the first documents of each dataset, the last one cut, with `max_tokens` text tokens over all, of
    which each gives its share, rounded up; 0: all. Its bytes are those of its tokens; where a token does not
    stand for the same bytes everywhere, those of the text that they decode to.
    """
    total, tokenizer = mixture.heldout_text_tokens, mixture.tokenizer
    if not 0 < max_tokens < total:
        return HeldoutPart(tuple(d.heldout.tokens for d in mixture.datasets), mixture.heldout_bytes)
    lengths, stops, utf8_bytes = tokenizer.token_bytes_lengths(), [], 0
    for dataset in mixture.datasets:
        stream = dataset.tokens(dataset.heldout)
        wanted = -(-max_tokens * dataset.heldout.text_tokens // total)
        stops.append(_end_of_text(stream, tokenizer.separator_id, wanted))
        for start, stop in document_bounds(stream, tokenizer.separator_id, stops[-1]):
            tokens = stream.read(start + 1, stop)
            text = lengths[tokens].sum() if lengths is not None else len(tokenizer.decode(tokens).encode())
            utf8_bytes += int(text)
    return HeldoutPart(tuple(stops), utf8_bytes)


def _end_of_text(stream: TokenStream, separator_id: int, n: int) -> int:
    """Returns where the first n tokens that are no separators end."""
    for offset, tokens in _scan(stream):
        text = np.flatnonzero(tokens != separator_id)
        if n <= text.size:
            return offset + int(text[n - 1]) + 1 if n else offset
        n -= text.size
    return len(stream)


def heldout_batches(
    mixture: Mixture, *, context_length: int, batch_size: int, part: HeldoutPart | None = None
) -> Iterator[Batch]:
    """Yields batches that score every text token of every held-out document exactly once.

    The datasets follow one another, whatever their weights. The first token of a document is predicted
    from the separator, which itself is never scored. A document of more than T tokens becomes
    overlapping pieces, T // 2 apart, so that every scored token but its first T sees at least T / 2
    tokens before it. Pieces share rows; the last batch is filled up with rows of padding. `part` is of the
    text; all of it if None.
    """
    separator_id = mixture.tokenizer.separator_id
    stops = (part or heldout_part(mixture, max_tokens=0)).stops
    pieces = itertools.chain.from_iterable(
        _heldout_pieces(dataset.tokens(dataset.heldout), separator_id, context_length, end)
        for dataset, end in zip(mixture.datasets, stops, strict=True)
    )
    rows = _pack(pieces, context_length)
    while batch := list(itertools.islice(rows, batch_size)):
        yield _rows_to_batch(batch, batch_size, context_length, separator_id)


@dataclasses.dataclass(frozen=True)
class _Piece:
    tokens: np.ndarray  # int32[n + 1]: n inputs, and each one's next token
    n_context: int  # leading targets that an earlier piece has scored


@dataclasses.dataclass(eq=False)  # a row is itself, not its contents
class _Row:
    room: int  # tokens
    pieces: list[_Piece] = dataclasses.field(default_factory=list)


def _heldout_pieces(stream: TokenStream, separator_id: int, length: int, end: int) -> Iterator[_Piece]:
    stride = max(1, length // 2)
    for start, stop in document_bounds(stream, separator_id, end):
        scored = start + 1  # the first token not yet scored; tokens[start] is the separator
        first = start
        while scored < stop:
            last = min(first + length, stop - 1)
            yield _Piece(stream.read(first, last + 1), n_context=scored - (first + 1))
            scored, first = last + 1, first + stride


def document_bounds(
    stream: TokenStream, separator_id: int, end: int | None = None
) -> Iterator[tuple[int, int]]:
    """Yields of each document before `end` its separator and the next one; the last document is cut there."""
    end = len(stream) if end is None else end
    found = ((offset + np.flatnonzero(tokens == separator_id)).tolist() for offset, tokens in _scan(stream))
    others = filter(None, itertools.chain.from_iterable(found))  # the stream's first token is a separator
    for start, stop in itertools.pairwise(itertools.chain([0], others, [len(stream)])):
        if start >= end:
            return
        yield start, min(stop, end)


def _scan(stream: TokenStream) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the tokens of a stream in blocks, int32[n], each after its offset."""
    for offset in range(0, len(stream), _SCAN_TOKENS):
        yield offset, stream.read(offset, min(offset + _SCAN_TOKENS, len(stream)))


def _pack(pieces: Iterator[_Piece], length: int) -> Iterator[_Row]:
    """Packs by first fit into rows of `length`; when too many are open, the fullest is given out."""
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


DeviceBatch = dict[str, Any]  # a Batch of global arrays [B, T]


class Feed:
    """Gives out a stream's batches on the devices, and keeps the next ones under way.

    Every `next` gives out a batch that was sent earlier, and sends another after it. JAX transfers
    asynchronously, so no thread is needed: only taking a batch from the stream, which reads ahead by
    itself, costs the caller time.
    """

    def __init__(self, stream: grain.DatasetIterator, put: Callable[[Batch], DeviceBatch], ahead: int = 2):
        """Reads nothing yet; `put` starts a batch's transfer, of `ahead` besides the one given out."""
        self.waited = 0.0  # seconds the caller has waited for the stream; sending is not waiting
        self._stream, self._put, self._ahead = stream, put, ahead
        self._under_way: deque[tuple[DeviceBatch, Any]] = deque()  # batch, the stream's state after it
        self._state = stream.get_state()
        self._seen = (0.0, 0.0)  # seconds of training and of waiting at the last `wait_share`

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> DeviceBatch:
        while len(self._under_way) <= self._ahead and self._send_one():
            pass
        if not self._under_way:
            raise StopIteration
        batch, self._state = self._under_way.popleft()
        return batch

    def state(self) -> Any:
        """Returns the stream's state after the last batch given out, whatever was read since."""
        return self._state

    def set_state(self, state: Any) -> None:
        """Goes on where `state` was taken; forgets the batches under way."""
        self._under_way.clear()
        self._stream.set_state(state)
        self._state = state

    def wait_share(self, seconds: float) -> float:
        """Returns the share of the training time since the last call, in seconds, that went into waiting."""
        (before, waited_before), self._seen = self._seen, (seconds, self.waited)
        return (self.waited - waited_before) / max(seconds - before, 1e-9)

    def _send_one(self) -> bool:
        began = time.perf_counter()
        try:
            batch = next(self._stream)
        except StopIteration:
            return False
        finally:
            self.waited += time.perf_counter() - began
        self._under_way.append((self._put(batch), self._stream.get_state()))
        return True
