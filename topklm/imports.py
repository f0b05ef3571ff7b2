"""Says which packages are installed, and keeps them from importing what they can do without."""

from collections.abc import Iterator
import contextlib
import sys

VERSION = "0.1.0"  # of topklm


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


def versions(*packages: str) -> dict[str, str]:
    """Returns the version of each package, "unknown" where none is installed under that name.

    Ours may be a clone on PYTHONPATH, and is known all the same.
    """
    import importlib.metadata  # noqa: PLC0415 - `import topklm` does without

    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = VERSION if package == "topklm" else "unknown"
    return found
