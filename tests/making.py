"""Makes prepared datasets by hand: writes shards and their description without the code that prepares text.

For tests of what reads them.
"""

from collections.abc import Callable, Sequence
import dataclasses
from pathlib import Path

import numpy as np

from topklm.data.dataset import (
    DESCRIPTION_FILE,
    FORMAT_VERSION,
    TOKENIZER_FILE,
    Dataset,
    load_dataset,
    read_description,
)
from topklm.data.records import SHARD_TOKENS, Shard, shard_bounds, shard_name, write_shard
from topklm.data.tokenizer import Tokenizer, train_bpe
from topklm.storage.files import sealed_json


def make_dataset(
    folder: Path,
    train: Sequence[str],
    heldout: Sequence[str] = (),
    *,
    tokenizer: Tokenizer | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Dataset:
    """A dataset of these documents; without a tokenizer, one with a token for every byte."""
    folder.mkdir(parents=True)
    tokenizer = tokenizer or train_bpe([], 257)
    tokenizer.save(folder / TOKENIZER_FILE)
    documents = [*train, *heldout]
    n_bytes = sum(len(text.encode()) for text in documents)
    splits = {
        name: _write_split(folder, name, texts, tokenizer, shard_tokens)
        for name, texts in (("train", train), ("heldout", heldout))
    }
    description = {
        "format_version": FORMAT_VERSION,
        "fingerprint": "0" * 64,
        "settings": {},
        "tokenizer": {
            "sha256": tokenizer.sha256,
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "separator_id": tokenizer.separator_id,
        },
        "sources": [{"url": "a.txt", "size": n_bytes, "sha256": "0" * 64, "documents": len(documents)}],
        "text": {
            "documents": len(documents),
            "utf8_bytes": n_bytes,
            "duplicates": 0,
            "too_short": 0,
            "too_long": 0,
            "documents_with_replacements": 0,
            "replaced_sequences": 0,
            "problems": {},
        },
        "problem_examples": [],
        "splits": splits,
    }
    (folder / DESCRIPTION_FILE).write_bytes(sealed_json(description, indent=1))
    return load_dataset(folder)


def rewrite_description(folder: Path, edit: Callable[[dict], object]) -> None:
    """Changes what a dataset.json says as a program does that writes it: its digest of itself is right."""
    description = read_description(folder)
    edit(description)
    (folder / DESCRIPTION_FILE).write_bytes(sealed_json(description, indent=1))


def stream_of(documents: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """For each document the separator, then its tokens; int32[n]."""
    separator = np.array([tokenizer.separator_id], np.int32)
    parts = [part for text in documents for part in (separator, tokenizer.encode(text))]
    return np.concatenate([np.zeros(0, np.int32), *parts])


def write_stream(folder: Path, name: str, ids: np.ndarray, vocab_size: int, shard_tokens: int) -> list[Shard]:
    """The shards of a stream."""
    bounds = shard_bounds(len(ids), shard_tokens)
    return [
        write_shard(folder / shard_name(name, i, len(bounds)), [ids[start:stop]], vocab_size)
        for i, (start, stop) in enumerate(bounds)
    ]


def _write_split(
    folder: Path, name: str, documents: Sequence[str], tokenizer: Tokenizer, shard_tokens: int
) -> dict:
    ids = stream_of(documents, tokenizer)
    shards = write_stream(folder, name, ids, tokenizer.vocab_size, shard_tokens)
    return {
        "documents": len(documents),
        "tokens": len(ids),
        "text_tokens": len(ids) - len(documents),
        "utf8_bytes": sum(len(text.encode()) for text in documents),
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }


def conllu(*sentences):
    """Sentences of (form, head, relation), with a space between words but before a full stop."""
    blocks = []
    for words in sentences:
        text = " ".join(form for form, _, _ in words).replace(" .", ".")
        rows = [
            f"{n}\t{form}\t_\tX\t_\t_\t{head}\t{relation}\t_\t_"
            for n, (form, head, relation) in enumerate(words, 1)
        ]
        blocks.append("\n".join([f"# text = {text}", *rows]))
    return "\n\n".join(blocks) + "\n"
