"""The sources and settings of a dataset, and how one source file becomes chunks of tokens.

A dataset is decided by its sources and its settings. Every worker encodes files alike, whether a thread here
or a machine of a pipeline; the result depends on the file and the settings alone, so work that is done is
found again by its name.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import operator
import re
from typing import Any, ClassVar, TypeVar

import numpy as np
import tokenizers

from topklm.config import MAX_VOCABULARY
from topklm.data.building.chunks import INDEX_DTYPE, Chunk, Storage
from topklm.data.documents import Problem
from topklm.data.records import SHARD_TOKENS, token_dtype
from topklm.data.sources import FileReader, SourceFile
from topklm.data.tokenizer import Encode, Tokenizer, fast_encoder, open_tokenizer
from topklm.errors import UserError
from topklm.progress import Report
from topklm.storage.files import json_digest

# A kill costs at most the encoding of one chunk; both bounds keep a chunk's index and tokens small.
CHUNK_UTF8_BYTES = 32 << 20
CHUNK_DOCUMENTS = 1 << 18
MAX_EXAMPLES = 20  # problems of one file that are kept word for word
_MIN_VOCAB = 257  # the bytes and the separator

_IDENTITY_VERSION = 2  # of what a fingerprint is made of: datasets keep theirs as their format changes
_FORMAT = 2  # of chunks; other code may not reuse this code's
_BATCH_CHARS = 1 << 20  # characters encoded at a time
_DONE_FILE = "done.json"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which documents are taken, and into which split."""

    text_field: str = "text"  # key of the text in a JSON line, or column of a table
    heldout_fraction: float = 0.05  # share of documents held out, chosen by a hash of their text
    min_chars: int = 0  # shorter documents are left out
    max_chars: int = 0  # longer documents are left out; 0: none is
    strict: bool = False  # stop at the first problem instead of counting it
    # Of few documents, see `fitted`: hex digest of the last one held out; "": the share decides.
    last_heldout: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns the choices of a user that decide about a dataset."""
        settings = dataclasses.asdict(self)
        del settings["strict"], settings["last_heldout"]
        return settings

    def is_heldout(self, sha256: bytes) -> bool:
        """Tells whether the document with this digest of its text is held out."""
        if self.last_heldout:
            return sha256.hex() <= self.last_heldout
        return int.from_bytes(sha256[:8], "big") / 2**64 < self.heldout_fraction

    def has_length(self, text: str) -> bool:
        """Tells whether a document is neither too short nor too long."""
        return self.min_chars <= len(text) and (not self.max_chars or len(text) <= self.max_chars)


@dataclasses.dataclass(frozen=True)
class DatasetSettings:
    """Everything but the sources that decides what a dataset holds."""

    selection: Selection
    tokenizer: str = "train:4096"  # train:VOCAB, or a file that `open_tokenizer` reads
    deduplicate: bool = True  # drop exact copies of documents
    shard_tokens: int = SHARD_TOKENS  # per shard, about

    def to_json(self) -> dict[str, Any]:
        """Returns it as in dataset.json; a tokenizer's file by the sha256 of its content."""
        content = dataclasses.asdict(self)
        del content["selection"]
        if self.vocab_size is None:
            content["tokenizer"] = self.tokenizer_of_file.sha256
        return {**self.selection.to_json(), **content}

    @property
    def vocab_size(self) -> int | None:
        """Tokens of a tokenizer that is to be trained; None for one from a file."""
        if not self.tokenizer.startswith("train:"):
            return None
        size = self.tokenizer.removeprefix("train:")
        if not re.fullmatch("[0-9]{1,9}", size) or not _MIN_VOCAB <= int(size) <= MAX_VOCABULARY:
            raise UserError(
                f"tokenizer = {self.tokenizer!r}: VOCAB in train:VOCAB must be a number, {_MIN_VOCAB} or "
                f"more (256 bytes and a separator) and {MAX_VOCABULARY} or less"
            )
        return int(size)

    @functools.cached_property
    def tokenizer_of_file(self) -> Tokenizer:
        """The tokenizer that is not to be trained."""
        return open_tokenizer(self.tokenizer)


