"""Text to a prepared dataset: a tokenizer and two token streams, training and held-out.

A dataset's folder appears whole or not at all, and is named after a fingerprint of everything that
shaped it, so it can be reused without asking. Batches are `topklm.data.stream`'s affair.
"""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
import errno
import hashlib
import json
from pathlib import Path
import shutil
import time
from typing import Any
import uuid

import numpy as np
import tokenizers

from topklm.config import DataConfig
from topklm.data.corpora import Corpus, TextCounts, file_ending, open_corpus
from topklm.data.records import (
    Shard,
    StreamWriter,
    TokenStream,
    check_shards,
    sha256_of_file,
)
from topklm.data.tokenizer import Tokenizer, split_text, train_bpe
from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.files import fsync, write_atomically

FORMAT_VERSION = 1

_BATCH_CHARS = 1 << 20  # characters encoded at a time
_STALE_SECONDS = 24 * 3600  # a temporary folder untouched for this long belongs to a dead process
_DATASET_FILE = "dataset.json"
_TOKENIZER_FILE = "tokenizer.json"
_SPLITS = ("train", "heldout")


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
    fingerprint: str  # hex digest of the source's bytes and of all settings

    def tokens(self, split: SplitInfo) -> TokenStream:
        """Random access to the tokens of `self.train` or `self.heldout`."""
        return TokenStream(self.path, split.shards, self.tokenizer.vocab_size)


