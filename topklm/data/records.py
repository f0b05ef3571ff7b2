"""A stream of token ids on disk, cut into records so that any token is found by arithmetic.

Shards are ArrayRecord files of fixed-length records. The meaning of tokens is not known here.

`record_offsets` finds where in such a file each record lies, so that a few can be read without the rest. The
format is that of github.com/google/array_record over Riegeli (doc/riegeli_records_file_format.md): chunks one
after the other, a header in every block of 64 KiB, the index in the last chunk but one. Only writers with
group_size:1 are known here, which put each record into a chunk of its own. Checksums are not compared: that
is done by the library that reads the records.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import os
from pathlib import Path
import struct
import threading
from typing import Any, TypeAlias

from array_record.python import array_record_module
import numpy as np
import tensorstore as ts

from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.storage.files import replacing
from topklm.storage.remote import ByteRange, RemoteFolder

BLOCK_BYTES = 1 << 16
_BLOCK_HEADER_BYTES = 24
_CHUNK_HEADER = struct.Struct("<8x Q 8x 8x 8x")  # hash, SIZE, hash, type and records, decoded size
_MAGIC = 0x71930E704FDAE05E


class NoIndexError(ValueError):
    """Bytes `start` to `stop` - 1 of the file hold no index."""

    def __init__(self, start: int, stop: int):
        super().__init__(f"no index in bytes {start} to {stop - 1}")
        self.start, self.stop = start, stop


def record_offsets(read: Callable[[int, int], bytes], size: int) -> np.ndarray:
    """Returns the offset of each record in a file of `size` bytes, and the end of the last; int64[n + 1].

    `read` gives the bytes from one offset to before another. NoIndexError if they hold no index.
    """
    tail = size - BLOCK_BYTES
    if tail < 0:
        raise NoIndexError(0, size)
    start, stop = tail, size
    try:
        postscript = _chunk_records(_chunk(read(start, stop), start))[0]
        # Field 1 is the offset of the index, field 2 the magic number.
        end, after = _varint(postscript, 1)
        if postscript[0] != 0x08 or postscript[after] != 0x10 or _varint(postscript, after + 1)[0] != _MAGIC:
            raise ValueError("no postscript")
        if end > tail:
            raise ValueError("an index after the end")
        start, stop = end, tail
        _, *entries = _chunk_records(_chunk(read(start, stop), start))
        if any(entry[0] != 0x08 for entry in entries[:1]):
            raise ValueError("no index")
        content = np.concatenate([*entries, np.zeros(0, np.uint8)])
        begins = np.cumsum([0, *map(len, entries)])[:-1]
        offsets = np.append(_varints(content, begins + 1), end)
    except (ValueError, IndexError, struct.error) as e:
        raise NoIndexError(start, stop) from e
    if (np.diff(offsets) <= 0).any():
        raise NoIndexError(start, stop)
    return offsets


def _chunk(content: bytes, offset: int) -> np.ndarray:
    """Returns the data of the chunk at an offset of the file, uint8[n]; ValueError if it is none."""
    is_content = np.arange(offset, offset + len(content)) % BLOCK_BYTES >= _BLOCK_HEADER_BYTES
    whole = np.frombuffer(content, np.uint8)[is_content]
    (n_bytes,) = _CHUNK_HEADER.unpack(whole[: _CHUNK_HEADER.size].tobytes())
    if not 0 < n_bytes <= whole.size - _CHUNK_HEADER.size:
        raise ValueError("not a chunk")
    return whole[_CHUNK_HEADER.size : _CHUNK_HEADER.size + n_bytes]


def _chunk_records(data: np.ndarray) -> list[np.ndarray]:
    """Splits the data of a simple chunk into its records, uint8 each."""
    codec, (n_bytes, begin) = int(data[0]), _varint(data, 1)
    sizes = _decompressed(data[begin : begin + n_bytes], codec)
    starts = np.flatnonzero(np.append(True, sizes[:-1] < 128))
    lengths = _varints(sizes, starts)
    values = _decompressed(data[begin + n_bytes :], codec)
    if lengths.sum() != values.size:
        raise ValueError("records of other sizes")
    return np.split(values, np.cumsum(lengths)[:-1])


def _decompressed(data: np.ndarray, codec: int) -> np.ndarray:
    if codec == 0:
        return data
    if codec != ord("z"):
        raise ValueError(f"compression {codec}")
    size, begin = _varint(data, 0)
    # Zstandard as TensorStore has it: an array of one chunk.
    metadata = {"zarr_format": 2, "shape": [size], "chunks": [size], "dtype": "|u1", "order": "C"}
    metadata |= {"compressor": {"id": "zstd"}, "fill_value": None, "filters": None}
    spec = {"driver": "zarr", "kvstore": {"driver": "memory"}, "metadata": metadata}
    array: Any = ts.open(spec, create=True).result()
    array.kvstore["0"] = data[begin:].tobytes()
    return array.read().result()


def _varint(data: np.ndarray, at: int) -> tuple[int, int]:
    """Returns the number that begins at an index, and the index after it."""
    after = at + int(np.argmax(data[at : at + 10] < 128)) + 1
    return int(_varints(data, np.array([at]))[0]), after


def _varints(data: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Returns the numbers, below 2^63, that begin at these indices: seven bits a byte, the low ones first."""
    found = np.zeros(starts.size, np.int64)
    goes_on = np.ones(starts.size, bool)
    for n in range(9):
        byte = data[np.minimum(starts + n, data.size - 1)].astype(np.int64)
        found |= np.where(goes_on, (byte & 127) << 7 * n, 0)
        goes_on &= byte >= 128
    return found


