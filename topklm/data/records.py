"""A stream of token ids on disk, cut into records so that any token is found by arithmetic.

Shards are ArrayRecord files of fixed-length records. What the tokens mean, and where documents
begin, is not known here.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import errno
import hashlib
import os
from pathlib import Path
import threading
from typing import Any

from array_record.python import array_record_module
import numpy as np

from topklm.errors import UserError
from topklm.files import fsync

RECORD_TOKENS = 2048  # tokens per record; the last record of a stream may be shorter
SHARD_TOKENS = 8192 * RECORD_TOKENS  # tokens per shard, 16.8 M; the last shard may be shorter

_WRITER_OPTIONS = "group_size:1"  # one record per compressed chunk: nothing unwanted is decoded
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # the library's advice for random access
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a stream."""

    name: str  # file name inside the dataset's folder
    tokens: int
    size: int  # bytes
    sha256: str  # of the file, hex


def token_dtype(vocab_size: int) -> np.dtype:
    """The little-endian integer type that tokens of this vocabulary are stored in."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class StreamWriter:
    """Appends token ids to a new stream; use as a context manager, then read `shards`.

    Files are named `<stream>-00000-of-00002.arrayrecord` once their number is known, and each is
    fsynced. The folder should be one that nobody reads until the stream is whole.
    """

    def __init__(self, folder: Path, stream: str, vocab_size: int, tokens_per_shard: int = SHARD_TOKENS):
        if tokens_per_shard % RECORD_TOKENS:
            raise ValueError(f"tokens_per_shard must be a multiple of {RECORD_TOKENS}")
        self.shards: tuple[Shard, ...] = ()  # filled when the stream is closed
        self._folder, self._stream, self._vocab_size = folder, stream, vocab_size
        self._tokens_per_shard = tokens_per_shard
        self._pending: list[np.ndarray] = []  # tokens of the record not yet full
        self._n_pending = 0
        self._writer: Any = None
        self._tokens_in_shard = 0
        self._finished: list[tuple[Path, int]] = []

    def __enter__(self) -> "StreamWriter":
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if exc_type is None:
            self._close()
        elif self._writer is not None:
            # The caller's error is the one to report, not what closing half a file says to it.
            with contextlib.suppress(RuntimeError):
                self._writer.close()

    def append(self, ids: np.ndarray) -> None:
        """Adds integer ids, shape [n], each from 0 to vocab_size - 1."""
        if ids.size and (ids.min() < 0 or ids.max() >= self._vocab_size):
            raise ValueError(f"token ids must be from 0 to {self._vocab_size - 1}")
        self._pending.append(ids)
        self._n_pending += ids.size
        if self._n_pending >= RECORD_TOKENS:
            tokens = np.concatenate(self._pending)
            whole = tokens.size - tokens.size % RECORD_TOKENS
            for start in range(0, whole, RECORD_TOKENS):
                self._write_record(tokens[start : start + RECORD_TOKENS])
            self._pending, self._n_pending = [tokens[whole:]], tokens.size - whole

    def _write_record(self, tokens: np.ndarray) -> None:
        path = self._folder / f"{self._stream}-{len(self._finished):05d}.arrayrecord"
        with _write_errors_are_os_errors(path):
            if self._writer is None:
                self._writer = array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)
            self._writer.write(tokens.astype(token_dtype(self._vocab_size)).tobytes())
        self._tokens_in_shard += tokens.size
        if self._tokens_in_shard == self._tokens_per_shard:
            self._finish_shard(path)

    def _finish_shard(self, path: Path) -> None:
        with _write_errors_are_os_errors(path):
            self._writer.close()
        fsync(path)
        self._finished.append((path, self._tokens_in_shard))
        self._writer, self._tokens_in_shard = None, 0

    def _close(self) -> None:
        if self._n_pending:
            self._write_record(np.concatenate(self._pending))
        if self._writer is not None:
            self._finish_shard(self._folder / f"{self._stream}-{len(self._finished):05d}.arrayrecord")
        shards = []
        for i, (path, tokens) in enumerate(self._finished):
            final = path.with_name(f"{self._stream}-{i:05d}-of-{len(self._finished):05d}.arrayrecord")
            path.rename(final)
            shards.append(Shard(final.name, tokens, final.stat().st_size, sha256_of_file(final)))
        self.shards = tuple(shards)


class TokenStream:
    """Random access to a stream that `StreamWriter` wrote; `len` is its number of tokens.

    Safe to use from several threads and to pickle. A shard is opened when first read.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], vocab_size: int):
        self._folder, self._shards = folder, tuple(shards)
        self._dtype = token_dtype(vocab_size)
        self._starts = np.cumsum([0, *(shard.tokens for shard in shards)])
        self._prepare_to_open()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_readers", "_locks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare_to_open()

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1, int32[stop - start].

        Raises:
            UserError: If a shard is missing, cut short, damaged, or not the one that was written.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of a stream of {len(self)}")
        parts = [np.zeros(0, np.int32)]
        while start < stop:
            number = int(np.searchsorted(self._starts, start, side="right")) - 1
            end = min(stop, int(self._starts[number + 1]))
            first = int(self._starts[number])
            parts.append(self._read_shard(number, start - first, end - first))
            start = end
        return np.concatenate(parts)

    def _prepare_to_open(self) -> None:
        self._readers: list[Any] = [None] * len(self._shards)
        self._locks = [threading.Lock() for _ in self._shards]

    def _read_shard(self, number: int, start: int, stop: int) -> np.ndarray:
        first, last = start // RECORD_TOKENS, (stop - 1) // RECORD_TOKENS
        path = self._folder / self._shards[number].name
        with self._locks[number]:
            if self._readers[number] is None:
                self._readers[number] = _open_shard(path, self._shards[number])
            try:
                records = self._readers[number].read(list(range(first, last + 1)))
            except RuntimeError as e:
                raise _bad_shard(path, f"is damaged ({e})") from e
        tokens = np.frombuffer(b"".join(records), self._dtype).astype(np.int32)
        offset = first * RECORD_TOKENS
        if tokens.size != min((last + 1) * RECORD_TOKENS, self._shards[number].tokens) - offset:
            raise _bad_shard(path, "holds other records than were written")
        return tokens[start - offset : stop - offset]


