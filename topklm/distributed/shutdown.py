"""Describes why a run of several processes ends early: the words and exit codes that people see.

The first process in trouble describes it once; every other process ends on the same description.
"""

import dataclasses
import enum
import faulthandler
import sys
import threading

from topklm.errors import EXIT_TRY_AGAIN, EXIT_USER_ERROR

_FLUSH_S = 2.0
_STDERR = 2
AGAIN = "start the same command again to resume"


class Kind(enum.StrEnum):
    """Sort of an end."""

    MISTAKE = "mistake"  # of the user; the text says what to do
    FAILURE = "failure"  # a bug
    HANG = "hang"  # no progress, somewhere
    GONE = "gone"  # a process that cannot speak for itself any more
    LATE = "late"  # somebody was waited for in vain, or does not belong to the run
    STOP = "stop"  # a process was asked to stop, and nothing is lost
    STOPPED = "stopped"  # the same, for a process that was not asked itself


_LAST_LINES = {
    Kind.MISTAKE: "error: process {process} failed: {text}",
    Kind.FAILURE: "error: process {process} failed: {text}; {again}",
    Kind.HANG: "error: {text}; stacks above; {again}",
    Kind.GONE: "error: process {process} is gone ({text}): it was killed or its machine failed; {again}",
    Kind.LATE: "error: {text}",
    Kind.STOP: "{text}",
    Kind.STOPPED: "error: process {process} was told to stop ({text}); {again}",
}
_GIVEN_UP = "error: the others gave up this process, {process} ({text}); {again}"


class PeerLost(Exception):  # noqa: N818 - named for what happened
    """Another process of the run failed, is gone or did not come; its text is one line for a person."""


@dataclasses.dataclass(frozen=True)
class Ending:
    """The end of a run, as its processes tell each other."""

    kind: Kind
    process: int  # index of the one that caused it
    text: str  # one line: that process's last words, or what others saw of it

    @property
    def exit_code(self) -> int:
        """Code of the processes that end because of it."""
        return {Kind.MISTAKE: EXIT_USER_ERROR, Kind.STOP: 0}.get(self.kind, EXIT_TRY_AGAIN)

    def heard(self, *, told_to_stop: bool) -> "Ending":
        """Returns the ending for a process that was told to stop itself, or was not.

        Only the former may end with 0, which launchers read as finished.
        """
        if self.kind is Kind.STOP and not told_to_stop:
            return dataclasses.replace(self, kind=Kind.STOPPED)
        return self

    def last_line(self, reader: int) -> str:
        """Returns what the process with index `reader` prints before it ends."""
        given_up = self.kind is Kind.GONE and self.process == reader
        line = _GIVEN_UP if given_up else _LAST_LINES[self.kind]
        return line.format(process=self.process, text=self.text, again=AGAIN)


def say_last_line(ending: Ending, reader: int) -> None:
    """Prints what `reader` says before it ends; never blocks for long; in a hang, also the stacks."""

    def write() -> None:
        sys.stdout.flush()
        if ending.kind is Kind.HANG:
            faulthandler.dump_traceback(_STDERR)
        stream = sys.stdout if ending.kind is Kind.STOP else sys.stderr
        print(ending.last_line(reader), file=stream, flush=True)

    # The main thread may hold the streams, blocked.
    writing = threading.Thread(target=write, daemon=True)
    writing.start()
    writing.join(_FLUSH_S)
