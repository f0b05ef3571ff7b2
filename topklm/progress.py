"""Shows how far a long piece of work is: lines in a log, or bars on a terminal.

Knows nothing of the work; its results never depend on what is shown.
"""

from collections.abc import Callable, Iterator
import contextlib
import time

import rich.console
import rich.progress

_LINE_SECONDS = 10  # between two lines of a long phase where there is no terminal

Report = Callable[
    [int, int, int], None
]  # takes units of work, documents and tokens, each since the last time


class Progress:
    """Shows whole lines, through `say`, and nothing else."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say

    @contextlib.contextmanager
    def phase(self, name: str, total: int) -> Iterator[Report]:
        """Begins one long piece of work.

        Args:
            name: For example "encoding".
            total: Units of it, such as bytes; 0 where nobody knows.

        Yields:
            A function that is told of (units, documents, tokens) done since the last time.
        """
        yield lambda units, documents, tokens: None


class TerminalProgress(Progress):
    """A bar with tokens per second and the time left; every ten seconds a line where there is no terminal."""

    def __init__(self, console: rich.console.Console):
        super().__init__(lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True))
        self._console = console

    @contextlib.contextmanager
    def phase(self, name: str, total: int) -> Iterator[Report]:
        """Shows one long piece of work, see `Progress.phase`."""
        show = _Bar if self._console.is_terminal else _Lines
        with show(name, total, self._console) as report:
            yield report


class _Figures:
    """Counts of a phase."""

    def __init__(self, name: str, total: int, console: rich.console.Console):
        self._name, self._total, self._console = name, total, console
        self._units = self._documents = self._tokens = 0
        self._began = time.monotonic()

    def _add(self, units: int, documents: int, tokens: int) -> None:
        self._units += units
        self._documents += documents
        self._tokens += tokens

    def _text(self) -> str:
        seconds = max(1e-9, time.monotonic() - self._began)
        parts = [f"{self._documents:,} documents"] if self._documents else []
        if self._tokens:
            parts += [f"{self._tokens:,} tokens", f"{self._tokens / seconds:,.0f} tokens/s"]
        if self._units and self._total:
            left = seconds / self._units * max(0, self._total - self._units)
            parts.append(f"{round(left // 60)}:{round(left % 60):02} left")
        return ", ".join(parts)


class _Lines(_Figures):
    def __enter__(self) -> Report:
        self._next_line = time.monotonic() + _LINE_SECONDS
        return self._report

    def __exit__(self, *_: object) -> None:
        pass

    def _report(self, units: int, documents: int, tokens: int) -> None:
        self._add(units, documents, tokens)
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_SECONDS
            share = f"{min(1.0, self._units / self._total):.0%} | " if self._total else ""
            self._console.print(f"{self._name}: {share}{self._text()}", highlight=False, soft_wrap=True)


class _Bar(_Figures):
    def __enter__(self) -> Report:
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TextColumn("{task.fields[figures]}"),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task(self._name, total=self._total or None, figures="")
        self._bar.start()
        return self._report

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _report(self, units: int, documents: int, tokens: int) -> None:
        self._add(units, documents, tokens)
        self._bar.update(self._task, completed=self._units, figures=self._text())
