"""The engine of one machine: its cores, each told the same function and many tasks, and heard while it works.

A core is a process, unless there are fewer tasks than cores: then the tokenizer's own threads take the rest.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import time
from typing import Any, TypeVar

from topklm.data.building.chunks import Chunk, Totals, drop_duplicates
from topklm.data.building.encode import FileResult, ReportProgress
from topklm.data.building.storage import Storage
from topklm.data.building.work_items import EncodeTask, ShardTask
from topklm.data.records import Shard
from topklm.errors import UserError

_POLL_SECONDS = 0.1
_ORPHAN_POLL_SECONDS = 1.0

Task = TypeVar("Task")
Result = TypeVar("Result")

_reports: Any = None  # in a worker process: where its reports go


def all_cores() -> int:
    """Counts the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """Cores to work with; use as a context manager."""

    def __init__(self, cores: int, *, in_this_process: bool = False):
        """Takes the number of cores, and whether to start no process (a trainer's would hold all of JAX)."""
        self._cores, self._in_this_process = cores, in_this_process
        self._pool: ProcessPoolExecutor | None = None
        self._reports: Any = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()) if error[0] else []:
                process.terminate()  # nothing that a worker has not finished is of use
            self._pool.shutdown(cancel_futures=True)

    def map(
        self,
        function: Callable[[Task, ReportProgress], Result],
        tasks: Sequence[Task],
        report: ReportProgress,
    ) -> list[Result]:
        """Returns `[function(task, report) for task in tasks]`; begins with the first tasks.

        Args:
            function: At the top level of a module; its second argument takes what `report` takes.
            tasks: Can be pickled.
            report: Called in this thread of this process only.

        Raises:
            UserError: If a worker process was killed, as the system does when memory runs out; and
                what a task raises.
        """
        if self._in_this_process or min(self._cores, len(tasks)) <= 1:
            _limit_threads(self._cores)
            return self._map_in_threads(function, tasks, report)
        try:
            return self._map_in_processes(function, tasks, report)
        except BrokenProcessPool as e:
            raise UserError(
                "a worker process was killed, perhaps for lack of memory; the same command with fewer "
                "--workers continues where it stopped"
            ) from e

    def _map_in_threads(self, function: Callable, tasks: Sequence, report: ReportProgress) -> list:
        messages: queue.SimpleQueue = queue.SimpleQueue()
        stop = threading.Event()

        def tell(*message: Any) -> None:
            if stop.is_set():
                raise _Stopped
            messages.put(message)

        def run(task: Any) -> Any:
            if stop.is_set():
                raise _Stopped
            try:
                return function(task, tell)
            except BaseException:
                stop.set()  # before the thread takes the next task
                raise

        with ThreadPoolExecutor(1) as pool:
            futures = [pool.submit(run, task) for task in tasks]
            try:
                return _collect(futures, messages, report)
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _map_in_processes(self, function: Callable, tasks: Sequence, report: ReportProgress) -> list:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._reports = context.Queue()
            processes = min(self._cores, len(tasks))
            arguments = (self._reports, -(-self._cores // processes), os.getpid())
            self._pool = ProcessPoolExecutor(processes, context, _begin_worker, arguments)
        with _interrupts_held():
            futures = [self._pool.submit(_call, function, task) for task in tasks]
        return _collect(futures, self._reports, report)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Holds Ctrl-C back until the block ends; processes that begin in it never hear of it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Stopped(Exception):  # noqa: N818 - no error: it unwinds a task that nobody waits for
    pass


def _collect(futures: Sequence[Future], messages: Any, report: ReportProgress) -> list:
    left, order = set(futures), {future: number for number, future in enumerate(futures)}
    while left:
        done, left = wait(left, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        for message in _pending(messages):
            report(*message)
        for future in sorted(done, key=order.__getitem__):
            future.result()  # the first failure ends the work; those after it may only have been stopped
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


def _call(function: Callable, task: Any) -> Any:
    return function(task, lambda *message: _reports.put(message))


class LocalEngine:
    """See `work_items.Engine`."""

    def __init__(self, workers: Workers):
        self._workers = workers

    def encode(self, tasks: Sequence[EncodeTask], work: Storage, report: ReportProgress) -> list[FileResult]:
        """Encodes the files, see `work_items.Engine`."""
        # The largest first, so that no worker is left with a large one at the end.
        order = sorted(range(len(tasks)), key=lambda i: -tasks[i].job.file.size)
        done = self._workers.map(_run, [tasks[i] for i in order], report)
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
        return self._workers.map(_run, tasks, report)


def _run(task: Any, report: ReportProgress) -> Any:
    return task.run(report)
