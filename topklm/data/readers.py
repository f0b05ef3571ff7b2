"""Reads text: from one source file to its documents, and to what is wrong with it.

Knows file formats and broken bytes; memory stays bounded whatever a file holds. Which files there are is
`topklm.data.sources`' affair; what becomes of documents and problems is the caller's.
"""

import codecs
from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
from types import TracebackType
from typing import Any
import zlib

from topklm.data import sources
from topklm.data.compression import BLOCK_BYTES, DamageError, Read, gunzip, plain_blocks, unzstd
from topklm.data.sources import SourceFile
from topklm.errors import UserError
from topklm.imports import optional_module
from topklm.storage.errors import store_errors, store_errors_are_user_errors
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
MAX_LINE_BYTES = 64 << 20  # longer lines, and longer texts in a table, are no documents

_TABLE_ROWS = 128  # of a Parquet file, decoded at a time
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


class FileReader:
    """Iterates over the documents and problems of a file, in order.

    A `.txt` file is cut after blank lines into documents of at least 16 KiB (after a line where 1 MiB has no
    blank line, anywhere where 2 MiB have no line). A `.jsonl` file holds one JSON object a line; a `.json`
    file that, or an array of objects, or one object over several lines; a `.parquet` file and a Hugging Face
    dataset one document a row. Blank lines are no documents.

    A file that is damaged yields what came before the damage, then a Problem("damaged file", ...), and ends.

    Attributes:
        bytes_read: Stored bytes read so far (rows for a Hugging Face dataset); may be read from any thread.
        sha256: After the end, hex digest of the bytes as stored; for a Hugging Face dataset of all texts
            (empty where there is none), each after its length in UTF-8 bytes as 8 bytes, little-endian.

    Raises:
        UserError: While iterating: if the file is not there any more, has changed since it was found, or
            may not be read, if its store does not answer, if a package is missing, or if a whole table
            lacks the column.
    """

    def __init__(self, file: SourceFile, text_field: str):
        """Opens nothing yet.

        Args:
            file: What to read.
            text_field: Key of the text in a JSON object, or column of a table; "doc.text" is also the key
                "text" in the object "doc".
        """
        self.bytes_read = 0
        self.sha256 = ""
        self._file, self._text_field = file, text_field
        self._hash = hashlib.sha256()

    def __iter__(self) -> Items:
        self.bytes_read, self._hash = 0, hashlib.sha256()
        if self._file.ending == sources.HF:
            yield from self._read_hf()
        else:
            with _StoredFile(self._file) as stored:
                yield from self._read_stored(stored)
                stored.check_unchanged()
        self.sha256 = self._hash.hexdigest()

    def _read_stored(self, stored: "_StoredFile") -> Items:
        read = functools.partial(self._next_bytes, stored)
        if self._file.ending == ".parquet":
            yield from self._read_parquet(stored)
            stored.seek(0)
            self.bytes_read = 0
        else:
            yield from _stored_items(read, self._file.ending, self._text_field)
        while read(BLOCK_BYTES):  # what comes after a damage counts for the hash
            pass

    def _next_bytes(self, stored: "_StoredFile", size: int) -> bytes:
        block = stored.read(size)
        self._hash.update(block)
        self.bytes_read += len(block)
        return block

    def _read_parquet(self, stored: "_StoredFile") -> Items:
        for row, n_rows, item in _parquet_items(stored, self._file.url, self._text_field):
            # The size of a single row is not to be had.
            self.bytes_read = self._file.size * row // max(n_rows, row, 1)
            yield item

    def _read_hf(self) -> Items:
        for raw, item in _hf_items(self._file, self._text_field):
            if raw is not None:
                self.bytes_read += 1
                self._hash.update(len(raw).to_bytes(8, "little"))
                self._hash.update(raw)
            yield item


