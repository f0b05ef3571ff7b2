"""Encoded text on its way to shards: chunks of documents, and the shards that are cut from them.

A chunk is a file of tokens and a file that indexes it: documents in source order, both splits mixed and
copies not yet dropped. It is written once, when its text is encoded, and read to look for copies and to write
shards, each on its own. The index ends with digests of both files.

Two documents are copies when the first 128 bits of their texts' SHA-256 agree: among 10^12 texts, two
different ones do with a probability of 10^-15. Memory does not grow with the text.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import hashlib
import os
from pathlib import Path
import shutil
import tempfile
from typing import Any, ClassVar

import numpy as np

from topklm.data.dataset import SPLITS
from topklm.data.records import (
    Shard,
    ShardError,
    check_shards,
    sha256_of_file,
    shard_bounds,
    shard_name,
    token_dtype,
    write_shard,
)
from topklm.data.sources import file_system
from topklm.errors import UserError
from topklm.progress import Report
from topklm.storage.files import parse_json, replacing, sealed_json, unsealed, write_atomically


class Storage:
    """A folder given by a local path or a URL that fsspec knows; cheap, and safe to pickle.

    All that is in it is ours: anything in the way of a file is deleted.
    """

    def __init__(self, url: str | Path):
        self.is_local = "://" not in str(url) or str(url).startswith("file://")
        # A relative path would mean something else to a worker elsewhere.
        self.path = Path(os.path.expanduser(str(url).removeprefix("file://"))).absolute()  # of a local folder
        self.url = str(self.path) if self.is_local else str(url).rstrip("/")

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "Storage":
        """The folder that holds it."""
        return Storage(self.url.rpartition("/")[0])

    def child(self, name: str) -> "Storage":
        """Returns the folder `name` in this one."""
        return Storage(f"{self.url}/{name}")

    def exists(self, name: str) -> bool:
        """Tells whether the file is there; whole, then."""
        return (self.path / name).exists() if self.is_local else self._fs().exists(f"{self.url}/{name}")

    def read(self, name: str) -> bytes:
        """Reads a small file; FileNotFoundError if it is not there."""
        return (self.path / name).read_bytes() if self.is_local else self._fs().cat_file(f"{self.url}/{name}")

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file, whole or not at all."""
        if self.is_local:
            self._make_way_for(name)
            write_atomically(self.path / name, content)
        else:
            self._fs().pipe_file(f"{self.url}/{name}", content)

    def read_sealed(self, name: str) -> dict[str, Any] | None:
        """Reads a small file of `write_sealed`; None if it is not there, or not as it was written."""
        try:
            return unsealed(parse_json(self.read(name)))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
            return None

    def write_sealed(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a small file of JSON with a digest of itself."""
        self.write(name, sealed_json(content))

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[Path]:
        """Yields a local path to write a file at, which becomes `name` at the end of the block."""
        if self.is_local:
            self._make_way_for(name)
            with replacing(self.path / name) as temporary:
                yield temporary
        else:
            with tempfile.TemporaryDirectory() as folder:
                temporary = Path(folder) / name
                yield temporary
                self._fs().put_file(str(temporary), f"{self.url}/{name}")

    def names(self) -> list[str]:
        """Lists a local folder, in no order; nothing if there is no such folder."""
        return os.listdir(self.path) if self.path.is_dir() else []

    def discard(self, name: str) -> None:
        """Deletes a file or folder in a local folder, if it is there."""
        path = self.path / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def open_local(self, name: str) -> Iterator[Path]:
        """Yields a local path to read a file at, while the block lasts."""
        if self.is_local:
            yield self.path / name
        else:
            with tempfile.TemporaryDirectory() as folder:
                local = Path(folder) / name
                self._fs().get_file(f"{self.url}/{name}", str(local))
                yield local

    def remove(self) -> None:
        """Deletes the folder and all that is in it, if it is there."""
        if self.is_local:
            shutil.rmtree(self.path, ignore_errors=True)
        elif self._fs().exists(self.url):
            self._fs().rm(self.url, recursive=True)

    def _make_way_for(self, name: str) -> None:
        """Makes the folder; deletes a folder where a file is to be, and a file where this folder is to be."""
        if self.path.exists() and not self.path.is_dir():
            self.path.unlink()
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / name).is_dir():
            self.discard(name)

    def _fs(self) -> Any:
        return file_system(self.url, "--out")[0]


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

# Adds documents to a chunk: INDEX_DTYPE[n], and their tokens in pieces, separators included.
Append = Callable[[np.ndarray, Sequence[np.ndarray]], None]

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
        """Reads the index, INDEX_DTYPE[documents]; UserError if it is not as it was written."""
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

    @contextlib.contextmanager
    def create(self, dtype: np.dtype) -> Iterator[Append]:
        """Yields a function that adds documents to the chunk, which is there once the block has ended."""
        rows, digest = [np.zeros(0, INDEX_DTYPE)], hashlib.sha256()
        with self.storage.create(self._name("tokens")) as path, path.open("wb") as file:

            def append(documents: np.ndarray, tokens: Sequence[np.ndarray]) -> None:
                rows.append(documents)
                for piece in tokens:
                    content = piece.astype(dtype).tobytes()
                    digest.update(content)
                    file.write(content)

            yield append
        content = np.concatenate(rows).tobytes() + digest.digest()
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


def _row_ranges(ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields consecutive ranges of documents of about _COPY_TOKENS tokens, at least one document each."""
    first = 0
    while first < ends.size:
        begin = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, begin + _COPY_TOKENS, side="right")))
        yield first, last
        first = last


