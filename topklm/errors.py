"""The exception that means "the user can fix this", and how the commands end on it.

An error of the operating system that names a file, or that has a line in `_DISK_ERRORS`, and memory that does
not suffice are of that kind too. Everything else that is raised is a bug and keeps its traceback.
"""

from collections.abc import Callable, Iterator
import contextlib
import errno
import logging
import os
import re
import signal
import sys
import traceback
from typing import Any, NoReturn

EXIT_USER_ERROR = 2
# EX_TEMPFAIL of sysexits.h: another process of the run died, nothing moved, a disk failed.
EXIT_TRY_AGAIN = 75
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
EXIT_TERMINATED = 143  # 128 + SIGTERM

_LONGEST_VALUE = 200  # characters that a line shows of a value that a user gave
_LONGEST_LINE = 4000

_NONE: Any = ...  # None is a value that users give; this stays the same in other processes


class UserError(Exception):
    """A mistake that the user can mend, in one line: field, value, allowed values, advice.

    Of a value, the line is `FIELD = VALUE: TEXT; ADVICE`; ALLOWED stands for the text "must be ALLOWED".
    Without a value it is `FIELD: TEXT`, or `FIELD TEXT` if that begins with "is" or "has". Other mistakes are
    a sentence, the text alone.
    Quoted values of over 200 characters are cut, and control characters are escaped.

    Attributes:
        field: Name of the value as the reader knows it: "model.topk_k", "--port", "top_p"; "" in a sentence.
        text: The line without the field and its value.
    """

    def __init__(
        self, text: str = "", *, field: str = "", value: Any = _NONE, allowed: str = "", advice: str = ""
    ):
        self.field, self._value = field, value
        self.text = (text or f"must be {allowed}") + (f"; {advice}" if advice else "")
        super().__init__(one_line(self._line()))

    def _line(self) -> str:
        if not self.field:
            return self.text
        if self._value is _NONE:
            return f"{self.field}{'' if self.text.startswith(('is ', 'has ')) else ':'} {self.text}"
        return f"{self.field} = {one_line(str(self._value))}: {self.text}"

    def named(self, field: str) -> "UserError":
        """Returns the error under the name by which another reader knows the field, for a flag "--top-p"."""
        return UserError(self.text, field=field, value=self._value)

    def within(self, field: str, value: Any = _NONE) -> "UserError":
        """Returns the error as one of a field that holds what is wrong; if it is the same, only once."""
        text = self.text if self.field == field else str(self)
        return UserError(text, field=field, value=value)


class ArgumentError(UserError, ValueError):
    """An argument of the Python interface that is not allowed; `field` is its name."""


def one_line(text: str) -> str:
    """Returns a text as one line for a terminal: blanks joined, long values cut, unprintable ones escaped."""
    text = " ".join(text.split())
    for long_value in (rf"(?<=')[^']{{{_LONGEST_VALUE + 1},}}(?=')", rf"\S{{{2 * _LONGEST_VALUE},}}"):
        text = re.sub(long_value, lambda found: _cut(found[0], _LONGEST_VALUE), text)
    return visible(_cut(text, _LONGEST_LINE))


def visible(text: str) -> str:
    r"""Returns the text with line breaks and other characters that are not printed spelled out, as `\n`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}... ({len(text):,} characters)"


# Looked up by number, and in the texts of libraries; in this order where a text has several.
_DISK_ERRORS = {
    errno.EACCES: "permission denied: mend its permissions, or choose another path",
    errno.EPERM: "operation not permitted: mend its permissions, or choose another path",
    errno.ENOSPC: "no space left on the disk: free some, or choose another folder",
    errno.EDQUOT: "disk quota exceeded: free some space, or choose another folder",
    errno.EFBIG: "the file would pass the size limit set for this process: raise it (ulimit -f)",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EEXIST: "a file is in the way: choose another path",
    errno.EISDIR: "a folder is in the way: choose another path",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another path",
    errno.ENOTEMPTY: "a folder that is not empty is in the way: remove it, or choose another path",
    errno.ENAMETOOLONG: "the name is too long for the file system: choose a shorter one",
    errno.ELOOP: "symbolic links that lead in a circle: mend them, or choose another path",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
    errno.ENFILE: "the machine has too many open files: close some programs",
    errno.EIO: "the disk cannot read or write: see the system's log, and try again on another disk",
    errno.ESTALE: "the network file system has lost the file: mount it again, and try again",
    errno.EBUSY: "the file is in use: try again later",
}
# Of these a launcher that starts the same command again may be the cure.
_PASSING = (errno.EIO, errno.ESTALE, errno.EBUSY, errno.ENFILE, errno.ETIMEDOUT)


@contextlib.contextmanager
def disk_errors_are_user_errors(doing: str) -> Iterator[None]:
    """Turns a refusal of the operating system (full disk, no permission) inside the block into a UserError.

    The line begins with `doing`, such as "writing the checkpoint of step 400".
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as e:
        code = system_error(e)
        if code not in _DISK_ERRORS:
            raise
        raise UserError(_DISK_ERRORS[code], field=f"{doing}{_place(e)}") from e


def _place(error: Exception) -> str:
    filename = error.filename if isinstance(error, OSError) else None
    return f" ({os.fsdecode(filename)})" if isinstance(filename, str | bytes) and filename else ""


# In the messages of TensorStore, of version 0.1.80 and of later ones, also where Orbax passes them on.
_SYSTEM_ERROR = re.compile(r"\[OS error (\d+): |os_error_code='(\d+)'")


