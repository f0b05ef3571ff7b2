"""Formats of files that hold text: their endings, who reads them, and how they are decompressed.

A format is one entry of `FORMATS`, a compression one of `COMPRESSIONS`; sources, readers, help, errors and
the table of docs/data.md know formats from here. Decompression yields everything before the first damage, in
bounded memory.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import io
import itertools
import os
import re
from typing import Any
from urllib.parse import urlsplit
import zlib

from topklm.data import documents
from topklm.data.documents import (
    BLOCK_BYTES,
    DamageError,
    Document,
    Items,
    OtherEncodingError,
    Problem,
    field_cuts,
    field_item,
    find_field,
    listing,
    table_item,
    too_long,
    without_surrogates,
)
from topklm.errors import UserError
from topklm.imports import optional_module
from topklm.storage.files import store_errors

HF = "hf"

_ROWS = 128  # of a Parquet file, decoded at a time

Rows = Iterator[tuple[int, int, Document | Problem]]  # (row, counted from 1, number of rows, item)
_arrow = functools.partial(optional_module, extra="parquet", flag="reading .parquet")


def read_parquet(stored: io.RawIOBase, url: str, text_field: str) -> Rows:
    """Reads a Parquet file, `url` in errors; UserError if the column is missing, there twice, or no text."""
    parquet = _arrow("pyarrow.parquet")
    row = n_rows = 0
    try:
        table = parquet.ParquetFile(stored, buffer_size=BLOCK_BYTES, page_checksum_verification=True)
        n_rows = table.metadata.num_rows
        path = _column_path(table.schema_arrow, url, text_field)
        for group in range(table.num_row_groups):
            for raw in _parquet_column(table, path, group):
                row += 1
                yield row, n_rows, table_item(raw, f"row {row}")
        if row != n_rows:
            raise ValueError(f"it holds {row} rows, not {n_rows} as it says")
    except _parquet_errors() as e:
        yield row, n_rows, _damaged_table(e, row + 1)


def _column_path(schema: Any, url: str, text_field: str) -> list[str]:
    """Names the column that holds the text, after the structs around it; UserError if there is not one."""
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
    """Yields path and type of each field that a name may mean, in the order of `find_field`."""
    for head, rest in field_cuts(text_field):
        for field in fields:
            if field.name == head and rest is not None:
                inner = [field.type.field(i) for i in _fields_of(field.type)]
                yield from (([head, *path], column_type) for path, column_type in _paths_in(inner, rest))
            elif field.name == head:
                yield [head], field.type


def _fields_of(column_type: Any) -> range:
    """Counts the fields of a struct; none of another type."""
    types = _arrow("pyarrow.types")
    return range(column_type.num_fields if types.is_struct(column_type) else 0)


def _holds_text(column_type: Any) -> bool:
    """Tells whether a column's values are text, or bytes that may be, or null, all of them."""
    types = _arrow("pyarrow.types")
    if types.is_dictionary(column_type):
        column_type = column_type.value_type
    column_type = getattr(column_type, "storage_type", column_type)
    kinds = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
    return types.is_fixed_size_binary(column_type) or str(column_type) in kinds


def _no_column(url: str, text_field: str, columns: Sequence[str]) -> UserError:
    return UserError(
        f"text_field = {text_field!r}: {url} has no such column; give the one that holds the text, "
        f"of {listing(columns)}"
    )


def _parquet_column(table: Any, path: list[str], group: int) -> Iterator[bytes | None]:
    n_done = 0
    try:
        for batch in _parquet_batches(table, path, group, _ROWS):
            yield from batch
            n_done += len(batch)
    except _parquet_errors():
        # The batch that failed may have rows before the damage.
        for batch in itertools.islice(_parquet_batches(table, path, group, 1), n_done, None):
            yield from batch
        raise


def _parquet_batches(table: Any, path: list[str], group: int, n_rows: int) -> Iterator[list[bytes | None]]:
    pyarrow = _arrow("pyarrow")
    compute = _arrow("pyarrow.compute")
    columns = [".".join(path)]
    for batch in table.iter_batches(n_rows, row_groups=[group], columns=columns, use_threads=False):
        column = batch.column(path[0])
        for name in path[1:]:
            column = compute.struct_field(column, name)  # null where the struct is
        column = column.storage if hasattr(column, "storage") else column
        column = column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column
        yield column.cast(pyarrow.large_binary()).to_pylist()


def _parquet_errors() -> tuple[type[Exception], ...]:
    pyarrow = _arrow("pyarrow")
    return (pyarrow.ArrowException, OSError, ValueError, OverflowError)


def _damaged_table(error: Exception, row: int) -> Problem:
    return Problem("damaged file", f"row {row}", " ".join(str(error).split())[:200] or type(error).__name__)


