"""The engine of one machine: its cores do pieces of work, and tell how far they are.

A core is a process, unless there are fewer pieces than cores: then the tokenizer's own threads take the rest.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import time
from typing import Any

from topklm.data.building.chunks import Chunk, Totals, drop_duplicates
from topklm.data.building.encode import FileResult, ReportProgress
from topklm.data.building.storage import Storage
from topklm.data.building.work_items import EncodeTask, ShardTask
from topklm.data.records import Shard
from topklm.errors import UserError

_POLL_SECONDS = 0.1
_ORPHAN_POLL_SECONDS = 1.0

_reports: Any = None  # in a worker process: where its reports go


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