@dataclasses.dataclass(frozen=True)
class DatasetSources:
    """The files of a dataset."""

    train: tuple[SourceFile, ...]
    heldout: tuple[SourceFile, ...] = ()  # files whose documents are all held out

    @property
    def files(self) -> list[tuple[SourceFile, bool]]:
        """(file, whether all of it is held out), in the order of the dataset's documents."""
        heldout = {file.url for file in self.heldout}
        train = [(file, False) for file in self.train if file.url not in heldout]
        return train + [(file, True) for file in self.heldout]


def fingerprint(contents: Sequence[tuple[str, str, bool]], settings: DatasetSettings) -> str:
    """Computes the name of a dataset's content, a hex digest, wherever its sources lie.

    `contents` are of each file its ending, the sha256 of its bytes, and whether all of it is held out.
    """
    return json_digest(
        {
            "format_version": _IDENTITY_VERSION,
            "tokenizers_version": tokenizers.__version__ if settings.vocab_size is not None else None,
            "settings": settings.to_json(),
            "files": [list(content) for content in contents],
        }
    )


@dataclasses.dataclass
class FileResult:
    """Content of a file; counts before copies are dropped."""

    url: str
    size: int  # bytes as stored
    sha256: str = ""  # of the bytes as stored
    chunks: int = 0
    documents: int = 0
    utf8_bytes: int = 0
    too_short: int = 0
    too_long: int = 0
    documents_with_replacements: int = 0
    replaced_sequences: int = 0  # invalid UTF-8 sequences and unpaired surrogates, now U+FFFD
    problems: dict[str, int] = dataclasses.field(default_factory=dict)  # kind -> how many
    examples: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class FileTask:
    """One source file to encode: all that decides the outcome, and the folder that receives it."""

    Result: ClassVar[type] = FileResult

    file: SourceFile
    heldout: bool  # all of it
    selection: Selection
    tokenizer_sha256: str
    work: Storage

    @property
    def size(self) -> int:
        """Bytes as stored."""
        return self.file.size

    @property
    def name(self) -> str:
        """Name of the folder for its chunks: another for other contents or settings."""
        choice = [self.selection.to_json(), self.selection.last_heldout]
        identity = [_FORMAT, dataclasses.asdict(self.file), self.heldout, choice, self.tokenizer_sha256]
        return json_digest(identity)[:24]

    def run(self, report: Report) -> FileResult:
        """Encodes the file, or the rest of it; UserError if it cannot be read; if `strict`, for a problem."""
        folder = self.work.child(self.name)
        if (result := self._finished(folder)) is not None:
            if self.selection.strict and result.examples:
                raise _strict_stop(result.examples[0])
            report(self.size, result.documents)
            return result
        tokenizer, encode = _encoder(self.work.url, self.tokenizer_sha256)
        reader = FileReader(self.file, self.selection.text_field)
        result = FileResult(self.file.url, self.size)
        bytes_told = 0
        # One thread reads, one encodes, this one writes. Both are ended here, whatever happens: left to the
        # garbage collector, they would be waited for in any thread, even one of themselves.
        with (
            contextlib.closing(
                _ahead(_batches(_select(reader, self, result), self, folder, result))
            ) as batches,
            contextlib.closing(_ahead((b.chunk, *_encode(b, tokenizer, encode)) for b in batches)) as encoded,
        ):
            for chunk, group in itertools.groupby(encoded, key=operator.itemgetter(0)):
                with chunk.create(token_dtype(tokenizer.vocab_size)) as append:
                    for _, rows, tokens in group:
                        append(rows, tokens)
                        report(reader.bytes_read - bytes_told, len(rows), sum(piece.size for piece in tokens))
                        bytes_told = reader.bytes_read
        report(reader.bytes_read - bytes_told)
        result.sha256 = reader.sha256
        folder.write_sealed(_DONE_FILE, {"folder": self.name, "result": dataclasses.asdict(result)})
        return result

    def chunks(self, result: FileResult) -> list[Chunk]:
        """Returns the chunks of the encoded file, in order."""
        return [Chunk(self.work.child(self.name), number) for number in range(result.chunks)]

    def discard_damaged(self) -> list[str]:
        """Deletes pieces of unfinished work on this machine that are not as they were written; names them."""
        folder = self.work.child(self.name)
        result, names = self._finished(folder), folder.names()
        numbers = {int(found[1]) for name in names if (found := re.fullmatch(r"(\d{6,9})\.index", name))}
        if result is not None:
            numbers.update(range(result.chunks))
        bad = [chunk for number in sorted(numbers) if not (chunk := Chunk(folder, number)).is_whole()]
        for chunk in bad:
            chunk.discard()
        damaged = [f"{folder.url}/{chunk.number:06d}" for chunk in bad]
        if _DONE_FILE in names and (bad or result is None):
            folder.discard(_DONE_FILE)
            damaged += [f"{folder.url}/{_DONE_FILE}"] if result is None else []
        return damaged

    def _finished(self, folder: Storage) -> FileResult | None:
        """Reads what an earlier attempt found in a file; None if it did not end, or that is damaged."""
        content = folder.read_sealed(_DONE_FILE)
        return FileResult(**content["result"]) if content and content.get("folder") == self.name else None


