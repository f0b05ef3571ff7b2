"""A prepared dataset on disk: a tokenizer, two token streams, and the description of both.

Opens and describes a folder that `topklm.data.build` wrote. A folder with a `dataset.json` is whole: that
file is written last.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from topklm.data.records import Shard, TokenStream, missing_shards
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError

FORMAT_VERSION = 2
DESCRIPTION_FILE = "dataset.json"
TOKENIZER_FILE = "tokenizer.json"
SPLITS = ("train", "heldout")


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
    """A prepared dataset on disk."""

    path: Path
    tokenizer: Tokenizer
    train: SplitInfo
    heldout: SplitInfo
    fingerprint: str  # hex digest of what the sources held and of all settings

    def tokens(self, split: SplitInfo) -> TokenStream:
        """Random access to the tokens of `self.train` or `self.heldout`."""
        return TokenStream(self.path, split.shards, self.tokenizer.vocab_size)

    @property
    def splits(self) -> dict[str, SplitInfo]:
        """Both splits by name."""
        return {name: getattr(self, name) for name in SPLITS}

    def __str__(self) -> str:
        return "; ".join(
            f"{name} {split.documents:,} documents, {split.tokens:,} tokens, {split.utf8_bytes:,} bytes"
            for name, split in (("train:", self.train), ("held out:", self.heldout))
        )


def is_dataset(path: Path) -> bool:
    """Whether a whole dataset is there."""
    return (path / DESCRIPTION_FILE).is_file()


def load_dataset(path: str | Path) -> Dataset:
    """Opens a prepared folder; reads its description and tokenizer, no shard.

    Raises:
        UserError: If a file is missing or not the one that was written, or the format is another.
    """
    path = Path(path).expanduser().absolute()
    content = read_description(path)
    try:
        splits = {name: _split_from_json(content["splits"][name]) for name in SPLITS}
        sha256, fingerprint = content["tokenizer"]["sha256"], content["fingerprint"]
    except (KeyError, TypeError) as e:
        raise UserError(
            f"{path / DESCRIPTION_FILE}: damaged (no {e}); delete the folder and prepare the data again"
        ) from e
    tokenizer = Tokenizer.load(path / TOKENIZER_FILE)
    if tokenizer.sha256 != sha256:
        raise UserError(
            f"{path / TOKENIZER_FILE} is not the tokenizer of this dataset (sha256 "
            f"{tokenizer.sha256[:12]}, not {sha256[:12]}); "
            "put it back, or delete the folder and prepare the data again"
        )
    missing = missing_shards(path, [shard for split in splits.values() for shard in split.shards])
    if missing:
        raise UserError(
            f"{path / missing[0]} is missing ({len(missing)} of its shards are); put it back, or delete the "
            "folder and prepare the data again"
        )
    return Dataset(path, tokenizer, fingerprint=fingerprint, **splits)


def read_description(path: Path) -> dict[str, Any]:
    """The content of a folder's dataset.json.

    Raises:
        UserError: If it is missing, damaged, or of another format version.
    """
    file = path / DESCRIPTION_FILE
    advice = "delete the folder and prepare the data again"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(f"{file}: not there, so the folder is no prepared dataset; {advice}") from e
    except ValueError as e:
        raise UserError(f"{file}: damaged ({e}); {advice}") from e
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file}: format_version = {version!r}, this program reads {FORMAT_VERSION}; {advice}"
        )
    return content


def _split_from_json(content: dict[str, Any]) -> SplitInfo:
    shards = tuple(Shard(**shard) for shard in content["shards"])
    return SplitInfo(content["documents"], content["tokens"], content["utf8_bytes"], shards)
