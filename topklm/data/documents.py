"""Documents and problems, and the files that are read from their start to their end: text and JSON.

Knows broken bytes; memory stays bounded whatever a file holds. Which file is read how stands in
`topklm.data.formats`.
"""

import codecs
from collections.abc import Callable, Iterator
import dataclasses
import functools
import itertools
import json
import re
from typing import Any

from topklm.storage.files import parse_json

PROBLEMS = (
    "damaged file",
    "not UTF-8",
    "invalid JSON",
    "no text field",
    "line too long",
    "empty",
    "NUL bytes",
)
BLOCK_BYTES = 1 << 20  # read, and decompressed, at a time
MAX_LINE_BYTES = 64 << 20  # longer lines, and longer texts in a table, are no documents

# A .txt file does not say where documents begin, and a book must not fall into one split whole.
_TEXT_MIN_BYTES = 16 << 10
_TEXT_LONG_BYTES = 1 << 20  # without a blank line, a document ends with a line after these
_TEXT_MAX_BYTES = 2 << 20  # and without an end of line, here

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_OTHER_BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")  # of UTF-16 and UTF-32
_UTF_16 = "as in UTF-16: convert the file to UTF-8"
_JSON_SPACE = re.compile(r"[ \t\r\n,]*")
_BLANK_LINE = re.compile(rb"\n[ \t\r\f\v]*\n")
_SURROGATES = re.compile("[\ud800-\udfff]")
_QUICKSTART_FIELD = "extract"


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """A text: can be encoded as UTF-8, is not blank, has no NUL."""

    text: str
    where: str  # "line 12", "item 7" and "row 5", counted from 1, or "byte 16384", where it begins
    replaced: int  # invalid UTF-8 sequences and unpaired surrogates, now U+FFFD


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """A part of a file that holds no document."""

    kind: str  # one of PROBLEMS
    where: str
    what: str  # short reason


Items = Iterator[Document | Problem]


class DamageError(Exception):
    """The bytes of a file end or break where they must not; its text says how."""


class OtherEncodingError(Exception):
    """A file begins as those of another encoding do."""