def share_tokenizer(tokenizer: Tokenizer, work: Storage) -> None:
    """Puts the tokenizer where every task finds it."""
    work.write(_tokenizer_file(tokenizer.sha256), tokenizer.to_bytes())


def shared_tokenizer(sha256: str, work: Storage) -> Tokenizer | None:
    """Reads the tokenizer of this digest that was put there; None if it is not there, or damaged."""
    try:
        content = work.read(_tokenizer_file(sha256))
    except (FileNotFoundError, IsADirectoryError):
        return None
    return Tokenizer(content) if hashlib.sha256(content).hexdigest() == sha256 else None


def _tokenizer_file(sha256: str) -> str:
    return f"tokenizer-{sha256[:24]}.json"


@functools.lru_cache(maxsize=1)
def _encoder(work: str, sha256: str) -> tuple[Tokenizer, Encode]:
    """Returns the tokenizer, and the encoder that a process keeps for all of its files."""
    tokenizer = shared_tokenizer(sha256, Storage(work))
    if tokenizer is None:
        raise UserError(
            f"{work}/{_tokenizer_file(sha256)} is not as it was written: start the same command again"
        )
    return tokenizer, fast_encoder(tokenizer)


def training_text(
    files: Sequence[tuple[SourceFile, bool]], selection: Selection, budget: int, report: Report
) -> Iterator[str]:
    """Yields documents of the training split to train a tokenizer on, in source order.

    The `budget` is UTF-8 bytes at most, about; every file may give the same share, and what one does not use
    goes to those after it. `files` tell of each whether all of it is held out.
    """
    readable = [file for file, heldout in files if not heldout]
    for number, file in enumerate(readable):
        left = budget // (len(readable) - number)
        for text, raw in _selected(file, selection):
            if selection.is_heldout(hashlib.sha256(raw).digest()):
                continue
            yield text
            report(0, 1)
            left -= len(raw)
            budget -= len(raw)
            if left <= 0:
                break


def fitted(files: Sequence[tuple[SourceFile, bool]], selection: Selection) -> Selection:
    """Returns a selection under which both splits have documents, where a share of few leaves one empty.

    If it leaves none to hold out, that with the lowest hash is; if it leaves none to train on, the two with
    the highest hashes are trained on. A share that gives both splits a document, as the first documents of
    most corpora show, stays as it is, and so does one of fewer than three different documents.
    """
    if not selection.heldout_fraction:
        return selection
    lowest, has_train, has_heldout = b"", False, False
    highest: list[bytes] = []
    for file, all_heldout in files:
        for _, raw in _selected(file, selection):
            sha256 = hashlib.sha256(raw).digest()
            is_heldout = all_heldout or selection.is_heldout(sha256)
            has_train, has_heldout = has_train or not is_heldout, has_heldout or is_heldout
            if has_train and has_heldout:
                return selection
            if not all_heldout:
                lowest = min(lowest or sha256, sha256)
                highest = sorted({*highest, sha256})[-3:]
    if len(highest) < 3:
        return selection
    return dataclasses.replace(selection, last_heldout=(highest[0] if has_heldout else lowest).hex())


def _selected(file: SourceFile, selection: Selection) -> Iterator[tuple[str, bytes]]:
    """Yields (text, text in UTF-8) of the documents of a file that are neither too short nor too long."""
    for item in FileReader(file, selection.text_field):
        if not isinstance(item, Problem) and selection.has_length(item.text):
            yield item.text, item.text.encode()