def drop_duplicates(chunks: Sequence[Chunk], scratch: Path) -> None:
    """Marks copies in the chunks' files; `scratch` takes temporary files of 33 bytes a document.

    The copy that stays is the first in the held-out split, or else the first: no held-out text is ever
    trained on, whatever file it comes from.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        starts = np.cumsum([0, *(chunk.documents() for chunk in chunks)])
        total = int(starts[-1])
        is_copy = np.memmap(Path(name, "copies"), bool, "w+", shape=max(1, total))
        buckets = [Path(name, f"{number}.entries") for number in range(-(-total // _BUCKET_DOCUMENTS))]
        _fill_buckets(buckets, chunks, starts)
        for bucket in buckets:
            is_copy[copies(np.fromfile(bucket, _ENTRY_DTYPE))] = True
            bucket.unlink()
        for chunk, start, stop in zip(chunks, starts[:-1], starts[1:], strict=True):
            chunk.drop(np.flatnonzero(is_copy[start:stop]))


def copies(entries: np.ndarray) -> np.ndarray:
    """Returns the numbers that `drop_duplicates` drops among entries (digest, heldout, document)."""
    order = np.lexsort(
        (entries["document"], 1 - entries["heldout"], entries["digest"][:, 1], entries["digest"][:, 0])
    )
    digests = entries["digest"][order]
    repeats = (digests[1:] == digests[:-1]).all(axis=1)
    return entries["document"][order[1:][repeats]]


def _fill_buckets(buckets: Sequence[Path], chunks: Sequence[Chunk], starts: np.ndarray) -> None:
    """Writes files of entries; all copies of a text come into one."""
    pending: list[np.ndarray] = []
    for number, chunk in enumerate(chunks):
        index = chunk.index()
        entries = np.zeros(index.size, _ENTRY_DTYPE)
        entries["digest"], entries["heldout"] = index["digest"], index["heldout"]
        entries["document"] = starts[number] + np.arange(index.size)
        pending.append(entries)
        if sum(part.size for part in pending) < _BUCKET_DOCUMENTS and number < len(chunks) - 1:
            continue
        entries, pending = np.concatenate(pending), []
        bucket_of = entries["digest"][:, 1] % max(1, len(buckets))
        for n, path in enumerate(buckets):
            with path.open("ab") as file:
                entries[bucket_of == n].tofile(file)


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """One shard to write: all that decides it, and the folder that receives it."""

    Result: ClassVar[type] = Shard

    name: str
    split: str
    size: int  # tokens
    parts: tuple[tuple[Chunk, int, int], ...]  # chunk, and start and stop of the split's tokens in it
    vocab_size: int
    folder: Storage

    def run(self, report: Report) -> Shard:
        """Writes it; in a local folder, finds it when an attempt that was ended later has written it."""
        folder, shard = self.folder, self._recorded() if self.folder.is_local else None
        if shard is None and folder.is_local:
            folder.discard(self.name)
            folder.path.mkdir(parents=True, exist_ok=True)
            shard = write_shard(folder.path / self.name, self._blocks(), self.vocab_size)
            folder.write_sealed(self._record, {"folder": folder.name, "shard": dataclasses.asdict(shard)})
        elif shard is None:
            with folder.create(self.name) as path:
                shard = write_shard(path, self._blocks(), self.vocab_size)
        report(self.size, 0, self.size)
        return shard

    def discard_damaged(self) -> list[str]:
        """Deletes the shard in a local folder if it is not as it was written; returns its name if it did."""
        if self._record not in self.folder.names():
            return []
        with contextlib.suppress(ShardError):
            if (shard := self._recorded()) is not None:
                check_shards(self.folder.path, [shard], contents=True)
                return []
        self.folder.discard(self.name)
        self.folder.discard(self._record)
        return [f"{self.folder.url}/{self.name}"]

    @property
    def _record(self) -> str:
        """Names the file that says that the shard was written, and with which bytes; goes when all are."""
        return f".{self.name}.json"

    def _recorded(self) -> Shard | None:
        """Reads the shard as it was written; None if it was not, or the record of that is damaged."""
        content = self.folder.read_sealed(self._record)
        if content is None or content.get("folder") != self.folder.name:
            return None
        shard = Shard(**content["shard"])
        return shard if (shard.name, shard.tokens) == (self.name, self.size) else None

    def _blocks(self) -> Iterator[np.ndarray]:
        dtype = token_dtype(self.vocab_size)
        for chunk, start, stop in self.parts:
            yield from chunk.tokens(self.split == "heldout", start, stop, dtype)


def plan_shards(
    chunks: Sequence[Chunk], totals: Sequence[Totals], vocab_size: int, shard_tokens: int, folder: Storage
) -> list[ShardTask]:
    """Plans shards of near-equal size for both splits; each is one stream, the kept documents in order."""
    tasks = []
    for number, split in enumerate(SPLITS):
        ends = np.cumsum([0, *(total.tokens[number] for total in totals)])
        bounds = shard_bounds(int(ends[-1]), shard_tokens)
        for i, (start, stop) in enumerate(bounds):
            first = int(np.searchsorted(ends, start, side="right")) - 1
            last = int(np.searchsorted(ends, stop, side="left"))
            parts = tuple(
                (chunks[c], max(0, start - int(ends[c])), min(stop, int(ends[c + 1])) - int(ends[c]))
                for c in range(first, last)
                if ends[c] < ends[c + 1]
            )
            name = shard_name(split, i, len(bounds))
            tasks.append(ShardTask(name, split, stop - start, parts, vocab_size, folder))
    return tasks
