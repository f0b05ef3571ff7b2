"""The explorer's index: an SQLite file that sorts and filters neurons and finds words, made anew at need.

Whoever finds it missing, damaged or made from other files makes it anew: beside its place, and renamed when
it is whole, so that two explorers of one run do not disturb each other. A CRC-32 of the whole file stands in
the field of SQLite's header that is left to applications (`user_version`). What it holds is the affair of
`topklm.explorer.index_content`.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import json
import os
from pathlib import Path
import re
import sqlite3
import threading
from typing import Any, NamedTuple
import uuid
import zlib

from topklm.explorer import index_content
from topklm.explorer.figures import BY_NAME
from topklm.explorer.source import Source

READABLE = "readable"  # the order that nobody has to ask for

# What a passage's matches stand between; characters for private use, which no text of ours means anything by.
_OPEN, _CLOSE = "\ue000", "\ue001"
_SNIPPET_WORDS = 40
_MOST_WORDS = 16  # of a search

_USER_VERSION = slice(60, 64)  # bytes of the file, see https://www.sqlite.org/fileformat.html
_BLOCK_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which neurons, in which order.

    Attributes:
        sort: A figure, or `READABLE`.
        falling: The largest first; neurons without the figure come last both ways.
        layers: Only these; all if empty.
        ranges: The least and the largest value of figures, either of which may be None.
        numbers: Only these; None: all.
    """

    sort: str = READABLE
    falling: bool = False
    layers: tuple[int, ...] = ()
    ranges: Mapping[str, tuple[float | None, float | None]] = dataclasses.field(default_factory=dict)
    numbers: Sequence[int] | None = None


class Passage(NamedTuple):
    """A stretch of text in which words were found; `pieces` are its text, and whether each was asked for."""

    begin: int
    document: int
    pieces: list[tuple[str, bool]]


