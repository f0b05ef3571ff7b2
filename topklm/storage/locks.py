"""One process at a time in a folder; the kernel lets go when the process ends, however it ends."""

from collections.abc import Callable, Iterator
import contextlib
import errno
import fcntl
import os
from pathlib import Path
from typing import IO, Any

LOCK_FILE = ".lock"

# How file systems say that they have no locks: NFS with nolock, or opened to read; Lustre without flock.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EINVAL)


@contextlib.contextmanager
def held(folder: Path, busy: Callable[[str], None], warn: Callable[[str], None] = print) -> Iterator[None]:
    """Holds a folder that exists for this process.

    Args:
        folder: Gets a lock file.
        busy: Called with the process id of the owner when there is another one. It may raise; if it
            returns, the owner's end is waited for.
        warn: Is told if the file system has no locks; then nobody is kept out.
    """
    with (folder / LOCK_FILE).open("a+", encoding="utf-8") as lock:
        try:
            if not _lock(lock, fcntl.LOCK_NB):
                lock.seek(0)
                busy(lock.read().strip() or "unknown")
                _lock(lock)
        except OSError as e:
            if e.errno not in _NO_LOCKS:
                raise
            warn(f"warning: {folder} is on a file system without locks: nothing keeps another process out")
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def is_held(folder: Path) -> bool:
    """Tells whether some process is known to hold the folder now."""
    try:
        with (folder / LOCK_FILE).open("rb") as lock:
            return not _lock(lock, fcntl.LOCK_NB)
    except OSError as e:
        if e.errno != errno.ENOENT and e.errno not in _NO_LOCKS:
            raise
        return False


def _lock(file: IO[Any], flags: int = 0) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | flags)
    except BlockingIOError:
        return False
    return True
