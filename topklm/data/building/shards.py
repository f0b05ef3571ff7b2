"""Encoded chunks to the shards of a dataset: which tokens go into which shard, and writing one.

A split is one stream, the kept documents of all chunks in order; every shard can be written on its own.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses

import numpy as np

from topklm.data.building.chunks import Chunk, Totals
from topklm.data.building.storage import Storage
from topklm.data.dataset import SPLITS
from topklm.data.records import (
    Shard,
    ShardError,
    check_shards,
    shard_bounds,
    shard_name,
    token_dtype,
    write_shard,
)
from topklm.storage.files import parse_json, sealed_json, unsealed


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """One shard to write: tokens start to stop - 1 of a split, found in `parts`."""

    name: str
    split: str
    tokens: int
    parts: tuple[tuple[Chunk, int, int], ...]  # chunk, and start and stop of the split's tokens in it
    vocab_size: int


def plan_shards(
    chunks: Sequence[Chunk], totals: Sequence[Totals], vocab_size: int, shard_tokens: int
) -> list[ShardJob]:
    """Shards of near-equal size for both splits."""
    jobs = []
    for number, split in enumerate(SPLITS):
        ends = np.cumsum([0, *(total.tokens[number] for total in totals)])
        bounds = shard_bounds(int(ends[-1]), shard_tokens)
        for i, (start, stop) in enumerate(bounds):
            parts = _parts(chunks, ends, start, stop)
            jobs.append(ShardJob(shard_name(split, i, len(bounds)), split, stop - start, parts, vocab_size))
    return jobs


def make_shard(job: ShardJob, folder: Storage) -> Shard:
    """Writes a shard; in a local folder, finds it when an attempt that was ended later has written it."""
    if folder.is_local:
        if (shard := _recorded(job, folder)) is not None:
            return shard
        folder.discard(job.name)
        folder.path.mkdir(parents=True, exist_ok=True)
        shard = write_shard(folder.path / job.name, _blocks(job), job.vocab_size)
        folder.write(_record(job), sealed_json({"folder": folder.name, "shard": dataclasses.asdict(shard)}))
        return shard
    with folder.create(job.name) as path:
        return write_shard(path, _blocks(job), job.vocab_size)


def discard_damaged(job: ShardJob, folder: Storage) -> list[str]:
    """Deletes a shard in a local folder that is not as it was written; returns its name if it did."""
    if _record(job) not in folder.names():
        return []
    shard = _recorded(job, folder)
    with contextlib.suppress(ShardError):
        if shard is not None:
            check_shards(folder.path, [shard], contents=True)
            return []
    folder.discard(job.name)
    folder.discard(_record(job))
    return [f"{folder.url}/{job.name}"]


def _record(job: ShardJob) -> str:
    """Names the file that says that a shard was written, and with which bytes; goes when all are."""
    return f".{job.name}.json"


def _recorded(job: ShardJob, folder: Storage) -> Shard | None:
    """Reads the shard as it was written; None if it was not, or the record of that is damaged."""
    try:
        content = unsealed(parse_json(folder.read(_record(job))))
        if content.get("folder") != folder.name:
            return None
        shard = Shard(**content["shard"])
        return shard if (shard.name, shard.tokens) == (job.name, job.tokens) else None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
        return None


def _parts(chunks: Sequence[Chunk], ends: np.ndarray, start: int, stop: int) -> tuple:
    first = int(np.searchsorted(ends, start, side="right")) - 1
    last = int(np.searchsorted(ends, stop, side="left"))
    return tuple(
        (chunks[i], max(start, int(ends[i])) - int(ends[i]), min(stop, int(ends[i + 1])) - int(ends[i]))
        for i in range(first, last)
        if ends[i] < ends[i + 1]
    )


def _blocks(job: ShardJob) -> Iterator[np.ndarray]:
    dtype = token_dtype(job.vocab_size)
    for chunk, start, stop in job.parts:
        yield from chunk.tokens(job.split == "heldout", start, stop, dtype)