def without_mark_of_others(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yields the content in blocks of which none is empty; the first holds a byte order mark whole."""
    first = b""
    for block in blocks:
        first += block
        if len(first) >= max(map(len, _OTHER_BYTE_ORDER_MARKS)):
            break
    if first.startswith(_OTHER_BYTE_ORDER_MARKS):
        raise OtherEncodingError(f"a byte order mark {_UTF_16}")
    yield from filter(None, itertools.chain([first], blocks))


def read_text(blocks: Iterator[bytes], _: str) -> Items:
    """Yields the documents of plain text, which is cut after blank lines into pieces of 16 KiB or more."""
    buffer, offset, is_first, damage = b"", 0, True, None
    try:
        for block in blocks:
            buffer, start = buffer + block, 0
            if not offset and buffer.startswith(_BYTE_ORDER_MARK):
                start = len(_BYTE_ORDER_MARK)
            while end := _document_end(buffer, start):
                yield _document(*_decode(buffer[start:end]), f"byte {offset + start}")
                start, is_first = end, False
            buffer, offset = buffer[start:], offset + start
    except DamageError as e:
        damage = Problem("damaged file", f"byte {offset + len(buffer)}", str(e))
    if buffer.strip() or (is_first and not damage):
        yield _document(*_decode(buffer), f"byte {offset}")
    if damage:
        yield damage


def _document_end(text: bytes, start: int) -> int:
    """Finds the end of the document that begins at `start`; 0 if `text` is too short to know."""
    if len(text) < start + _TEXT_MIN_BYTES:
        return 0
    limit = start + _TEXT_MAX_BYTES
    # From the last line that ends too early, as a blank line follows the end of another.
    line_before = text.rfind(b"\n", start, start + _TEXT_MIN_BYTES - 1)
    blank = _BLANK_LINE.search(text, line_before if line_before >= 0 else start + _TEXT_MIN_BYTES - 1, limit)
    line_end = text.find(b"\n", start + _TEXT_LONG_BYTES - 1, limit) + 1
    if blank or line_end:
        return min(end for end in (blank.end() if blank else 0, line_end) if end)
    if len(text) <= limit:
        return 0
    # A byte 10xxxxxx continues a character, which has four at most.
    return next((end for end in range(limit, limit - 4, -1) if text[end] & 0xC0 != 0x80), limit)


def read_json_lines(blocks: Iterator[bytes], text_field: str) -> Items:
    """Yields the items of a file that holds one JSON object a line."""
    number = 0
    try:
        for line in _lines(blocks):
            number += 1
            if line is None:
                yield too_long(f"line {number}")
            elif line and not line.isspace():
                yield _json_item(line, text_field, f"line {number}")
    except DamageError as e:
        yield Problem("damaged file", f"line {number + 1}", str(e))


def read_json(blocks: Iterator[bytes], text_field: str) -> Items:
    """Yields the items of a .json file: one JSON object a line, or values that its first line only begins."""
    first = b""
    try:
        for block in blocks:
            first += block
            if len(first.strip()) > 1:
                break
    except DamageError as e:
        yield Problem("damaged file", "line 1", str(e))
        return
    line = first.removeprefix(_BYTE_ORDER_MARK).strip().partition(b"\n")[0]
    read = _json_value_items if line.startswith(b"[") or line.strip() == b"{" else read_json_lines
    yield from read(itertools.chain([first], blocks), text_field)


def _json_value_items(blocks: Iterator[bytes], text_field: str) -> Items:
    """Yields the items of a JSON array, or of JSON values one after another."""
    # Bytes that are no UTF-8 become surrogates, which are replaced and counted with those that JSON may hold.
    decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    text, at, number, opened, closed = "", 0, 0, False, False
    try:
        while True:
            at = _JSON_SPACE.match(text, at).end()  # type: ignore[union-attr]
            if text.startswith("]" if opened else "[", at):
                opened, closed, at = True, opened, at + 1
                continue
            value = None if closed else _json_value(text, at)
            if (value[1] if value else len(text)) - at > MAX_LINE_BYTES:
                yield too_long(f"item {number + 1}", "; what follows is not read")
                return
            if value:
                number, at = number + 1, value[1]
                yield field_item(value[0], text_field, f"item {number}", 0)
                continue
            more = _more_text(blocks, decode, len(text) - at)
            if not more:
                break
            text, at = text[at:] + more, 0
        if at < len(text) or opened != closed:
            what = "other data after the array" if closed else "it is cut short, or no JSON"
            yield Problem("damaged file", f"item {number + 1}", what)
    except DamageError as e:
        yield Problem("damaged file", f"item {number + 1}", str(e))


def _more_text(blocks: Iterator[bytes], decode: Callable[[bytes], str], least: int) -> str:
    """Reads at least so many characters more, so that a long value is tried few times; "" at the end."""
    parts, size = [], 0
    for block in blocks:
        parts.append(decode(block))
        size += len(parts[-1])
        if size > least:
            break
    return "".join(parts)


def _json_value(text: str, start: int) -> tuple[Any, int] | None:
    """Parses the value that begins at `start`; says where it ends; None if the text ends before it does."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    # A number may go on.
    return None if end == len(text) and not isinstance(value, dict | list | str) else (value, end)


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes | None]:
    """Yields the lines without their ends; None for one that is too long."""
    begun, size = bytearray(), 0  # a line whose end is yet to come
    for block in blocks:
        lines: list[Any] = block.split(b"\n")
        rest = lines.pop()
        if lines:
            size += len(lines[0])
            lines[0] = bytes(begun) + lines[0] if size <= MAX_LINE_BYTES else None
            begun, size = bytearray(), 0
            yield from lines
        size += len(rest)
        begun += rest
        if size > MAX_LINE_BYTES:
            begun.clear()
    if size:
        yield bytes(begun) if size <= MAX_LINE_BYTES else None


def read_quickstart(blocks: Iterator[bytes], _: str) -> Items:
    """Yields the items of the quickstart corpus: {title: {"extract": text, ...}}."""
    content = b"".join(blocks)
    try:
        entries = list(parse_json(content).values())
    except ValueError as e:
        yield Problem("damaged file", "row 1", str(e))
        return
    for row, entry in enumerate(entries, start=1):
        yield field_item(entry, _QUICKSTART_FIELD, f"row {row}", 0)


