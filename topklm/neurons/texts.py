"""Where the text comes from that neurons are looked at on: documents as token ids."""

from collections import Counter
from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np

from topklm.config import DataConfig
from topklm.data.dataset import SPLITS, is_dataset, load_dataset
from topklm.data.documents import Document
from topklm.data.mixture import Mixture
from topklm.data.prepare import prepare
from topklm.data.readers import FileReader
from topklm.data.sources import SourceFile, corpus_name, find
from topklm.data.stream import document_bounds
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError

_DIGEST_BYTES = 16  # of a text: what tells it from others, as when data are prepared

COPY = "exact copy of a document before"


class Documents(Protocol):
    """Text in a fixed order, so that work on it can be taken up again.

    Attributes:
        name: What it is, in words and a fingerprint.
        n_tokens: How many there are; None where only reading would tell.
    """

    name: str
    n_tokens: int | None

    def __iter__(self) -> Iterator[np.ndarray]:
        """Token ids of each document, int32[n], without separators."""
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
    tokenizer: Tokenizer, data: DataConfig, source: str | None = None, split: str = "heldout"
) -> SourceText:
    """The text of a run, or another.

    Args:
        tokenizer: The model's.
        data: The run's; its data are opened, or prepared again, if no source is given.
        source: A prepared folder, or what `topklm prepare` takes: files, globs, URLs of text.
        split: Of prepared data, "train" or "heldout".

    Raises:
        UserError: For text that cannot be read, or data prepared with another tokenizer.
    """
    if source is None:
        return _Prepared(prepare(data, lambda line: None), split, tokenizer, "the run's own data")
    if (folder := as_folder(source)) and is_dataset(folder):
        mixture = Mixture.single(load_dataset(folder))
        return _Prepared(mixture, split, tokenizer, f"--source = {source}")
    names = [part.strip() for part in source.split(",") if part.strip()]
    return _Files(find(names, flag="--source"), data.text_field, tokenizer)


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
        said: What the user gave, e.g. "--source = notes.jsonl".
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
    """Documents of files, less what `topklm prepare` leaves out: what cannot be read, and exact copies."""

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
