"""Packages that may be missing: which are installed, and what to install."""

from collections.abc import Iterator
import contextlib
import importlib
import sys
from types import ModuleType

from topklm.errors import UserError

VERSION = "0.1.0"  # of topklm


def optional_module(name: str, extra: str, flag: str) -> ModuleType:
    """Imports a package that not every user needs.

    Raises:
        UserError: If it is not installed, with the user's `flag` and the extra of topklm that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise UserError(f"{flag}: needs the package {name} ({e}); run: pip install 'topklm[{extra}]'") from e


@contextlib.contextmanager
def without(*modules: str) -> Iterator[None]:
    """Hides modules from imports inside the block; those imported before stay."""
    hidden = [module for module in modules if module not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for module in hidden:
            del sys.modules[module]


def versions(*packages: str) -> dict[str, str]:
    """Returns the version of each package, "unknown" of one that is not installed; ours may be a clone."""
    import importlib.metadata  # noqa: PLC0415 - `import topklm` does without

    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = VERSION if package == "topklm" else "unknown"
    return found