class _StoredFile:
    """A file's bytes, local or not; what its store raises becomes a UserError. Reads like a Python file."""

    def __init__(self, file: SourceFile):
        self._file = file
        self._is_remote = sources.is_remote(file.url)
        self.closed = False
        with self._errors_are_user_errors():
            self._check_version()
            if self._is_remote:
                fs, path = sources.file_system(file.url, "reading")
                self._handle = fs.open(path, "rb", block_size=8 * BLOCK_BYTES)
            else:
                self._handle = open(file.url, "rb")  # noqa: SIM115 - closed by close()

    def __enter__(self) -> "_StoredFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self, size: int = -1) -> bytes:
        """`size` bytes; fewer at the end only."""
        with self._errors_are_user_errors():
            block = self._handle.read(size)
            while 0 < len(block) < size and (more := self._handle.read(size - len(block))):
                block += more
            return block

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As for any file."""
        with self._errors_are_user_errors():
            return self._handle.seek(offset, whence)

    def tell(self) -> int:
        """As for any file."""
        return self._handle.tell()

    def readable(self) -> bool:
        """As for any file."""
        return True

    def seekable(self) -> bool:
        """As for any file."""
        return True

    def writable(self) -> bool:
        """As for any file."""
        return False

    def close(self) -> None:
        """As for any file."""
        self.closed = True
        self._handle.close()

    def check_unchanged(self) -> None:
        """Raises a UserError if a local file is another one now."""
        if not self._is_remote:
            with self._errors_are_user_errors():
                self._check_version()

    def _check_version(self) -> None:
        if not self._file.version:
            return
        if self._is_remote:
            fs, path = sources.file_system(self._file.url, "reading")
            is_same = sources.is_version(self._file.version, fs.info(path))
        else:
            is_same = sources.local_version(os.stat(self._file.url)) == self._file.version
        if not is_same:
            raise UserError(f"{self._file.url} has changed since the command began; start it again")

    @contextlib.contextmanager
    def _errors_are_user_errors(self) -> Iterator[None]:
        if self._is_remote:
            with store_errors_are_user_errors("reading", self._file.url):
                yield
        else:
            try:
                yield
            except OSError as e:
                raise UserError(f"{self._file.url} cannot be read: {e.strerror}; check the path") from e


def _stored_items(read: Read, ending: str, text_field: str) -> Items:
    """Yields the items of a file that is read from its start to its end."""
    kind, *compression = ending.lstrip(".").split(".")
    try:
        yield from _READERS[kind](_begin(_DECOMPRESSED["".join(compression)](read)), text_field)
    except _OtherEncodingError:
        yield Problem("not UTF-8", "byte 0", f"a byte order mark {_UTF_16}")


class _OtherEncodingError(Exception):
    """A file begins as those of another encoding do."""


def _begin(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yields the content in blocks of which none is empty; the first holds a byte order mark whole."""
    first = b""
    for block in blocks:
        first += block
        if len(first) >= max(map(len, _OTHER_BYTE_ORDER_MARKS)):
            break
    if first.startswith(_OTHER_BYTE_ORDER_MARKS):
        raise _OtherEncodingError
    yield from filter(None, itertools.chain([first], blocks))


def _text_items(blocks: Iterator[bytes], _: str) -> Items:
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
    """Where the document that begins at `start` ends; 0 if `text` is too short to know."""
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


def _json_line_items(blocks: Iterator[bytes], text_field: str) -> Items:
    number = 0
    try:
        for line in _lines(blocks):
            number += 1
            if line is None:
                yield _too_long(f"line {number}")
            elif line and not line.isspace():
                yield _json_item(line, text_field, f"line {number}")
    except DamageError as e:
        yield Problem("damaged file", f"line {number + 1}", str(e))


def _json_items(blocks: Iterator[bytes], text_field: str) -> Items:
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
    read = _json_value_items if line.startswith(b"[") or line.strip() == b"{" else _json_line_items
    yield from read(itertools.chain([first], blocks), text_field)


def _json_value_items(blocks: Iterator[bytes], text_field: str) -> Items:
    """Yields the items of a JSON array, or of JSON values one after another."""
    # What is no UTF-8 becomes surrogates, which are replaced, and counted, with those that JSON may hold.
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
                yield _too_long(f"item {number + 1}", "; what follows is not read")
                return
            if value:
                number, at = number + 1, value[1]
                yield _field_item(value[0], text_field, f"item {number}", 0)
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
    """The lines without their ends; None for one that is too long."""
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
    return _field_item(record, text_field, where, replaced)


def _field_item(record: Any, text_field: str, where: str, replaced: int) -> Document | Problem:
    """The document in a row of JSON, or of a dataset."""
    if not isinstance(record, dict):
        return Problem("no text field", where, f"no object but {type(record).__name__}")
    value = _find(record, text_field)
    if value is _MISSING:
        return Problem("no text field", where, f"no {text_field!r} in {_listing(record)}")
    if value is None:
        return Problem("empty", where, "null")
    if not isinstance(value, str):
        what = f"an object with {_listing(value)}" if isinstance(value, dict) else type(value).__name__
        return Problem("no text field", where, f"{text_field!r} is no text but {what}")
    text, unpaired = _replace_surrogates(value)
    return _document(text, replaced + unpaired, where)


_MISSING = object()


