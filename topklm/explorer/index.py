"""Finds words, in an SQLite file that is made when it is needed.

An index that is missing, damaged or made from other files is made again: beside the old one, and renamed when
it is whole, so that two explorers of one run do not disturb each other. A CRC-32 of the whole file stands in
the field of SQLite's header that is left to applications (`user_version`).
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import hashlib
from pathlib import Path
import re
import sqlite3
import threading
from typing import Any, BinaryIO, NamedTuple
import zlib

from topklm.explorer.neuron_data import NeuronData
from topklm.storage.files import replacing

FORMAT = 2
PASSAGE_TOKENS = 128  # the text that a search for words finds at once

# Of an example, the tokens found under its neuron: mostly those before it, which are all the model has read.
BEFORE, AFTER = 16, 4
_WORDS = "unicode61 remove_diacritics 2"
_SCHEMA = f"""
CREATE TABLE facts (fingerprint TEXT NOT NULL);
CREATE VIRTUAL TABLE neuron_texts USING fts5(top_tokens, examples, content='', tokenize='{_WORDS}');
CREATE VIRTUAL TABLE passages USING fts5(text, begin UNINDEXED, document UNINDEXED, tokenize='{_WORDS}');
"""

# Enclose a passage's matches; characters for private use, which mean nothing in any text of ours.
_OPEN, _CLOSE = "\ue000", "\ue001"
_SNIPPET_WORDS = 40
_MOST_WORDS = 16  # of a search

_USER_VERSION = slice(60, 64)  # bytes of the file, see https://www.sqlite.org/fileformat.html
_BLOCK_BYTES = 2**20


class Passage(NamedTuple):
    """A stretch of text in which words were found; `pieces` are its text, and whether each was asked for."""

    begin: int
    document: int
    pieces: list[tuple[str, bool]]


class Index:
    """Opens the index of a source; `report` is told when it has to be made."""

    def __init__(self, source: NeuronData, report: Callable[[str], None] = print):
        self._source, self._report = source, report
        self._path = source.folder.index
        self._lock = threading.Lock()
        self._connection = self._open() or self._make()

    def close(self) -> None:
        """Lets go of the file."""
        self._connection.close()

    def active_at(self, words: str, limit: int) -> list[int]:
        """Returns neurons whose strongest tokens or examples hold the words; first those whose tokens do."""
        statement = (
            "SELECT rowid FROM neuron_texts WHERE neuron_texts MATCH ? "
            "ORDER BY bm25(neuron_texts, 10, 1), rowid LIMIT ?"
        )
        return [number for (number,) in self._all(statement, [], words, limit)]

    def passages(self, words: str, limit: int) -> list[Passage]:
        """Returns where the text of the store holds the words, the best match first."""
        statement = (
            f"SELECT begin, document, snippet(passages, 0, ?, ?, '…', {_SNIPPET_WORDS}) FROM passages "
            "WHERE passages MATCH ? ORDER BY rank, begin LIMIT ?"
        )
        found = self._all(statement, [_OPEN, _CLOSE], words, limit)
        return [Passage(begin, document, _pieces(snippet)) for begin, document, snippet in found]

    def _all(self, statement: str, values: Sequence[Any], words: str, limit: int) -> list[tuple[Any, ...]]:
        """Searches for all words, in any order, the last perhaps not typed to its end."""
        terms = [f'"{word}"' for word in re.findall(r"\w+", words)[:_MOST_WORDS]]
        if not terms:
            return []
        values = [*values, f"{' '.join(terms)}*", limit]
        with self._lock:
            return self._connection.execute(statement, values).fetchall()

    def _open(self) -> sqlite3.Connection | None:
        """Opens the file; None if it is missing, damaged, or of something else."""
        with contextlib.suppress(sqlite3.DatabaseError, OSError), contextlib.ExitStack() as stack:
            with self._path.open("rb") as file:
                if _crc(file) != file.read(4):
                    return None
            connection = _connect(self._path, "ro")
            stack.callback(connection.close)
            if connection.execute("SELECT fingerprint FROM facts").fetchall() == [(self._fingerprint(),)]:
                stack.pop_all()
                return connection
        return None

    def _make(self) -> sqlite3.Connection:
        self._report(f"making the explorer's index ({self._path.name})")
        try:
            with replacing(self._path) as temporary:
                with contextlib.closing(_connect(temporary, "rwc")) as connection:
                    self._fill(connection)
                with temporary.open("r+b") as file:
                    crc = _crc(file)
                    file.write(crc)
            return _connect(self._path, "ro")
        except (OSError, sqlite3.OperationalError):  # the folder is not ours to write, or the disk is full
            connection = sqlite3.connect(":memory:", check_same_thread=False)
            self._fill(connection)
            return connection

    def _fingerprint(self) -> str:
        """Returns a digest of everything that the index is made from."""
        store = self._source.store
        digest = hashlib.sha256(f"{FORMAT} {store.metadata} {store.n_tokens}".encode())
        for name in ("top_tokens", "examples", "example_parts"):  # other figures may be added to the table
            digest.update(repr(self._source.rows[name].to_pylist()).encode())
        return digest.hexdigest()

    def _fill(self, connection: sqlite3.Connection) -> None:
        """Writes everything into an empty database."""
        connection.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {_SCHEMA}")
        with connection:
            connection.executemany(
                "INSERT INTO neuron_texts (rowid, top_tokens, examples) VALUES (?, ?, ?)",
                _neuron_texts(self._source),
            )
            connection.executemany(
                "INSERT INTO passages (text, begin, document) VALUES (?, ?, ?)", _passages(self._source)
            )
            connection.execute("INSERT INTO facts VALUES (?)", (self._fingerprint(),))


def _crc(file: BinaryIO) -> bytes:
    """Computes the CRC of a whole file with zeros in its place, to which it goes back."""
    file.seek(0)
    crc = zlib.crc32(bytes(4), zlib.crc32(file.read(_USER_VERSION.start)))
    file.seek(_USER_VERSION.stop)
    while block := file.read(_BLOCK_BYTES):
        crc = zlib.crc32(block, crc)
    file.seek(_USER_VERSION.start)
    return crc.to_bytes(4, "big")


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    # Threads take turns under the lock of `Index`.
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, check_same_thread=False)


def _neuron_texts(source: NeuronData) -> Iterator[tuple[int, str, str]]:
    decode = source.tokenizer.decode
    for number in range(source.n_neurons):
        tokens = [decode([token]) for token in source.row(number, ["top_tokens"])["top_tokens"] or ()]
        examples = []
        for at in source.strongest_examples(number):
            window = source.window(at, 2 * BEFORE)
            inside = at - window.begin
            examples.append(decode(window.ids[max(0, inside - BEFORE) : inside + AFTER + 1]))
        yield number, " \n ".join(tokens), " \n ".join(examples)


def _passages(source: NeuronData) -> Iterator[tuple[str, int, int]]:
    starts, numbers = source.documents
    for first, end, document in zip(starts[:-1].tolist(), starts[1:].tolist(), numbers.tolist(), strict=True):
        for begin in range(first, end, PASSAGE_TOKENS):
            yield source.plain_text(begin, min(begin + PASSAGE_TOKENS, end)), begin, document


def _pieces(snippet: str) -> list[tuple[str, bool]]:
    """Takes a snippet apart where matches begin and end."""
    parts = re.split(f"{_OPEN}(.*?){_CLOSE}", snippet, flags=re.DOTALL)
    return [(text, bool(number % 2)) for number, text in enumerate(parts) if text]
