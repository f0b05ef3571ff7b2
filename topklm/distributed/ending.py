"""Why a run of several processes ends early, in the words and with the exit codes that people see.

The first process in trouble describes it once; every other process ends on the same description.
"""

import dataclasses
import enum
import faulthandler
import json
import sys
import threading

from topklm.errors import EXIT_TRY_AGAIN, EXIT_USER_ERROR

_FLUSH_S = 2.0
_STDERR = 2
AGAIN = "start the same command again to resume"


class Kind(enum.StrEnum):
    """What sort of end it is."""

    MISTAKE = "mistake"  # of the user; the text says what to do
    FAILURE = "failure"  # a bug
    HANG = "hang"  # no progress, somewhere
    GONE = "gone"  # a process that cannot speak for itself any more
    LATE = "late"  # somebody was waited for in vain
    STOP = "stop"  # somebody asked for it, and nothing is lost


class PeerLost(Exception):  # noqa: N818 - named for what happened
    """Another process of the run failed, is gone or did not come; its text is one line for a person."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


@dataclasses.dataclass(frozen=True)
class Ending:
    """The end of a run, as the processes tell it to each other.

    Attributes:
        kind: What sort of end.
        process: Whose.
        text: One line: that process's last words, or what others saw of it.
    """

    kind: Kind
    process: int
    text: str

    @property
    def exit_code(self) -> int:
        """Of the processes that end because of it."""
        return {Kind.MISTAKE: EXIT_USER_ERROR, Kind.STOP: 0}.get(self.kind, EXIT_TRY_AGAIN)

    def last_line(self, reader: int) -> str:
        """What the process `reader` prints before it ends."""
        match self.kind:
            case Kind.STOP:
                return self.text
            case Kind.LATE:
                return f"error: {self.text}"
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
        """Read back by `from_json`."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Ending":
        """The inverse of `to_json`."""
        values = json.loads(text)
        return cls(**{**values, "kind": Kind(values["kind"])})


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