RECORD_TOKENS = 2048  # tokens per record; the last record of a stream may be shorter
SHARD_TOKENS = 8192 * RECORD_TOKENS  # tokens per shard at most, 16.8 M, unless asked otherwise
MAX_OPEN_SHARDS = 256  # of one stream; systems allow a process some 1,000 open files

# From a bucket: records that are read together, and bytes that usually hold the index of a shard.
_SPAN_RECORDS = 16
_INDEX_BYTES = 3 * BLOCK_BYTES
_ROUNDS = 6  # requests for the same records, of which three are needed, before they count as damaged

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
    ends: str = ""  # sha256 of its first and last record, which tells it from others; "" in older datasets


class ShardError(UserError):
    """A shard is not the file that was written; its `fault` names no file, e.g. "is missing"."""

    def __init__(self, message: str, fault: str = ""):
        super().__init__(message)
        self.fault = fault


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the little-endian integer type that tokens of this vocabulary are stored in."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def shard_bounds(n_tokens: int, shard_tokens: int = SHARD_TOKENS) -> list[tuple[int, int]]:
    """Cuts a stream into as few shards as possible, of near-equal size; returns (start, stop) of each.

    A shard has at most `shard_tokens`, rounded down to whole records, one at least. The numbers of records
    differ by one at most; only the stream's last record may be short. An empty stream has no shard.
    """
    records = -(-n_tokens // RECORD_TOKENS)
    n_shards = -(-records // max(1, shard_tokens // RECORD_TOKENS))
    cuts = [records * i // n_shards * RECORD_TOKENS for i in range(n_shards)]
    return list(itertools.pairwise([*cuts, n_tokens])) if n_shards else []


def shard_name(stream: str, number: int, n_shards: int) -> str:
    """Names a shard, for example `train-00000-of-00002.arrayrecord`."""
    return f"{stream}-{number:05d}-of-{n_shards:05d}.arrayrecord"


def write_shard(path: Path, blocks: Iterable[np.ndarray], vocab_size: int) -> Shard:
    """Writes a shard beside `path`, flushes it to the disk, and renames it into place.

    Blocks are token ids in order, integers [n_i] below vocab_size, which decides the bytes of a token.
    ValueError for other ids, OSError if the disk refuses.
    """
    dtype, tokens, first, last = token_dtype(vocab_size), 0, b"", b""
    with replacing(path) as temporary:
        with _write_errors_are_os_errors(path):
            writer = array_record_module.ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
            try:
                for record in _records(blocks, vocab_size):
                    last = record.astype(dtype).tobytes()
                    writer.write(last)
                    first, tokens = first or last, tokens + record.size
            except BaseException:
                # The error at hand is the one to report, not what closing half a file says to it.
                with contextlib.suppress(RuntimeError):
                    writer.close()
                raise
            writer.close()
        size, sha256 = temporary.stat().st_size, sha256_of_file(temporary)
    return Shard(path.name, tokens, size, sha256, _ends_digest([first, last]))


def _records(blocks: Iterable[np.ndarray], vocab_size: int) -> Iterator[np.ndarray]:
    """Yields the tokens of all blocks in pieces of RECORD_TOKENS; the last may be shorter."""
    rest = np.zeros(0, np.int32)
    for ids in blocks:
        if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
            raise ValueError(f"token ids must be from 0 to {vocab_size - 1}")
        tokens = np.concatenate([rest, ids])
        whole = tokens.size - tokens.size % RECORD_TOKENS
        for start in range(0, whole, RECORD_TOKENS):
            yield tokens[start : start + RECORD_TOKENS]
        rest = tokens[whole:]
    if rest.size:
        yield rest


class TokenStream:
    """Random access to a stream that `write_shard` wrote; `len` is its number of tokens.

    Safe to use from several threads and to pickle. A shard is opened, and its size, its number of records and
    the first and last of them are checked, when it is first read; no more than a few hundred are open at a
    time. Every record is checked by the file format, as it is read. Of a folder in a bucket only ranges are
    read, those of one call at the same time.
    """

    def __init__(self, folder: Path | RemoteFolder, shards: Sequence[Shard], vocab_size: int):
        self._folder, self._shards, self._vocab_size = folder, tuple(shards), vocab_size
        self._starts = np.cumsum([0, *(shard.tokens for shard in shards)])
        opened: Any = _RemoteShard if isinstance(folder, RemoteFolder) else _OpenShard
        # A thread that reads from one that is dropped keeps it alive: the last reference closes the file.
        self._shard = functools.lru_cache(MAX_OPEN_SHARDS)(functools.partial(opened, folder))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple:
        return TokenStream, (self._folder, self._shards, self._vocab_size)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Reads tokens start to stop - 1, int32[stop - start]; ShardError if a shard is not as written."""
        return self.read_many([(start, stop)])[0]

    def read_many(self, spans: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Reads tokens start to stop - 1 of each span, as `read`."""
        parts = [self._parts(start, stop) for start, stop in spans]
        found: dict[_Part, np.ndarray] = {}
        for round_ in range(_ROUNDS + 1):
            fetched: dict[ByteRange, _RemoteShard] = {}
            for part in itertools.chain.from_iterable(parts):
                if part not in found:
                    try:
                        found[part] = self._read(part, is_last_try=round_ == _ROUNDS)
                    except _NotHereError as e:
                        fetched.update(dict.fromkeys(e.ranges, e.shard))
            if not fetched:
                break
            _fetch(fetched)
        empty = np.zeros(0, np.int32)
        return [np.concatenate([empty, *(found[part] for part in those)]) for those in parts]

    def _parts(self, start: int, stop: int) -> "list[_Part]":
        """Cuts a span at the ends of shards."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of a stream of {len(self)}")
        parts = []
        while start < stop:
            number = int(np.searchsorted(self._starts, start, side="right")) - 1
            first, end = int(self._starts[number]), min(stop, int(self._starts[number + 1]))
            parts.append((number, start - first, end - first))
            start = end
        return parts

    def _read(self, part: "_Part", is_last_try: bool) -> np.ndarray:
        number, start, stop = part
        shard = self._shard(self._shards[number])
        try:
            return shard.read(start, stop, token_dtype(self._vocab_size))
        except _NotHereError as e:
            if is_last_try:
                raise e.damage from e
            raise


_Part: TypeAlias = tuple[int, int, int]  # number of a shard, and tokens of it: from, to before


class _OpenShard:
    """A shard's reader, for one thread at a time."""

    def __init__(self, folder: Path, shard: Shard):
        self._path, self._shard = folder / shard.name, shard
        self._lock = threading.Lock()
        self._reader: Any = None

    def read(self, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
        """Reads tokens start to stop - 1 of the shard, int32."""
        wanted = range(start // RECORD_TOKENS, (stop - 1) // RECORD_TOKENS + 1)
        with self._lock:
            records = self._records(wanted)
        tokens = np.frombuffer(b"".join(records), dtype).astype(np.int32)
        offset = wanted[0] * RECORD_TOKENS
        if tokens.size != min(wanted.stop * RECORD_TOKENS, self._shard.tokens) - offset:
            raise _bad_shard(self._path, "holds other records than were written")
        return tokens[start - offset : stop - offset]

    def _records(self, wanted: range) -> list[bytes]:
        if self._reader is None:
            _check_size(self._path, self._shard)
            self._reader = self._open(self._path)
        try:
            return self._reader.read(list(wanted))
        except RuntimeError as e:
            raise self._damage(wanted, e) from e

    def _damage(self, wanted: range, error: Exception) -> ShardError:
        number = next((n for n in wanted if not self._is_readable(n)), wanted[0])
        return _bad_shard(self._path, f"is damaged: its record {number} cannot be read ({error})")

    def _is_readable(self, record: int) -> bool:
        try:
            self._reader.read([record])
        except RuntimeError:
            return False
        return True

    def _open(self, path: str | Path) -> Any:
        shard = self._shard
        try:
            reader = array_record_module.ArrayRecordReader(str(path), _READER_OPTIONS)
            records = reader.num_records()
        except RuntimeError as e:
            raise _bad_shard(self._path, f"cannot be read ({e})") from e
        # A file that is not ArrayRecord opens without complaint and has no records.
        if records != -(-shard.tokens // RECORD_TOKENS):
            raise _bad_shard(self._path, f"holds {records} records, not what was written")
        with contextlib.suppress(RuntimeError):  # a damaged record is refused when it is asked for
            if shard.ends and _ends_digest(reader.read([0, records - 1])) != shard.ends:
                raise _bad_shard(self._path, "is another shard than was written")
        return reader


class _NotHereError(Exception):
    """Bytes that are not yet on this machine, or are `damage` if they were just fetched."""

    def __init__(self, shard: "_RemoteShard", ranges: Sequence[tuple[int, int]], damage: ShardError):
        super().__init__(str(damage))
        self.ranges = [ByteRange(shard.name, start, stop) for start, stop in ranges]
        self.shard, self.damage = shard, damage


class _RemoteShard(_OpenShard):
    """A shard in a bucket, read from a local file that has holes where nothing was fetched.

    A hole fails the checksums of the format like any other damage, which is all that tells them apart: so
    processes share such files, and one that was killed leaves nothing that could be taken for data.
    """

    def __init__(self, folder: RemoteFolder, shard: Shard):
        super().__init__(folder, shard)  # type: ignore[arg-type]  # for its name in errors
        self.folder, self.name = folder, shard.name
        self._file = f"{shard.sha256}.arrayrecord"
        self._offsets: Any = None

    def keep(self, parts: dict[int, bytes]) -> None:
        """Writes bytes of the shard, by their offsets, into its local file."""
        self.folder.keep(self._file, self._shard.size, parts)

    def _records(self, wanted: range) -> list[bytes]:
        local = self.folder.cache / self._file
        if not local.exists():  # deleted, for the cache was full
            self._reader = None
        if self._reader is None:
            self._offsets = self._index(local)
            try:
                self._reader = self._open(local)
            except ShardError as e:
                raise _NotHereError(self, self._ends(_INDEX_BYTES), e) from e
        try:
            return self._reader.read(list(wanted))
        except RuntimeError as e:
            first = wanted.start // _SPAN_RECORDS * _SPAN_RECORDS
            last = min(-(-wanted.stop // _SPAN_RECORDS) * _SPAN_RECORDS, len(self._offsets) - 1)
            span = int(self._offsets[first]), int(self._offsets[last])
            raise _NotHereError(self, [span], self._damage(wanted, e)) from e

    def _index(self, local: Path) -> np.ndarray:
        """Returns where the records lie, as `record_offsets`, by what is here of the shard."""
        size = self._shard.size
        damage = _bad_shard(self._path, "cannot be read (its index is damaged)")
        try:
            with local.open("rb") as file:

                def read(start: int, stop: int) -> bytes:
                    return os.pread(file.fileno(), stop - start, start)

                offsets = record_offsets(read, size)
                head = read(0, BLOCK_BYTES)
        except FileNotFoundError as e:
            raise _NotHereError(self, self._ends(_INDEX_BYTES), damage) from e
        except NoIndexError as e:
            raise _NotHereError(self, self._ends(max(_INDEX_BYTES, size - e.start)), damage) from e
        if not any(head):
            raise _NotHereError(self, self._ends(_INDEX_BYTES), damage)
        return offsets

    def _ends(self, n_last: int) -> list[tuple[int, int]]:
        """Returns two ranges, of the first record and of the last bytes; one, if the shard is small."""
        size = self._shard.size
        if size <= BLOCK_BYTES + n_last:
            return [(0, size)]
        return [(0, BLOCK_BYTES), (size - n_last, size)]


def _fetch(ranges: Mapping[ByteRange, _RemoteShard]) -> None:
    """Reads ranges, which may be of several shards of a folder, into their local files."""
    parts: dict[_RemoteShard, dict[int, bytes]] = {}
    folder = next(iter(ranges.values())).folder
    try:
        found = folder.read_ranges(ranges)
    except FileNotFoundError as e:
        raise _bad_shard(e.filename, "is missing") from e
    except EOFError as e:
        raise _bad_shard(str(e), "has fewer bytes than were written") from e
    for one, content in found.items():
        parts.setdefault(ranges[one], {})[one.start] = content
    for shard, contents in parts.items():
        shard.keep(contents)


def missing_shards(folder: Path | RemoteFolder, shards: Sequence[Shard]) -> list[str]:
    """Lists the shards that are not there; one look at the folder, however many they are."""
    there = folder.names() if isinstance(folder, RemoteFolder) else set(os.listdir(folder))
    return [shard.name for shard in shards if shard.name not in there]


def check_shards(folder: Path, shards: Sequence[Shard], *, contents: bool = False) -> None:
    """Checks that shards are there in full size, with `contents` every byte; ShardError names the first."""
    for shard in shards:
        path = folder / shard.name
        _check_size(path, shard)
        if contents and sha256_of_file(path) != shard.sha256:
            raise _bad_shard(path, "holds other bytes than were written")


def sha256_of_file(path: Path) -> str:
    """Returns the hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_size(path: Path, shard: Shard) -> None:
    # Opened, not only asked for its size: the library takes a file that it may not read for an empty one.
    with disk_errors_are_user_errors(f"reading {path}"):
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError as e:
            raise _bad_shard(path, "is missing") from e
        except IsADirectoryError as e:
            raise _bad_shard(path, "is a folder") from e
    if size != shard.size:
        raise _bad_shard(path, f"has {size} bytes, not {shard.size}")


def _ends_digest(records: Sequence[bytes]) -> str:
    return hashlib.sha256(b"".join(records)).hexdigest()


def _bad_shard(path: str | Path, what: str) -> ShardError:
    return ShardError(f"{path} {what}; delete its folder and prepare the data again", what)


@contextlib.contextmanager
def _write_errors_are_os_errors(path: Path) -> Iterator[None]:
    """Turns a full disk, which ArrayRecord reports as a RuntimeError, into an OSError."""
    try:
        yield
    except RuntimeError as e:
        for code in _WRITE_ERRORS:
            if os.strerror(code) in str(e):
                raise OSError(code, os.strerror(code), str(path)) from e
        raise
