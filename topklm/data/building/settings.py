"""What decides which dataset comes out of a preparation: its sources and its settings."""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import json
import re
from typing import Any

import tokenizers

from topklm.config import MAX_VOCABULARY
from topklm.data.building.encode import Selection
from topklm.data.records import SHARD_TOKENS
from topklm.data.sources import SourceFile
from topklm.data.tokenizer import Tokenizer, open_tokenizer
from topklm.errors import UserError

TRAIN_PREFIX = "train:"
_IDENTITY_VERSION = 2  # of what a fingerprint is made of: datasets keep theirs as their format changes
MIN_VOCAB = 257  # the bytes and the separator


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything but the sources that decides what a dataset holds."""

    selection: Selection
    tokenizer: str = "train:4096"  # train:VOCAB, or a file that `open_tokenizer` reads
    deduplicate: bool = True  # drop exact copies of documents
    shard_tokens: int = SHARD_TOKENS  # per shard, about

    def to_json(self) -> dict[str, Any]:
        """As written to dataset.json; a tokenizer's file by the sha256 of what it holds."""
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
        """The tokenizer of a file."""
        return _opened(self.tokenizer)


@dataclasses.dataclass(frozen=True)
class Sources:
    """The files of a dataset."""

    train: tuple[SourceFile, ...]
    heldout: tuple[SourceFile, ...] = ()  # files whose documents are all held out

    @property
    def files(self) -> list[tuple[SourceFile, bool]]:
        """(file, whether all of it is held out), in the order of the dataset's documents."""
        heldout = {file.url for file in self.heldout}
        train = [(file, False) for file in self.train if file.url not in heldout]
        return train + [(file, True) for file in self.heldout]


def fingerprint(contents: Sequence[tuple[str, str, bool]], settings: Settings) -> str:
    """Names what a dataset holds, not where its sources lie.

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
