"""Looks into a prepared dataset: decodes random windows, or reads all and lists each difference.

Verification reads every byte of every file, every record, every token. It mends nothing, decodes no text, and
needs the memory of a few records.
"""

from collections.abc import Iterator
import dataclasses
import os
from pathlib import Path
import random
from typing import Any

import numpy as np

from topklm.data.dataset import (
    DESCRIPTION_FILE,
    SPLITS,
    TOKENIZER_FILE,
    Dataset,
    SplitInfo,
    damaged,
    read_description,
    split_from_json,
)
from topklm.data.records import RECORD_TOKENS, Shard, ShardError, TokenStream, check_shards, sha256_of_file
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.progress import Progress, Report

_BLOCK_TOKENS = 64 * RECORD_TOKENS  # read at a time
_COUNTED = ("documents", "tokens", "utf8_bytes")
_TOKENIZER_FIELDS = ("kind", "vocab_size", "separator_id")


@dataclasses.dataclass(frozen=True)
class DatasetProblem:
    """One thing that is wrong."""

    file: str  # name inside the folder
    what: str


@dataclasses.dataclass(frozen=True)
class Counts:
    """Content of the readable shards of a split."""

    shards: int  # that could be read to their end
    documents: int
    tokens: int  # separators included
    utf8_bytes: int | None  # of the text; None if the tokenizer does not tell the bytes of its tokens


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """Findings of `verify`."""

    path: Path
    splits: dict[str, Counts]
    problems: tuple[DatasetProblem, ...]
    other_files: tuple[str, ...]  # names in the folder that do not belong to the dataset


def verify(path: str | Path, progress: Progress | None = None) -> VerifyReport:
    """Reads a dataset to its last byte; UserError only if dataset.json, or a file, may not be read.

    Compared with dataset.json are the size and sha256 of every file, that file's own included, the number of
    records of every shard, and for each split documents, tokens and, where the tokenizer tells the bytes of
    its tokens, the bytes of text. `progress` is told of the bytes, documents and tokens that were read.
    """
    path = Path(os.path.expanduser(path)).absolute()
    contradictions: list[str] = []
    description = read_description(path, contradictions.append)
    try:
        splits = {name: split_from_json(description["splits"][name]) for name in SPLITS}
        told = {field: description["tokenizer"][field] for field in ("sha256", *_TOKENIZER_FIELDS)}
        if [type(value) for value in told.values()] != [str, str, int, int]:
            raise TypeError(f"tokenizer: {told}")
        contradictions += _contradictions(description)
    except (KeyError, TypeError, ValueError) as e:
        raise damaged(path / DESCRIPTION_FILE, e) from e
    total = sum(shard.size for split in splits.values() for shard in split.shards)
    check = _Check(path, told, contradictions)
    with (progress or Progress(lambda text: None)).phase("verifying", total) as report:
        found = {name: check.split(name, split, report) for name, split in splits.items()}
    expected = {DESCRIPTION_FILE, TOKENIZER_FILE}
    expected.update(shard.name for split in splits.values() for shard in split.shards)
    others = sorted(file.name for file in path.iterdir() if file.name not in expected)
    return VerifyReport(path, found, tuple(check.problems), tuple(others))


