"""Prepared datasets: a tokenizer, two token streams, and the description of both; and mixtures of datasets.

A folder with a `dataset.json` is whole: that file is written last. A mixture decides whose window is next and
nothing else: `topklm.data.stream` says which of its windows that is.

`verify` reads every byte of every file, every record, every token, and lists each difference. It mends
nothing, decodes no text, and needs the memory of a few records.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
from fractions import Fraction
import functools
import heapq
import math
import os
from pathlib import Path
import random
import re
from typing import Any

import numpy as np

from topklm.data.formats import endings
from topklm.data.records import (
    RECORD_TOKENS,
    Shard,
    ShardError,
    TokenStream,
    check_shards,
    missing_shards,
    sha256_of_file,
)
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.progress import Progress, Report
from topklm.storage.files import check_name, is_bucket, json_digest, parse_json, unsealed
from topklm.storage.remote import CACHE_GIB, RemoteFolder

FORMAT_VERSION = 3
_OLDER_VERSIONS = (2,)  # read, too; 2 holds no digest of itself
DESCRIPTION_FILE = "dataset.json"
TOKENIZER_FILE = "tokenizer.json"
SPLITS = ("train", "heldout")

MAX_PERIOD = 1_000_000  # windows after which a mixture's turns repeat; their table takes 12 bytes for each
_WEIGHT = re.compile(r"[0-9]{1,12}(\.[0-9]{0,12})?|\.[0-9]{1,12}")
_EXAMPLE = "write DIR:WEIGHT,DIR:WEIGHT with decimal weights above 0, such as books:0.7,wiki:0.3"


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """One split: for each document the separator, then its tokens."""

    documents: int
    tokens: int  # separators included
    utf8_bytes: int  # of the text
    shards: tuple[Shard, ...]

    @property
    def text_tokens(self) -> int:
        """Tokens without the separators."""
        return self.tokens - self.documents


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared dataset on disk, or in a bucket."""

    path: Path | RemoteFolder
    tokenizer: Tokenizer
    train: SplitInfo
    heldout: SplitInfo
    fingerprint: str  # hex digest of what the sources held and of all settings

    def tokens(self, split: SplitInfo) -> TokenStream:
        """Gives random access to the tokens of `self.train` or `self.heldout`."""
        return TokenStream(self.path, split.shards, self.tokenizer.vocab_size)

    def close(self) -> None:
        """Ends waits for a bucket that gives no answer."""
        if isinstance(self.path, RemoteFolder):
            self.path.close()

    @property
    def splits(self) -> dict[str, SplitInfo]:
        """Both splits by name."""
        return {name: getattr(self, name) for name in SPLITS}

    def __str__(self) -> str:
        return "; ".join(
            f"{name} {split.documents:,} documents, {split.tokens:,} tokens, {split.utf8_bytes:,} bytes"
            for name, split in (("train:", self.train), ("held out:", self.heldout))
        )


def is_dataset(path: str | Path) -> bool:
    """Tells whether a whole dataset is there, by asking a bucket too; UserError if that may not be known."""
    if is_bucket(path):
        if any(sign in str(path) for sign in ",*?[") or str(path).lower().endswith(endings()):
            return False  # files of text
        try:
            return bool(RemoteFolder(str(path)).read(DESCRIPTION_FILE))
        except FileNotFoundError:
            return False
    with disk_errors_are_user_errors(f"looking for a dataset in {path}"):
        try:
            return (Path(path) / DESCRIPTION_FILE).is_file()
        except PermissionError:
            raise
        except OSError:  # no path of a folder, but a list of sources, longer than names may be
            return False


def load_dataset(path: str | Path, cache_gib: float = CACHE_GIB) -> Dataset:
    """Opens a prepared folder, local or in a bucket; reads its description and tokenizer, no shard.

    A file that is missing, cannot be read, or is not the one that was written is a UserError. `cache_gib` is
    that of `RemoteFolder`.
    """
    check_name(os.fspath(path), "dataset")
    bucket = RemoteFolder(str(path), cache_gib) if is_bucket(path) else None
    folder = bucket or Path(os.path.expanduser(path)).absolute()
    content = read_description(folder)
    try:
        splits = {name: split_from_json(content["splits"][name]) for name in SPLITS}
        sha256, fingerprint = str(content["tokenizer"]["sha256"]), str(content["fingerprint"])
    except (KeyError, TypeError, ValueError) as e:
        raise damaged(folder / DESCRIPTION_FILE, e) from e
    with disk_errors_are_user_errors(f"reading {folder}"):
        try:
            file = bucket.local_copy(TOKENIZER_FILE) if bucket else Path(folder / TOKENIZER_FILE)
            found = sha256_of_file(file)
        except FileNotFoundError:
            found = "missing"
        missing = missing_shards(folder, [shard for split in splits.values() for shard in split.shards])
    advice = "put it back, or delete the folder and prepare the data again"
    if found != sha256:
        raise UserError(
            f"{folder / TOKENIZER_FILE} is not the tokenizer of this dataset (sha256 {found[:12]}, not "
            f"{sha256[:12]}); {advice}"
        )
    if missing:
        raise UserError(f"{folder / missing[0]} is missing ({len(missing)} of its shards are); {advice}")
    tokenizer = Tokenizer.load(file)
    return Dataset(folder, tokenizer, fingerprint=fingerprint, **splits)


