"""Which dataset is asked for, what a preparation writes about it, and whether a folder holds it.

A dataset is decided by its sources and its settings.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
import re
from typing import Any

import tokenizers

from topklm.config import MAX_VOCABULARY
from topklm.data.building.chunks import Totals
from topklm.data.building.encode import FileResult, Selection
from topklm.data.dataset import DESCRIPTION_FILE, FORMAT_VERSION, SPLITS, damaged
from topklm.data.records import SHARD_TOKENS, Shard, sha256_of_file
from topklm.data.sources import SourceFile
from topklm.data.tokenizer import Tokenizer, open_tokenizer
from topklm.errors import UserError

TRAIN_PREFIX = "train:"
_IDENTITY_VERSION = 2  # of what a fingerprint is made of: datasets keep theirs as their format changes
MAX_EXAMPLES = 100  # problems kept word for word
MIN_VOCAB = 257  # the bytes and the separator


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
            content["tokenizer"] = self.open_tokenizer().sha256
        return {**self.selection.to_json(), **content}

    @property
    def vocab_size(self) -> int | None:
        """Tokens of a tokenizer that is to be trained; None for one from a file."""
        if not self.tokenizer.startswith(TRAIN_PREFIX):
            return None
        size = self.tokenizer.removeprefix(TRAIN_PREFIX)
        if not re.fullmatch("[0-9]{1,9}", size) or not MIN_VOCAB <= int(size) <= MAX_VOCABULARY:
            raise UserError(
                f"tokenizer = {self.tokenizer!r}: VOCAB in train:VOCAB must be a number, {MIN_VOCAB} or more "
                f"(256 bytes and a separator) and {MAX_VOCABULARY} or less"
            )
        return int(size)

    def open_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer of a file."""
        return _opened(self.tokenizer)


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
    """Computes the name of a dataset's content, wherever its sources lie.

    Args:
        contents: Of each file its ending, the sha256 of its bytes, and whether all of it is held out.
        settings: Of the dataset.

    Returns:
        A hex digest.
    """
    trained = settings.vocab_size is not None
    identity = {
        "format_version": _IDENTITY_VERSION,
        "tokenizers_version": tokenizers.__version__ if trained else None,
        "settings": settings.to_json(),
        "files": [list(content) for content in contents],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


@functools.lru_cache(maxsize=2)
def _opened(path: str) -> Tokenizer:
    return open_tokenizer(path)


def describe(
    sources: DatasetSources,
    settings: DatasetSettings,
    tokenizer: Tokenizer,
    results: Sequence[FileResult],
    totals: Sequence[Totals],
    shards: Sequence[tuple[str, Shard]],
) -> dict[str, Any]:
    """Makes the content of dataset.json.

    Args:
        sources: Where the text came from.
        settings: Of the dataset.
        tokenizer: Of the dataset.
        results: One for each file.
        totals: One for each chunk.
        shards: (split, shard), in order.
    """
    contents = [(f.ending, r.sha256, held) for (f, held), r in zip(sources.files, results, strict=True)]
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint(contents, settings),
        "settings": settings.to_json(),
        "tokenizer": {
            "sha256": tokenizer.sha256,
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "separator_id": tokenizer.separator_id,
        },
        "sources": [
            {**dataclasses.asdict(file), "heldout": held, "sha256": r.sha256, "documents": r.documents}
            for (file, held), r in zip(sources.files, results, strict=True)
        ],
        "text": _text_counts(results, totals),
        "problem_examples": [example for r in results for example in r.examples][:MAX_EXAMPLES],
        "splits": {
            name: _split(number, totals, [shard for split, shard in shards if split == name])
            for number, name in enumerate(SPLITS)
        },
    }


def remarks(description: dict[str, Any]) -> list[str]:
    """Returns lines on all documents that were left out or mended."""
    text, lines = description["text"], []
    if text["replaced_sequences"]:
        lines.append(
            f"replaced {text['replaced_sequences']:,} invalid UTF-8 sequences in "
            f"{text['documents_with_replacements']:,} documents with U+FFFD"
        )
    if text["duplicates"]:
        lines.append(f"dropped {text['duplicates']:,} documents that are copies of others")
    for name, what in (("too_short", "shorter than min_chars"), ("too_long", "longer than max_chars")):
        if text[name]:
            lines.append(f"left out {text[name]:,} documents {what}")
    for kind, n in text["problems"].items():
        example = next((e for e in description["problem_examples"] if f": {kind} (" in e), None)
        lines.append(f"{n:,} x {kind}" + (f"; the first: {example}" if example else ""))
    return lines


