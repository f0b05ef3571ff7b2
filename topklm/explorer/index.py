"""Sorts and filters neurons, in memory, and finds words, in an SQLite file that is made when it is needed.

An index that is missing, damaged or made from other files is made again: beside the old one, and renamed when
it is whole, so that two explorers of one run do not disturb each other. A CRC-32 of the whole file stands in
the field of SQLite's header that is left to applications (`user_version`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import os
from pathlib import Path
import re
import sqlite3
import threading
from typing import Any, NamedTuple
import uuid
import zlib

import numpy as np

from topklm.explorer.neuron_data import NeuronData
from topklm.neurons.statistics.table import readable_first

READABLE = "readable"  # the default order
FORMAT = 2
PASSAGE_TOKENS = 128  # the text that a search for words finds at once

# Of an example, the tokens found under its neuron: mostly those before it, which are all the model has read.
_BEFORE, _AFTER = 16, 4
_WORDS = "unicode61 remove_diacritics 2"
_SCHEMA = f"""
CREATE TABLE facts (fingerprint TEXT NOT NULL);
CREATE VIRTUAL TABLE neuron_texts USING fts5(top_tokens, examples, content='', tokenize='{_WORDS}');
CREATE VIRTUAL TABLE passages USING fts5(text, begin UNINDEXED, document UNINDEXED, tokenize='{_WORDS}');
"""
_KEPT_ORDERS = 16

# Enclose a passage's matches; characters for private use, which mean nothing in any text of ours.
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
        source: The run's neurons.
        report: Is told when it has to be made.
    """

    def __init__(self, source: NeuronData, report: Callable[[str], None] = print):
        self._source, self._report = source, report
        self._order = functools.lru_cache(_KEPT_ORDERS)(self._sorted)
        self._lock = threading.RLock()
        self._connection = self._open()

    def close(self) -> None:
        """Lets go of the file."""
        self._connection.close()

    def neurons(self, wanted: Wanted, offset: int, limit: int) -> tuple[int, list[int]]:
        """Returns how many neurons there are of those wanted, and the numbers of some of them."""
        measured, n = self._source.measured, self._source.n_neurons
        kept = np.ones(n, bool)
        if wanted.layers:
            kept &= np.repeat(np.isin(measured.layers, wanted.layers), measured.d_model)
        if wanted.numbers is not None:
            kept &= np.isin(np.arange(n), list(wanted.numbers))
        for name, (least, most) in wanted.ranges.items():
            values = self._source.column(name)  # NaN is in no range
            kept &= (values >= (-np.inf if least is None else least)) & (
                values <= (np.inf if most is None else most)
            )
        order = self._order(wanted.sort, wanted.falling)
        found = order[kept[order]]
        return len(found), found[offset : offset + limit].tolist()

    def _sorted(self, sort: str, falling: bool) -> np.ndarray:
        """Sorts all neurons, those without the figure last; equal ones by `readable_first`: int64[n]."""
        readable = readable_first(self._source.rows)
        if sort == READABLE:
            return readable[::-1] if falling else readable
        values = self._source.column(sort)[readable]
        keys = (-values if falling else values), np.isnan(values)
        return readable[np.lexsort(keys)]  # stable

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
        """Finds the words in the text of the store, the best match first."""
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
                if _made_from(connection, _fingerprint(self._source)):
                    return connection
        return self._make()

    def _make(self) -> sqlite3.Connection:
        path = self._source.folder.index
        self._report(f"making the explorer's index ({path.name})")
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with contextlib.closing(_connect(f"{temporary.absolute().as_uri()}?mode=rwc")) as connection:
                _fill(connection, self._source)
            _put_crc(temporary)
            os.replace(temporary, path)
            return _connect(f"{path.absolute().as_uri()}?mode=ro")
        except (
            OSError,
            sqlite3.OperationalError,
        ):  # the folder may not be ours to write, or the disk is full
            connection = _connect("file::memory:")
            _fill(connection, self._source)
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
    """Returns whether an index is of this; it is closed if not, or if it cannot be read."""
    with contextlib.ExitStack() as stack:
        stack.callback(connection.close)
        if connection.execute("SELECT fingerprint FROM facts").fetchall() != [(fingerprint,)]:
            return False
        stack.pop_all()
    return True


def _fingerprint(source: NeuronData) -> str:
    """Returns a digest of everything that the index is made from."""
    digest = hashlib.sha256(f"{FORMAT} {source.store.metadata} {source.store.n_tokens}".encode())
    with source.folder.table.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _fill(connection: sqlite3.Connection, source: NeuronData) -> None:
    """Writes everything into an empty database."""
    connection.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {_SCHEMA}")
    with connection:
        connection.execute("BEGIN")
        connection.executemany(
            "INSERT INTO neuron_texts (rowid, top_tokens, examples) VALUES (?, ?, ?)", _neuron_texts(source)
        )
        connection.executemany(
            "INSERT INTO passages (text, begin, document) VALUES (?, ?, ?)", _passages(source)
        )
        connection.execute("INSERT INTO facts VALUES (?)", (_fingerprint(source),))
    connection.commit()


def _neuron_texts(source: NeuronData) -> Iterator[tuple[int, str, str]]:
    decode = source.tokenizer.decode
    for number in range(source.n_neurons):
        row = source.row(number, ["top_tokens", "examples", "example_parts"])
        tokens = [decode([token]) for token in row["top_tokens"] or ()]
        strongest = [
            at for at, part in zip(row["examples"] or (), row["example_parts"] or (), strict=True) if not part
        ]
        examples = []
        for at in strongest:
            window = source.window(at, 2 * _BEFORE)
            inside = at - window.begin
            examples.append(decode(window.ids[max(0, inside - _BEFORE) : inside + _AFTER + 1]))
        yield number, " \n ".join(tokens), " \n ".join(examples)


def _passages(source: NeuronData) -> Iterator[tuple[str, int, int]]:
    starts, numbers = source.documents
    for first, end, document in zip(starts[:-1].tolist(), starts[1:].tolist(), numbers.tolist(), strict=True):
        for begin in range(first, end, PASSAGE_TOKENS):
            yield source.plain_text(begin, min(begin + PASSAGE_TOKENS, end)), begin, document


def _query(words: str) -> str:
    """Makes a query of FTS5 for all words, in any order, the last perhaps not typed to its end."""
    found = re.findall(r"\w+", words)[:_MOST_WORDS]
    return " ".join(f'"{word}"' for word in found) + "*" if found else ""


def _pieces(snippet: str) -> list[tuple[str, bool]]:
    pieces = []
    for number, part in enumerate(snippet.split(_OPEN)):
        inside, _, after = part.partition(_CLOSE) if number else ("", "", part)
        pieces += [(inside, True), (after, False)]
    return [(text, matched) for text, matched in pieces if text]
