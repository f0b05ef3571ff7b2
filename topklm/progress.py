"""Shows how far a long piece of work is: lines in a log, or bars on a terminal."""

from collections.abc import Callable, Iterator
import contextlib
import threading
import time
from typing import Protocol

import rich.console
import rich.progress

_SHARES = 1000  # units of work whose share alone is known
_LINE_SECONDS = 10  # between two lines of a long phase where there is no terminal


class Report(Protocol):
    """Is told how much is done since the last time."""

    def __call__(self, units: int, documents: int = 0, tokens: int = 0) -> None:
        """Takes units of work, and which documents and tokens they are, where these are shown."""


class Progress:
    """Shows whole lines, through `say`, and nothing else."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say

    @contextlib.contextmanager
    def phase(self, name: str, total: int) -> Iterator[Report]:
        """Begins one long piece of work of `total` units, such as bytes; 0 where nobody knows.

        Yields a function that is told of (units, documents, tokens) done since the last time.
        """
        yield lambda units, documents=0, tokens=0: None

    @contextlib.contextmanager
    def phase_of_tokens(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Begins a long piece of work whose units are tokens, and shown as such."""
        with self.phase(name, total) as report:
            yield lambda tokens: report(tokens, 0, tokens)

    @contextlib.contextmanager
    def phase_by_share(self, name: str) -> Iterator[Callable[[float], None]]:
        """Begins a long piece of work; yields a function that is told which share of it is done, 0 to 1."""
        with self.phase(name, _SHARES) as report:
            done = 0

            def tell(share: float) -> None:
                nonlocal done
                report(round(_SHARES * share) - done)
                done = round(_SHARES * share)

            yield tell


class TerminalProgress(Progress):
    """A bar with tokens per second and the time left; every ten seconds a line where there is no terminal."""

    def __init__(self, console: rich.console.Console):
        super().__init__(lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True))
        self._console = console

    @contextlib.contextmanager
    def phase(self, name: str, total: int) -> Iterator[Report]:
        """Shows one long piece of work, see `Progress.phase`."""
        done, began = (0, 0, 0), time.monotonic()
        next_line = began + _LINE_SECONDS
        bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TextColumn("{task.fields[figures]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        task = bar.add_task(name, total=total or None, figures="")

        def report(units: int, documents: int = 0, tokens: int = 0) -> None:
            nonlocal done, next_line
            done = (done[0] + units, done[1] + documents, done[2] + tokens)
            now = time.monotonic()
            if not bar.disable:
                bar.update(task, completed=done[0], figures=_figures(*done, total, now - began))
            elif now >= next_line:
                next_line = now + _LINE_SECONDS
                share = f"{min(1.0, done[0] / total):.0%} | " if total else ""
                figures = _figures(*done, total, now - began)
                self._console.print(f"{name}: {share}{figures}", highlight=False, soft_wrap=True)

        with bar:
            yield report


class StoppedError(Exception):
    """The work was asked to end."""


class WatchedProgress(Progress):
    """Passes everything on to another, and lets other threads see how far the work is, and end it.

    `name` is that of the present phase, or the last line that was said. Of the phase `share` is done, 0 to 1,
    and `seconds_left` are left, as its pace so far says; None where nobody knows.
    """

    def __init__(self, inner: Progress):
        super().__init__(self._say)
        self.name = "starting"
        self.share: float | None = None
        self.seconds_left: float | None = None
        self._inner, self._stopped = inner, threading.Event()

    def stop(self) -> None:
        """Makes the work raise StoppedError when it next tells of itself."""
        self._stopped.set()

    def _tell(self, name: str, share: float | None = None, seconds_left: float | None = None) -> None:
        if self._stopped.is_set():
            raise StoppedError
        self.name, self.share, self.seconds_left = name, share, seconds_left

    def _say(self, text: str) -> None:
        self._tell(text)
        self._inner.say(text)

    @contextlib.contextmanager
    def phase(self, name: str, total: int) -> Iterator[Report]:
        """Watches one long piece of work, see `Progress.phase`."""
        done, began = 0, time.monotonic()
        self._tell(name)
        with self._inner.phase(name, total) as inner:

            def report(units: int, documents: int = 0, tokens: int = 0) -> None:
                nonlocal done
                inner(units, documents, tokens)
                done += units
                known = bool(done and total)
                left = _seconds_left(done, total, time.monotonic() - began) if known else None
                self._tell(name, min(1.0, done / total) if known else None, left)

            yield report


def _seconds_left(units: int, total: int, seconds: float) -> float:
    return seconds / units * max(0, total - units)


def _figures(units: int, documents: int, tokens: int, total: int, seconds: float) -> str:
    parts = [f"{documents:,} documents"] if documents else []
    if tokens:
        parts += [f"{tokens:,} tokens", f"{tokens / max(1e-9, seconds):,.0f} tokens/s"]
    if units and total:
        left = _seconds_left(units, total, seconds)
        parts.append(f"{round(left // 60)}:{round(left % 60):02} left")
    return ", ".join(parts)
