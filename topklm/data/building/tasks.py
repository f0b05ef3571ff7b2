"""The pieces of work of a preparation, each of which any process that reaches the work folder can do."""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
from typing import Protocol

from topklm.data.building.chunks import Chunk, Totals
from topklm.data.building.encode import FileJob, FileResult, Report, encode_file
from topklm.data.building.shards import ShardJob, make_shard
from topklm.data.building.storage import Storage
from topklm.data.building.words import Encode, fastest
from topklm.data.records import Shard
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError


@dataclasses.dataclass(frozen=True)
class EncodeTask:
    """One file to encode."""

    job: FileJob
    work: Storage

    def run(self, report: Report) -> FileResult:
        """Encodes it."""
        tokenizer, encode = _encoder(self.work.url, self.job.tokenizer_sha256)
        return encode_file(self.job, tokenizer, encode, self.work, report)


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """One shard to write."""

    job: ShardJob
    folder: Storage

    def run(self, report: Report) -> Shard:
        """Writes it."""
        shard = make_shard(self.job, self.folder)
        report(shard.tokens, 0, shard.tokens)
        return shard


class Engine(Protocol):
    """Does the work of a preparation, here or elsewhere; the outcome is the same.

    All of its machines reach the work folder; results come back in the order of what was to be done.
    """

    def encode(self, tasks: Sequence[EncodeTask], work: Storage, report: Report) -> list[FileResult]:
        """Encodes the files."""

    def drop_duplicates(self, chunks: Sequence[Chunk], work: Storage) -> None:
        """Marks copies; see `duplicates.drop_duplicates`."""

    def totals(self, chunks: Sequence[Chunk], work: Storage) -> list[Totals]:
        """What is kept of each chunk."""

    def write_shards(self, tasks: Sequence[ShardTask], work: Storage, report: Report) -> list[Shard]:
        """Writes the shards."""


def share_tokenizer(tokenizer: Tokenizer, work: Storage) -> None:
    """Puts the tokenizer where every task finds it."""
    work.write(_name(tokenizer.sha256), tokenizer.to_bytes())


def shared_tokenizer(sha256: str, work: Storage) -> Tokenizer | None:
    """Reads the tokenizer of this digest that was put there; None if it is not there, or damaged."""
    try:
        content = work.read(_name(sha256))
    except (FileNotFoundError, IsADirectoryError):
        return None
    return Tokenizer(content) if hashlib.sha256(content).hexdigest() == sha256 else None


def _name(sha256: str) -> str:
    return f"tokenizer-{sha256[:24]}.json"


@functools.lru_cache(maxsize=1)
def _encoder(work: str, sha256: str) -> tuple[Tokenizer, Encode]:
    """What a process needs for all of its files."""
    tokenizer = shared_tokenizer(sha256, Storage(work))
    if tokenizer is None:
        raise UserError(f"{work}/{_name(sha256)} is not as it was written: start the same command again")
    return tokenizer, fastest(tokenizer)
