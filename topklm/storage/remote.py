"""Folders in buckets: data that are only read, in ranges kept on the local disk; and run folders.

Ranges, whose meaning is not known here, and arrays are read through TensorStore's clients, of gs:// and
s3://. Run folders are in Google Cloud Storage; their paths are `etils.epath.Path` (see
`topklm.storage.files`), which reads and writes through gcsfs, as Orbax does.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
import contextlib
import errno
import functools
import hashlib
import os
from pathlib import Path
import shutil
import sys
import tempfile
import threading
import time
from typing import Any, NamedTuple

from etils.epath import backend
import tensorstore as ts

from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.imports import optional_module
from topklm.storage.files import (
    AnyPath,
    is_bucket,
    is_silence,
    storage_errors_are_user_errors,
    store_errors_are_user_errors,
    write_atomically,
)

CACHE_GIB = 8.0

# For a request, and for a store that has never answered; the libraries would try again for minutes.
_ANSWER_SECONDS = 15.0
# For a store that has answered before; a watchdog ends a training that stands still for 10 minutes.
_PATIENCE_SECONDS = 480.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 15.0
_REQUESTS_AT_A_TIME = 128
_LOOKS_PER_CACHE = 16  # at the size of the cache, while as much is written as it may hold


class ByteRange(NamedTuple):
    """Bytes start to stop - 1 of an object."""

    name: str
    start: int
    stop: int


class RemoteFolder:
    """A folder in a bucket; safe to use from several threads and to pickle.

    A store that is silent is asked again, with longer and longer pauses, and a line on standard error says
    so. Ranges that were read are kept in files of a local folder which all processes of a user share, within
    `cache_gib` in all; those written longest ago are deleted first.
    """

    def __init__(self, url: str, cache_gib: float = CACHE_GIB):
        if not url.partition("://")[2].partition("/")[0]:
            raise UserError(f"{url}: names no bucket; give gs://BUCKET/FOLDER or s3://BUCKET/FOLDER")
        self.url, self._cache_gib = url.rstrip("/"), cache_gib
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._has_answered, self._silent_since = False, 0.0
        self._unseen_bytes = 0  # written since the last look at the size of the cache

    def __reduce__(self) -> tuple:
        return RemoteFolder, (self.url, self._cache_gib)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> str:
        return f"{self.url}/{name}"

    @property
    def name(self) -> str:
        """The last part of its URL."""
        return self.url.rpartition("/")[2]

    def close(self) -> None:
        """Makes reads that wait for the store give up; none can be begun any more."""
        self._closed.set()

    def read(self, name: str) -> bytes:
        """Reads an object whole; FileNotFoundError if there is none, UserError if the store refuses."""
        return self._ask({name: lambda: self._store.read(name)})[name]

    def read_ranges(self, ranges: Iterable[ByteRange]) -> dict[ByteRange, bytes]:
        """Reads all at the same time; FileNotFoundError, or EOFError with the URL of what is shorter."""

        def begin(one: ByteRange) -> Any:
            return self._store.read(one.name, byte_range=slice(one.start, one.stop))

        return self._ask({one: functools.partial(begin, one) for one in ranges})

    def names(self) -> set[str]:
        """Lists the objects of the folder."""
        found = self._ask({"": lambda: self._store.list()})[""]  # noqa: PLW0108 - opens the store when asked
        return {name.decode(errors="surrogateescape") for name in found}

    @functools.cached_property
    def cache(self) -> Path:
        """The local folder that holds what was read, of all datasets."""
        folder = Path(tempfile.gettempdir(), f"topklm-cache-{os.getuid()}")
        with disk_errors_are_user_errors(f"keeping data in {folder}"):
            folder.mkdir(mode=0o700, exist_ok=True)
            if folder.stat().st_uid != os.getuid():
                raise UserError(f"{folder} belongs to another user: set TMPDIR to a folder of your own")
        return folder

    def local_copy(self, name: str) -> Path:
        """Reads an object whole into a local file."""
        content = self.read(name)
        path = self.cache / f"{hashlib.sha256(content).hexdigest()}-{name}"
        with disk_errors_are_user_errors(f"keeping data in {self.cache}"):
            write_atomically(path, content)
        return path

    def keep(self, file: str, size: int, parts: dict[int, bytes]) -> None:
        """Writes bytes at their offsets into a file of the cache, which has holes where nothing is known."""
        path = self.cache / file
        with disk_errors_are_user_errors(f"keeping data in {path}"):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                os.ftruncate(descriptor, size)
                for offset, content in parts.items():
                    os.pwrite(descriptor, content, offset)
            finally:
                os.close(descriptor)
            with self._lock:
                self._unseen_bytes += sum(map(len, parts.values()))
                most = self._cache_gib * 2**30
                if self._unseen_bytes < most / _LOOKS_PER_CACHE:
                    return
                self._unseen_bytes = 0
            self._trim(most)

    def _trim(self, most: float) -> None:
        files = []
        for entry in os.scandir(self.cache):
            with contextlib.suppress(FileNotFoundError):  # deleted by another process
                stat = entry.stat()
                files.append((stat.st_mtime, stat.st_blocks * 512, entry.path))
        used = sum(size for _, size, _ in files)
        # Of a disk that is nearly full, something is left to others.
        most = min(most, 0.9 * (used + shutil.disk_usage(self.cache).free))
        for _, size, path in sorted(files):
            if used <= most:
                return
            Path(path).unlink(missing_ok=True)
            used -= size

    @functools.cached_property
    def _store(self) -> Any:
        return ts.KvStore.open(_spec(self.url), context=_context()).result(timeout=_ANSWER_SECONDS)

    def _ask(self, questions: dict[Any, Any]) -> dict[Any, Any]:
        """Begins all questions at once, and those again that are not answered; returns the answers by key."""
        answers: dict[Any, Any] = {}
        began, pause = time.monotonic(), _FIRST_PAUSE_SECONDS
        while True:
            silence = self._ask_once(questions, answers)
            if silence is None:
                return answers
            patience = _PATIENCE_SECONDS if self._has_answered else _ANSWER_SECONDS
            if time.monotonic() - began + pause > patience or self._closed.wait(pause):
                with storage_errors_are_user_errors(f"reading {self.url}", self.url):
                    raise silence
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _ask_once(self, questions: dict[Any, Any], answers: dict[Any, Any]) -> Exception | None:
        """Adds the answers that come; returns an error if the store was silent, raises any other."""
        silence: Exception | None = None
        missing = ""
        deadline = time.monotonic() + _ANSWER_SECONDS
        with storage_errors_are_user_errors(f"reading {self.url}", self.url):
            asked = {key: begin() for key, begin in questions.items() if key not in answers}
            for key, future in asked.items():
                try:
                    found = future.result(timeout=max(0.0, deadline - time.monotonic()))
                except (ValueError, RuntimeError, TimeoutError) as e:
                    if "OUT_OF_RANGE" in str(e):
                        raise EOFError(self / key.name) from e
                    if not is_silence(e):
                        raise
                    silence = e
                    continue
                if getattr(found, "state", "") == "missing":
                    missing = getattr(key, "name", key)
                answers[key] = found.value if hasattr(found, "value") else found
        self._say(silence)
        if missing:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self / missing)
        return silence

    def _say(self, silence: Exception | None) -> None:
        """Tells the user of the first question that is not answered, and of the first that is again."""
        with self._lock:
            before, now = self._silent_since, time.monotonic()
            if silence is None:
                self._has_answered, self._silent_since = True, 0.0
                said = f"{self.url} answers again, after {now - before:.0f} s" if before else ""
            else:
                self._silent_since = before or now
                said = (
                    f"warning: {self.url} gives no answer ({str(silence) or 'in time'}): asked again for up "
                    f"to {_PATIENCE_SECONDS / 60:.0f} minutes"
                )
                said = said if self._has_answered and not before else ""
        if said:
            print(said, file=sys.stderr, flush=True)


@functools.cache
def _context() -> Any:
    # A request is repeated here, where the user is told.
    retries: Any = {"max_retries": 2, "initial_delay": "0.2s", "max_delay": "1s"}
    limit = {"limit": _REQUESTS_AT_A_TIME}
    names = [f"{store}_request_{what}" for store in ("gcs", "s3") for what in ("retries", "concurrency")]
    return ts.Context({name: retries if name.endswith("retries") else limit for name in names})


def _spec(url: str) -> dict[str, Any]:
    """Returns TensorStore's description of a folder in a bucket."""
    protocol, _, rest = url.partition("://")
    bucket, _, folder = rest.partition("/")
    spec: dict[str, Any] = {
        "driver": {"gs": "gcs"}.get(protocol, protocol),
        "bucket": bucket,
        "path": f"{folder}/",
    }
    if protocol == "s3":
        # As botocore and fsspec have them.
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        spec |= {"endpoint": endpoint} if endpoint else {}
        spec |= {"aws_region": region} if endpoint and region else {}
        if os.environ.get("FSSPEC_S3_ANON", "").lower() == "true":
            spec |= {"aws_credentials": {"type": "anonymous"}}
    return spec


