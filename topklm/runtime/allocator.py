"""Chooses the memory allocator of a training process (Linux).

XLA on CPU allocates its temporaries again in each step. The C library's allocator maps and unmaps each large
one, and the page faults cost a quarter of the step. tcmalloc keeps them; it must be there when the process
starts, so a process that finds it installed starts itself again with it. Otherwise glibc is told to keep
freed memory. Measured: docs/decisions.md.
"""

import ctypes
import itertools
import os
from pathlib import Path
import sys

from topklm.errors import UserError

VARIABLE = "TOPKLM_ALLOCATOR"
CHOICES = ("tcmalloc", "glibc", "system")

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
                f"{VARIABLE} = tcmalloc: it is not installed; install it (Debian, Ubuntu: "
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
        return f"{library} ({VARIABLE}=system turns it off)"
    if _choice() == "system" or not _tell_glibc():
        return "the system's"
    return f"glibc, told to keep freed memory ({VARIABLE}=system turns that off)"


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
    choice = os.environ.get(VARIABLE) or None
    if choice not in (None, *CHOICES):
        raise UserError(f"{VARIABLE} = {choice}: must be one of {', '.join(CHOICES)}, or not set")
    return choice


def _tell_glibc() -> bool:
    """Tells glibc to keep freed memory; returns False where the C library has no mallopt."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    settings = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _NEVER_TRIM_BYTES}
    return all([mallopt(name, value) for name, value in settings.items()])
