"""Where the text comes from that neurons are looked at on: documents as token ids."""

from collections.abc import Iterator
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Protocol

import numpy as np

from topklm.config import DataConfig
from topklm.data.dataset import SPLITS, is_dataset, load_dataset
from topklm.data.mixture import Mixture
from topklm.data.prepare import prepare
from topklm.data.readers import Document, FileReader
from topklm.data.sources import SourceFile, corpus_name, find
from topklm.data.stream import document_bounds
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError


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


def open_documents(
    tokenizer: Tokenizer, data: DataConfig, source: str | None = None, split: str = "heldout"
) -> Documents:
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
    if is_dataset(Path(source).expanduser()):
        mixture = Mixture.single(load_dataset(Path(source).expanduser()))
        return _Prepared(mixture, split, tokenizer, f"--source = {source}")
    names = [part.strip() for part in source.split(",") if part.strip()]
    return _Files(find(names, flag="--source"), data.text_field, tokenizer)


class _Prepared:
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


class _Files:
    def __init__(self, files: tuple[SourceFile, ...], text_field: str, tokenizer: Tokenizer):
        self.n_tokens: int | None = None
        self._files, self._text_field, self._tokenizer = files, text_field, tokenizer
        facts = [dataclasses.asdict(file) for file in files]
        fingerprint = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()
        self.name = f"{corpus_name(files)} ({fingerprint[:12]})"

    def __iter__(self) -> Iterator[np.ndarray]:
        for file in self._files:
            for item in FileReader(file, self._text_field):
                # What cannot be read is left out here, as it is when data are prepared.
                if isinstance(item, Document):
                    yield self._tokenizer.encode(item.text)
