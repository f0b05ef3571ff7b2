"""Imports that wait or are hidden, packages that may be missing, and versions of installed packages."""

from collections.abc import Iterator, Sequence
import contextlib
import functools
import gc
import importlib
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
import importlib.util
import sys
from types import ModuleType

from topklm.errors import UserError

VERSION = "0.1.0"  # of topklm


def optional_module(name: str, extra: str, flag: str) -> ModuleType:
    """Imports a package not all users need; UserError with the extra that installs it, and their `flag`."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise UserError(f"{flag}: needs the package {name} ({e}); run: pip install 'topklm[{extra}]'") from e


@contextlib.contextmanager
def uncollected(*, first: bool = False) -> Iterator[None]:
    """Imports in the block without searches for garbage, of which there is none: a fifth of the time.

    With `first`, for the start of a process, later searches leave out all that is there after the block.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
        if first:
            _leave_out_once()


@functools.cache
def _leave_out_once() -> None:
    """Freezes once: what is garbage by then is never freed."""
    gc.freeze()


class _Uncollected(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        """Runs a module's source, and with it the imports in it."""
        with uncollected():
            super().exec_module(module)


class _Waiting:
    """Finds our own modules so that they are loaded when something of them is used."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns None for packages, and for modules of others, which are found as usual."""
        spec = PathFinder.find_spec(name, path, target) if name.startswith("topklm.") else None
        if spec is None or spec.submodule_search_locations is not None:
            return None
        if isinstance(spec.loader, SourceFileLoader):
            spec.loader = importlib.util.LazyLoader(_Uncollected(spec.loader.name, spec.loader.path))
        return spec


@contextlib.contextmanager
def when_used() -> Iterator[None]:
    """Puts off loading modules of topklm that the block imports, as `from topklm.neurons import harvest`.

    Each is loaded when something of it is used first, so that `--help` does without JAX, which takes seconds.
    """
    sys.meta_path.insert(0, _Waiting)
    try:
        yield
    finally:
        sys.meta_path.remove(_Waiting)


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