def _json_item(line: bytes, text_field: str, where: str) -> Document | Problem:
    text, replaced = _decode(line.removeprefix(_BYTE_ORDER_MARK))
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as e:
        if "\0" in text:
            what = f"U+0000 at character {text.index(chr(0))} of the line{_hint(text)}"
            return Problem("NUL bytes", where, what)
        reason = f"{e.msg} at character {e.pos}" if isinstance(e, json.JSONDecodeError) else str(e)
        return Problem("invalid JSON", where, reason)
    return field_item(record, text_field, where, replaced)


def field_item(record: Any, text_field: str, where: str, replaced: int) -> Document | Problem:
    """Returns the document in a row of JSON, or of a dataset."""
    if not isinstance(record, dict):
        return Problem("no text field", where, f"no object but {type(record).__name__}")
    value = find_field(record, text_field)
    if value is _MISSING:
        return Problem("no text field", where, f"no {text_field!r} in {listing(record)}")
    if value is None:
        return Problem("empty", where, "null")
    if not isinstance(value, str):
        what = f"an object with {listing(value)}" if isinstance(value, dict) else type(value).__name__
        return Problem("no text field", where, f"{text_field!r} is no text but {what}")
    text, unpaired = without_surrogates(value)
    return _document(text, replaced + unpaired, where)


_MISSING = object()


def find_field(record: Any, text_field: str) -> Any:
    """Looks a key up, or the keys that it joins with dots; the longest literal one first."""
    for head, rest in field_cuts(text_field):
        if isinstance(record, dict) and head in record:
            value = record[head] if rest is None else find_field(record[head], rest)
            if rest is None or value is not _MISSING:
                return value
    return _MISSING


@functools.cache
def field_cuts(text_field: str) -> tuple[tuple[str, str | None], ...]:
    """Returns the ways to read "a.b.c": as it is, with None, or as "c" in "a.b", or as "b.c" in "a"."""
    parts = text_field.split(".")
    cuts = ((".".join(parts[:n]), ".".join(parts[n:])) for n in range(len(parts) - 1, 0, -1))
    return (text_field, None), *cuts


def _document(text: str, replaced: int, where: str) -> Document | Problem:
    if not text or text.isspace():
        return Problem("empty", where, "nothing but white space" if text else "no character")
    if "\0" in text:
        return Problem("NUL bytes", where, f"U+0000 at character {text.index(chr(0))}{_hint(text)}")
    return Document(text, where, replaced)


def _hint(text: str) -> str:
    """Guesses the encoding of text with a NUL in every other place."""
    n, begun = text.count("\0", 0, 200), len(text[:200])
    return f", {_UTF_16}" if begun > 3 and 3 * n > begun else ""


def too_long(where: str, and_so: str = "") -> Problem:
    """Returns the problem of a line or text of more than MAX_LINE_BYTES."""
    return Problem("line too long", where, f"more than {MAX_LINE_BYTES:,} bytes{and_so}")


def listing(names: Any) -> str:
    """Lists keys or columns for a person, ten at most."""
    names = list(names)
    shown = ", ".join(repr(str(name)[:40]) for name in names[:10])
    return f"{shown} and {len(names) - 10} more" if len(names) > 10 else shown or "an empty object"


def _decode(raw: bytes) -> tuple[str, int]:
    """Returns the text, and how many invalid sequences in it were replaced."""
    try:
        return raw.decode("utf-8"), 0
    except UnicodeDecodeError:
        text = raw.decode("utf-8", errors="replace")
        return text, text.count(_REPLACEMENT) - raw.count(_REPLACEMENT.encode())


def without_surrogates(text: str) -> tuple[str, int]:
    """Replaces surrogates by U+FFFD; returns the text and how many there were."""
    # JSON may escape half a surrogate pair ("\ud83d"), which no UTF-8 can hold.
    try:
        text.encode()
    except UnicodeEncodeError:
        return _SURROGATES.subn(_REPLACEMENT, text)
    return text, 0


def table_item(raw: bytes | None, where: str) -> Document | Problem:
    """Returns the document in a row of a table: its bytes, or None where it is null."""
    if raw is None:
        return Problem("empty", where, "null")
    if len(raw) > MAX_LINE_BYTES:
        return too_long(where)
    return _document(*_decode(raw), where)