def check_not_empty(
    results: Sequence[FileResult], totals: Sequence[Totals], settings: DatasetSettings
) -> None:
    """Refuses a dataset without training text, or with none held out where some was asked for.

    Raises:
        UserError: Saying why there is none.
    """
    documents = [sum(total.documents[split] for total in totals) for split in (0, 1)]
    if not any(documents):
        raise _no_text(results, _text_counts(results, totals), settings.selection)
    fraction = settings.selection.heldout_fraction
    for name, n in zip(SPLITS, documents, strict=True):
        if n == 0 and (name == "train" or fraction > 0):
            raise UserError(
                f"heldout_fraction = {fraction}: of {sum(documents)} document(s) none came into the {name} "
                "split; give more documents (three that differ are enough), or name the text to hold out "
                "(topklm prepare --heldout FILE)"
            )


def _no_text(results: Sequence[FileResult], text: Mapping[str, Any], selection: Selection) -> UserError:
    names = ", ".join(result.url for result in results[:3]) + (" ..." if len(results) > 3 else "")
    counts = {
        f"too short (min_chars = {selection.min_chars})": text["too_short"],
        f"too long (max_chars = {selection.max_chars})": text["too_long"],
        **text["problems"],
    }
    left_out = ", ".join(f"{what}: {n:,}" for what, n in counts.items() if n)
    advice = "give files that hold text"
    if text["too_short"] or text["too_long"]:
        advice = "give longer documents or other limits (--min-chars, --max-chars)"
    elif text["problems"]:
        advice += ", and its key (--text-field, data.text_field)"
    first = next((example for result in results for example in result.examples), "")
    return UserError(
        f"no text in {names}{f', left out {left_out}' if left_out else ''}: {advice}"
        f"{f'; the first problem: {first}' if first else ''}"
    )


def check_same(made: dict[str, Any], sources: DatasetSources, settings: DatasetSettings, where: str) -> None:
    """Refuses a dataset that other sources or settings made.

    Args:
        made: Its description.
        sources: Asked for.
        settings: Asked for.
        where: The dataset's folder.

    Raises:
        UserError: Naming what differs.
    """
    asked = settings.to_json()
    try:
        old = dict(made["settings"])
        is_same = _same_sources(made["sources"], sources)
    except (KeyError, TypeError, ValueError) as e:
        raise damaged(f"{where}/{DESCRIPTION_FILE}", e) from e
    different = [f"{k} was {old.get(k)!r}, now {v!r}" for k, v in asked.items() if old.get(k) != v]
    if not is_same:
        different.append("its sources are others or have changed")
    if different:
        raise UserError(
            f"{where} holds another dataset: {'; '.join(different)}. Choose another folder, or delete it"
        )


def _same_sources(made: Sequence[dict[str, Any]], asked: DatasetSources) -> bool:
    if [(s["url"], s["size"], s["heldout"]) for s in made] != [(f.url, f.size, h) for f, h in asked.files]:
        return False
    # A file that was copied or touched has another version, and perhaps the same content.
    return all(
        old["version"] == file.version
        or (os.path.isfile(file.url) and sha256_of_file(Path(file.url)) == old["sha256"])
        for old, (file, _) in zip(made, asked.files, strict=True)
    )


def _text_counts(results: Sequence[FileResult], totals: Sequence[Totals]) -> dict[str, Any]:
    names = ("too_short", "too_long", "documents_with_replacements", "replaced_sequences")
    read = sum(result.documents for result in results)
    kept = sum(sum(total.documents) for total in totals)
    problems: Counter[str] = Counter()
    for result in results:
        problems.update(result.problems)
    return {
        "documents": read,  # before copies were dropped
        "utf8_bytes": sum(result.utf8_bytes for result in results),
        "duplicates": read - kept,
        **{name: sum(getattr(result, name) for result in results) for name in names},
        "problems": dict(sorted(problems.items())),
    }


def _split(number: int, totals: Sequence[Totals], shards: Sequence[Shard]) -> dict[str, Any]:
    names = ("documents", "tokens", "utf8_bytes")
    documents, tokens, utf8_bytes = (sum(getattr(total, name)[number] for total in totals) for name in names)
    return {
        "documents": documents,
        "tokens": tokens,
        "text_tokens": tokens - documents,
        "utf8_bytes": utf8_bytes,
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
