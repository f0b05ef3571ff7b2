"""Searches: neurons near words, active at them, or raising them, and neurons that tell a pattern's tokens.

Words are found in an SQLite file that is made when it is needed. An index that is missing, damaged or made
from other files is made again: beside the old one, and renamed when it is whole, so that two explorers of one
run do not disturb each other. A CRC-32 of the whole file stands in the field of SQLite's header that is left
to applications (`user_version`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import hashlib
import itertools
from pathlib import Path
import re
import sqlite3
import threading
from typing import Any, BinaryIO, NamedTuple
import unicodedata
import zlib

import numpy as np

from topklm.errors import UserError
from topklm.explorer.neuron_data import NeuronData, shown
from topklm.explorer.views import summary
from topklm.inference.interventions import Intervention, as_json
from topklm.neurons.dictionary import check_coordinates
from topklm.neurons.search import count_active, rank
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
        store = self._source.store
        digest = hashlib.sha256(f"{FORMAT} {store.metadata} {store.n_tokens}".encode())
        for name in ("top_tokens", "examples", "example_parts"):  # other figures may be added to the table
            digest.update(repr(self._source.rows[name].to_pylist()).encode())
        return digest.hexdigest()

    def _fill(self, connection: sqlite3.Connection) -> None:
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


KINDS = ("words", "regex")
LISTS = {"neurons": "", "literal": "active at", "raising": "raising"}  # and words for the name of a set
MOST_FOUND = 50
MOST_PASSAGES = 20
SHOWN = 20  # neurons of a list of a search for words
REGEX_SECONDS = 10.0
COUNTED_EVENTS = 20_000_000  # of a store that is read for each search for words, in a second or two

_LONGEST_NAME = 40  # characters of a file


def words(source: NeuronData, index: Index, text: str, literal: bool = False) -> dict[str, Any]:
    """Returns labels, neurons and passages in which words are found; UserError without words.

    `literal` says whether that is there for a store of more than `COUNTED_EVENTS`, too; it is None otherwise.
    """
    if not text.strip():
        raise UserError("search is empty: type a few words")
    labels = source.named()
    wanted = text.casefold().split()
    found = [at for at, label in labels.items() if all(word in label.casefold() for word in wanted)]
    near = index.active_at(text, MOST_FOUND)
    is_counted = literal or source.store.n_events <= COUNTED_EVENTS
    ids = _first_tokens(source, text)
    return {
        "kind": "words",
        "text": text,
        "labelled": [summary(source, source.number(*at), labels) for at in found[:MOST_FOUND]],
        "neurons": [summary(source, n, labels) | _match(source, n, text) for n in near],
        **(_literal(source, text, labels) if is_counted else {"literal": None, "occurrences": None}),
        "raised": source.texts(ids),
        "raising": [summary(source, n, labels) | more for n, more in _raising(source, ids)],
        "passages": [
            {
                "begin": passage.begin,
                "document": passage.document,
                "pieces": [{"text": shown(piece), "matched": matched} for piece, matched in passage.pieces],
                "text": source.plain_text(passage.begin, passage.begin + 64),
            }
            for passage in index.passages(text, MOST_PASSAGES)
        ],
    }


def _match(source: NeuronData, number: int, text: str) -> dict[str, Any]:
    """Returns where a neuron has the words: `near_words`, and the input tokens that they stand in."""
    tokens = source.row(number, ["top_tokens"])["top_tokens"] or ()
    patterns = _patterns(text)
    held = [token for token in tokens if any(p.search(_folded(source.texts([token])[0])) for p in patterns)]
    return {"found": near_words(source, number, text), "matched": source.texts(held)}


def _patterns(text: str) -> list[re.Pattern[str]]:
    """Compiles a pattern for each word; the last is perhaps not typed to its end."""
    parts = re.findall(r"\w+", _folded(text))
    return [re.compile(rf"\b{part}\b") for part in parts[:-1]] + [
        re.compile(rf"\b{part}\w*") for part in parts[-1:]
    ]


def near_words(source: NeuronData, number: int, text: str) -> list[tuple[str, str]] | None:
    """Returns the example of a neuron, of its strongest, that holds the most of some words.

    As pieces of its text, each with "here" for the example's token, "found" for one of the words, or "". None
    if no example holds any: the words are among the strongest tokens.
    """
    patterns = _patterns(text)
    best: tuple[int, str, list[str]] | None = None
    for at in source.strongest_examples(number):
        window = source.window(at, 2 * BEFORE)
        inside = at - window.begin
        first = max(0, inside - BEFORE)
        tokens = source.running_texts(window.ids[first : inside + AFTER + 1])
        whole = "".join(tokens)
        folded = _folded(whole)
        n = sum(pattern.search(folded) is not None for pattern in patterns)
        if not n or (best is not None and n <= best[0]):
            continue
        marks = [""] * len(whole)
        for pattern in patterns:
            for found in pattern.finditer(folded):
                marks[found.start() : found.end()] = ["found"] * len(found[0])
        begin = len("".join(tokens[: inside - first]))
        own = tokens[inside - first]
        space = len(own) - len(own.lstrip(" "))
        marks[begin + space : begin + len(own)] = ["here"] * (len(own) - space)
        best = n, whole, marks
        if n == len(patterns):
            break
    return None if best is None else _runs(best[1], best[2])


def _runs(text: str, marks: Sequence[str]) -> list[tuple[str, str]]:
    """Joins neighbouring characters with one mark."""
    borders = [0, *(at for at in range(1, len(text)) if marks[at] != marks[at - 1]), len(text)]
    return [(text[a:b], marks[a]) for a, b in itertools.pairwise(borders) if b > a]


def _folded(text: str) -> str:
    """Returns text in small letters without diacritics, as the index compares it, of the same length."""
    return "".join((unicodedata.normalize("NFD", c)[0].lower() + c)[0] for c in text)


def _literal(source: NeuronData, text: str, labels: Mapping[tuple[int, int], str]) -> dict[str, Any]:
    """Returns how often words stand in the text, and the neurons that are active at their last tokens.

    Those first that are active there the most often beyond their density: a neuron that is active everywhere
    says nothing of a word.
    """
    pattern = r"\s+".join(map(re.escape, text.split()))
    pattern = rf"(?<!\w){pattern}(?!\w)"
    matched = source.stored_text.matches(pattern, timeout_s=REGEX_SECONDS).ends
    n = int(matched.sum())
    if not n:
        return {"literal": [], "occurrences": 0}
    active = count_active(source.store, matched).ravel()
    beyond = active / n - source.column("density")
    order = [int(j) for j in np.argsort(-beyond, kind="stable")[:MOST_FOUND] if beyond[j] > 0]
    return {
        "occurrences": n,
        "literal": [
            summary(source, j, labels)
            | {"active": int(active[j]), "occurrences": n, "probability": float(active[j] / n)}
            for j in order
        ],
    }


def _first_tokens(source: NeuronData, text: str) -> list[int]:
    """Returns the token that words begin with, after a space and without, small and as they are written."""
    word = text.strip()
    forms = dict.fromkeys((f" {word}", word, f" {word.casefold()}", word.casefold()))
    encoded = [source.tokenizer.encode(form) for form in forms]
    first = [int(ids[0]) for ids in encoded if len(ids) and source.tokenizer.decode(ids[:1]).strip()]
    whole = [int(ids[0]) for ids in encoded if len(ids) == 1]
    return list(dict.fromkeys(whole or first[:1]))


def _raising(source: NeuronData, ids: Sequence[int]) -> list[tuple[int, dict[str, Any]]]:
    """Returns the neurons that have a token among those that they raise most, by its place there.

    By the Jacobian lens, or by the identity where that was not measured; of the tokens that are common in the
    text, and of all. Where the place is the same, the larger effect at the neuron's highest activation comes
    first.
    """
    highest = source.column("max_activation")
    found: list[tuple[int, dict[str, Any]]] = []
    measured = any(source.rows["jacobian_top"].is_valid().to_pylist())
    lens = "jacobian" if measured else "identity"
    for name in (f"{lens}_common_top", f"{lens}_top"):
        listed = source.rows[name].combine_chunks()
        offsets, tokens = listed.offsets.to_numpy(), listed.values.to_numpy()
        effects = source.rows[f"{name}_effects"].combine_chunks().values.to_numpy()
        for at in np.flatnonzero(np.isin(tokens, ids)).tolist():
            number = int(np.searchsorted(offsets, at, side="right")) - 1
            facts: dict[str, Any] = {"lens": lens, "effect": float(effects[at])}
            facts |= {"place": at - int(offsets[number]) + 1, "raised": source.texts([int(tokens[at])])[0]}
            found.append((number, facts))
    found.sort(key=lambda one: (one[1]["place"], -one[1]["effect"] * np.nan_to_num(highest[one[0]])))
    first: dict[int, dict[str, Any]] = {}
    for number, one in found:
        first.setdefault(number, one)
    return list(first.items())[:MOST_FOUND]


def regex(
    source: NeuronData, pattern: str, ignore_case: bool = True, only_ends: bool = False
) -> dict[str, Any]:
    """Returns neurons by how well they tell the tokens of matches, or only the last ones, from others."""
    found = source.stored_text.matches(pattern, ignore_case=ignore_case, timeout_s=REGEX_SECONDS)
    matched = found.ends if only_ends else found.touched
    labels = source.named()
    return {
        "kind": "regex",
        "text": pattern,
        "n_matches": found.count,
        "n_matched": int(matched.sum()),
        "n_tokens": len(matched),
        "neurons": [
            summary(source, source.number(ranked.layer, ranked.neuron), labels) | dataclasses.asdict(ranked)
            for ranked in rank(source.store, matched, MOST_FOUND)
        ],
    }


def as_set(source: NeuronData, data: Mapping[str, Any], name: str, top: int) -> tuple[str, bytes]:
    """Returns name and content of a file of the first neurons of a search, as `select --save` writes it.

    `data` is of `words` or `regex`, `name` one of `LISTS`. UserError if there is no such list, none is in it,
    or neurons are codes of a dictionary.
    """
    check_coordinates(source.measured.dictionary, "a set of interventions")
    if name not in LISTS or name not in data:
        raise UserError(f"list = {name}: must be one of {', '.join(key for key in LISTS if key in data)}")
    if not 1 <= top <= MOST_FOUND:
        raise UserError(f"top = {top}: must be from 1 to {MOST_FOUND}")
    chosen = [Intervention(n["layer"], n["neuron"], mode="ablate") for n in (data[name] or ())[:top]]
    if not chosen:
        raise UserError(f"{data['text']}: no neuron was found, so there is nothing to save")
    metadata = source.store.metadata
    model = {"run": metadata.run, "step": metadata.step, "d_model": metadata.d_model}
    model |= {"parameters": metadata.parameters} if metadata.parameters else {}
    words_of_file = re.findall(r"[a-z0-9]+", f"{LISTS[name]} {data['text']}".casefold())
    stem = "-".join(words_of_file)[:_LONGEST_NAME] or "neurons"
    return f"{stem}.json", as_json(chosen, model=model if metadata.parameters else None)