def find_hf(source: str, flag: str) -> list[tuple[str, str]]:
    """Finds the shards of hf:NAME[:CONFIG][:SPLIT]; UserError if there is none, or without the package.

    Of each it returns the URL, "hf:NAME:CONFIG:SPLIT#3/8" (shard 3 of 8, counted from 0), and its version.
    """
    name, *rest = source.removeprefix("hf:").split(":")
    if not name or len(rest) > 2:
        raise UserError(f"{flag} = {source!r}: must be hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    datasets = optional_module("datasets", "hf", flag)
    name = os.path.expanduser(name)
    name = os.path.abspath(name) if os.path.isdir(name) else name
    with _hf_errors_are_user_errors(flag, source):
        configs = datasets.get_dataset_config_names(name)
        default = datasets.get_dataset_default_config_name(name)
    config, split = (*rest, "", "")[:2]
    default = configs[0] if len(configs) == 1 else default
    if config and config not in configs and len(rest) == 1 and default:
        config, split = default, config  # hf:NAME:SPLIT, as there is but one configuration to mean
    config, split = config or default or "", split or "train"
    if config not in configs:
        which = f"has no configuration {config!r}" if config else "has several configurations"
        raise UserError(
            f"{flag}: {source!r} {which}; give hf:{name}:CONFIG with one of {', '.join(sorted(configs))}"
        )
    dataset, version = _open_hf(name, config, split, flag)
    n = dataset.num_shards
    digits = len(str(n))  # sorted by name is sorted by number
    return [(f"hf:{name}:{config}:{split}#{i:0{digits}}/{n}", version) for i in range(n)]


def hf_parts(url: str) -> tuple[str, str, str, int, int]:
    """Splits the URL of a shard: name, configuration, split, shard and number of shards."""
    source, _, unit = url.removeprefix("hf:").rpartition("#")
    name, config, split = source.rsplit(":", 2)
    shard, n_shards = unit.split("/")
    return name, config, split, int(shard), int(n_shards)


def read_hf(url: str, version: str, text_field: str) -> Iterator[tuple[bytes | None, Document | Problem]]:
    """Yields (text in UTF-8, item) of the rows of a shard of `find_hf`; None for one that could not be read.

    Of that version if it is not "". UserError if it has changed, its store does not answer, or it lacks the
    column.
    """
    row = 0
    try:
        for row, record in enumerate(_hf_rows(url, version, text_field), start=1):
            raw, value = b"", find_field(record, text_field)
            if isinstance(value, str):
                raw = without_surrogates(value)[0].encode()
            item = field_item(record, text_field, f"row {row}", 0)
            yield raw, too_long(f"row {row}") if len(raw) > documents.MAX_LINE_BYTES else item
    except (EOFError, zlib.error, *store_errors()) as e:  # type: ignore[misc]
        if isinstance(e, OSError) and (e.errno is not None or isinstance(e, ConnectionError)):
            raise UserError(f"{url} cannot be read any more: {e}; check the network and the path") from e
        yield None, _damaged_table(e, row + 1)


def _hf_rows(url: str, version: str, text_field: str) -> Iterator[dict[str, Any]]:
    name, config, split, shard, n_shards = hf_parts(url)
    dataset = _hf_dataset(name, config, split, version).shard(n_shards, shard)
    columns = dataset.column_names or list(next(iter(dataset), {text_field: ""}))
    wanted = [name for name in columns if name in dict(field_cuts(text_field))]
    if not wanted:
        raise _no_column(url, text_field, columns)
    yield from dataset.select_columns(wanted)  # the others may be pictures to decode


@functools.lru_cache(maxsize=1)  # to open it once for all of its shards
def _hf_dataset(name: str, config: str, split: str, version: str) -> Any:
    dataset, current_version = _open_hf(name, config, split, "reading")
    if version not in ("", current_version):
        raise UserError(f"hf:{name}:{config}:{split} has changed since the command began; start it again")
    return dataset


def _open_hf(name: str, config: str, split: str, flag: str) -> tuple[Any, str]:
    """Returns one split of a Hugging Face dataset, streaming, and its version; UserError as `find_hf`."""
    datasets = optional_module("datasets", "hf", flag)
    source = f"hf:{name}:{config}:{split}"
    with _hf_errors_are_user_errors(flag, source):
        builder = datasets.load_dataset_builder(name, config)
        splits = builder.as_streaming_dataset()
    if split not in splits:
        raise UserError(f"{flag}: {source!r} has no split {split!r}; it has {', '.join(sorted(splits))}")
    return splits[split], str(builder.hash)


@contextlib.contextmanager
def _hf_errors_are_user_errors(flag: str, source: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, EOFError, zlib.error, *store_errors()) as e:  # type: ignore[misc]
        raise UserError(
            f"{flag}: {source!r} cannot be opened: {e}; check its name, its files and the network"
        ) from e


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
    read_table: Callable[[io.RawIOBase, str, str], Rows] | None = None
    extra: str = ""  # of topklm, with the packages that it needs


FORMATS: dict[str, Format] = {
    ".txt": Format("documents of about 16 KiB, cut at blank lines", documents.read_text),
    ".jsonl": Format("one JSON object a line, the text under `--text-field`", documents.read_json_lines),
    ".json": Format(
        "the same, or an array of objects, or one object over several lines", documents.read_json
    ),
    ".parquet": Format("the column `--text-field`", read_table=read_parquet, extra="parquet"),
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