def read_description(path: Path | RemoteFolder, note: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Reads a folder's dataset.json, as `parse_description`; UserError if it is missing or cannot be read."""
    file = path / DESCRIPTION_FILE
    with disk_errors_are_user_errors(f"reading {file}"):
        try:
            content = (
                path.read(DESCRIPTION_FILE) if isinstance(path, RemoteFolder) else Path(file).read_bytes()
            )
        except (FileNotFoundError, NotADirectoryError) as e:
            advice = "check the path, or make it: topklm prepare SOURCE --out DIR"
            there = f"no prepared dataset, it has no {DESCRIPTION_FILE}"
            what = there if isinstance(path, RemoteFolder) or path.is_dir() else "there is no such folder"
            raise UserError(f"{path}: {what}: {advice}") from e
    return parse_description(content, file, note)


def parse_description(
    content: bytes, file: str | Path, note: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Decodes dataset.json, `file` in errors; UserError if it is damaged, or of another format version.

    With `note`, a digest that is not its own is told to that and is no error.
    """
    try:
        description = parse_json(content)
        version = description.get("format_version")
        if version not in (*_OLDER_VERSIONS, FORMAT_VERSION):
            raise UserError(
                f"{file}: format_version = {version!r}, this program reads {FORMAT_VERSION}; delete the "
                "folder and prepare the data again"
            )
        if version == FORMAT_VERSION or "sha256" in description:
            try:
                return unsealed(description)
            except ValueError as e:
                if note is None:
                    raise
                note(f"is not as it was written: {e}")
        return description
    except ValueError as e:
        raise damaged(file, e) from e


def split_from_json(content: dict[str, Any]) -> SplitInfo:
    """Reads a split of the description; KeyError, TypeError or ValueError if it is none."""
    shards = tuple(Shard(**shard) for shard in content["shards"])
    counts = [content[name] for name in ("documents", "tokens", "utf8_bytes")]
    for shard in shards:
        if [type(value) for value in dataclasses.astuple(shard)] != [str, int, int, str, str]:
            raise TypeError(f"{shard}")
        if os.path.basename(shard.name) != shard.name:
            raise ValueError(f"{shard}")
    for count in (*counts, *(n for shard in shards for n in (shard.tokens, shard.size))):
        if type(count) is not int or not 0 <= count < 1 << 63:
            raise ValueError(f"{count!r} is no count")
    documents, tokens, utf8_bytes = counts
    return SplitInfo(documents, tokens, utf8_bytes, shards)


def damaged(file: str | Path, what: Exception) -> UserError:
    """Makes the error of a description that cannot be used, with the reason."""
    why = f"no {what}" if isinstance(what, KeyError) else str(what)
    return UserError(f"{file}: damaged ({why}); delete the folder and prepare the data again")


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Datasets that share a tokenizer, and the share of the training windows that each one gives."""

    datasets: tuple[Dataset, ...]
    weights: tuple[int, ...]  # above 0, without a common divisor; dataset i gives weights[i] / period

    def __post_init__(self) -> None:
        """Raises UserError if the datasets were prepared with different tokenizers."""
        first = self.datasets[0]
        for other in self.datasets[1:]:
            if other.tokenizer.sha256 != first.tokenizer.sha256:
                raise UserError(
                    f"{other.path} was prepared with another tokenizer (sha256 "
                    f"{other.tokenizer.sha256[:12]}) than {first.path} ({first.tokenizer.sha256[:12]}): "
                    "prepare it again with that one (topklm prepare --tokenizer)",
                    field="data.mixture",
                )

    @classmethod
    def single(cls, dataset: Dataset) -> "Mixture":
        """Makes the mixture of one dataset alone."""
        return cls((dataset,), (1,))

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all of them."""
        return self.datasets[0].tokenizer

    @property
    def period(self) -> int:
        """Windows after which the turns repeat."""
        return sum(self.weights)

    @property
    def fingerprint(self) -> str:
        """Names what the datasets hold and their weights, not where they lie."""
        if len(self.datasets) == 1:
            return self.datasets[0].fingerprint
        parts = [[d.fingerprint, weight] for d, weight in zip(self.datasets, self.weights, strict=True)]
        return json_digest(parts)

    @property
    def heldout_bytes(self) -> int:
        """UTF-8 bytes of all held-out text."""
        return sum(dataset.heldout.utf8_bytes for dataset in self.datasets)

    @property
    def heldout_text_tokens(self) -> int:
        """Tokens of all held-out text, separators not counted."""
        return sum(dataset.heldout.text_tokens for dataset in self.datasets)

    def close(self) -> None:
        """Ends waits for buckets that give no answer."""
        for dataset in self.datasets:
            dataset.close()

    def picks(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Picks the dataset whose turn it is, at windows int64[N] counted from the run's start, in any order.

        After any number n of windows, dataset i has given fewer than one window more or less than n
        weights[i] / period. Returns the dataset of each window, and how many windows it has given before;
        int64[N] both.
        """
        order, earlier = self._table
        periods, position = np.divmod(np.asarray(windows, np.int64), self.period)
        datasets = order[position].astype(np.int64)
        return datasets, periods * np.asarray(self.weights, np.int64)[datasets] + earlier[position]

    @functools.cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """For each window of a period: its dataset, int32, and that one's windows before it, int64."""
        order = _turns(self.weights)
        earlier = np.zeros(order.size, np.int64)
        for dataset, weight in enumerate(self.weights):
            earlier[order == dataset] = np.arange(weight)
        return order, earlier


def open_mixture(text: str, cache_gib: float = CACHE_GIB) -> Mixture:
    """Opens the datasets of `data.mixture`: "DIR:0.7,DIR:0.3"; the weights need not add up to 1.

    UserError for a text of another form, a folder given twice or without a dataset, datasets of different
    tokenizers, and weights that only repeat after more than a million windows.
    """
    said = f"data.mixture = {text!r}:"
    parsed: dict[str, Fraction] = {}
    for part in text.split(","):
        folder, _, weight = (word.strip() for word in part.rpartition(":"))
        if not folder or not _WEIGHT.fullmatch(weight) or not Fraction(weight):
            raise UserError(f"{said} {part.strip()!r} is not a folder and its weight: {_EXAMPLE}")
        path = folder.rstrip("/") if is_bucket(folder) else os.path.realpath(os.path.expanduser(folder))
        if path in parsed:
            raise UserError(f"{said} the folder {folder} is there twice: add its weights up")
        parsed[path] = Fraction(weight)
    unit = math.lcm(*(weight.denominator for weight in parsed.values()))
    whole = [int(weight * unit) for weight in parsed.values()]
    weights = tuple(weight // math.gcd(*whole) for weight in whole)
    if sum(weights) > MAX_PERIOD:
        raise UserError(
            f"{said} the weights stand as {' : '.join(map(str, weights))}, so their turns repeat only after "
            f"{sum(weights):,} windows; at most {MAX_PERIOD:,}: give weights of fewer digits"
        )
    try:
        return Mixture(tuple(load_dataset(folder, cache_gib) for folder in parsed), weights)
    except UserError as e:
        raise e.within("data.mixture", repr(text)) from e


def _turns(weights: Sequence[int]) -> np.ndarray:
    """Returns the dataset of each window of one period, int32[sum(weights)].

    The chairman assignment of R. Tijdeman (Discrete Mathematics 32, 1980): with k datasets, no count is
    ever further than 1 - 1 / (2 k - 2) from its share. To stay that close, window x of dataset i must
    stand in a certain stretch of the period; of all whose stretch has begun, the one whose stretch ends
    first is taken, which meets all of them if anything does (the "pfair" view of S. Baruah et al.,
    Algorithmica 15, 1996).
    """
    period, slack = sum(weights), 2 * (len(weights) - 1)
    if not slack:
        return np.zeros(period, np.int32)
    dataset = np.repeat(np.arange(len(weights)), weights)
    weight = np.asarray(weights, np.int64)[dataset]
    x = np.concatenate([np.arange(n, dtype=np.int64) for n in weights])
    # Positions from 1. Not before it would be too many: x + 1 - position weight / period <= 1 - 1 / slack.
    begins = -(-period * (slack * x + 1) // (slack * weight))
    # Not after it would be too few: (position - 1) weight / period - x <= 1 - 1 / slack.
    ends = period * (slack * (x + 1) - 1) // (slack * weight) + 1
    by_begin = np.argsort(begins, kind="stable")
    # One integer sorts by the end of the stretch, then by dataset.
    keys = (ends * len(weights) + dataset)[by_begin].tolist()
    released = np.searchsorted(begins[by_begin], np.arange(1, period + 1), side="right").tolist()
    order, taken = np.empty(period, np.int32), 0
    waiting: list[int] = []
    for position in range(period):
        for key in keys[taken : released[position]]:
            heapq.heappush(waiting, key)
        taken = released[position]
        order[position] = heapq.heappop(waiting) % len(weights)
    return order


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
