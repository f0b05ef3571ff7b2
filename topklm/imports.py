"""Keeps libraries from importing what they can do without."""

from collections.abc import Iterator
import contextlib
import sys


@contextlib.contextmanager
def without(*modules: str) -> Iterator[None]:
    """Inside the block these cannot be imported, as if they were not installed; what has been, stays."""
    hidden = [module for module in modules if module not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for module in hidden:
            del sys.modules[module]