def check_shards(folder: Path, shards: Sequence[Shard], *, contents: bool = False) -> None:
    """Checks that every shard is there in its full size, and with `contents` that no byte changed.

    Raises:
        UserError: Naming the first file that is not as it was written.
    """
    for shard in shards:
        path = folder / shard.name
        _check_size(path, shard)
        if contents and sha256_of_file(path) != shard.sha256:
            raise _bad_shard(path, "holds other bytes than were written")


def sha256_of_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_shard(path: Path, shard: Shard) -> Any:
    _check_size(path, shard)
    try:
        reader = array_record_module.ArrayRecordReader(str(path), _READER_OPTIONS)
        records = reader.num_records()
    except RuntimeError as e:
        raise _bad_shard(path, f"cannot be read ({e})") from e
    # A file that is not ArrayRecord opens without complaint and has no records.
    if records != -(-shard.tokens // RECORD_TOKENS):
        raise _bad_shard(path, f"holds {records} records, not what was written")
    return reader


def _check_size(path: Path, shard: Shard) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError as e:
        raise _bad_shard(path, "is missing") from e
    if size != shard.size:
        raise _bad_shard(path, f"has {size} bytes, not {shard.size}")


def _bad_shard(path: Path, what: str) -> UserError:
    return UserError(f"{path} {what}; delete its folder and prepare the data again")


@contextlib.contextmanager
def _write_errors_are_os_errors(path: Path) -> Iterator[None]:
    """ArrayRecord reports a full disk as a RuntimeError that holds the system's message."""
    try:
        yield
    except RuntimeError as e:
        for code in _WRITE_ERRORS:
            if os.strerror(code) in str(e):
                raise OSError(code, os.strerror(code), str(path)) from e
        raise