class Index:
    """Opens the index of a source.

    Args:
        source: What it is made from.
        report: Is told when it has to be made.
    """

    def __init__(self, source: Source, report: Callable[[str], None] = print):
        self._source, self._report = source, report
        self._lock = threading.RLock()
        self._connection = self._open()

    def close(self) -> None:
        """Lets go of the file."""
        self._connection.close()

    def neurons(self, wanted: Wanted, offset: int, limit: int) -> tuple[int, list[int]]:
        """How many neurons there are of those wanted, and the numbers of some of them."""
        where, values = _conditions(wanted)
        sort = wanted.sort if wanted.sort == READABLE else BY_NAME[wanted.sort].name
        order = f"{sort} IS NULL, {sort} {'DESC' if wanted.falling else 'ASC'}, readable"
        (count,) = self._all(f"SELECT count(*) FROM neurons WHERE {where}", values)[0]
        found = self._all(
            f"SELECT number FROM neurons WHERE {where} ORDER BY {order} LIMIT ? OFFSET ?",
            [*values, limit, offset],
        )
        return count, [number for (number,) in found]

    def active_at(self, words: str, limit: int) -> list[int]:
        """Neurons whose strongest tokens or examples hold the words; first those whose tokens do."""
        if not (query := _query(words)):
            return []
        found = self._all(
            "SELECT rowid FROM neuron_texts WHERE neuron_texts MATCH ? "
            "ORDER BY bm25(neuron_texts, 10, 1), rowid LIMIT ?",
            [query, limit],
        )
        return [number for (number,) in found]

    def passages(self, words: str, limit: int) -> list[Passage]:
        """Where the words stand in the text of the store, the best match first."""
        if not (query := _query(words)):
            return []
        found = self._all(
            f"SELECT begin, document, snippet(passages, 0, ?, ?, '…', {_SNIPPET_WORDS}) FROM passages "
            "WHERE passages MATCH ? ORDER BY rank, begin LIMIT ?",
            [_OPEN, _CLOSE, query, limit],
        )
        return [Passage(begin, document, _pieces(snippet)) for begin, document, snippet in found]

    def _all(self, statement: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._connection.execute(statement, values).fetchall()
            except sqlite3.DatabaseError:  # damaged, which shows only where it is read
                self._connection.close()
                self._connection = self._make()
                return self._connection.execute(statement, values).fetchall()

    def _open(self) -> sqlite3.Connection:
        path = self._source.folder.index
        with contextlib.suppress(sqlite3.DatabaseError, OSError):
            if _crc_of_rest(path) == _crc(path):
                connection = _connect(f"{path.absolute().as_uri()}?mode=ro")
                if _made_from(connection, index_content.fingerprint(self._source)):
                    return connection
        return self._make()

    def _make(self) -> sqlite3.Connection:
        path = self._source.folder.index
        self._report(f"making the explorer's index ({path.name})")
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with contextlib.closing(_connect(f"{temporary.absolute().as_uri()}?mode=rwc")) as connection:
                index_content.fill(connection, self._source)
            _put_crc(temporary)
            os.replace(temporary, path)
            return _connect(f"{path.absolute().as_uri()}?mode=ro")
        except (
            OSError,
            sqlite3.OperationalError,
        ):  # the folder may not be ours to write, or the disk is full
            connection = _connect("file::memory:")
            index_content.fill(connection, self._source)
            return connection
        finally:
            with contextlib.suppress(OSError):
                Path(temporary).unlink(missing_ok=True)


def _crc(path: Path) -> bytes:
    """Reads the CRC in the file's header."""
    with path.open("rb") as file:
        return file.read(_USER_VERSION.stop)[_USER_VERSION]


def _crc_of_rest(path: Path) -> bytes:
    """Computes the CRC that belongs there: of the whole file with zeros in its place."""
    with path.open("rb") as file:
        first = bytearray(file.read(_USER_VERSION.stop))
        first[_USER_VERSION] = bytes(4)
        crc = zlib.crc32(first)
        while block := file.read(_BLOCK_BYTES):
            crc = zlib.crc32(block, crc)
    return crc.to_bytes(4, "big")


def _put_crc(path: Path) -> None:
    crc = _crc_of_rest(path)
    with path.open("r+b") as file:
        file.seek(_USER_VERSION.start)
        file.write(crc)


def _connect(uri: str) -> sqlite3.Connection:
    # Threads take turns under the lock of `Index`.
    return sqlite3.connect(uri, uri=True, check_same_thread=False)


def _made_from(connection: sqlite3.Connection, fingerprint: str) -> bool:
    """Whether an index is of this; it is closed if not, or if it cannot be read."""
    with contextlib.ExitStack() as stack:
        stack.callback(connection.close)
        if connection.execute("SELECT fingerprint FROM facts").fetchall() != [(fingerprint,)]:
            return False
        stack.pop_all()
    return True


def _conditions(wanted: Wanted) -> tuple[str, list[Any]]:
    """The WHERE of a statement, and its values. Names come from `FIGURES` and nowhere else."""
    parts, values = ["1"], list[Any]()
    if wanted.layers:
        parts.append("layer IN (SELECT value FROM json_each(?))")
        values.append(json.dumps(list(wanted.layers)))
    if wanted.numbers is not None:
        parts.append("number IN (SELECT value FROM json_each(?))")
        values.append(json.dumps(list(wanted.numbers)))
    for name, (least, most) in wanted.ranges.items():
        for sign, bound in ((">=", least), ("<=", most)):
            if bound is not None:
                parts.append(f"{BY_NAME[name].name} {sign} ?")
                values.append(bound)
    return " AND ".join(parts), values


def _query(words: str) -> str:
    """Every word, in any order, the last one perhaps not typed to its end; nothing has a meaning to FTS5."""
    found = re.findall(r"\w+", words)[:_MOST_WORDS]
    return " ".join(f'"{word}"' for word in found) + "*" if found else ""


def _pieces(snippet: str) -> list[tuple[str, bool]]:
    pieces = []
    for number, part in enumerate(snippet.split(_OPEN)):
        inside, _, behind = part.partition(_CLOSE) if number else ("", "", part)
        pieces += [(inside, True), (behind, False)]
    return [(text, matched) for text, matched in pieces if text]
