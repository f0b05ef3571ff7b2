"""A prepared dataset on disk: a tokenizer, two token streams, and the description of both.

Opens and describes a folder that `topklm.data.build` wrote. A folder with a `dataset.json` is whole: that
file is written last.
"""

from collections.abc import Callable, Iterator
import dataclasses
import os
from pathlib import Path
import random
from typing import Any

import numpy as np

from topklm.data.records import Shard, TokenStream, missing_shards, sha256_of_file
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.storage.files import check_name, parse_json, sealed_json, unsealed

FORMAT_VERSION = 3
_OLDER_VERSIONS = (2,)  # read, too; 2 holds no digest of itself
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
        """Gives random access to the tokens of `self.train` or `self.heldout`."""
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
    """Tells whether a whole dataset is there.

    Raises:
        UserError: If the folder may not be looked into.
    """
    with disk_errors_are_user_errors(f"looking for a dataset in {path}"):
        try:
            return (path / DESCRIPTION_FILE).is_file()
        except PermissionError:
            raise
        except OSError:  # no path of a folder, but a list of sources, longer than names may be
            return False


def load_dataset(path: str | Path) -> Dataset:
    """Opens a prepared folder; reads its description and tokenizer, no shard.

    Raises:
        UserError: If a file is missing, cannot be read, or is not the one that was written, or the format is
            another.
    """
    check_name(os.fspath(path), "dataset")
    path = Path(os.path.expanduser(path)).absolute()
    content = read_description(path)
    try:
        splits = {name: split_from_json(content["splits"][name]) for name in SPLITS}
        sha256, fingerprint = str(content["tokenizer"]["sha256"]), str(content["fingerprint"])
    except (KeyError, TypeError, ValueError) as e:
        raise damaged(path / DESCRIPTION_FILE, e) from e
    with disk_errors_are_user_errors(f"reading {path}"):
        try:
            found = sha256_of_file(path / TOKENIZER_FILE)
        except FileNotFoundError:
            found = "missing"
        missing = missing_shards(path, [shard for split in splits.values() for shard in split.shards])
    if found != sha256:
        raise UserError(
            f"{path / TOKENIZER_FILE} is not the tokenizer of this dataset (sha256 {found[:12]}, not "
            f"{sha256[:12]}); put it back, or delete the folder and prepare the data again"
        )
    if missing:
        raise UserError(
            f"{path / missing[0]} is missing ({len(missing)} of its shards are); put it back, or delete the "
            "folder and prepare the data again"
        )
    tokenizer = Tokenizer.load(path / TOKENIZER_FILE)
    return Dataset(path, tokenizer, fingerprint=fingerprint, **splits)


def read_description(path: Path, note: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Reads a folder's dataset.json; see `parse_description`.

    Raises:
        UserError: If it is missing, cannot be read, is damaged, or of another format version.
    """
    file = path / DESCRIPTION_FILE
    try:
        content = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(
            f"{file}: not there, so the folder is no prepared dataset; prepare the data again"
        ) from e
    except OSError as e:
        with disk_errors_are_user_errors(f"reading {file}"):
            raise e
    return parse_description(content, file, note)


def description_to_bytes(description: dict[str, Any]) -> bytes:
    """Encodes dataset.json, with a digest of itself; the same description gives the same bytes."""
    return sealed_json(description, indent=1)


def parse_description(
    content: bytes, file: str | Path, note: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Returns what `description_to_bytes` was given.

    Args:
        content: Of dataset.json.
        file: Its name, for errors.
        note: Told what is wrong if its digest is not its own, which then is no error.

    Raises:
        UserError: If it is damaged, or of another format version.
    """
    try:
        description = parse_json(content)
        version = description.get("format_version")
        if version not in (*_OLDER_VERSIONS, FORMAT_VERSION):
            raise UserError(
                f"{file}: format_version = {version!r}, this program reads {FORMAT_VERSION}; delete the "
                "folder and prepare the data again"
            )
        if version in _OLDER_VERSIONS and "sha256" not in description:
            return description
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
    """Reads a split of the description.

    Raises:
        KeyError, TypeError, ValueError: If it is none.
    """
    shards = tuple(Shard(**shard) for shard in content["shards"])
    for shard in shards:
        if [type(value) for value in dataclasses.astuple(shard)] != [str, int, int, str, str]:
            raise TypeError(f"{shard}")
        if os.path.basename(shard.name) != shard.name:
            raise ValueError(f"{shard}")
    counts = [content[name] for name in ("documents", "tokens", "utf8_bytes")]
    for count in (*counts, *(shard.tokens for shard in shards), *(shard.size for shard in shards)):
        if type(count) is not int:
            raise TypeError(f"{count!r} is no count")
        if not 0 <= count < 1 << 63:
            raise ValueError(f"{count!r} is no count")
    documents, tokens, utf8_bytes = counts
    return SplitInfo(documents, tokens, utf8_bytes, shards)


def damaged(file: str | Path, what: Exception) -> UserError:
    """Makes the error of a description that cannot be used, with the reason."""
    why = f"no {what}" if isinstance(what, KeyError) else str(what)
    return UserError(f"{file}: damaged ({why}); delete the folder and prepare the data again")


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

    Window i begins at token i * context_length, as in training; the last is moved back to be full.

    Args:
        dataset: Only the shards that hold the windows are opened.
        split: "train" or "heldout".
        n_windows: Fewer are given where the split has fewer.
        context_length: Tokens per window.
        seed: Of the choice.

    Raises:
        UserError: For a split without tokens, or a shard that is not as it was written.
    """
    tokens = dataset.tokens(dataset.splits[split])
    if not len(tokens):
        raise UserError(f"split = {split}: {dataset.path} has no documents in it; choose the other one")
    n_all = -(-len(tokens) // context_length)
    for number in sorted(random.Random(seed).sample(range(n_all), min(n_windows, n_all))):
        start = max(0, min(number * context_length, len(tokens) - context_length))
        stop = min(start + context_length, len(tokens))
        yield TextWindow(start, stop, tuple(_pieces(dataset, tokens.read(start, stop))))


def _pieces(dataset: Dataset, tokens: np.ndarray) -> Iterator[DocumentPiece]:
    begins = np.flatnonzero(tokens == dataset.tokenizer.separator_id)
    for part in np.split(tokens, begins):
        # Before a separator that stands first there is nothing.
        if part.size:
            is_start = bool(part[0] == dataset.tokenizer.separator_id)
            yield DocumentPiece(is_start, dataset.tokenizer.decode(part[is_start:]))