def _select(reader: FileReader, task: FileTask, result: FileResult) -> Iterator[tuple[bytes, int, str]]:
    """Yields (SHA-256, UTF-8 bytes, text) of documents that are taken; counts others in `result`."""

    def note(what: str, done: str) -> None:
        example = f"{task.file.url}, {what}"
        if task.selection.strict:
            raise _strict_stop(example)
        if len(result.examples) < MAX_EXAMPLES:
            result.examples.append(f"{example}: {done}")

    for item in reader:
        if isinstance(item, Problem):
            result.problems[item.kind] = result.problems.get(item.kind, 0) + 1
            note(f"{item.where}: {item.kind} ({item.what})", "skipped")
            continue
        if item.replaced:
            result.documents_with_replacements += 1
            result.replaced_sequences += item.replaced
            note(f"{item.where}: invalid UTF-8 ({item.replaced} sequences)", "replaced by U+FFFD")
        text = item.text
        if not task.selection.has_length(text):
            result.too_short += len(text) < task.selection.min_chars
            result.too_long += len(text) >= task.selection.min_chars
            continue
        raw = text.encode()
        result.documents += 1
        result.utf8_bytes += len(raw)
        yield hashlib.sha256(raw).digest(), len(raw), text


def _strict_stop(example: str) -> UserError:
    return UserError(f"strict: {example}; mend or remove it, or leave out --strict to have it counted")


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Documents of one chunk that are encoded together."""

    chunk: Chunk
    rows: np.ndarray  # INDEX_DTYPE[n], tokens not yet known
    texts: list[str]


def _batches(
    documents: Iterable[tuple[bytes, int, str]], task: FileTask, folder: Storage, result: FileResult
) -> Iterator[_Batch]:
    """Cuts the documents into chunks, and these into batches; leaves out chunks that are written already."""
    chunk, chunk_bytes, chunk_documents = Chunk(folder, 0), 0, 0
    written = chunk.is_written
    rows: list[tuple] = []
    texts: list[str] = []
    chars = 0
    for sha256, utf8_bytes, text in documents:
        if not written:
            start = np.frombuffer(sha256[:16], "<u8")
            rows.append((start, 0, utf8_bytes, task.heldout or task.selection.is_heldout(sha256)))
            texts.append(text)
        chars += len(text)
        chunk_bytes += utf8_bytes
        chunk_documents += 1
        full = chunk_bytes >= CHUNK_UTF8_BYTES or chunk_documents >= CHUNK_DOCUMENTS
        if texts and (full or chars >= _BATCH_CHARS):
            yield _Batch(chunk, np.array(rows, INDEX_DTYPE), texts)
            rows, texts, chars = [], [], 0
        if full:
            chunk, chunk_bytes, chunk_documents = Chunk(folder, chunk.number + 1), 0, 0
            written = chunk.is_written
    if texts:
        yield _Batch(chunk, np.array(rows, INDEX_DTYPE), texts)
    result.chunks = chunk.number + (chunk_documents > 0)


def _encode(batch: _Batch, tokenizer: Tokenizer, encode: Encode) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns the index rows with their numbers of tokens, and the tokens of all documents in pieces."""
    separator = np.array([tokenizer.separator_id], np.int32)
    rows = batch.rows.copy()
    tokens: list[np.ndarray] = []
    cut = (tokenizer.pieces(text) for text in batch.texts)
    pieces = ((n, i == 0, piece) for n, text in enumerate(cut) for i, piece in enumerate(text))
    for group in _groups(pieces):
        arrays = encode([piece for _, _, piece in group])
        for (number, is_start, _), ids in zip(group, arrays, strict=True):
            if is_start:
                tokens.append(separator)
            tokens.append(ids)
            rows["tokens"][number] += ids.size + is_start
    return rows, tokens


def _groups(pieces: Iterable[tuple[int, bool, str]]) -> Iterator[list[tuple[int, bool, str]]]:
    """Groups pieces to be encoded at once: the library needs some 100 bytes for each token of them."""
    group: list[tuple[int, bool, str]] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece[2])
        if size >= _BATCH_CHARS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _ahead(items: Iterable[T]) -> Generator[T, None, None]:
    """Yields the items, computed in a thread of their own a little before they are asked for."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as thread:
        coming = deque(thread.submit(next, iterator, None) for _ in range(2))
        while (item := coming.popleft().result()) is not None:
            coming.append(thread.submit(next, iterator, None))
            yield item
