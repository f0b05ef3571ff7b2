"""What the explorer's index holds, and how it is made; `topklm.explorer.index` looks after the file."""

from collections.abc import Iterator
import hashlib
import sqlite3
from typing import Any

import numpy as np

from topklm.explorer.figures import FIGURES
from topklm.explorer.source import Source
from topklm.neurons.ranking import readable_first

FORMAT = 1
PASSAGE_TOKENS = 128  # what a search for words finds at once

# Of an example, what is found under its neuron: mostly what stands before, which is all the model has read.
_BEFORE, _BEHIND = 16, 4
_WORDS = "unicode61 remove_diacritics 2"

_SCHEMA = f"""
CREATE TABLE facts (fingerprint TEXT NOT NULL);
CREATE TABLE neurons (
    number INTEGER PRIMARY KEY, layer INTEGER, readable INTEGER,
    {", ".join(f.name + " REAL" for f in FIGURES)}
);
CREATE VIRTUAL TABLE neuron_texts USING fts5(top_tokens, examples, content='', tokenize='{_WORDS}');
CREATE VIRTUAL TABLE passages USING fts5(text, begin UNINDEXED, document UNINDEXED, tokenize='{_WORDS}');
"""


def fingerprint(source: Source) -> str:
    """Changes with whatever the index is made from."""
    digest = hashlib.sha256(f"{FORMAT} {source.store.metadata} {source.store.n_tokens}".encode())
    with source.folder.table.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def fill(connection: sqlite3.Connection, source: Source) -> None:
    """Writes everything into an empty database."""
    connection.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {_SCHEMA}")
    with connection:
        connection.execute("BEGIN")
        marks = ", ".join("?" * (3 + len(FIGURES)))
        connection.executemany(f"INSERT INTO neurons VALUES ({marks})", _neurons(source))
        connection.executemany(
            "INSERT INTO neuron_texts (rowid, top_tokens, examples) VALUES (?, ?, ?)", _neuron_texts(source)
        )
        connection.executemany(
            "INSERT INTO passages (text, begin, document) VALUES (?, ?, ?)", _passages(source)
        )
        connection.execute("INSERT INTO facts VALUES (?)", (fingerprint(source),))
    for name in ("readable", *(figure.name for figure in FIGURES)):
        connection.execute(f"CREATE INDEX neurons_{name} ON neurons ({name})")
    connection.commit()


def _neurons(source: Source) -> Iterator[tuple[Any, ...]]:
    rank = np.empty(source.n_neurons, np.int64)
    rank[readable_first(source.rows)] = np.arange(source.n_neurons)
    columns = [source.rows[name].to_pylist() for name in ("layer", *(figure.name for figure in FIGURES))]
    for number, (layer, *figures) in enumerate(zip(*columns, strict=True)):
        yield (number, layer, int(rank[number]), *figures)


def _neuron_texts(source: Source) -> Iterator[tuple[int, str, str]]:
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
            examples.append(decode(window.ids[max(0, inside - _BEFORE) : inside + _BEHIND + 1]))
        yield number, " \n ".join(tokens), " \n ".join(examples)


def _passages(source: Source) -> Iterator[tuple[str, int, int]]:
    starts, numbers = source.documents
    for first, behind, document in zip(
        starts[:-1].tolist(), starts[1:].tolist(), numbers.tolist(), strict=True
    ):
        for begin in range(first, behind, PASSAGE_TOKENS):
            yield source.plain_text(begin, min(begin + PASSAGE_TOKENS, behind)), begin, document
