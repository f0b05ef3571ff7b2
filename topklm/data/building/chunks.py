"""Encoded text on its way to shards: chunks of documents, each a file of tokens and a file that indexes it.

A chunk holds documents in source order, both splits mixed and copies not yet dropped. It is written once,
by whoever encodes its text, and read by those who look for copies and those who write shards.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from topklm.data.building.storage import Storage

# One row per document, in order.
INDEX_DTYPE = np.dtype(
    [
        ("digest", "<u8", 2),  # first 128 bits of the SHA-256 of the text
        ("tokens", "<u4"),  # separator included
        ("utf8_bytes", "<u4"),
        ("heldout", "u1"),
    ]
)

_COPY_TOKENS = 1 << 20  # tokens read at a time


@dataclasses.dataclass(frozen=True)
class Totals:
    """What a chunk holds of each split once copies are dropped; index 0: train, 1: held out."""

    documents: tuple[int, ...]
    tokens: tuple[int, ...]
    utf8_bytes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A place in a storage for one chunk, written or not."""

    storage: Storage
    number: int

    @property
    def is_written(self) -> bool:
        """The index is written last."""
        return self.storage.exists(self._name("index"))

    def documents(self) -> int:
        """Number of documents of a written chunk."""
        with self.storage.open_local(self._name("index")) as path:
            return path.stat().st_size // INDEX_DTYPE.itemsize

    def index(self) -> np.ndarray:
        """INDEX_DTYPE[documents]."""
        return np.frombuffer(self.storage.read(self._name("index")), INDEX_DTYPE)

    def drop(self, rows: np.ndarray) -> None:
        """Says which documents are copies of others: sorted row numbers, int[n]."""
        name = self._name("dropped")
        if rows.size or self.storage.exists(name):  # from an earlier attempt with other sources
            self.storage.write(name, rows.astype("<u4").tobytes())

    def kept(self) -> np.ndarray:
        """bool[documents]: which documents are no copies of others."""
        keep = np.ones(self.documents(), bool)
        if self.storage.exists(self._name("dropped")):
            keep[np.frombuffer(self.storage.read(self._name("dropped")), "<u4")] = False
        return keep

    def totals(self) -> Totals:
        """Documents, tokens and bytes that are kept."""
        index, keep = self.index(), self.kept()
        masks = [keep & (index["heldout"] == split) for split in (0, 1)]
        documents, tokens, utf8_bytes = (
            tuple(int(column[mask].sum(dtype=np.int64)) for mask in masks)
            for column in (keep, index["tokens"], index["utf8_bytes"])
        )
        return Totals(documents, tokens, utf8_bytes)

    def tokens(self, heldout: bool, start: int, stop: int, dtype: np.dtype) -> Iterator[np.ndarray]:
        """Kept tokens start to stop - 1 of one split, counted within this chunk, a block at a time."""
        index = self.index()
        keep = self.kept() & (index["heldout"] == heldout)
        ends = np.cumsum(index["tokens"], dtype=np.int64)
        passed = 0  # kept tokens before this block
        with self.storage.open_local(self._name("tokens")) as path:
            stored = np.memmap(path, dtype, mode="r") if ends.size else np.zeros(0, dtype)
            for first, last in _row_ranges(ends):
                mask = np.repeat(keep[first:last], index["tokens"][first:last])
                begin = int(ends[first - 1]) if first else 0
                block = stored[begin : begin + mask.size][mask]
                wanted = block[max(0, start - passed) : max(0, stop - passed)]
                passed += block.size
                if wanted.size:
                    yield wanted
                if passed >= stop:
                    return

    def create(self, dtype: np.dtype) -> "ChunkWriter":
        """Begins to write it; use the writer as a context manager."""
        return ChunkWriter(self, dtype)

    def _name(self, kind: str) -> str:
        return f"{self.number:06d}.{kind}"


class ChunkWriter:
    """Appends documents to a chunk, which is there once the `with` block has ended."""

    def __init__(self, chunk: Chunk, dtype: np.dtype):
        self._chunk, self._dtype = chunk, dtype
        self._rows: list[np.ndarray] = []
        self._stack = contextlib.ExitStack()
        self._file: BinaryIO

    def __enter__(self) -> "ChunkWriter":
        path: Path = self._stack.enter_context(self._chunk.storage.create(self._chunk._name("tokens")))
        self._file = self._stack.enter_context(path.open("wb"))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
        if error[0] is None:
            index = np.concatenate([np.zeros(0, INDEX_DTYPE), *self._rows])
            self._chunk.storage.write(self._chunk._name("index"), index.tobytes())

    def append(self, rows: np.ndarray, tokens: Sequence[np.ndarray]) -> None:
        """Adds documents: INDEX_DTYPE[n], and their tokens in pieces, separators included."""
        self._rows.append(rows)
        for piece in tokens:
            self._file.write(piece.astype(self._dtype).tobytes())


def _row_ranges(ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of documents of about _COPY_TOKENS tokens, at least one document each."""
    first = 0
    while first < ends.size:
        begin = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, begin + _COPY_TOKENS, side="right")))
        yield first, last
        first = last
