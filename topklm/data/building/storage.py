"""A folder of files on this machine or in a bucket, in which nothing is ever half-written.

Local work needs one folder; a pipeline on many machines needs one that they all reach. Both are this class.
"""

from collections.abc import Iterator, Mapping
import contextlib
import os
from pathlib import Path
import shutil
import tempfile
from typing import Any

from topklm.data.sources import file_system
from topklm.storage.files import parse_json, replacing, sealed_json, unsealed, write_atomically


class Storage:
    """A folder given by a local path or a URL that fsspec knows; cheap, and safe to pickle.

    All that is in it is ours: anything in the way of a file is deleted.
    """

    def __init__(self, url: str | Path):
        self.is_local = "://" not in str(url) or str(url).startswith("file://")
        # A relative path would mean something else to a worker elsewhere.
        self.path = Path(os.path.expanduser(str(url).removeprefix("file://"))).absolute()  # of a local folder
        self.url = str(self.path) if self.is_local else str(url).rstrip("/")

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "Storage":
        """The folder that holds it."""
        return Storage(self.url.rpartition("/")[0])

    def child(self, name: str) -> "Storage":
        """Returns the folder `name` in this one."""
        return Storage(f"{self.url}/{name}")

    def exists(self, name: str) -> bool:
        """Tells whether the file is there; whole, then."""
        return (self.path / name).exists() if self.is_local else self._fs().exists(f"{self.url}/{name}")

    def read(self, name: str) -> bytes:
        """Reads a small file; FileNotFoundError if it is not there."""
        return (self.path / name).read_bytes() if self.is_local else self._fs().cat_file(f"{self.url}/{name}")

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file, whole or not at all."""
        if self.is_local:
            self._make_way_for(name)
            write_atomically(self.path / name, content)
        else:
            self._fs().pipe_file(f"{self.url}/{name}", content)

    def read_sealed(self, name: str) -> dict[str, Any] | None:
        """Reads a small file of `write_sealed`; None if it is not there, or not as it was written."""
        try:
            return unsealed(parse_json(self.read(name)))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
            return None

    def write_sealed(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a small file of JSON with a digest of itself."""
        self.write(name, sealed_json(content))

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[Path]:
        """Yields a local path to write a file at, which becomes `name` at the end of the block."""
        if self.is_local:
            self._make_way_for(name)
            with replacing(self.path / name) as temporary:
                yield temporary
        else:
            with tempfile.TemporaryDirectory() as folder:
                temporary = Path(folder) / name
                yield temporary
                self._fs().put_file(str(temporary), f"{self.url}/{name}")

    def names(self) -> list[str]:
        """Lists a local folder, in no order; nothing if there is no such folder."""
        return os.listdir(self.path) if self.path.is_dir() else []

    def discard(self, name: str) -> None:
        """Deletes a file or folder in a local folder, if it is there."""
        path = self.path / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def open_local(self, name: str) -> Iterator[Path]:
        """Yields a local path to read a file at, while the block lasts."""
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

    def _make_way_for(self, name: str) -> None:
        """Makes the folder; deletes a folder where a file is to be, and a file where this folder is to be."""
        if self.path.exists() and not self.path.is_dir():
            self.path.unlink()
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / name).is_dir():
            self.discard(name)

    def _fs(self) -> Any:
        return file_system(self.url, "--out")[0]
