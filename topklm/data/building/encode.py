"""One source file to chunks of tokens: filters, split, hash and tokens of each document.

Every worker does this, whether a thread here or a machine of a pipeline. The result depends on the file and
the settings alone, so work that is done is found again by its name.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import hashlib
import itertools
import json
import operator
import re
from typing import Any, TypeVar

import numpy as np

from topklm.data.building.chunks import INDEX_DTYPE, Chunk
from topklm.data.building.storage import Storage
from topklm.data.building.word_cache import Encode
from topklm.data.documents import Problem
from topklm.data.readers import FileReader
from topklm.data.records import token_dtype
from topklm.data.sources import SourceFile
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError
from topklm.storage.files import parse_json, sealed_json, unsealed

# A kill costs at most the encoding of one chunk; both bounds keep a chunk's index and tokens small.
CHUNK_UTF8_BYTES = 32 << 20
CHUNK_DOCUMENTS = 1 << 18
MAX_EXAMPLES = 20  # problems of one file that are kept word for word

_FORMAT = 2  # of chunks; other code may not reuse this code's
_BATCH_CHARS = 1 << 20  # characters encoded at a time
_DONE_FILE = "done.json"

T = TypeVar("T")
# Takes stored bytes read, documents and tokens, each since the last time.
ReportProgress = Callable[[int, int, int], None]


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
class FileJob:
    """One source file to encode; everything that decides the outcome."""

    file: SourceFile
    heldout: bool  # all of it
    selection: Selection
    tokenizer_sha256: str

    @property
    def folder(self) -> str:
        """Name of the folder for its chunks: another for other contents or settings."""
        choice = [self.selection.to_json(), self.selection.last_heldout]
        identity = [_FORMAT, dataclasses.asdict(self.file), self.heldout, choice, self.tokenizer_sha256]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


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


def encode_file(
    job: FileJob, tokenizer: Tokenizer, encode: Encode, work: Storage, report: ReportProgress
) -> FileResult:
    """Encodes a file, or what an earlier attempt has left of it.

    Args:
        job: The file and its settings.
        tokenizer: The one that `job` names.
        encode: How its tokens are found, see `word_cache.fastest`.
        work: Its folder `job.folder` receives the chunks.
        report: Told about progress.

    Raises:
        UserError: For a file that cannot be read at all; with `strict` for the first problem in it.
    """
    folder = work.child(job.folder)
    if (result := _finished(job, folder)) is not None:
        if job.selection.strict and result.examples:
            raise _strict_stop(result.examples[0])
        report(job.file.size, result.documents, 0)
        return result
    reader, result = FileReader(job.file, job.selection.text_field), FileResult(job.file.url, job.file.size)
    bytes_told = 0
    dtype = token_dtype(tokenizer.vocab_size)
    with contextlib.ExitStack() as stack:
        # One thread reads, one encodes, this one writes. Both are ended here, whatever happens: left to the
        # garbage collector, they would be waited for in any thread, even one of themselves.
        batches = stack.enter_context(
            contextlib.closing(_ahead(_batches(_select(reader, job, result), job, folder, result)))
        )
        encoded = stack.enter_context(
            contextlib.closing(_ahead((b.chunk, *_encode(b, tokenizer, encode)) for b in batches))
        )
        for chunk, group in itertools.groupby(encoded, key=operator.itemgetter(0)):
            with chunk.create(dtype) as writer:
                for _, rows, tokens in group:
                    writer.append(rows, tokens)
                    report(reader.bytes_read - bytes_told, len(rows), sum(piece.size for piece in tokens))
                    bytes_told = reader.bytes_read
    report(reader.bytes_read - bytes_told, 0, 0)
    result.sha256 = reader.sha256
    folder.write(_DONE_FILE, sealed_json({"folder": job.folder, "result": dataclasses.asdict(result)}))
    return result


def discard_damaged(job: FileJob, work: Storage) -> list[str]:
    """Deletes those pieces of a file's unfinished work that are not as they were written.

    Args:
        job: The file and its settings.
        work: On this machine.

    Returns:
        Names of what was deleted.
    """
    folder = work.child(job.folder)
    result, names = _finished(job, folder), folder.names()
    numbers = {int(found[1]) for name in names if (found := re.fullmatch(r"(\d{6,9})\.index", name))}
    if result is not None:
        numbers.update(range(result.chunks))
    bad = [chunk for number in sorted(numbers) if not (chunk := Chunk(folder, number)).is_whole()]
    for chunk in bad:
        chunk.discard()
    if _DONE_FILE in names and (bad or result is None):
        folder.discard(_DONE_FILE)
    damaged = [f"{folder.url}/{chunk.number:06d}" for chunk in bad]
    return damaged + [f"{folder.url}/{_DONE_FILE}" for _ in range(_DONE_FILE in names and result is None)]


def _finished(job: FileJob, folder: Storage) -> FileResult | None:
    """Reads what an earlier attempt found in a file; None if it did not end, or that is damaged."""
    try:
        content = unsealed(parse_json(folder.read(_DONE_FILE)))
        return FileResult(**content["result"]) if content.get("folder") == job.folder else None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
        return None


def chunks_of(job: FileJob, result: FileResult, work: Storage) -> list[Chunk]:
    """Returns the chunks of an encoded file, in order."""
    return [Chunk(work.child(job.folder), number) for number in range(result.chunks)]


def training_text(
    files: Sequence[tuple[SourceFile, bool]], selection: Selection, budget: int, report: ReportProgress
) -> Iterator[str]:
    """Yields documents of the training split to train a tokenizer on, in source order.

    Args:
        files: Files, and whether all of the file is held out.
        selection: As for encoding.
        budget: UTF-8 bytes at most, about; every file may give the same share, and what one does not
            use goes to those after it.
        report: Told about progress.
    """
    readable = [file for file, heldout in files if not heldout]
    for number, file in enumerate(readable):
        left = budget // (len(readable) - number)
        for text, raw in _selected(file, selection):
            if selection.is_heldout(hashlib.sha256(raw).digest()):
                continue
            yield text
            report(0, 1, 0)
            left -= len(raw)
            budget -= len(raw)
            if left <= 0:
                break


def fitted(files: Sequence[tuple[SourceFile, bool]], selection: Selection) -> Selection:
    """Returns a selection under which both splits have documents, where a share of few leaves one empty.

    If it leaves none to hold out, that with the lowest hash is; if it leaves none to train on, the two with
    the highest hashes are trained on. A share that gives both splits a document, as the first documents of
    most corpora show, stays as it is, and so does one of fewer than three different documents.

    Args:
        files: Files, and whether all of the file is held out.
        selection: With the share.
    """
    if not selection.heldout_fraction:
        return selection
    lowest, has_train, has_heldout = b"", False, False
    highest: list[bytes] = []
    for file, all_heldout in files:
        for _, raw in _selected(file, selection):
            digest = hashlib.sha256(raw).digest()
            is_heldout = all_heldout or selection.is_heldout(digest)
            has_train, has_heldout = has_train or not is_heldout, has_heldout or is_heldout
            if has_train and has_heldout:
                return selection
            if not all_heldout:
                lowest = min(lowest or digest, digest)
                highest = sorted({*highest, digest})[-3:]
    if len(highest) < 3:
        return selection
    return dataclasses.replace(selection, last_heldout=(highest[0] if has_heldout else lowest).hex())


def _selected(file: SourceFile, selection: Selection) -> Iterator[tuple[str, bytes]]:
    """Yields (text, text in UTF-8) of the documents of a file that are neither too short nor too long."""
    for item in FileReader(file, selection.text_field):
        if not isinstance(item, Problem) and selection.has_length(item.text):
            yield item.text, item.text.encode()


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Documents of one chunk that are encoded together."""

    chunk: Chunk
    rows: np.ndarray  # INDEX_DTYPE[n], tokens not yet known
    texts: list[str]


