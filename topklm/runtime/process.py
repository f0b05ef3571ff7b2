"""The process of a command: its signals, and the memory allocator of a trainer (Linux).

`StopRequest` hears Ctrl-C, SIGTERM and SIGHUP at once, also while the main thread compiles for minutes.
Python runs signal handlers between bytecodes of the main thread only; here the interpreter passes each signal
on to a thread (`signal.set_wakeup_fd`). The training loop saves, and agrees with other processes.

XLA on CPU allocates its temporaries again in each step. The C library's allocator maps and unmaps each large
one, and the page faults cost a quarter of the step. tcmalloc keeps them; it must be there when the process
starts, so a process that finds it installed starts itself again with it. Otherwise glibc is told to keep
freed memory. Measured: docs/decisions.md.
"""

from collections.abc import Callable, Iterator
import contextlib
import ctypes
import itertools
import os
from pathlib import Path
import signal
import sys
import threading
import types
from typing import Any

from topklm.errors import EXIT_INTERRUPTED, UserError

ALLOCATOR_VARIABLE = "TOPKLM_ALLOCATOR"
ALLOCATORS = ("tcmalloc", "glibc", "system")

# Where distributions and conda put shared libraries.
_FOLDERS = ("/usr/lib", "/usr/lib/*-linux-gnu", "/usr/lib64", "/usr/local/lib", "/usr/local/lib64")
_LIBRARIES = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4", "libtcmalloc_minimal.so", "libtcmalloc.so")
_SILENT_BYTES = str(2**50)
# mallopt parameters, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER_TRIM_BYTES = 2**31 - 1


def restart_with_tcmalloc() -> None:
    """Starts this process's command again with tcmalloc in it; returns if there is no need or no tcmalloc.

    The process keeps its number. To be called before anything slow is imported.
    """
    choice = _choice()
    if choice not in (None, "tcmalloc") or sys.platform != "linux" or preloaded():
        return
    library = find_tcmalloc()
    if library is None:
        if choice:
            raise UserError(
                f"{ALLOCATOR_VARIABLE} = tcmalloc: it is not installed; install it (Debian, Ubuntu: "
                "libtcmalloc-minimal4), or unset the variable"
            )
        return
    os.environ["LD_PRELOAD"] = " ".join(filter(None, [str(library), os.environ.get("LD_PRELOAD")]))
    # It would report every allocation of a gigabyte.
    os.environ.setdefault("TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD", _SILENT_BYTES)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_freed_memory() -> str:
    """Sets up the allocator that the process has, before jax first uses a device; returns its name.

    Threads that exist already keep heaps of their own.
    """
    if library := preloaded():
        return f"{library} ({ALLOCATOR_VARIABLE}=system turns it off)"
    if _choice() == "system" or not _tell_glibc():
        return "the system's"
    return f"glibc, told to keep freed memory ({ALLOCATOR_VARIABLE}=system turns that off)"


def release_freed_memory() -> None:
    """Returns to the system what the process has freed; for after a compilation, which takes some 200 MB."""
    try:
        library = ctypes.CDLL(None)
        if hasattr(library, "MallocExtension_ReleaseFreeMemory"):  # tcmalloc's
            library.MallocExtension_ReleaseFreeMemory()
        else:
            library.malloc_trim(0)
    except (AttributeError, OSError):
        pass  # not glibc: then nothing is told to keep memory either


def find_tcmalloc() -> Path | None:
    """Finds the installed library, or returns None."""
    prefix = os.environ.get("CONDA_PREFIX")
    folders = [*_FOLDERS, f"{prefix}/lib"] if prefix else _FOLDERS
    for name, pattern in itertools.product(_LIBRARIES, folders):
        if found := sorted(Path("/").glob(f"{pattern}/{name}".lstrip("/"))):
            return found[0]
    return None


def preloaded() -> str | None:
    """Returns the file name of the allocator that was put into this process when it started."""
    names = os.environ.get("LD_PRELOAD", "").replace(":", " ").split()
    return next((Path(name).name for name in names if "malloc" in name), None)


def _choice() -> str | None:
    choice = os.environ.get(ALLOCATOR_VARIABLE) or None
    if choice not in (None, *ALLOCATORS):
        raise UserError(
            f"{ALLOCATOR_VARIABLE} = {choice}: must be one of {', '.join(ALLOCATORS)}, or not set"
        )
    return choice


