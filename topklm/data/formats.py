"""Formats of files that hold text: their endings, who reads them, and how they are decompressed.

A format is one entry of `FORMATS`, a compression one of `COMPRESSIONS`; sources, readers, help, errors and
the table of docs/data.md know formats from here. Decompression yields everything before the first damage, in
bounded memory.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import io
import re
from typing import Any
from urllib.parse import urlsplit
import zlib

from topklm.data import documents, tables
from topklm.data.documents import BLOCK_BYTES, DamageError, Items, OtherEncodingError, Problem
from topklm.errors import UserError
from topklm.imports import optional_module

QUICKSTART = "quickstart"

_GZIP_BYTES = 64 << 10  # compressed; bytes that a step does not use up are copied
# RFC 8878, section 3.1.
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18", re.DOTALL)
_ZSTD_RLE_BLOCK = 1
# Some public corpora are compressed with `zstd --long=31`; the memory is taken only if a file asks for it.
_ZSTD_MAX_WINDOW_BYTES = 1 << 31

Read = Callable[..., bytes]  # read(size) -> bytes, fewer at the end only


@dataclasses.dataclass(frozen=True)
class Format:
    """How files of one ending are read; either `read` or `read_table`."""

    help: str  # for docs: the text that is read
    # From its start to its end: (content in blocks, text field) -> items; may be compressed.
    read: Callable[[Iterator[bytes], str], Items] | None = None
    # By seeking: (file, url, text field) -> (row, number of rows, item).
    read_table: Callable[[io.RawIOBase, str, str], tables.Rows] | None = None
    extra: str = ""  # of topklm, with the packages that it needs


FORMATS: dict[str, Format] = {
    ".txt": Format("documents of about 16 KiB, cut at blank lines", documents.read_text),
    ".jsonl": Format("one JSON object a line, the text under `--text-field`", documents.read_json_lines),
    ".json": Format(
        "the same, or an array of objects, or one object over several lines", documents.read_json
    ),
    ".parquet": Format("the column `--text-field`", read_table=tables.read_parquet, extra="parquet"),
    # No ending: the file of a package.
    QUICKSTART: Format("leads of articles of English Wikipedia", documents.read_quickstart, extra=QUICKSTART),
}


def endings() -> tuple[str, ...]:
    """Returns the endings of all files that are read, compressed ones after their own kind."""
    known = {ending: kind for ending, kind in FORMATS.items() if ending.startswith(".")}
    return tuple(e + c for e, kind in known.items() for c in (COMPRESSIONS if kind.read else ("",)))


def described() -> str:
    """Lists the endings for a person: ".txt, .jsonl (each also with .gz or .zst) or .parquet"."""
    read = [e for e, kind in FORMATS.items() if e.startswith(".") and kind.read]
    others = [e for e, kind in FORMATS.items() if e.startswith(".") and not kind.read]
    compressed = " or ".join(filter(None, COMPRESSIONS))
    return " or ".join([f"{', '.join(read)} (each also with {compressed})", *others])


def ending_of(name: str) -> str:
    """Returns the known ending of a path or URL, in lower case, or ""."""
    path = urlsplit(name).path if name.startswith("http") else name
    return next((ending for ending in endings() if path.lower().endswith(ending)), "")


def checked_ending(name: str, flag: str) -> str:
    """Returns the known ending of a path or URL, in lower case; UserError, with `flag`, if it has none."""
    ending = ending_of(name)
    if not ending:
        raise UserError(f"{flag}: cannot read {name!r}: files must end in {described()}")
    return ending


def of(ending: str) -> Format:
    """Returns the format of a known ending."""
    return FORMATS[_parts(ending)[0]]


def read_items(read: Read, ending: str, text_field: str) -> Items:
    """Yields the items of a file that is read from its start to its end."""
    kind, compression = _parts(ending)
    reader = FORMATS[kind].read
    assert reader is not None
    try:
        blocks = documents.without_mark_of_others(COMPRESSIONS[compression](read))
        yield from reader(blocks, text_field)
    except OtherEncodingError as e:
        yield Problem("not UTF-8", "byte 0", str(e))
    except DamageError as e:  # of a reader that does not say where
        yield Problem("damaged file", "after the last document", str(e))


def _parts(ending: str) -> tuple[str, str]:
    """Splits an ending into the format's and the compression's."""
    compression = next((c for c in COMPRESSIONS if c and ending.endswith(c)), "")
    return ending.removesuffix(compression), compression


def _gunzip(read: Read) -> Iterator[bytes]:
    """Yields the content of all members of a gzip file (RFC 1952)."""
    data = _first_block(read, _GZIP_BYTES)
    what = "no gzip file"
    while data:
        decoder = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        while not decoder.eof:
            data = data or read(_GZIP_BYTES)
            before = decoder.copy()
            try:
                block = decoder.decompress(data, BLOCK_BYTES)
            except zlib.error as e:
                yield _inflate_until_error(before, data)
                raise DamageError(f"{what}: {e}") from e
            if not (data or block or decoder.eof):
                raise DamageError("cut short within the compressed data")
            data = decoder.unconsumed_tail
            what = "damaged gzip data"
            yield block
        data = decoder.unused_data
        # Zeros may fill a file up to the blocks of its medium.
        while not (data := data.lstrip(b"\0")):
            if not (data := read(_GZIP_BYTES)):
                return
        what = "other data after the compressed data"


def _inflate_until_error(decoder: Any, data: bytes) -> bytes:
    """Decompresses data up to the byte at which that fails; the library gives all or nothing."""
    good, start = [], 0
    for step in (4096, 64, 1):
        before = decoder
        with contextlib.suppress(zlib.error):
            while start < len(data):
                before = decoder.copy()
                good.append(decoder.decompress(data[start : start + step]))
                start += step
        decoder = before
    return b"".join(good)


def _unzstd(read: Read) -> Iterator[bytes]:
    """Yields the content of all frames of a Zstandard file (RFC 8878).

    The library does not say whether a file ends within a frame, and may turn a few bytes into gigabytes at
    once; so it is given one of the format's blocks after the other, each of which holds 128 KiB at most.
    """
    zstandard = optional_module("zstandard", "zstd", "reading .zst")
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW_BYTES)
    magic, what = _first_block(read, 4), "no zstd file"
    while magic:
        try:
            if _ZSTD_SKIPPABLE.fullmatch(magic):
                _skip(read, int.from_bytes(_exactly(read, 4), "little"))
            elif magic == _ZSTD_MAGIC:
                yield from _zstd_frame(read, zstandard, decompressor.decompressobj())
            else:
                raise DamageError(what)
        except zstandard.ZstdError as e:
            raise DamageError(f"damaged zstd data: {e}") from e
        magic, what = read(4), "other data after the compressed data"


def _zstd_frame(read: Read, zstandard: Any, decoder: Any) -> Iterator[bytes]:
    header = _ZSTD_MAGIC + _exactly(read, 1)
    has_checksum = header[4] & 0b100
    header += _exactly(read, zstandard.frame_header_size(header) - len(header))
    yield decoder.decompress(header)
    is_last = False
    while not is_last:
        block = _exactly(read, 3)
        number = int.from_bytes(block, "little")
        is_last, kind, size = bool(number & 1), number >> 1 & 3, number >> 3
        yield decoder.decompress(block + _exactly(read, 1 if kind == _ZSTD_RLE_BLOCK else size))
    if has_checksum:
        yield decoder.decompress(_exactly(read, 4))


def _first_block(read: Read, size: int) -> bytes:
    block = read(size)
    if not block:
        raise DamageError("cut short: holds no bytes at all")
    return block


def _exactly(read: Read, size: int) -> bytes:
    block = read(size)
    if len(block) < size:
        raise DamageError("cut short within the compressed data")
    return block


def _skip(read: Read, size: int) -> None:
    while size:
        size -= len(_exactly(read, min(size, BLOCK_BYTES)))


COMPRESSIONS: dict[str, Callable[[Read], Iterator[bytes]]] = {
    "": lambda read: iter(lambda: read(BLOCK_BYTES), b""),
    ".gz": _gunzip,
    ".zst": _unzstd,
}