def _select(reader: FileReader, job: FileJob, result: FileResult) -> Iterator[tuple[bytes, int, str]]:
    """Yields (SHA-256, UTF-8 bytes, text) of documents that are taken; counts others in `result`."""
    for item in reader:
        if isinstance(item, Problem):
            result.problems[item.kind] = result.problems.get(item.kind, 0) + 1
            _note(result, job, f"{item.where}: {item.kind} ({item.what})", "skipped")
            continue
        if item.replaced:
            result.documents_with_replacements += 1
            result.replaced_sequences += item.replaced
            what = f"{item.where}: invalid UTF-8 ({item.replaced} sequences)"
            _note(result, job, what, "replaced by U+FFFD")
        text = item.text
        if not job.selection.has_length(text):
            result.too_short += len(text) < job.selection.min_chars
            result.too_long += len(text) >= job.selection.min_chars
            continue
        raw = text.encode()
        result.documents += 1
        result.utf8_bytes += len(raw)
        yield hashlib.sha256(raw).digest(), len(raw), text


def _note(result: FileResult, job: FileJob, what: str, done: str) -> None:
    example = f"{job.file.url}, {what}"
    if job.selection.strict:
        raise _strict_stop(example)
    if len(result.examples) < MAX_EXAMPLES:
        result.examples.append(f"{example}: {done}")


def _strict_stop(example: str) -> UserError:
    return UserError(f"strict: {example}; mend or remove it, or leave out --strict to have it counted")


def _batches(
    documents: Iterable[tuple[bytes, int, str]], job: FileJob, folder: Storage, result: FileResult
) -> Iterator[_Batch]:
    """Cuts the documents into chunks, and these into batches; leaves out chunks that are written already."""
    chunk, chunk_bytes, chunk_documents = Chunk(folder, 0), 0, 0
    written = chunk.is_written
    rows: list[tuple] = []
    texts: list[str] = []
    chars = 0
    for sha256, utf8_bytes, text in documents:
        if not written:
            digest = np.frombuffer(sha256[:16], "<u8")
            rows.append((digest, 0, utf8_bytes, job.heldout or job.selection.is_heldout(sha256)))
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
    for group in _groups(pieces, _BATCH_CHARS):
        arrays = encode([piece for _, _, piece in group])
        for (number, is_start, _), ids in zip(group, arrays, strict=True):
            if is_start:
                tokens.append(separator)
            tokens.append(ids)
            rows["tokens"][number] += ids.size + is_start
    return rows, tokens


def _groups(pieces: Iterable[tuple[int, bool, str]], chars: int) -> Iterator[list[tuple[int, bool, str]]]:
    """Groups pieces to be encoded at once: the library needs some 100 bytes for each token of them."""
    group: list[tuple[int, bool, str]] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece[2])
        if size >= chars:
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
