"""Text for looking at neurons: documents as token ids, cut into windows and packed into batches.

Windows read every token exactly once. A document longer than a window becomes overlapping ones: the first
tokens of each but the first are context only. Dims: B rows, T tokens in a row.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np

from topklm.config import DataConfig
from topklm.data.building.build import prepare
from topklm.data.dataset import SPLITS, Mixture, is_dataset, load_dataset
from topklm.data.documents import Document
from topklm.data.sources import FileReader, SourceFile, corpus_name, find
from topklm.data.stream import document_bounds
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError

_DIGEST_BYTES = 16  # of a text; tells it from others, as when data are prepared

COPY = "exact copy of a document before"


class Documents(Protocol):
    """Text in a fixed order, so that work on it can be taken up again.

    Attributes:
        name: In words and a fingerprint.
        n_tokens: How many there are; None where only reading would tell.
    """

    name: str
    n_tokens: int | None

    def __iter__(self) -> Iterator[np.ndarray]:
        """Returns token ids of each document, int32[n], without separators."""
        ...


class SourceText(Documents, Protocol):
    """Documents that a user named.

    Attributes:
        field: Where the text is looked for in lines and rows that have fields; "" where there are none.
        left_out: How many documents were left out of what was read last, by reason.
    """

    field: str = ""
    left_out: Mapping[str, int] = MappingProxyType({})


def open_documents(
    tokenizer: Tokenizer,
    data: DataConfig,
    source: str | None = None,
    split: str = "heldout",
    flag: str = "--source",
) -> SourceText:
    """Returns the text of a run, or another.

    Args:
        tokenizer: The model's.
        data: The run's; its data are opened, or prepared again, if no source is given.
        source: A prepared folder, or what `topklm prepare` takes: files, globs, URLs of text.
        split: Of prepared data, "train" or "heldout".
        flag: With which the user named the source, for errors.

    Raises:
        UserError: For text that cannot be read, or data prepared with another tokenizer.
    """
    if source is None:
        return _Prepared(prepare(data, lambda line: None), split, tokenizer, "the run's own data")
    if (folder := as_folder(source)) and is_dataset(folder):
        mixture = Mixture.single(load_dataset(folder))
        return _Prepared(mixture, split, tokenizer, f"{flag} = {source}")
    names = [part.strip() for part in source.split(",") if part.strip()]
    return _Files(find(names, flag=flag), data.text_field, tokenizer)


def as_folder(source: str) -> Path | None:
    """Returns the folder that a source names; None if it names something else, such as several files."""
    with contextlib.suppress(OSError, RuntimeError):  # too long for a name; nobody's home is known
        folder = Path(source).expanduser()
        return folder if folder.is_dir() else None
    return None


def described(left_out: Mapping[str, int]) -> str:
    """Describes documents left out, as a part of a line: "2 x empty, 1 x NUL bytes"; "" for nothing."""
    return ", ".join(f"{n:,} x {reason}" for reason, n in sorted(left_out.items()))


def no_text(documents: SourceText, said: str) -> UserError:
    """Makes the error for text without a document.

    Args:
        documents: Read to their end.
        said: The words of the user, e.g. "--source = notes.jsonl".
    """
    reasons = described(documents.left_out)
    looked_for = f"the field {documents.field!r} was looked for" if documents.field else ""
    why = "; ".join(part for part in (reasons, looked_for) if part)
    return UserError(f"{said}: there is no text in it{f' ({why})' if why else ''}; give other text")


class _Prepared(SourceText):
    def __init__(self, mixture: Mixture, split: str, tokenizer: Tokenizer, said: str):
        if mixture.tokenizer.sha256 != tokenizer.sha256:
            raise UserError(
                f"{said}: prepared with another tokenizer (sha256 {mixture.tokenizer.sha256[:12]}) than the "
                f"model's ({tokenizer.sha256[:12]}): give text, or data prepared with the model's"
            )
        assert split in SPLITS
        self._streams = [dataset.tokens(dataset.splits[split]) for dataset in mixture.datasets]
        self._separator_id = tokenizer.separator_id
        self.n_tokens: int | None = sum(dataset.splits[split].text_tokens for dataset in mixture.datasets)
        names = ", ".join(dataset.path.name for dataset in mixture.datasets)
        what = {"heldout": "held-out text", "train": "training text"}[split]
        self.name = f"{what} of {names} ({mixture.fingerprint[:12]})"

    def __iter__(self) -> Iterator[np.ndarray]:
        for stream in self._streams:
            for begin, end in document_bounds(stream, self._separator_id):
                yield stream.read(begin + 1, end)


class _Files(SourceText):
    """Documents of files, without unreadable ones and exact copies, as `topklm prepare` leaves them out."""

    def __init__(self, files: tuple[SourceFile, ...], text_field: str, tokenizer: Tokenizer):
        self.n_tokens: int | None = None
        self.field = text_field if any(file.ending != ".txt" for file in files) else ""
        self._files, self._text_field, self._tokenizer = files, text_field, tokenizer
        facts = [dataclasses.asdict(file) for file in files]
        fingerprint = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()
        self.name = f"{corpus_name(files)} ({fingerprint[:12]})"

    def __iter__(self) -> Iterator[np.ndarray]:
        seen, left_out = set[bytes](), Counter[str]()
        self.left_out = left_out
        for file in self._files:
            for item in FileReader(file, self._text_field):
                if not isinstance(item, Document):
                    left_out[item.kind] += 1
                    continue
                digest = hashlib.sha256(item.text.encode()).digest()[:_DIGEST_BYTES]
                if digest in seen:
                    left_out[COPY] += 1
                    continue
                seen.add(digest)
                yield self._tokenizer.encode(item.text)


_OVERLAP = 1 / 4  # of a window; its first new token can look back at so much, at least


@dataclasses.dataclass(frozen=True, eq=False)
class TokenWindow:
    """A stretch of a document.

    Attributes:
        document: Number of the document.
        inputs: int32[n], n at most T; the document's first window begins with the separator.
        n_known: Leading inputs that are not to be read: the separator, or tokens of the window before.
    """

    document: int
    inputs: np.ndarray
    n_known: int

    @property
    def n_new(self) -> int:
        """Inputs that are to be read; they stand last."""
        return len(self.inputs) - self.n_known


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Windows in rows; N of their tokens are to be read.

    Attributes:
        inputs: int32[R, T], filled up with separators.
        segment_ids: int32[R, T]: 1, 2, ... for the windows of a row, 0 for padding.
        positions: int32[R, T], from 0 in each window.
        places: int32[R, T], which of the N tokens an input is, in the order of the windows; -1: none.
        tokens: int32[N].
        documents: int64[N].
    """

    inputs: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    places: np.ndarray
    tokens: np.ndarray
    documents: np.ndarray


