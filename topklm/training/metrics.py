"""Where numbers go: metrics.jsonl and TensorBoard files."""

from collections.abc import Callable, Mapping
import json
import math
import os
import pathlib
import time
from typing import Any, Protocol

from topklm import run_folder
from topklm.buckets import storage_errors_are_user_errors
from topklm.errors import disk_errors_are_user_errors
from topklm.files import AnyPath, is_bucket, write_atomically
from topklm.imports import without
from topklm.training.spool import Spool

# tensorboardX looks for them, which takes seconds, for what is not used here.
with without("torch", "boto3", "google.cloud.storage"):
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog


class Writer(Protocol):
    """Takes a run's numbers."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line; numbers, lists of numbers (one per layer) and text are understood."""

    def sync(self) -> None:
        """Returns when the lines are where the checkpoints are; called before one refers to them."""

    def close(self) -> None:
        """Brings everything to its place and lets go."""


def open_writer(
    folder: AnyPath, resume_step: int, *, primary: bool = True, warn: Callable[[str], None] = print
) -> Writer:
    """Opens a run's metrics; lines of steps after `resume_step`, which will be done again, are dropped.

    Args:
        folder: The run folder, on a disk or in a bucket.
        resume_step: The last step that is done.
        primary: Whether this is the process that writes them; the writer of any other does nothing.
        warn: Is told, once in a row, when a bucket does not take them. Training goes on; `close` raises.
    """
    if not primary:
        return _Nobody()
    if is_bucket(folder):
        return _BucketWriter(folder, resume_step, warn)
    return MetricsWriter(pathlib.Path(folder), resume_step)


class MetricsWriter:
    """Appends one JSON line a call, and the same numbers to TensorBoard files, in a local folder."""

    def __init__(self, folder: pathlib.Path, resume_step: int):
        """Opens the files; lines of steps after `resume_step`, which will be done again, are dropped."""
        path = folder / run_folder.METRICS_FILE
        self._path = path
        with disk_errors_are_user_errors(f"writing {path}"):
            write_atomically(path, "".join(_lines_up_to(path, resume_step)).encode())
            self._file = path.open("a", encoding="utf-8")
            self._board = _Board(folder / "tensorboard", first_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line; numbers, lists of numbers (one per layer) and text are understood."""
        with disk_errors_are_user_errors(f"writing {self._path}"):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                if isinstance(value, str):
                    self._board.add(step, summary.text(name, value))
                elif isinstance(value, list):
                    for layer, x in enumerate(value):
                        self._board.add(step, summary.scalar(f"{name}/{layer}", x))
                else:
                    self._board.add(step, summary.scalar(name, value))

    def sync(self) -> None:
        """Returns when the lines are on the disk itself; called before a checkpoint refers to them."""
        with disk_errors_are_user_errors(f"writing {self._path}"):
            os.fsync(self._file.fileno())
            self._board.flush()

    def close(self) -> None:
        """Closes both files."""
        with disk_errors_are_user_errors(f"writing {self._path}"):
            self._file.close()
            self._board.close()


def is_evaluated(folder: AnyPath, step: int) -> bool:
    """Whether the metrics of a run hold the evaluation of a step."""
    return any(line["step"] == step and "eval/loss" in line for line in read(folder))


def read(folder: AnyPath) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics; none where there is no such file yet."""
    return [json.loads(line) for line in _lines_up_to(folder / run_folder.METRICS_FILE, math.inf)]


class _BucketWriter:
    """Writes to a local folder whose files are copied: every minute, at every `sync`, and at the end."""

    def __init__(self, folder: AnyPath, resume_step: int, warn: Callable[[str], None]):
        self._spool = Spool(folder, warn)
        self._spool.fetch(run_folder.METRICS_FILE)
        self._writer = MetricsWriter(self._spool.local, resume_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._writer.write(step, values)
        self._spool.copy_soon()

    def sync(self) -> None:
        self._writer.sync()
        self._spool.copy()

    def close(self) -> None:
        self._writer.close()
        self._spool.close()


class _Nobody:
    """The writer of a process that has nothing to write."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Board:
    """A TensorBoard file, written by the caller's own thread.

    tensorboardX would write from a thread behind a short queue: on a full disk that thread dies, and
    the run waits for it for ever.
    """

    def __init__(self, folder: pathlib.Path, first_step: int):
        folder.mkdir(exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        # Tells TensorBoard to forget what an earlier process wrote of this step and later ones.
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: Any) -> None:
        self._write(Event(step=step, summary=values))

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)


def _lines_up_to(path: AnyPath, step: float) -> list[str]:
    with storage_errors_are_user_errors(f"reading {path}", path):
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = []
    for line in lines:
        # A killed process can leave half a line, which only ever is the last one.
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    return kept
