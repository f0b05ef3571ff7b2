"""Run folders in Google Cloud Storage: checks before one is used, and copies of local files that grow.

Paths are `etils.epath.Path` (see `topklm.storage.files`), which reads and writes through gcsfs, as Orbax
does; arrays go through TensorStore's own client.
"""

from collections.abc import Callable, Mapping
from concurrent import futures
import os
import pathlib
import shutil
import tempfile
import time
from typing import Any

from etils.epath import backend

from topklm.errors import UserError
from topklm.imports import optional_module
from topklm.storage.errors import storage_errors_are_user_errors, store_errors_are_user_errors
from topklm.storage.files import AnyPath, is_bucket

# The libraries try again for minutes when nobody is there; the first question to a bucket shall not.
_ANSWER_SECONDS = 15.0

_EXTRA = "gcs"

_SECONDS_BETWEEN_COPIES = 60.0
# For one file to arrive, and for anyone who waits for a copy.
_PATIENCE_SECONDS = 60.0


def check_usable(folder: AnyPath, flag: str, *, write: bool) -> None:
    """Refuses a folder in a bucket that cannot be used, before anything is begun; a local one passes.

    The message begins with `flag`; `write` says whether a run shall be kept there, and not only read.
    """
    if not is_bucket(folder):
        return
    for module in ("gcsfs", "google.cloud.storage"):
        optional_module(module, _EXTRA, f"{flag} = {folder}")
    bucket = os.fspath(folder).split("/")[2]
    with store_errors_are_user_errors(flag, str(folder)):
        fs = file_system(folder)
        try:
            fs.call("GET", "b/{}/o", bucket, maxResults=1, timeout=_ANSWER_SECONDS)
        except FileNotFoundError as e:
            raise UserError(
                f"{flag} = {folder}: there is no bucket gs://{bucket}: create it, or choose another folder"
            ) from e
        if write:
            _check_settings_are_readable(fs, bucket, flag)


def file_system(path: AnyPath) -> Any:
    """Returns the file system of gcsfs that `epath` uses too, set to see what other machines write."""
    fs = backend.fsspec_backend.fs(path)
    fs.dircache.use_listings_cache = False
    fs.invalidate_cache()
    return fs


def _check_settings_are_readable(fs: Any, bucket: str, flag: str) -> None:
    """Checks what Orbax needs: it asks for a bucket's kind before it lists or deletes checkpoints."""
    try:
        fs.call("GET", "b/{}", bucket, timeout=_ANSWER_SECONDS)
    except OSError as e:
        if not str(e).startswith("Forbidden"):
            raise
        raise UserError(
            f"{flag}: reading the settings of gs://{bucket} is refused, but saving checkpoints needs it: "
            "grant roles/storage.legacyBucketReader (storage.buckets.get) beside roles/storage.objectUser"
        ) from e


class GcsMirror:
    """A local folder whose files are copied into a bucket while they grow: an object cannot be appended to.

    Copies are made by a thread, one after the other, and always of whole files. A copy that fails is told
    about once and made again the next time; only the last one must succeed. `local` is at first empty; `warn`
    is told about the first of several failures in a row.
    """

    def __init__(self, remote: AnyPath, warn: Callable[[str], None]):
        self.local = pathlib.Path(tempfile.mkdtemp(prefix="topklm-spool-"))
        self._remote, self._warn = remote, warn
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="spool")
        self._running: futures.Future[None] | None = None
        self._began = time.monotonic()
        self._copied: dict[str, int] = {}  # bytes of each file that have arrived
        self._is_failing = False

    def fetch(self, name: str) -> None:
        """Brings a file back from the bucket, if it is there."""
        remote = self._remote / name
        with storage_errors_are_user_errors(f"reading {remote}", remote):
            if remote.exists():
                (self.local / name).write_bytes(remote.read_bytes())

    def copy_soon(self) -> None:
        """Begins to copy if the last time is long enough ago; does not wait."""
        idle = self._running is None or self._running.done()
        if idle and time.monotonic() - self._began >= _SECONDS_BETWEEN_COPIES:
            self._report(self._outcome())
            self._start()

    def copy(self) -> None:
        """Copies what is there now, and returns when that has arrived or has failed."""
        self._report(self._outcome())
        self._start()
        self._report(self._outcome())

    def close(self) -> None:
        """Copies the rest and deletes the local folder; if that fails, it stays, and the error names it."""
        self._outcome()
        self._start()
        problem = self._outcome()
        self._thread.shutdown(wait=False, cancel_futures=True)
        if problem:
            raise UserError(f"{problem}. What was to be written is kept in {self.local}: copy it there")
        shutil.rmtree(self.local, ignore_errors=True)

    def _start(self) -> None:
        """Begins to copy, unless a copy that hangs is still under way."""
        if self._running is not None:
            return
        files = [path for path in self.local.rglob("*") if path.is_file()]
        # By what a file grows from now on is for the next copy: it may end in half a line.
        sizes = {path.relative_to(self.local).as_posix(): path.stat().st_size for path in files}
        self._began = time.monotonic()
        self._running = self._thread.submit(self._copy_files, sizes)

    def _copy_files(self, sizes: Mapping[str, int]) -> None:
        for name, size in sizes.items():
            if self._copied.get(name) == size:
                continue
            with (self.local / name).open("rb") as file:
                content = file.read(size)
            remote = self._remote / name
            with storage_errors_are_user_errors(f"writing {remote}", remote):
                file_system(remote).pipe_file(str(remote), content, timeout=_PATIENCE_SECONDS)
            self._copied[name] = size

    def _outcome(self) -> str:
        """Waits for the copy under way; returns what went wrong, or ""."""
        problem = ""
        if self._running:
            try:
                self._running.result(timeout=_PATIENCE_SECONDS)
                self._is_failing = False
            except futures.TimeoutError:
                return f"writing to {self._remote}: no answer for {_PATIENCE_SECONDS:.0f} s"
            except UserError as e:
                problem = str(e)
            self._running = None
        return problem

    def _report(self, problem: str) -> None:
        if problem and not self._is_failing:
            self._is_failing = True
            self._warn(f"warning: {problem}; training goes on, and this is tried again")