_SECONDS_BETWEEN_COPIES = 60.0
# For one file to arrive, and for anyone who waits for a copy.
_COPY_SECONDS = 60.0


def check_usable(folder: AnyPath, flag: str, *, write: bool) -> None:
    """Refuses a folder in a bucket that cannot be used, before anything is begun; a local one passes.

    The message begins with `flag`; `write` says whether a run shall be kept there, and not only read.
    """
    if not is_bucket(folder):
        return
    for module in ("gcsfs", "google.cloud.storage"):
        optional_module(module, "gcs", f"{flag} = {folder}")
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
        self.local = Path(tempfile.mkdtemp(prefix="topklm-spool-"))
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
                file_system(remote).pipe_file(str(remote), content, timeout=_COPY_SECONDS)
            self._copied[name] = size

    def _outcome(self) -> str:
        """Waits for the copy under way; returns what went wrong, or ""."""
        problem = ""
        if self._running:
            try:
                self._running.result(timeout=_COPY_SECONDS)
                self._is_failing = False
            except futures.TimeoutError:
                return f"writing to {self._remote}: no answer for {_COPY_SECONDS:.0f} s"
            except UserError as e:
                problem = str(e)
            self._running = None
        return problem

    def _report(self, problem: str) -> None:
        if problem and not self._is_failing:
            self._is_failing = True
            self._warn(f"warning: {problem}; training goes on, and this is tried again")
