"""The engines of a preparation: the cores of this machine, or an Apache Beam pipeline on any of its runners.

Any process that reaches the work folder can do any task; no bit of the result depends on which does. On one
machine a core is a process, unless there are fewer tasks than cores, and then the tokenizer's own threads
take the rest. The machines of a pipeline share one thing, the work folder, which holds every result.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
import contextlib
import dataclasses
import json
import logging
import multiprocessing
import operator
import os
import queue
import signal
import threading
import time
from typing import Any, ClassVar, Protocol

import numpy as np

from topklm.data.building.chunks import Chunk, Storage, Totals, drop_duplicates
from topklm.errors import UserError
from topklm.imports import optional_module
from topklm.progress import Report

_POLL_SECONDS = 0.1
_ORPHAN_POLL_SECONDS = 1.0
_RESULTS_FILE = "pipeline-results.json"  # of Beam

_reports: Any = None  # in a worker process: where its reports go


class Task(Protocol):
    """A piece of work that can be pickled: a `FileTask` or a `ShardTask`."""

    Result: ClassVar[type]  # a dataclass of JSON values

    @property
    def size(self) -> int:
        """Units of work."""

    def run(self, report: Report) -> Any:
        """Does it, and returns a Result."""


class Engine(Protocol):
    """Does the work of a preparation, here or elsewhere; the outcome is the same."""

    def run(self, tasks: Sequence[Task], work: Storage, report: Report) -> list[Any]:
        """Returns `[task.run(report) for task in tasks]`; all machines reach the folder `work`."""

    def drop_duplicates(self, chunks: Sequence[Chunk], work: Storage) -> None:
        """Marks copies; see `chunks.drop_duplicates`."""

    def totals(self, chunks: Sequence[Chunk], work: Storage) -> list[Totals]:
        """Counts the kept documents, tokens and bytes of each chunk."""


def all_cores() -> int:
    """Counts the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LocalEngine:
    """The engine of one machine, see `Engine`; use as a context manager."""

    def __init__(self, cores: int, *, in_this_process: bool = False):
        """Takes the number of cores, and whether to start no process (a trainer's would hold all of JAX)."""
        self._cores, self._in_this_process = cores, in_this_process
        self._pool: ProcessPoolExecutor | None = None
        self._messages: Any = None

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()) if error[0] else []:
                process.terminate()  # nothing that a worker has not finished is of use
            self._pool.shutdown(cancel_futures=True)

    def run(self, tasks: Sequence[Task], work: Storage, report: Report) -> list[Any]:
        """Does the tasks, see `Engine`, reporting in this thread; UserError if a worker was killed."""
        # The largest first, so that no worker is left with a large one at the end.
        order = sorted(range(len(tasks)), key=lambda i: -tasks[i].size)
        if self._in_this_process or min(self._cores, len(tasks)) <= 1:
            _limit_threads(self._cores)
            results = {i: tasks[i].run(report) for i in order}
        else:
            try:
                results = self._run_in_processes({i: tasks[i] for i in order}, report)
            except BrokenProcessPool as e:
                raise UserError(
                    "a worker process was killed, perhaps for lack of memory; the same command with fewer "
                    "--workers continues where it stopped"
                ) from e
        return [results[i] for i in range(len(tasks))]

    def drop_duplicates(self, chunks: Sequence[Chunk], work: Storage) -> None:
        """Marks copies, see `Engine`."""
        drop_duplicates(chunks, work.path)

    def totals(self, chunks: Sequence[Chunk], work: Storage) -> list[Totals]:
        """Counts what is kept, see `Engine`."""
        return [chunk.totals() for chunk in chunks]

    def _run_in_processes(self, tasks: dict[int, Task], report: Report) -> dict[int, Any]:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._messages = context.Queue()
            processes = min(self._cores, len(tasks))
            arguments = (self._messages, -(-self._cores // processes), os.getpid())
            self._pool = ProcessPoolExecutor(processes, context, _begin_worker, arguments)
        # Processes that begin here never hear of Ctrl-C.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = {self._pool.submit(_run_here, task): i for i, task in tasks.items()}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        left = set(futures)
        while left:
            done, left = wait(left, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            with contextlib.suppress(queue.Empty):
                while True:
                    report(*self._messages.get_nowait())
            for future in sorted(done, key=futures.__getitem__):
                future.result()  # the first failure ends the work
        return {i: future.result() for future, i in futures.items()}


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


def _run_here(task: Task) -> Any:
    return task.run(lambda *message: _reports.put(message))


class BeamEngine:
    """The engine of many machines, see `Engine`; every step is a pipeline. Needs the extra `beam`."""

    def __init__(self, runner: str, options: Sequence[str]):
        """Takes the name of a runner and Beam's own options, e.g. `--project=...`."""
        self._options = [f"--runner={runner}", *options]
        logging.disable(logging.WARNING)  # as it is imported, Beam warns of the optional parts that it misses
        try:
            self._beam = optional_module("apache_beam", "beam", "--runner")
        finally:
            logging.disable(logging.NOTSET)

    def run(self, tasks: Sequence[Task], work: Storage, report: Report) -> list[Any]:
        """Does the tasks, see `Engine`."""
        results = self._map(lambda task: task.run(lambda *_: None), tasks, work)
        for task, result in zip(tasks, results, strict=True):
            report(task.size, result.get("documents", 0), result.get("tokens", 0))
        return [task.Result(**result) for task, result in zip(tasks, results, strict=True)]

    def drop_duplicates(self, chunks: Sequence[Chunk], work: Storage) -> None:
        """Marks copies, see `Engine`."""
        beam = self._beam
        with self._pipeline() as pipeline:
            numbered = pipeline | "chunks" >> beam.Create(list(enumerate(chunks))) | beam.Reshuffle()
            copies = (
                numbered
                | "documents" >> beam.FlatMapTuple(_ranked)
                | "copies" >> beam.GroupByKey()
                | "all but one" >> beam.FlatMapTuple(_all_but_least)
            )
            both = {"chunk": numbered, "rows": copies} | "by chunk" >> beam.CoGroupByKey()
            _ = both | "mark" >> beam.MapTuple(_mark)

    def totals(self, chunks: Sequence[Chunk], work: Storage) -> list[Totals]:
        """Counts what is kept, see `Engine`."""
        return [Totals(**total) for total in self._map(Chunk.totals, chunks, work)]

    def _map(
        self, function: Callable[[Any], Any], items: Sequence[Any], work: Storage
    ) -> list[dict[str, Any]]:
        """Returns the fields of `function(item)`, a dataclass of JSON values, for each item."""

        def write(results: list[tuple[int, dict[str, Any]]]) -> None:
            work.write(_RESULTS_FILE, json.dumps(results).encode())

        beam = self._beam
        with self._pipeline() as pipeline:
            _ = (
                pipeline
                | "items" >> beam.Create(list(enumerate(items)))
                | beam.Reshuffle()
                | "run" >> beam.MapTuple(lambda number, item: (number, dataclasses.asdict(function(item))))
                | "gather" >> beam.combiners.ToList()
                | "write" >> beam.Map(write)
            )
        results = json.loads(work.read(_RESULTS_FILE))
        return [result for _, result in sorted(results, key=operator.itemgetter(0))]

    def _pipeline(self) -> Any:
        try:
            options = self._beam.options.pipeline_options.PipelineOptions(self._options)
            return self._beam.Pipeline(options=options)
        except (ValueError, ImportError) as e:
            raise UserError(f"--runner, --beam-options = {' '.join(self._options)}: {e}") from e


def _ranked(number: int, chunk: Chunk) -> Iterator[tuple[bytes, tuple[int, int, int]]]:
    """Yields of each document its digest, and (0 if held out, else 1; chunk; row): the least copy stays."""
    index = chunk.index()
    for row in range(index.size):
        yield index["digest"][row].tobytes(), (1 - int(index["heldout"][row]), number, row)


def _all_but_least(_digest: bytes, ranks: Iterable[tuple[int, int, int]]) -> Iterator[tuple[int, int]]:
    for _, number, row in sorted(ranks)[1:]:
        yield number, row


def _mark(_number: int, found: dict[str, Any]) -> None:
    (chunk,) = found["chunk"]
    chunk.drop(np.array(sorted(found["rows"]), np.int64))
