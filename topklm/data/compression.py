"""Decompresses files as they are read: everything before the first damage, in bounded memory.

Knows gzip and Zstandard; what the bytes mean is `topklm.data.readers`' affair.
"""

from collections.abc import Callable, Iterator
import contextlib
import re
from typing import Any
import zlib

from topklm.imports import optional_module

BLOCK_BYTES = 1 << 20  # read, and decompressed, at a time

_GZIP_BYTES = 64 << 10  # compressed; what a step does not use up is copied
# RFC 8878, section 3.1.
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18", re.DOTALL)
_ZSTD_RLE_BLOCK = 1
# Some public corpora are compressed with `zstd --long=31`; the memory is taken only if a file asks for it.
_ZSTD_MAX_WINDOW_BYTES = 1 << 31

Read = Callable[..., bytes]  # read(size) -> bytes, fewer at the end only


class DamageError(Exception):
    """The bytes of a file end or break where they must not; its text says how."""


def plain_blocks(read: Read) -> Iterator[bytes]:
    """The content of a file that is not compressed, in blocks."""
    while block := read(BLOCK_BYTES):
        yield block


def gunzip(read: Read) -> Iterator[bytes]:
    """The content of all members of a gzip file (RFC 1952), in blocks."""
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
    """What can be had from data whose decompression fails at some point; the library gives all or nothing."""
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


def unzstd(read: Read) -> Iterator[bytes]:
    """The content of all frames of a Zstandard file (RFC 8878), in blocks.

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
