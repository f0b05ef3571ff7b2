"""One process at a time in a folder; the kernel lets go when the process ends, however it ends."""

from collections.abc import Callable, Iterator
import contextlib
import fcntl
import os
from pathlib import Path

LOCK_FILE = ".lock"


@contextlib.contextmanager
def held(folder: Path, busy: Callable[[str], None]) -> Iterator[None]:
    """Holds a folder that exists for this process.

    Args:
        folder: Gets a lock file.
        busy: Called with the process id of the owner when there is another one. It may raise; if it
            returns, the owner's end is waited for.
    """
    with (folder / LOCK_FILE).open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            busy(lock.read().strip() or "unknown")
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def is_held(folder: Path) -> bool:
    """Whether some process holds the folder now."""
    try:
        with (folder / LOCK_FILE).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
