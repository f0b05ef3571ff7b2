"""Encoded text on its way to shards: chunks of documents, each a file of tokens and a file that indexes it.

A chunk holds documents in source order, both splits mixed and copies not yet dropped. It is written once,
when its text is encoded, and read to look for copies and to write shards. The index ends
with digests of both files.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import hashlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from topklm.data.building.storage import Storage
from topklm.data.records import sha256_of_file
from topklm.errors import UserError

# One row per document, in order.
INDEX_DTYPE = np.dtype(
    [
        ("digest", "<u8", 2),  # first 128 bits of the SHA-256 of the text
        ("tokens", "<u4"),  # separator included
        ("utf8_bytes", "<u4"),
        ("heldout", "u1"),
    ]
)

_DIGEST_BYTES = 32
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
            return (path.stat().st_size - 2 * _DIGEST_BYTES) // INDEX_DTYPE.itemsize

    def index(self) -> np.ndarray:
        """Reads the index, INDEX_DTYPE[documents].

        Raises:
            UserError: If it is not as it was written.
        """
        try:
            return self._read_index()[0]
        except ValueError as e:
            raise UserError(
                f"{self.storage.url}/{self._name('index')} is damaged ({e}): delete {self.storage.url}, and "
                "start the same command again"
            ) from e

    def is_whole(self) -> bool:
        """Reads both files, and tells whether they are as they were written."""
        try:
            _, tokens_digest = self._read_index()
            with self.storage.open_local(self._name("tokens")) as path:
                return bytes.fromhex(sha256_of_file(path)) == tokens_digest
        except (ValueError, FileNotFoundError, IsADirectoryError):
            return False

    def discard(self) -> None:
        """Deletes it."""
        for kind in ("index", "tokens", "dropped"):
            self.storage.discard(self._name(kind))

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

    def write_index(self, rows: np.ndarray, tokens_digest: bytes) -> None:
        """Writes the index and, after it, the digest of the tokens' file and one of all of this."""
        content = rows.tobytes() + tokens_digest
        self.storage.write(self._name("index"), content + self._digest(content))

    def _read_index(self) -> tuple[np.ndarray, bytes]:
        """Reads the index and the digest of the tokens' file; ValueError if it is not as it was written."""
        content = self.storage.read(self._name("index"))
        content, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
        if self._digest(content) != digest:
            raise ValueError("its digest differs")
        return np.frombuffer(content[:-_DIGEST_BYTES], INDEX_DTYPE), content[-_DIGEST_BYTES:]

    def _digest(self, content: bytes) -> bytes:
        # Of its place, too: every chunk has its own.
        return hashlib.sha256(f"{self.storage.name} {self.number} ".encode() + content).digest()

    def _name(self, kind: str) -> str:
        return f"{self.number:06d}.{kind}"


class ChunkWriter:
    """Appends documents to a chunk, which is there once the `with` block has ended."""

    def __init__(self, chunk: Chunk, dtype: np.dtype):
        self._chunk, self._dtype = chunk, dtype
        self._rows: list[np.ndarray] = []
        self._hash = hashlib.sha256()
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
            self._chunk.write_index(index, self._hash.digest())

    def append(self, rows: np.ndarray, tokens: Sequence[np.ndarray]) -> None:
        """Adds documents: INDEX_DTYPE[n], and their tokens in pieces, separators included."""
        self._rows.append(rows)
        for piece in tokens:
            content = piece.astype(self._dtype).tobytes()
            self._hash.update(content)
            self._file.write(content)


def _row_ranges(ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of documents of about _COPY_TOKENS tokens, at least one document each."""
    first = 0
    while first < ends.size:
        begin = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, begin + _COPY_TOKENS, side="right")))
        yield first, last
        first = last
