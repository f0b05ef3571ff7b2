"""Ends a run that makes no progress, and shows where it hangs.

A collective that one process never enters blocks the others for ever, without an error. This cannot tell
why; it dumps the Python stacks of all threads, so that a person can.
"""

from collections.abc import Iterator
import contextlib
import faulthandler
import pathlib
import threading
import time

from topklm import distributed
from topklm.distributed import coordination
from topklm.storage.files import AnyPath

_TIMEOUT_S = 600.0
# Before the first step: restoring, compiling, and the first use of every device.
_START_UP_FACTOR = 6
_MOST_CHECK_S = 1.0


class Watchdog:
    """A thread that wants to be told of progress; use it as a context.

    The stacks also go to stacks-<process>.txt in the run folder, if it is local. Longest time without
    progress is by default TOPKLM_HANG_TIMEOUT seconds (UserError if it is no number), or 600; until the first
    step is done, six times that.
    """

    def __init__(self, folder: AnyPath | None = None, timeout_s: float | None = None):
        self._timeout_s = timeout_s or coordination.seconds("TOPKLM_HANG_TIMEOUT", _TIMEOUT_S)
        self._folder = folder if isinstance(folder, pathlib.Path) else None
        self._step: int | None = None
        self._quiet_s = 0.0
        self._pauses = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def tick(self, step: int | None = None) -> None:
        """Says that there was progress, and which step is done, if one is."""
        self._quiet_s = 0.0
        if step is not None:
            self._step = step

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the time in the block, for work with a patience of its own; blocks can nest."""
        self._pauses += 1
        try:
            yield
        finally:
            self.tick()
            self._pauses -= 1

    def _watch(self) -> None:
        interval_s = min(_MOST_CHECK_S, self._timeout_s / 10)
        before = time.monotonic()
        while not self._stopping.wait(interval_s):
            now = time.monotonic()
            # After a gap, the whole process was stopped (SIGSTOP, a laptop's sleep), and not its fault.
            self._quiet_s += now - before if now - before < 3 * interval_s else interval_s
            before = now
            if self._pauses:
                self._quiet_s = 0.0
            limit_s = self._timeout_s * (_START_UP_FACTOR if self._step is None else 1)
            if self._quiet_s > limit_s:
                self._bite(limit_s)

    def _bite(self, limit_s: float) -> None:
        where = "before the first step" if self._step is None else f"in step {self._step + 1}"
        if self._folder:
            # The dump is for a person; that the disk refuses it must not keep the process alive.
            with contextlib.suppress(OSError):
                path = self._folder / f"stacks-{distributed.process_index()}.txt"
                with path.open("w", encoding="utf-8") as file:
                    faulthandler.dump_traceback(file)
        distributed.end_hung(f"no progress for {limit_s:g} s {where}")