def system_error(error: Exception) -> int | None:
    """Finds the number with which the operating system refused something, also in the texts of libraries."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if found := _SYSTEM_ERROR.search(str(error)):
        return int(found[1] or found[2])
    return next((code for code in _DISK_ERRORS if os.strerror(code) in str(error)), None)


def explain(error: BaseException) -> str | None:
    """Describes an error that is the system's and not a bug, in a phrase for a person; else None."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError):
        place, reason = _place(error).strip(" ()"), error.strerror or text
        if error.errno in _DISK_ERRORS:
            return f"{place or 'input or output'}: {_DISK_ERRORS[error.errno]}"
        return f"{place}: {reason[:1].lower()}{reason[1:]}" if place else None
    of_xla = isinstance(error, RuntimeError) and text.startswith("RESOURCE_EXHAUSTED") and "emory" in text
    if of_xla or isinstance(error, MemoryError):
        return f"out of memory ({text or 'the system gives no more'}): make the model or the batch smaller"
    # JAX finds no device of the kind that JAX_PLATFORMS names: a RuntimeError or, for "cuda", an assertion
    # without a text, raised by whichever call of a command is the first to need a device.
    *_, last = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)] or [""]
    if not last.replace(os.sep, "/").endswith("jax/_src/xla_bridge.py"):
        return None
    reason = text.partition(" (set JAX_PLATFORMS")[0]
    return (
        f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: JAX finds no such device"
        f"{f' ({reason})' if reason else ''}: unset it, or install what the device needs, for NVIDIA's "
        "(JAX_PLATFORMS=cuda) pip install 'topklm[cuda]'"
    )


def may_pass(error: BaseException) -> bool:
    """Tells whether the storage failed in a way that may be over when the same command is given again."""
    # The cause is the system's error of which a UserError was made.
    return any(isinstance(e, OSError) and e.errno in _PASSING for e in (error, error.__cause__))


def guarded(command: Callable[[], None], on_storage: int = EXIT_USER_ERROR) -> int:
    """Runs a command once to its exit code, and says in one line why it is not 0.

    It is 2 for a mistake of the user, and for what the system refuses; `on_storage` where storage failed in a
    way that may pass (a launcher starts a trainer again at 75); 130 for Ctrl-C; 141 if nobody reads its whole
    work; 143 for SIGTERM inside `sigterm_unwinds`.
    """
    try:
        command()
        if sys.stdout:
            sys.stdout.flush()
    except _ReaderGone:
        return EXIT_BROKEN_PIPE
    except Terminated:
        print("SIGTERM: what was saved before stays", file=sys.stderr)
        return EXIT_TERMINATED
    except KeyboardInterrupt:
        print("interrupted; what was saved before stays", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (UserError, OSError, MemoryError, RuntimeError, AssertionError) as e:
        text = explain(e)
        if text is None:
            raise
        print(f"error: {one_line(text)}", file=sys.stderr, flush=True)
        return on_storage if may_pass(e) else EXIT_USER_ERROR
    return 0


class Terminated(KeyboardInterrupt):
    """SIGTERM came: what Ctrl-C does, with another exit code."""


@contextlib.contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Makes SIGTERM raise `Terminated` inside the block, so that what is half made is removed.

    The system's own way would leave it. Only the main thread may enter. A signal that is ignored, or has a
    handler, stays so.
    """
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def terminate(number: int, frame: Any) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Lets SIGINT and SIGTERM act after the block: a process that is being started has no name to end it by.

    Only the main thread may enter.
    """
    received = list[int]()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    held = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in held:
        signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


class _ReaderGone(Exception):  # noqa: N818
    """Nobody reads standard output any more, and there is nothing else to do than to write it."""


class _Output:
    """A standard stream, see `output_never_ends_it`."""

    def __init__(self, stream: Any, ends_with_reader: bool):
        self._stream, self._ends_with_reader = stream, ends_with_reader
        self.failure: OSError | None = None  # the last one

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, output: Callable[[], object]) -> None:
        try:
            output()
        except OSError as e:
            self.failure = e
            is_unread = isinstance(e, BrokenPipeError)
            if is_unread or self._ends_with_reader:
                self.let_go()
            if is_unread and self._ends_with_reader:
                raise _ReaderGone from e
            if self._ends_with_reader:
                raise

    def let_go(self) -> None:
        """Writes what comes, and what is held, to nowhere: the interpreter would fail on it at its end."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def output_never_ends_it(goes_on: bool) -> Iterator[None]:
    """Makes standard output and standard error take any text, inside the block.

    Characters that their encoding lacks are escaped. A reader that goes away (`| head`) and a full disk end
    nothing if the command `goes_on`, having more to do than to print; if not, it ends once nobody reads.
    """
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    streams = [before[0] and _Output(before[0], not goes_on), before[1] and _Output(before[1], False)]
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        for stream in filter(None, streams):
            stream.flush()
            if stream.failure:
                stream.let_go()
        sys.stdout, sys.stderr = before
        failure = streams[0] and streams[0].failure
        if failure and not isinstance(failure, BrokenPipeError) and before[1] and goes_on:
            line = f"some of the output could not be written: {failure.strerror}"
            with contextlib.suppress(OSError):
                print(line, file=before[1], flush=True)


def end_at_once(code: int) -> NoReturn:
    """Ends the process without its threads: while XLA compiles or runs, an interpreter waits or crashes."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
            stream.flush()
    os._exit(code)


def report_each_failure_once() -> None:
    """Keeps libraries from printing, with a trace, errors that they also raise; for the rest of the process.

    On a full disk Orbax logs the error of each of its threads, asyncio those that nobody waited for, and
    TensorStore's threads complain that nobody listens to theirs any more.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: not record.exc_info)

    def report(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = report
