"""A folder of files on this machine or in a bucket, in which nothing is ever half-written.

Local work needs one folder; a pipeline on many machines needs one that they all reach. Both are this class.
"""

from collections.abc import Iterator
import contextlib
from pathlib import Path
import shutil
import tempfile
from typing import Any
import uuid

from topklm.data.sources import file_system
from topklm.files import fsync, write_atomically


class Storage:
    """A folder given by a local path or a URL that fsspec knows; cheap, and safe to pickle."""

    def __init__(self, url: str | Path):
        self.is_local = "://" not in str(url) or str(url).startswith("file://")
        # A relative path would mean something else to a worker elsewhere.
        self.path = Path(str(url).removeprefix("file://")).expanduser().absolute()  # of a local folder
        self.url = str(self.path) if self.is_local else str(url).rstrip("/")

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "Storage":
        """The folder that holds it."""
        return Storage(self.url.rpartition("/")[0])

    def child(self, name: str) -> "Storage":
        """The folder `name` in this one."""
        return Storage(f"{self.url}/{name}")

    def exists(self, name: str) -> bool:
        """Whether the file is there; whole, then."""
        return (self.path / name).exists() if self.is_local else self._fs().exists(f"{self.url}/{name}")

    def read(self, name: str) -> bytes:
        """A small file's content; FileNotFoundError if it is not there."""
        return (self.path / name).read_bytes() if self.is_local else self._fs().cat_file(f"{self.url}/{name}")

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file, whole or not at all."""
        if self.is_local:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / name, content)
        else:
            self._fs().pipe_file(f"{self.url}/{name}", content)

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[Path]:
        """A local path to write a file at; it becomes `name` when the block ends without an error."""
        if self.is_local:
            self.path.mkdir(parents=True, exist_ok=True)
            temporary = self.path / f".{name}.{uuid.uuid4().hex}.tmp"
            try:
                yield temporary
                fsync(temporary)
                temporary.replace(self.path / name)
                fsync(self.path)
            finally:
                temporary.unlink(missing_ok=True)
        else:
            with tempfile.TemporaryDirectory() as folder:
                temporary = Path(folder) / name
                yield temporary
                self._fs().put_file(str(temporary), f"{self.url}/{name}")

    def remove_unfinished(self) -> None:
        """Deletes what processes that were killed left of the files they were creating."""
        if self.is_local:
            for path in self.path.glob(".*.tmp"):
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def open_local(self, name: str) -> Iterator[Path]:
        """A local path to read a file at, while the block lasts."""
        if self.is_local:
            yield self.path / name
        else:
            with tempfile.TemporaryDirectory() as folder:
                local = Path(folder) / name
                self._fs().get_file(f"{self.url}/{name}", str(local))
                yield local

    def remove(self) -> None:
        """Deletes the folder and all that is in it, if it is there."""
        if self.is_local:
            shutil.rmtree(self.path, ignore_errors=True)
        elif self._fs().exists(self.url):
            self._fs().rm(self.url, recursive=True)

    def _fs(self) -> Any:
        return file_system(self.url, "--out")[0]
