"""Encoded text on its way to shards: chunks of documents, each a file of tokens and a file that indexes it.

A chunk holds documents in source order, both splits mixed and copies not yet dropped. It is written once,
when its text is encoded, and read to look for copies and to write shards. The index ends
with digests of both files.

Two documents are copies when the first 128 bits of their texts' SHA-256 agree: among 10^12 texts, two
different ones do with a probability of 10^-15. Memory does not grow with the text.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import hashlib
from pathlib import Path
import tempfile
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

# One row per document when copies are looked for.
_ENTRY_DTYPE = np.dtype([("digest", "<u8", 2), ("heldout", "u1"), ("document", "<u8")])

_DIGEST_BYTES = 32
_BUCKET_DOCUMENTS = 1 << 20  # documents sorted at a time
_COPY_TOKENS = 1 << 20  # tokens read at a time


@dataclasses.dataclass(frozen=True)
class Totals:
    """Counts of a chunk without its copies; index 0: train, 1: held out."""

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
        """Counts the documents of a written chunk."""
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
        """Tells which documents are no copies of others, bool[documents]."""
        keep = np.ones(self.documents(), bool)
        if self.storage.exists(self._name("dropped")):
            keep[np.frombuffer(self.storage.read(self._name("dropped")), "<u4")] = False
        return keep

    def totals(self) -> Totals:
        """Counts documents, tokens and bytes that are kept."""
        index, keep = self.index(), self.kept()
        masks = [keep & (index["heldout"] == split) for split in (0, 1)]
        documents, tokens, utf8_bytes = (
            tuple(int(column[mask].sum(dtype=np.int64)) for mask in masks)
            for column in (keep, index["tokens"], index["utf8_bytes"])
        )
        return Totals(documents, tokens, utf8_bytes)

    def tokens(self, heldout: bool, start: int, stop: int, dtype: np.dtype) -> Iterator[np.ndarray]:
        """Yields kept tokens start to stop - 1 of one split, counted within this chunk, in blocks."""
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
    """Yields consecutive ranges of documents of about _COPY_TOKENS tokens, at least one document each."""
    first = 0
    while first < ends.size:
        begin = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, begin + _COPY_TOKENS, side="right")))
        yield first, last
        first = last


def drop_duplicates(chunks: Sequence[Chunk], scratch: Path) -> None:
    """Marks copies in the chunks' files.

    `scratch` is a folder on this machine for temporary files, 33 bytes a document.

    The copy that stays is the first in the held-out split, or else the first: no held-out text is ever
    trained on, whatever file it comes from.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        sizes = [chunk.documents() for chunk in chunks]
        starts = np.cumsum([0, *sizes])
        total = int(starts[-1])
        n_buckets = -(-total // _BUCKET_DOCUMENTS)
        is_copy = np.memmap(folder / "copies", bool, "w+", shape=max(1, total))
        for bucket in _fill_buckets(folder, chunks, starts, n_buckets):
            is_copy[copies(np.fromfile(bucket, _ENTRY_DTYPE))] = True
            bucket.unlink()
        for chunk, start, stop in zip(chunks, starts[:-1], starts[1:], strict=True):
            chunk.drop(np.flatnonzero(is_copy[start:stop]))


def keep_all(chunks: Sequence[Chunk]) -> None:
    """Takes back what an earlier attempt may have marked."""
    for chunk in chunks:
        chunk.drop(np.zeros(0, np.int64))


def copies(entries: np.ndarray) -> np.ndarray:
    """Returns the numbers that `drop_duplicates` drops among entries (digest, heldout, document)."""
    order = np.lexsort(
        (entries["document"], 1 - entries["heldout"], entries["digest"][:, 1], entries["digest"][:, 0])
    )
    digests = entries["digest"][order]
    repeats = (digests[1:] == digests[:-1]).all(axis=1)
    return entries["document"][order[1:][repeats]]


def _fill_buckets(scratch: Path, chunks: Sequence[Chunk], starts: np.ndarray, n_buckets: int) -> list[Path]:
    """Writes files of entries; all copies of a text come into one."""
    paths = [scratch / f"{number}.entries" for number in range(n_buckets)]
    pending: list[np.ndarray] = []
    for chunk, start in zip(chunks, starts[:-1], strict=True):
        index = chunk.index()
        entries = np.zeros(index.size, _ENTRY_DTYPE)
        entries["digest"], entries["heldout"] = index["digest"], index["heldout"]
        entries["document"] = start + np.arange(index.size)
        pending.append(entries)
        if sum(part.size for part in pending) >= _BUCKET_DOCUMENTS:
            _spread(np.concatenate(pending), paths)
            pending = []
    if pending and paths:
        _spread(np.concatenate(pending), paths)
    return paths


def _spread(entries: np.ndarray, paths: Sequence[Path]) -> None:
    bucket = entries["digest"][:, 1] % len(paths)
    for number, path in enumerate(paths):
        with path.open("ab") as file:
            entries[bucket == number].tofile(file)