class _Check:
    """The comparison of one dataset with its description; collects problems."""

    def __init__(self, path: Path, told: dict[str, Any], contradictions: list[str]):
        self._path = path
        # In the order in which they were found, none twice.
        self.problems = {DatasetProblem(DESCRIPTION_FILE, what): None for what in contradictions}
        tokenizer = self._tokenizer(told)
        self._vocab_size = tokenizer.vocab_size if tokenizer else told["vocab_size"]
        self._separator_id = tokenizer.separator_id if tokenizer else told["separator_id"]
        self._token_bytes = tokenizer.token_bytes_lengths() if tokenizer else None

    def split(self, name: str, split: SplitInfo, report: Report) -> Counts:
        """Reads the shards of a split, and compares what they hold in all."""
        counts = [self._shard(shard, number == 0, report) for number, shard in enumerate(split.shards)]
        readable = [count for count in counts if count is not None]
        documents, tokens, utf8_bytes = (
            sum(getattr(count, field) or 0 for count in readable) for field in _COUNTED
        )
        found = Counts(len(readable), documents, tokens, None if self._token_bytes is None else utf8_bytes)
        if found.shards == len(split.shards):
            for field in _COUNTED:
                told, counted = getattr(split, field), getattr(found, field)
                if counted is not None and told != counted:
                    self._note(DESCRIPTION_FILE, f"{name}: {field} = {told:,}, its shards hold {counted:,}")
        return found

    def _shard(self, shard: Shard, is_first: bool, report: Report) -> Counts | None:
        """Counts the content of a shard; None if it could not be read to its end."""
        try:
            check_shards(self._path, [shard], contents=True)
        except ShardError as e:
            self._note(shard.name, e.fault)
        except UserError as e:
            if isinstance(e.__cause__, PermissionError):  # no damage
                raise
            self._note(shard.name, f"cannot be read ({e})")
            return None
        documents = utf8_bytes = 0
        # Of another shard in its place, which is named already, the records are counted.
        stream = TokenStream(self._path, [dataclasses.replace(shard, ends="")], self._vocab_size)
        for start in range(0, len(stream), _BLOCK_TOKENS):
            stop = min(start + _BLOCK_TOKENS, len(stream))
            try:
                tokens = stream.read(start, stop)
            except ShardError as e:
                self._note(shard.name, e.fault)
                return None
            if is_first and start == 0 and tokens[0] != self._separator_id:
                self._note(shard.name, f"begins with token {tokens[0]}, not with a separator")
            is_inside = (tokens >= 0) & (tokens < self._vocab_size)
            if not is_inside.all():
                first = int(np.argmin(is_inside))
                self._note(
                    shard.name,
                    f"holds token id {tokens[first]} in record {(start + first) // RECORD_TOKENS}, "
                    f"outside the vocabulary of {self._vocab_size:,}",
                )
            is_separator = tokens == self._separator_id
            begun = int(np.count_nonzero(is_separator & is_inside))
            documents += begun
            if self._token_bytes is not None:
                utf8_bytes += int(self._token_bytes[tokens[is_inside & ~is_separator]].sum())
            report(shard.size * stop // len(stream) - shard.size * start // len(stream), begun, stop - start)
        return Counts(1, documents, len(stream), utf8_bytes)

    def _tokenizer(self, told: dict[str, Any]) -> Tokenizer | None:
        """Returns the dataset's tokenizer; None if the file is another."""
        file = self._path / TOKENIZER_FILE
        try:
            with disk_errors_are_user_errors(f"reading {file}"):
                sha256 = sha256_of_file(file)
        except (UserError, OSError) as e:
            if isinstance(e.__cause__, PermissionError):
                raise
            self._note(TOKENIZER_FILE, f"cannot be read ({e.strerror if isinstance(e, OSError) else e})")
            return None
        if sha256 != told["sha256"]:
            self._note(TOKENIZER_FILE, f"has the sha256 {sha256[:12]}, not {told['sha256'][:12]}")
            return None
        tokenizer = Tokenizer.load(file)
        for field in _TOKENIZER_FIELDS:
            has = getattr(tokenizer, field)
            if told[field] != has:
                self._note(
                    DESCRIPTION_FILE, f"tokenizer: {field} = {told[field]!r}, {TOKENIZER_FILE}: {has!r}"
                )
        return tokenizer

    def _note(self, file: str, what: str) -> None:
        self.problems[DatasetProblem(file, what)] = None


def _contradictions(description: dict[str, Any]) -> list[str]:
    """Counts that do not follow from one another as they must."""
    text, splits = description["text"], description["splits"]
    read = sum(source["documents"] for source in description["sources"])
    kept = sum(splits[name]["documents"] for name in SPLITS)
    sums = [
        ("text: documents", text["documents"], "sources", read),
        ("text: duplicates", text["duplicates"], "documents that are in no split", read - kept),
    ]
    for name in SPLITS:
        split = splits[name]
        in_text = split["tokens"] - split["documents"]
        in_shards = sum(shard["tokens"] for shard in split["shards"])
        sums.append((f"{name}: text_tokens", split["text_tokens"], "tokens less documents", in_text))
        sums.append((f"{name}: tokens", split["tokens"], "its shards", in_shards))
    return [f"{what} = {told:,}, {other}: {count:,}" for what, told, other, count in sums if told != count]


@dataclasses.dataclass(frozen=True)
class DocumentPiece:
    """The part of a window that belongs to one document."""

    begins: bool  # a separator stands before it; otherwise the document began in an earlier window
    text: str


@dataclasses.dataclass(frozen=True)
class TextWindow:
    """Tokens start to stop - 1 of a split."""

    start: int
    stop: int
    pieces: tuple[DocumentPiece, ...]

    @property
    def documents(self) -> int:
        """Documents that the window holds something of."""
        return len(self.pieces)


def sample_windows(
    dataset: Dataset, split: str, n_windows: int, context_length: int, seed: int
) -> Iterator[TextWindow]:
    """Decodes random windows of a split, in the split's order; the same seed gives the same ones.

    Window i begins at token i * context_length, as in training; the last is moved back to be full. Fewer are
    given where the split has fewer. Only shards that hold windows are opened; UserError for one that is
    damaged.
    """
    stream, tokenizer = dataset.tokens(dataset.splits[split]), dataset.tokenizer
    if not len(stream):
        raise UserError(f"split = {split}: {dataset.path} has no documents in it; choose the other one")
    n_all = -(-len(stream) // context_length)
    for number in sorted(random.Random(seed).sample(range(n_all), min(n_windows, n_all))):
        start = max(0, min(number * context_length, len(stream) - context_length))
        stop = min(start + context_length, len(stream))
        tokens = stream.read(start, stop)
        parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.separator_id))
        pieces = tuple(
            DocumentPiece(bool(part[0] == tokenizer.separator_id), tokenizer.decode(part))
            for part in parts
            if part.size  # before a separator that stands first there is nothing
        )
        yield TextWindow(start, stop, pieces)
