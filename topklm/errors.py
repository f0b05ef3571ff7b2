"""The one exception that means "the user can fix this", and how the commands end on it.

Everything else that is raised is a bug and keeps its traceback.
"""

from collections.abc import Callable, Iterator
import contextlib
import errno
import logging
import os
import sys
from typing import NoReturn

EXIT_USER_ERROR = 2
EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: another process of the run died, or nothing moved
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class UserError(Exception):
    """A mistake the user can mend; its text is one line: what, its value, what is allowed, what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


_DISK_ERRORS = {
    errno.ENOSPC: "no space left on the disk: free some, or choose another folder",
    errno.EDQUOT: "disk quota exceeded: free some space, or choose another folder",
    errno.EFBIG: "the file would pass the size limit set for this process: raise it (ulimit -f)",
    errno.EACCES: "permission denied: choose a folder you can write to",
    errno.EPERM: "operation not permitted: choose a folder you can write to",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EEXIST: "a file is in the way: choose another path",
    errno.EISDIR: "a folder is in the way: choose another path",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another path",
}


@contextlib.contextmanager
def disk_errors_are_user_errors(doing: str) -> Iterator[None]:
    """Turns an operating-system refusal (full disk, no permission) inside the block into a UserError.

    Args:
        doing: What was attempted, for the message, e.g. "writing the checkpoint of step 400".
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as e:
        code = e.errno if isinstance(e, OSError) and e.errno else _error_number_in(str(e))
        if code not in _DISK_ERRORS:
            raise
        where = f" ({e.filename})" if isinstance(e, OSError) and e.filename else ""
        raise UserError(f"{doing}{where}: {_DISK_ERRORS[code]}") from e


def _error_number_in(text: str) -> int | None:
    """TensorStore and Orbax report the system's refusal as text inside other exceptions."""
    return next((code for code in _DISK_ERRORS if os.strerror(code) in text), None)


def guarded(command: Callable[[], None]) -> int:
    """Runs a command to its exit code: 2 with one line for a mistake of the user, 130 for Ctrl-C."""
    try:
        command()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; what was saved before stays", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def end_at_once(code: int) -> NoReturn:
    """Ends the process, and does not wait for its threads.

    An interpreter that ends while XLA compiles, or runs a program, waits for that or crashes.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
            stream.flush()
    os._exit(code)


def report_each_failure_once() -> None:
    """Keeps libraries from printing, trace and all, what they also raise; for the rest of the process.

    When a disk is full, Orbax logs the error of each of its threads, asyncio those that nobody waited for,
    and TensorStore's threads complain that nobody listens to theirs any more.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_has_no_trace)
    sys.unraisablehook = _report_unraisable


def _has_no_trace(record: logging.LogRecord) -> bool:
    return not record.exc_info


def _report_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