def windows_of(document: int, ids: np.ndarray, separator_id: int, length: int) -> Iterator[TokenWindow]:
    """Windows that together read every token of a document once.

    Args:
        document: Its number.
        ids: int32[n], its tokens, without a separator.
        separator_id: Of the token before a document.
        length: T, at least 2.
    """
    inputs = np.concatenate([[separator_id], ids]).astype(np.int32)
    for first, stop, known in chunk_bounds(len(inputs), length):
        yield TokenWindow(document, inputs[first:stop], known - first)


def chunk_bounds(n_inputs: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Yields where windows begin and end among the inputs of a document, the separator counted.

    Args:
        n_inputs: How many there are.
        length: T, at least 2.

    Yields:
        The first input of a window, the one after its last, and the first that is to be read.
    """
    overlap = max(1, int(length * _OVERLAP))
    known, first = 1, 0
    while known < n_inputs:
        stop = min(first + length, n_inputs)
        yield first, stop, known
        known, first = stop, stop - overlap


def batches(windows: Iterable[TokenWindow], n_tokens: int) -> Iterator[list[TokenWindow]]:
    """Windows in lists that have at least so many tokens to read; the last may have fewer."""
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


def pack(windows: list[TokenWindow], length: int, multiple: int, separator_id: int) -> Packed:
    """Puts windows into rows, the longest first, each into the first row that it fits into.

    Args:
        windows: None longer than `length`.
        length: T.
        multiple: The number of rows R is one of this.
        separator_id: Fills up rows.
    """
    rows, n_rows = _first_fit([len(window.inputs) for window in windows], length)
    shape = (-(-n_rows // multiple) * multiple, length)
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
    return Packed(inputs, segment_ids, positions, places, tokens, documents)


def _first_fit(sizes: list[int], room: int) -> tuple[list[int], int]:
    """Returns the row of each, and how many rows there are."""
    left: list[int] = []
    rows = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((row for row, space in enumerate(left) if space >= sizes[i]), len(left))
        if row == len(left):
            left.append(room)
        left[row] -= sizes[i]
        rows[i] = row
    return rows, len(left)
