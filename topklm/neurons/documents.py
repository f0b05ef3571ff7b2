"""Text for looking at neurons: documents as token ids, cut into windows and packed into batches.

Windows read every token exactly once. A document longer than a window becomes overlapping ones: the first
tokens of each but the first are context only. Dims: B rows, T tokens in a row.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
import re
from types import MappingProxyType
from typing import Protocol

import jax
import numpy as np

from topklm.config import DataConfig, ModelConfig
from topklm.data.building.build import prepare
from topklm.data.dataset import Mixture, is_dataset, load_dataset
from topklm.data.documents import Document
from topklm.data.sources import FileReader, SourceFile, corpus_name, find
from topklm.data.stream import document_bounds
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError
from topklm.layout import Layout
from topklm.model import transformer
from topklm.storage.files import is_bucket

_DIGEST_BYTES = 16  # of a text; tells it from others, as when data are prepared
_BATCH_TOKENS = 8192  # of one device
_OVERLAP = 1 / 4  # of a window; its first new token can look back at so much, at least

COPY = "exact copy of a document before"
BOTH = "match of both patterns"


class Documents(Protocol):
    """Text in a fixed order, so that work on it can be taken up again; iterated, int32[n] of each document.

    Attributes:
        name: In words and a fingerprint.
        n_tokens: How many there are, without separators; None where only reading would tell.
        field: Where the text is looked for in lines and rows that have fields; "" where there are none.
        left_out: How many documents were left out of what was read last, by reason.
    """

    name: str
    n_tokens: int | None = None
    field: str = ""
    left_out: Mapping[str, int] = MappingProxyType({})

    def __iter__(self) -> Iterator[np.ndarray]: ...


def open_documents(
    tokenizer: Tokenizer,
    data: DataConfig,
    source: str | None = None,
    split: str = "heldout",
    flag: str = "--source",
) -> Documents:
    """Returns the text of a run, or another: a prepared folder, or files, globs, URLs of text.

    Without a source the run's data are opened, or prepared again. `split` is of prepared data, "train" or
    "heldout"; `flag` names the source in errors. UserError for text that cannot be read, or data prepared
    with another tokenizer.
    """
    if source is None:
        return _Prepared(prepare(data, lambda line: None), split, tokenizer, "the run's own data")
    if (folder := _as_folder(source)) and is_dataset(folder):
        dataset = load_dataset(folder, data.cache_gib)
        return _Prepared(Mixture.single(dataset), split, tokenizer, f"{flag} = {source}")
    names = [part.strip() for part in source.split(",") if part.strip()]
    return _Files(find(names, flag=flag), data.text_field, tokenizer)


def _as_folder(source: str) -> str | Path | None:
    if is_bucket(source):
        return source
    with contextlib.suppress(OSError, RuntimeError):  # too long for a name; nobody's home is known
        folder = Path(source).expanduser()
        return folder if folder.is_dir() else None
    return None


def described(left_out: Mapping[str, int]) -> str:
    """Describes documents left out, as a part of a line: "2 x empty, 1 x NUL bytes"; "" for nothing."""
    return ", ".join(f"{n:,} x {reason}" for reason, n in sorted(left_out.items()))


def no_text(documents: Documents, said: str) -> UserError:
    """Makes the error for text without a document, read to its end; `said` as in "--source = notes.jsonl"."""
    looked_for = f"the field {documents.field!r} was looked for" if documents.field else ""
    why = "; ".join(filter(None, (described(documents.left_out), looked_for)))
    what, advice = "there is no text in it", "give other text"
    if isinstance(documents, Matching):
        what, advice = f"no document of the {documents.name} is like that", "give another pattern"
    return UserError(f"{said}: {what}{f' ({why})' if why else ''}; {advice}")


class _Prepared(Documents):
    def __init__(self, mixture: Mixture, split: str, tokenizer: Tokenizer, said: str):
        if mixture.tokenizer.sha256 != tokenizer.sha256:
            raise UserError(
                f"{said}: prepared with another tokenizer (sha256 {mixture.tokenizer.sha256[:12]}) than the "
                f"model's ({tokenizer.sha256[:12]}): give text, or data prepared with the model's"
            )
        self._streams = [dataset.tokens(dataset.splits[split]) for dataset in mixture.datasets]
        self._separator_id = tokenizer.separator_id
        self.n_tokens = sum(dataset.splits[split].text_tokens for dataset in mixture.datasets)
        names = ", ".join(dataset.path.name for dataset in mixture.datasets)
        what = {"heldout": "held-out text", "train": "training text"}[split]
        self.name = f"{what} of {names} ({mixture.fingerprint[:12]})"

    def __iter__(self) -> Iterator[np.ndarray]:
        for stream in self._streams:
            for begin, end in document_bounds(stream, self._separator_id):
                yield stream.read(begin + 1, end)


class _Files(Documents):
    """Documents of files, without unreadable ones and exact copies, as `topklm prepare` leaves them out."""

    def __init__(self, files: tuple[SourceFile, ...], text_field: str, tokenizer: Tokenizer):
        self.field = text_field if any(file.ending != ".txt" for file in files) else ""
        self._files, self._text_field, self._tokenizer = files, text_field, tokenizer
        facts = [dataclasses.asdict(file) for file in files]
        fingerprint = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()
        self.name = f"{corpus_name(files)} ({fingerprint[:12]})"

    def __iter__(self) -> Iterator[np.ndarray]:
        seen, left_out = set[bytes](), Counter[str]()
        self.left_out = left_out
        for item in itertools.chain.from_iterable(FileReader(file, self._text_field) for file in self._files):
            if not isinstance(item, Document):
                left_out[item.kind] += 1
                continue
            digest = hashlib.sha256(item.text.encode()).digest()[:_DIGEST_BYTES]
            if digest in seen:
                left_out[COPY] += 1
                continue
            seen.add(digest)
            yield self._tokenizer.encode(item.text)


class Matching(Documents):
    """Documents whose text matches a pattern (None: all), and not another one (None: none does)."""

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        wanted: re.Pattern[str] | None,
        unwanted: re.Pattern[str] | None,
    ):
        self.name = documents.name
        self._documents, self._tokenizer = documents, tokenizer
        self._wanted, self._unwanted = wanted, unwanted

    def __iter__(self) -> Iterator[np.ndarray]:
        left_out = Counter[str]()
        self.left_out = left_out
        for ids in self._documents:
            text = self._tokenizer.decode(ids)
            if self._wanted is not None and not self._wanted.search(text):
                continue
            if self._unwanted is None or not self._unwanted.search(text):
                yield ids
            elif self._wanted is not None:
                left_out[BOTH] += 1


@dataclasses.dataclass(frozen=True, eq=False)
class TokenWindow:
    """A stretch of a document."""

    document: int  # number of the document
    inputs: np.ndarray  # int32[n], n at most T; the document's first window begins with the separator
    n_known: int  # leading inputs that are not to be read: the separator, or tokens of the window before

    @property
    def n_new(self) -> int:
        """Inputs that are to be read; they stand last."""
        return len(self.inputs) - self.n_known


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Windows in rows, a number of batches of B; N of their tokens are to be read."""

    inputs: np.ndarray  # int32[R, T], filled up with separators
    segment_ids: np.ndarray  # int32[R, T]: 1, 2, ... for the windows of a row, 0 for padding
    positions: np.ndarray  # int32[R, T], from 0 in each window
    # int32[R, T], which of the N tokens an input is, in the order of the windows; -1: none.
    places: np.ndarray
    tokens: np.ndarray  # int32[N]
    documents: np.ndarray  # int64[N]
    batch_rows: int  # B

    def batches(self) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray, np.ndarray]]:
        """Yields batches: inputs, segment ids and positions, [B, T] each; which inputs, flat, are to be read.

        And which of the N tokens those are. Of next-token losses, a token's own is one before its input,
        which always has another before it in its row.
        """
        for begin in range(0, len(self.inputs), self.batch_rows):
            part = slice(begin, begin + self.batch_rows)
            places = self.places[part].reshape(-1)
            read = np.flatnonzero(places >= 0)
            yield (self.inputs[part], self.segment_ids[part], self.positions[part]), read, places[read]