def _find(record: Any, text_field: str) -> Any:
    """Looks a key up, or the keys that it joins with dots; the longest literal one first."""
    if not isinstance(record, dict):
        return _MISSING
    if text_field in record:
        return record[text_field]
    head, dot, rest = text_field.rpartition(".")
    while dot:
        if head in record and (value := _find(record[head], rest)) is not _MISSING:
            return value
        head, dot, last = head.rpartition(".")
        rest = f"{last}.{rest}"
    return _MISSING


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


def _too_long(where: str, and_so: str = "") -> Problem:
    return Problem("line too long", where, f"more than {MAX_LINE_BYTES:,} bytes{and_so}")


def _listing(names: Any) -> str:
    names = list(names)
    shown = ", ".join(repr(str(name)[:40]) for name in names[:10])
    return f"{shown} and {len(names) - 10} more" if len(names) > 10 else shown or "an empty object"


def _parquet_items(
    stored: _StoredFile, url: str, text_field: str
) -> Iterator[tuple[int, int, Document | Problem]]:
    """(row, number of rows, item) of a table."""
    parquet = optional_module("pyarrow.parquet", "parquet", "reading .parquet")
    row = n_rows = 0
    try:
        table = parquet.ParquetFile(stored, buffer_size=BLOCK_BYTES, page_checksum_verification=True)
        n_rows = table.metadata.num_rows
        path = _column_path(table.schema_arrow, url, text_field)
        for group in range(table.num_row_groups):
            for raw in _parquet_column(table, path, group):
                row += 1
                yield row, n_rows, _table_item(raw, f"row {row}")
        if row != n_rows:
            raise ValueError(f"it holds {row} rows, not {n_rows} as it says")
    except _parquet_errors() as e:
        yield row, n_rows, _damaged_table(e, row + 1)


def _column_path(schema: Any, url: str, text_field: str) -> list[str]:
    """Names the column that holds the text, or those of the structs around it and its own.

    Raises:
        UserError: If there is no such column, if there are several, or if it holds something else.
    """
    paths = list(_paths_in(list(schema), text_field))
    if not paths:
        raise _no_column(url, text_field, schema.names)
    path, column_type = paths[0]
    if len([p for p, _ in paths if p == path]) > 1:
        raise UserError(
            f"text_field = {text_field!r}: {url} has {len(paths)} columns of that name; rename all but one"
        )
    if not _holds_text(column_type):
        inside = [f"{text_field}.{column_type.field(i).name}" for i in _fields_of(column_type)]
        others = [name for name in schema.names if name != path[0]]
        raise UserError(
            f"text_field = {text_field!r}: that column of {url} holds {column_type}, not text; "
            f"there are also: {', '.join([*inside, *others]) or 'no others'}"
        )
    return path


def _paths_in(fields: Sequence[Any], text_field: str) -> Iterator[tuple[list[str], Any]]:
    """Yields path and type of each field that a name may mean, in the order of `_find`."""
    yield from (([field.name], field.type) for field in fields if field.name == text_field)
    head, dot, rest = text_field.rpartition(".")
    while dot:
        for field in fields:
            if field.name == head:
                inner = [field.type.field(i) for i in _fields_of(field.type)]
                yield from (([head, *path], column_type) for path, column_type in _paths_in(inner, rest))
        head, dot, last = head.rpartition(".")
        rest = f"{last}.{rest}"


def _fields_of(column_type: Any) -> range:
    """Numbers of the fields of a struct; none of another type."""
    types = optional_module("pyarrow.types", "parquet", "reading .parquet")
    return range(column_type.num_fields if types.is_struct(column_type) else 0)


def _holds_text(column_type: Any) -> bool:
    """Tells whether a column's values are text, or bytes that may be, or null, all of them."""
    types = optional_module("pyarrow.types", "parquet", "reading .parquet")
    if types.is_dictionary(column_type):
        column_type = column_type.value_type
    column_type = getattr(column_type, "storage_type", column_type)
    kinds = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
    return types.is_fixed_size_binary(column_type) or str(column_type) in kinds


def _no_column(url: str, text_field: str, columns: Sequence[str]) -> UserError:
    return UserError(
        f"text_field = {text_field!r}: {url} has no such column; give the one that holds the text, "
        f"of {_listing(columns)}"
    )


def _parquet_column(table: Any, path: list[str], group: int) -> Iterator[bytes | None]:
    n_done = 0
    try:
        for batch in _parquet_batches(table, path, group, _TABLE_ROWS):
            yield from batch
            n_done += len(batch)
    except _parquet_errors():
        # The batch that failed may have rows before the damage.
        for batch in itertools.islice(_parquet_batches(table, path, group, 1), n_done, None):
            yield from batch
        raise


