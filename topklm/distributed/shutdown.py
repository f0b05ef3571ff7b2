"""Describes why a run of several processes ends early: the words and exit codes that people see.

The first process in trouble describes it once; every other process ends on the same description.
"""

import dataclasses
import enum
import faulthandler
import json
import sys
import threading

from topklm.errors import EXIT_TRY_AGAIN, EXIT_USER_ERROR, one_line

_FLUSH_S = 2.0
_STDERR = 2
AGAIN = "start the same command again to resume"


class Kind(enum.StrEnum):
    """Sort of an end."""

    MISTAKE = "mistake"  # of the user; the text says what to do
    FAILURE = "failure"  # a bug
    HANG = "hang"  # no progress, somewhere
    GONE = "gone"  # a process that cannot speak for itself any more
    LATE = "late"  # somebody was waited for in vain
    STOP = "stop"  # a process was asked to stop, and nothing is lost
    STOPPED = "stopped"  # the same, for a process that was not asked itself
    STRANGER = "stranger"  # somebody outside of the run used its coordination service


class PeerLost(Exception):  # noqa: N818 - named for what happened
    """Another process of the run failed, is gone or did not come; its text is one line for a person."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


@dataclasses.dataclass(frozen=True)
class Ending:
    """The end of a run, as its processes tell each other.

    Attributes:
        kind: Sort of the end.
        process: Index of the process that caused it.
        text: One line: that process's last words, or what others saw of it.
    """

    kind: Kind
    process: int
    text: str

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
        match self.kind:
            case Kind.STOP:
                return self.text
            case Kind.STOPPED:
                return f"error: process {self.process} was told to stop ({self.text}); {AGAIN}"
            case Kind.LATE:
                return f"error: {self.text}"
            case Kind.STRANGER:
                return f"error: {self.text}: let only the run's own hosts reach that port; {AGAIN}"
            case Kind.MISTAKE:
                return f"error: process {self.process} failed: {self.text}"
            case Kind.FAILURE:
                return f"error: process {self.process} failed: {self.text}; {AGAIN}"
            case Kind.HANG:
                return f"error: {self.text}; stacks above; {AGAIN}"
            case Kind.GONE if self.process == reader:
                return f"error: the others gave up this process, {reader} ({self.text}); {AGAIN}"
            case Kind.GONE:
                cause = "it was killed or its machine failed"
                return f"error: process {self.process} is gone ({self.text}): {cause}; {AGAIN}"

    def to_json(self) -> str:
        """Returns the text that `from_json` reads."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Ending":
        """Reads `to_json`'s text.

        Raises:
            ValueError: If it is something else.
        """
        try:
            values = json.loads(text)
            return cls(Kind(values["kind"]), int(values["process"]), one_line(str(values["text"])))
        except (KeyError, TypeError) as e:
            raise ValueError(f"not an ending: {one_line(text)}") from e


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