def _tell_glibc() -> bool:
    """Tells glibc to keep freed memory; returns False where the C library has no mallopt."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    settings = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _NEVER_TRIM_BYTES}
    return all([mallopt(name, value) for name, value in settings.items()])


# A terminal or an ssh session that closes sends SIGHUP; nohup has it ignored.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_BYTES_AT_ONCE = 64  # a signal is one byte


class StopRequest:
    """Truthy once somebody has asked a training run to stop; `signal_name` says by what, `heard` if here.

    While the run is starting, nothing is lost by ending: the first signal ends the process. Once it trains,
    the first signal only makes this truthy, so that the loop finishes its step and saves. A second signal
    always ends the process at once.
    """

    def __init__(self, on_stop_while_starting: Callable[[str], None]):
        self.signal_name: str | None = None
        self._on_stop_while_starting = on_stop_while_starting
        self._training = False
        self.heard = False  # a signal to this process itself
        self._ending: threading.Thread | None = None
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def begin_training(self) -> None:
        """Notes that there will be steps to save; does not return if the process is already ending."""
        with self._lock:
            self._training = self._ending is None
        if self._ending:
            self._ending.join()
        for number in _handlers_before[-1] if _handlers_before else ():
            signal.signal(number, _leave_to_watcher)  # libtpu has SIGHUP ignored once JAX looks for devices

    def request(self, signal_name: str) -> None:
        """Stops this process because another one got that signal; it never counts as a second one."""
        with self._lock:
            self._stop(signal_name, tell_others=False)

    def _receive(self, number: int) -> None:
        with self._lock:
            if self.heard and number == signal.SIGHUP:
                return  # a terminal that closes sends two: one by the shell, one by the kernel
            if self.heard:
                os._exit(128 + number)
            self.heard = True
            self._stop(signal.Signals(number).name, tell_others=True)

    def _stop(self, signal_name: str, *, tell_others: bool) -> None:
        if self:
            return
        self.signal_name = signal_name
        if not self._training:
            # A thread of its own: telling others may take a while, and a second signal is still heard.
            self._ending = threading.Thread(target=self._end, args=(tell_others,), daemon=True)
            self._ending.start()

    def _end(self, tell_others: bool) -> None:
        text = (
            f"{self.signal_name}: stopped before the first step; nothing new to save. Resume with the same "
            "command"
        )
        try:
            print(f"{text}\n", end="", flush=True)  # in one piece: all processes of a machine print at once
            if tell_others:
                self._on_stop_while_starting(text)
        finally:
            # Nothing below the main thread's compilation could be unwound.
            os._exit(EXIT_INTERRUPTED if self.signal_name == "SIGINT" else 0)


@contextlib.contextmanager
def stop_on_signal(
    on_stop_while_starting: Callable[[str], None] = lambda text: None,
) -> Iterator[StopRequest]:
    """Catches SIGINT, SIGTERM and SIGHUP inside the block; only the main thread may enter it.

    A signal that is ignored stays so: shells let their background jobs ignore Ctrl-C. Processes that begin
    inside the block know nothing of this. `on_stop_while_starting` is told the last line of a process that a
    signal, not another process, ends before it has trained; the place to tell the run's others.
    """
    request = StopRequest(on_stop_while_starting)
    received, sent = os.pipe()
    os.set_blocking(sent, False)
    watcher = threading.Thread(target=_watch, args=(received, request), daemon=True)
    before = {n: signal.getsignal(n) for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
    wakeup_before = signal.set_wakeup_fd(sent, warn_on_full_buffer=False)
    for number in before:
        signal.signal(number, _leave_to_watcher)
    _handlers_before.append(before)
    watcher.start()
    try:
        yield request
    finally:
        _handlers_before.remove(before)
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup_before)
        os.close(sent)  # ends the watcher
        watcher.join()
        os.close(received)


# Of the blocks that are open now, for processes forked in them.
_handlers_before: list[dict[signal.Signals, Any]] = []


def _leave_to_watcher(number: int, frame: types.FrameType | None) -> None:
    """Does nothing: Python passes on only signals that have a handler."""


def _watch(received: int, request: StopRequest) -> None:
    while numbers := os.read(received, _BYTES_AT_ONCE):
        for number in numbers:
            if number in _SIGNALS:
                request._receive(number)


def _forget_in_child() -> None:
    """Restores the handlers in a forked process: a signal to it would go through the pipe to its parent."""
    if _handlers_before:
        signal.set_wakeup_fd(-1)
        for number, handler in _handlers_before[0].items():
            signal.signal(number, handler)


os.register_at_fork(after_in_child=_forget_in_child)