@dataclasses.dataclass(frozen=True, eq=False)
class TextModel:
    """A model that text is run through, in windows that are packed into rows."""

    config: ModelConfig
    params: transformer.Parameters  # on the devices of `layout`
    layout: Layout  # rows of a batch are split over its devices
    separator_id: int  # of the token that stands before documents
    batch_rows: int | None = None  # B, over all devices; None: as many as suit them

    @property
    def rows(self) -> int:
        """Returns B."""
        suits = max(1, _BATCH_TOKENS // self.config.context_length) * self.layout.size
        return self.batch_rows or suits

    def windows(
        self, documents: Iterable[np.ndarray], first: int = 0, step: int = 1
    ) -> Iterator[TokenWindow]:
        """Yields the windows of all documents, or of each `step`-th from the one numbered `first`."""
        for number, ids in itertools.islice(enumerate(documents), first, None, step):
            yield from windows_of(number, ids, self.separator_id, self.config.context_length)

    def pack(self, windows: list[TokenWindow]) -> Packed:
        """Puts windows into rows, as `pack` does."""
        return pack(windows, self.config.context_length, self.rows, self.separator_id)

    def put(self, arrays: tuple[np.ndarray, ...]) -> tuple[jax.Array, ...]:
        """Puts the arrays of a batch on the devices."""
        return jax.device_put(arrays, self.layout.batch)


def windows_of(document: int, ids: np.ndarray, separator_id: int, length: int) -> Iterator[TokenWindow]:
    """Yields windows that together read every token, `ids` int32[n], of the document of this number once."""
    inputs = np.concatenate([[separator_id], ids]).astype(np.int32)
    for first, stop, known in chunk_bounds(len(inputs), length):
        yield TokenWindow(document, inputs[first:stop], known - first)


def chunk_bounds(n_inputs: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Yields first input, the one after the last, and the first to be read, of windows of T >= 2 tokens."""
    overlap = max(1, int(length * _OVERLAP))
    known, first = 1, 0
    while known < n_inputs:
        stop = min(first + length, n_inputs)
        yield first, stop, known
        known, first = stop, stop - overlap


def batches(windows: Iterable[TokenWindow], n_tokens: int) -> Iterator[list[TokenWindow]]:
    """Yields windows in lists that have at least so many tokens to read; the last may have fewer."""
    stretch: list[TokenWindow] = []
    n = 0
    for window in windows:
        stretch.append(window)
        n += window.n_new
        if n >= n_tokens:
            yield stretch
            stretch, n = [], 0
    if stretch:
        yield stretch


def pack(windows: list[TokenWindow], length: int, batch_rows: int, separator_id: int) -> Packed:
    """Puts windows into rows of T tokens, the longest first, each into the first row that it fits into.

    None is longer than T; the number of rows is a multiple of `batch_rows`, filled up with separators.
    """
    rows, n_rows = first_fit([len(window.inputs) for window in windows], length)
    shape = (-(-n_rows // batch_rows) * batch_rows, length)
    inputs = np.full(shape, separator_id, np.int32)
    segment_ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    places = np.full(shape, -1, np.int32)
    filled, segments = np.zeros(n_rows, int), np.zeros(n_rows, np.int32)
    done = 0
    for window, row in zip(windows, rows, strict=True):
        begin = filled[row]
        end = filled[row] = begin + len(window.inputs)
        segments[row] += 1
        inputs[row, begin:end] = window.inputs
        segment_ids[row, begin:end] = segments[row]
        positions[row, begin:end] = np.arange(end - begin)
        places[row, begin + window.n_known : end] = np.arange(done, done + window.n_new)
        done += window.n_new
    tokens = np.concatenate([window.inputs[window.n_known :] for window in windows])
    documents = np.repeat([window.document for window in windows], [window.n_new for window in windows])
    return Packed(inputs, segment_ids, positions, places, tokens, documents, batch_rows)


def first_fit(sizes: Sequence[int], capacity: int) -> tuple[list[int], int]:
    """Returns the row of each, the longest put first, into the first row with space; and how many rows."""
    # A tournament: a node holds the most space that a row below it has, so each search takes log2(n) steps.
    n = 1 << max(0, len(sizes) - 1).bit_length()
    most, rows, n_rows = [capacity] * (2 * n), [0] * len(sizes), 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        node = 1
        while node < n:
            node = 2 * node if most[2 * node] >= sizes[i] else 2 * node + 1
        rows[i] = node - n
        n_rows = max(n_rows, node - n + 1)
        most[node] -= sizes[i]
        while node > 1:
            node //= 2
            most[node] = max(most[2 * node], most[2 * node + 1])
    return rows, n_rows