def _parquet_batches(table: Any, path: list[str], group: int, n_rows: int) -> Iterator[list[bytes | None]]:
    pyarrow = optional_module("pyarrow", "parquet", "reading .parquet")
    compute = optional_module("pyarrow.compute", "parquet", "reading .parquet")
    columns = [".".join(path)]
    for batch in table.iter_batches(n_rows, row_groups=[group], columns=columns, use_threads=False):
        column = batch.column(path[0])
        for name in path[1:]:
            column = compute.struct_field(column, name)  # null where the struct is
        column = column.storage if hasattr(column, "storage") else column
        column = column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column
        yield column.cast(pyarrow.large_binary()).to_pylist()


def _parquet_errors() -> tuple[type[Exception], ...]:
    pyarrow = optional_module("pyarrow", "parquet", "reading .parquet")
    return (pyarrow.ArrowException, OSError, ValueError, OverflowError)


def _damaged_table(error: Exception, row: int) -> Problem:
    return Problem("damaged file", f"row {row}", " ".join(str(error).split())[:200] or type(error).__name__)


def _table_item(raw: bytes | None, where: str) -> Document | Problem:
    if raw is None:
        return Problem("empty", where, "null")
    if len(raw) > MAX_LINE_BYTES:
        return _too_long(where)
    return _document(*_decode(raw), where)


def _quickstart_items(blocks: Iterator[bytes], _: str) -> Items:
    """The file of the quickstart corpus: {title: {"extract": text, ...}}."""
    content = b"".join(blocks)
    try:
        entries = list(parse_json(content).values())
    except ValueError as e:
        yield Problem("damaged file", "row 1", str(e))
        return
    for row, entry in enumerate(entries, start=1):
        yield _field_item(entry, _QUICKSTART_FIELD, f"row {row}", 0)


def _hf_items(file: SourceFile, text_field: str) -> Iterator[tuple[bytes | None, Document | Problem]]:
    """(text in UTF-8, item) of the rows of one shard of a dataset."""
    row = 0
    try:
        for row, record in enumerate(_hf_rows(file, text_field), start=1):
            raw, value = b"", _find(record, text_field)
            if isinstance(value, str):
                raw = _replace_surrogates(value)[0].encode()
            item = _field_item(record, text_field, f"row {row}", 0)
            yield raw, _too_long(f"row {row}") if len(raw) > MAX_LINE_BYTES else item
    except (EOFError, zlib.error, *store_errors()) as e:  # type: ignore[misc]
        if isinstance(e, OSError) and (e.errno is not None or isinstance(e, ConnectionError)):
            raise UserError(f"{file.url} cannot be read any more: {e}; check the network and the path") from e
        yield None, _damaged_table(e, row + 1)


def _hf_rows(file: SourceFile, text_field: str) -> Iterator[dict[str, Any]]:
    name, config, split, shard, n_shards = sources.hf_parts(file.url)
    dataset = _hf_dataset(name, config, split, file.version).shard(n_shards, shard)
    columns = dataset.column_names or list(next(iter(dataset), {text_field: ""}))
    # One with a dot may be inside of another.
    roots = [text_field, *(text_field[:i] for i, char in enumerate(text_field) if char == ".")]
    wanted = [name for name in columns if name in roots]
    if not wanted:
        raise _no_column(file.url, text_field, columns)
    yield from dataset.select_columns(wanted)  # the others may be pictures to decode


@functools.lru_cache(maxsize=1)  # to open it once for all of its shards
def _hf_dataset(name: str, config: str, split: str, version: str) -> Any:
    dataset, current_version = sources.hf_dataset(name, config, split, "reading")
    if version not in ("", current_version):
        raise UserError(f"hf:{name}:{config}:{split} has changed since the command began; start it again")
    return dataset


_DECOMPRESSED: dict[str, Callable[[Read], Iterator[bytes]]] = {
    "": plain_blocks,
    "gz": gunzip,
    "zst": unzstd,
}
_READERS: dict[str, Callable[[Iterator[bytes], str], Items]] = {
    "txt": _text_items,
    "jsonl": _json_line_items,
    "json": _json_items,
    sources.QUICKSTART: _quickstart_items,
}


def _decode(raw: bytes) -> tuple[str, int]:
    """Text, and how many invalid sequences in it were replaced."""
    try:
        return raw.decode("utf-8"), 0
    except UnicodeDecodeError:
        text = raw.decode("utf-8", errors="replace")
        return text, text.count(_REPLACEMENT) - raw.count(_REPLACEMENT.encode())


def _replace_surrogates(text: str) -> tuple[str, int]:
    # JSON may escape half a surrogate pair ("\ud83d"), which no UTF-8 can hold.
    try:
        text.encode()
    except UnicodeEncodeError:
        return _SURROGATES.subn(_REPLACEMENT, text)
    return text, 0