def prepare(data: DataConfig, announce: Callable[[str], None] = print) -> Dataset:
    """Makes the dataset that `data` describes, or finds it already made.

    A document is held out when a hash of its text says so, so that copies of one text are never on
    both sides, and a corpus may grow without any document changing sides. The tokenizer is trained
    on the training split. The text is read twice and never held in memory.

    Args:
        data: Source and settings.
        announce: Receives a few lines of progress.

    Raises:
        UserError: For text that cannot be read, a split without documents, a disk that refuses, or
            a folder of the same name that is damaged.
    """
    corpus = open_corpus(data.source, data.text_field)
    with disk_errors_are_user_errors("preparing the data"):
        root = Path(data.dir).expanduser().absolute()
        identity = _identity(corpus, data)
        final = root / f"{corpus.name}-{_fingerprint(identity)[:12]}"
        if final.is_dir() and any(final.iterdir()):
            dataset = load_dataset(final)
            announce(f"data: reusing {final} ({_summary(dataset)})")
            return dataset
        root.mkdir(parents=True, exist_ok=True)
        _remove_stale_folders(root)
        temporary = root / f".{final.name}.{uuid.uuid4().hex}.tmp"
        try:
            temporary.mkdir()
            _write_dataset(temporary, corpus, data, identity, announce)
            _move_into_place(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        dataset = load_dataset(final)
        announce(f"data: wrote {final} ({_summary(dataset)})")
        return dataset


def load_dataset(path: str | Path) -> Dataset:
    """Opens a folder that `prepare` wrote; reads its tokenizer, no tokens yet.

    Raises:
        UserError: If a file is missing or not the one that was written, or the format is another.
    """
    path = Path(path).expanduser().absolute()
    content = _read_description(path)
    tokenizer = Tokenizer.load(path / _TOKENIZER_FILE)
    if tokenizer.sha256 != content["tokenizer_sha256"]:
        raise UserError(
            f"{path / _TOKENIZER_FILE} is not the tokenizer of this dataset (sha256 "
            f"{tokenizer.sha256[:12]}, not {content['tokenizer_sha256'][:12]}); "
            "delete the folder and prepare the data again"
        )
    splits = {name: _split_from_json(content["splits"][name]) for name in _SPLITS}
    for split in splits.values():
        check_shards(path, split.shards)
    return Dataset(path, tokenizer, fingerprint=content["fingerprint"], **splits)


def verify_dataset(dataset: Dataset) -> None:
    """Reads every byte of both splits and compares it with what was written.

    Raises:
        UserError: Naming the first file that differs.
    """
    check_shards(dataset.path, dataset.train.shards + dataset.heldout.shards, contents=True)


def _identity(corpus: Corpus, data: DataConfig) -> dict[str, Any]:
    """Everything that decides what the dataset holds; not where its source lies."""
    return {
        "format_version": FORMAT_VERSION,
        "tokenizers_version": tokenizers.__version__,
        "text_field": data.text_field,
        "vocab_size": data.vocab_size,
        "heldout_fraction": data.heldout_fraction,
        "files": [{"ending": file_ending(f), "sha256": sha256_of_file(f)} for f in corpus.files],
    }


def _fingerprint(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _write_dataset(
    folder: Path,
    corpus: Corpus,
    data: DataConfig,
    identity: dict[str, Any],
    announce: Callable[[str], None],
) -> None:
    counts, started = TextCounts(), time.monotonic()
    announce(f"data: reading {corpus.name}, {len(corpus.files):,} file(s), to train the tokenizer")
    tokenizer = _train_tokenizer(corpus, data, counts)
    announce(
        f"data: {tokenizer.vocab_size:,} tokens in the vocabulary; {counts.documents:,} documents, "
        f"{counts.utf8_bytes:,} bytes of text, {time.monotonic() - started:.1f} s"
    )
    _announce_oddities(counts, announce)
    started = time.monotonic()
    splits = _write_splits(folder, corpus, data, tokenizer)
    announce(
        f"data: encoded {sum(split.tokens for split in splits.values()):,} tokens, "
        f"{time.monotonic() - started:.1f} s"
    )
    if _identity(corpus, data) != identity:
        raise UserError("data.source: a file changed while it was read; prepare the data again")
    tokenizer.save(folder / _TOKENIZER_FILE)
    files = [
        {"path": str(path), "size": path.stat().st_size, **file}
        for path, file in zip(corpus.files, identity["files"], strict=True)
    ]
    content = {
        **identity,
        "files": files,
        "fingerprint": _fingerprint(identity),
        "tokenizer_sha256": tokenizer.sha256,
        "text": dataclasses.asdict(counts),
        "splits": {
            name: {**dataclasses.asdict(split), "text_tokens": split.text_tokens}
            for name, split in splits.items()
        },
    }
    write_atomically(folder / _DATASET_FILE, json.dumps(content, indent=2).encode())


def _train_tokenizer(corpus: Corpus, data: DataConfig, counts: TextCounts) -> Tokenizer:
    """First pass over the text."""
    documents = dict.fromkeys(_SPLITS, 0)

    def training_documents() -> Iterator[str]:
        for text in corpus.documents(counts):
            split = _split_of(text, data.heldout_fraction)
            documents[split] += 1
            if split == "train":
                yield text

    tokenizer = train_bpe(training_documents(), data.vocab_size)
    for name, n in documents.items():
        if n == 0:
            raise UserError(
                f"data.heldout_fraction = {data.heldout_fraction}: of {counts.documents} "
                f"document(s) none came into the {name} split; give more documents in data.source "
                "or another fraction"
            )
    return tokenizer


def _write_splits(
    folder: Path, corpus: Corpus, data: DataConfig, tokenizer: Tokenizer
) -> dict[str, SplitInfo]:
    """Second pass over the text."""
    documents, tokens, utf8_bytes = (dict.fromkeys(_SPLITS, 0) for _ in range(3))
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(StreamWriter(folder, name, tokenizer.vocab_size)) for name in _SPLITS
        }
        pieces = _pieces(corpus.documents(), data.heldout_fraction)
        for batch in _batches(pieces, _BATCH_CHARS):
            encoded = tokenizer.encode_batch([piece for _, _, piece in batch])
            for (split, is_start, piece), ids in zip(batch, encoded, strict=True):
                if is_start:
                    writers[split].append(np.array([tokenizer.separator_id]))
                writers[split].append(ids)
                documents[split] += is_start
                tokens[split] += ids.size + is_start
                utf8_bytes[split] += len(piece.encode())
    return {
        name: SplitInfo(documents[name], tokens[name], utf8_bytes[name], writers[name].shards)
        for name in _SPLITS
    }


def _pieces(documents: Iterable[str], fraction: float) -> Iterator[tuple[str, bool, str]]:
    """(split, whether a document begins here, text): documents, cut where they are long."""
    for document in documents:
        split = _split_of(document, fraction)
        for i, piece in enumerate(split_text(document)):
            yield split, i == 0, piece


def _batches(pieces: Iterable[tuple[str, bool, str]], chars: int) -> Iterator[list[tuple[str, bool, str]]]:
    batch: list[tuple[str, bool, str]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[2])
        if size >= chars:
            yield batch
            batch, size = [], 0
    yield batch


def _split_of(text: str, heldout_fraction: float) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") / 2**64 < heldout_fraction else "train"


def _move_into_place(temporary: Path, final: Path) -> None:
    try:
        temporary.rename(final)
    except OSError as e:
        # Another process prepared the same data in the meantime: its folder is as good as ours.
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return
    fsync(final.parent)


def _remove_stale_folders(root: Path) -> None:
    for folder in root.glob(".*." + "[0-9a-f]" * 32 + ".tmp"):
        # Another process may remove or finish its folder while we look at it.
        with contextlib.suppress(OSError):
            # A file that is being written is newer than the folder that holds it.
            newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - newest > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _read_description(path: Path) -> dict[str, Any]:
    file = path / _DATASET_FILE
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


def _summary(dataset: Dataset) -> str:
    return "; ".join(
        f"{name} {split.documents:,} documents, {split.tokens:,} tokens, {split.utf8_bytes:,} bytes"
        for name, split in (("train:", dataset.train), ("held out:", dataset.heldout))
    )


def _announce_oddities(counts: TextCounts, announce: Callable[[str], None]) -> None:
    if counts.replaced_sequences:
        announce(
            f"data: replaced {counts.replaced_sequences:,} invalid UTF-8 sequences in "
            f"{counts.documents_with_replacements:,} documents with U+FFFD"
        )
    if counts.empty_documents:
        announce(f"data: skipped {counts.empty_documents:,} empty documents")
