"""Finds where in an ArrayRecord file each record lies, so that a few can be read without the rest.

The format is that of github.com/google/array_record over Riegeli (doc/riegeli_records_file_format.md): chunks
one after the other, a header in every block of 64 KiB, the index in the last chunk but one. Only writers with
group_size:1 are known here, which put each record into a chunk of its own. Checksums are not compared: that
is done by the library that reads the records.
"""

from collections.abc import Callable
import struct
from typing import Any

import numpy as np
import tensorstore as ts

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
        postscript = _records(_chunk(read(start, stop), start))[0]
        # Field 1 is the offset of the index, field 2 the magic number.
        end, after = _varint(postscript, 1)
        if postscript[0] != 0x08 or postscript[after] != 0x10 or _varint(postscript, after + 1)[0] != _MAGIC:
            raise ValueError("no postscript")
        if end > tail:
            raise ValueError("an index after the end")
        start, stop = end, tail
        _, *entries = _records(_chunk(read(start, stop), start))
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


def _records(data: np.ndarray) -> list[np.ndarray]:
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
