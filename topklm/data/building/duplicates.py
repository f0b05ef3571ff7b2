"""Exact copies of documents: finds all but one of each text, in memory that does not grow with the text.

Two documents are copies when the first 128 bits of their texts' SHA-256 agree: among 10^12 texts, two
different ones do with a probability of 10^-15.
"""

from collections.abc import Sequence
from pathlib import Path
import tempfile

import numpy as np

from topklm.data.building.chunks import Chunk

_BUCKET_DOCUMENTS = 1 << 20  # documents sorted at a time

_ENTRY_DTYPE = np.dtype([("digest", "<u8", 2), ("heldout", "u1"), ("document", "<u8")])


def drop_duplicates(chunks: Sequence[Chunk], scratch: Path) -> None:
    """Marks copies in the chunks' files.

    `scratch` is a folder on this machine for temporary files, 33 bytes a document.

    The copy that stays is the first in the held-out split, or else the first: no held-out text is ever
    trained on, whatever file it comes from.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        sizes = [chunk.documents() for chunk in chunks]
        starts = np.cumsum([0, *sizes])
        total = int(starts[-1])
        n_buckets = -(-total // _BUCKET_DOCUMENTS)
        is_copy = np.memmap(folder / "copies", bool, "w+", shape=max(1, total))
        for bucket in _fill_buckets(folder, chunks, starts, n_buckets):
            is_copy[copies(np.fromfile(bucket, _ENTRY_DTYPE))] = True
            bucket.unlink()
        for chunk, start, stop in zip(chunks, starts[:-1], starts[1:], strict=True):
            chunk.drop(np.flatnonzero(is_copy[start:stop]))


def keep_all(chunks: Sequence[Chunk]) -> None:
    """Takes back what an earlier attempt may have marked."""
    for chunk in chunks:
        chunk.drop(np.zeros(0, np.int64))


def copies(entries: np.ndarray) -> np.ndarray:
    """Document numbers that `drop_duplicates` drops among entries (digest, heldout, document)."""
    order = np.lexsort(
        (entries["document"], 1 - entries["heldout"], entries["digest"][:, 1], entries["digest"][:, 0])
    )
    digests = entries["digest"][order]
    repeats = (digests[1:] == digests[:-1]).all(axis=1)
    return entries["document"][order[1:][repeats]]


def _fill_buckets(scratch: Path, chunks: Sequence[Chunk], starts: np.ndarray, n_buckets: int) -> list[Path]:
    """Files of entries; all copies of a text come into one."""
    paths = [scratch / f"{number}.entries" for number in range(n_buckets)]
    pending: list[np.ndarray] = []
    for chunk, start in zip(chunks, starts[:-1], strict=True):
        index = chunk.index()
        entries = np.zeros(index.size, _ENTRY_DTYPE)
        entries["digest"], entries["heldout"] = index["digest"], index["heldout"]
        entries["document"] = start + np.arange(index.size)
        pending.append(entries)
        if sum(part.size for part in pending) >= _BUCKET_DOCUMENTS:
            _spread(np.concatenate(pending), paths)
            pending = []
    if pending and paths:
        _spread(np.concatenate(pending), paths)
    return paths


def _spread(entries: np.ndarray, paths: Sequence[Path]) -> None:
    bucket = entries["digest"][:, 1] % len(paths)
    for number, path in enumerate(paths):
        with path.open("ab") as file:
            entries[bucket == number].tofile(file)
