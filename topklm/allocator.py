"""Keeps freed memory for the next step instead of returning it to the system (Linux with glibc).

XLA on CPU allocates its temporaries anew each step. glibc maps and unmaps each large one, and the page
faults cost a quarter of the step. Here glibc is told to serve them from one heap that it keeps. Must run
before jax first uses a device: its threads, once they exist, keep heaps of their own. Measured on two cores:
docs/decisions.md.
"""

import ctypes
import os

# mallopt parameters, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER_TRIM_BYTES = 2**31 - 1


def keep_freed_memory() -> bool:
    """Sets the allocator up; False where the C library has no mallopt or TOPKLM_ALLOCATOR=system."""
    if os.environ.get("TOPKLM_ALLOCATOR") == "system":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    settings = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _NEVER_TRIM_BYTES}
    return all([mallopt(name, value) for name, value in settings.items()])
