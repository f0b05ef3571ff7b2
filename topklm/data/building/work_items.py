"""The pieces of work of a preparation, files to encode and shards to write, and the engine of one machine.

Any process that reaches the work folder can do one; no bit of the result depends on which does. A split is
one stream, the kept documents of all chunks in order; every shard can be written on its own. The cores of a
machine do pieces of work and tell how far they are: a core is a process, unless there are fewer pieces than
cores, and then the tokenizer's own threads take the rest.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
import contextlib
import dataclasses
import functools
import hashlib
import multiprocessing
import os
import queue
import signal
import threading
import time
from typing import Any, Protocol

import numpy as np

from topklm.data.building.chunks import Chunk, Totals, drop_duplicates
from topklm.data.building.encode import FileJob, FileResult, ReportProgress, encode_file
from topklm.data.building.storage import Storage
from topklm.data.building.word_cache import Encode, fastest
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
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError
from topklm.storage.files import parse_json, sealed_json, unsealed

_POLL_SECONDS = 0.1
_ORPHAN_POLL_SECONDS = 1.0

_reports: Any = None  # in a worker process: where its reports go


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
    """Plans shards of near-equal size for both splits."""
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


@dataclasses.dataclass(frozen=True)
class EncodeTask:
    """One file to encode."""

    job: FileJob
    work: Storage

    def run(self, report: ReportProgress) -> FileResult:
        """Encodes it."""
        tokenizer, encode = _encoder(self.work.url, self.job.tokenizer_sha256)
        return encode_file(self.job, tokenizer, encode, self.work, report)


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """One shard to write."""

    job: ShardJob
    folder: Storage

    def run(self, report: ReportProgress) -> Shard:
        """Writes it."""
        shard = make_shard(self.job, self.folder)
        report(shard.tokens, 0, shard.tokens)
        return shard


class Engine(Protocol):
    """Does the work of a preparation, here or elsewhere; the outcome is the same.

    All of its machines reach the work folder; results come back in the order of what was to be done.
    """

    def encode(self, tasks: Sequence[EncodeTask], work: Storage, report: ReportProgress) -> list[FileResult]:
        """Encodes the files."""

    def drop_duplicates(self, chunks: Sequence[Chunk], work: Storage) -> None:
        """Marks copies; see `chunks_lib.drop_duplicates`."""

    def totals(self, chunks: Sequence[Chunk], work: Storage) -> list[Totals]:
        """Counts the kept documents, tokens and bytes of each chunk."""

    def write_shards(self, tasks: Sequence[ShardTask], work: Storage, report: ReportProgress) -> list[Shard]:
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
    """Returns the tokenizer, and the encoder that a process keeps for all of its files."""
    tokenizer = shared_tokenizer(sha256, Storage(work))
    if tokenizer is None:
        raise UserError(f"{work}/{_name(sha256)} is not as it was written: start the same command again")
    return tokenizer, fastest(tokenizer)


def all_cores() -> int:
    """Counts the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LocalEngine:
    """The engine of one machine, see `work_items.Engine`; use as a context manager."""

    def __init__(self, cores: int, *, in_this_process: bool = False):
        """Takes the number of cores, and whether to start no process (a trainer's would hold all of JAX)."""
        self._cores, self._in_this_process = cores, in_this_process
        self._pool: ProcessPoolExecutor | None = None
        self._reports: Any = None

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()) if error[0] else []:
                process.terminate()  # nothing that a worker has not finished is of use
            self._pool.shutdown(cancel_futures=True)

    def encode(self, tasks: Sequence[EncodeTask], work: Storage, report: ReportProgress) -> list[FileResult]:
        """Encodes the files, see `work_items.Engine`."""
        # The largest first, so that no worker is left with a large one at the end.
        order = sorted(range(len(tasks)), key=lambda i: -tasks[i].job.file.size)
        done = self._run([tasks[i] for i in order], report)
        by_number = dict(zip(order, done, strict=True))
        return [by_number[i] for i in range(len(tasks))]

    def drop_duplicates(self, chunks: Sequence[Chunk], work: Storage) -> None:
        """Marks copies, see `work_items.Engine`."""
        drop_duplicates(chunks, work.path)

    def totals(self, chunks: Sequence[Chunk], work: Storage) -> list[Totals]:
        """Counts the kept documents, tokens and bytes of each chunk, see `work_items.Engine`."""
        return [chunk.totals() for chunk in chunks]

    def write_shards(self, tasks: Sequence[ShardTask], work: Storage, report: ReportProgress) -> list[Shard]:
        """Writes the shards, see `work_items.Engine`."""
        return self._run(tasks, report)

    def _run(self, items: Sequence[Any], report: ReportProgress) -> list[Any]:
        """Returns `[item.run(report) for item in items]`; begins with the first items.

        Args:
            items: Of `work_items`; can be pickled.
            report: Called in this thread of this process only.

        Raises:
            UserError: If a worker process was killed, as the system does when memory runs out; and
                what an item raises.
        """
        if self._in_this_process or min(self._cores, len(items)) <= 1:
            _limit_threads(self._cores)
            return [item.run(report) for item in items]
        try:
            return self._run_in_processes(items, report)
        except BrokenProcessPool as e:
            raise UserError(
                "a worker process was killed, perhaps for lack of memory; the same command with fewer "
                "--workers continues where it stopped"
            ) from e

    def _run_in_processes(self, items: Sequence[Any], report: ReportProgress) -> list[Any]:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._reports = context.Queue()
            processes = min(self._cores, len(items))
            arguments = (self._reports, -(-self._cores // processes), os.getpid())
            self._pool = ProcessPoolExecutor(processes, context, _begin_worker, arguments)
        with _interrupts_held():
            futures = [self._pool.submit(_run_here, item) for item in items]
        return _collect(futures, self._reports, report)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Holds Ctrl-C back until the block ends; processes that begin in it never hear of it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _collect(futures: Sequence[Future], messages: Any, report: ReportProgress) -> list:
    left, order = set(futures), {future: number for number, future in enumerate(futures)}
    while left:
        done, left = wait(left, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        for message in _pending(messages):
            report(*message)
        for future in sorted(done, key=order.__getitem__):
            future.result()  # the first failure ends the work
    return [future.result() for future in futures]


def _pending(messages: Any) -> Iterator[tuple]:
    with contextlib.suppress(queue.Empty):
        while True:
            yield messages.get_nowait()


def _begin_worker(reports: Any, threads: int, parent: int) -> None:
    global _reports  # noqa: PLW0603 - a process pool offers no other place for what every task needs
    _reports = reports
    _limit_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent decides
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process with its parent: one that was killed cannot tell its workers to stop."""
    while os.getppid() == parent:
        time.sleep(_ORPHAN_POLL_SECONDS)
    os._exit(1)


def _limit_threads(threads: int) -> None:
    # Read by the tokenizer's library when it first uses threads.
    os.environ["RAYON_NUM_THREADS"] = str(threads)


def _run_here(item: Any) -> Any:
    return item.run(lambda *message: _reports.put(message))
