"""Paths to a local disk or into a bucket; files that are never half-written, nor read if damaged; locks.

Errors of disks and of remote stores are named for a user here; `topklm.errors` has those with a number.
"""

import atexit
from collections.abc import Callable, Iterator, Mapping
import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import json
import logging
import os
from pathlib import Path
import re
import shutil
import sys
import tempfile
from typing import IO, Any, TypeAlias
import uuid

from etils import epath
import fsspec

from topklm.errors import UserError, disk_errors_are_user_errors, system_error

AnyPath: TypeAlias = Path | epath.Path

_BUCKET_PREFIX = "gs://"  # of run folders
_BUCKET_PREFIXES = (_BUCKET_PREFIX, "s3://")  # data are read from both
EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}  # of topklm, by a URL's protocol
_CREDENTIALS = {
    "gcs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (public: FSSPEC_S3_ANON=true)",
}

# The libraries of the stores share no base class; names, so that none of them need be imported.
_REFUSALS = {
    "PermissionError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "GoogleAuthError",
}
_SILENCES = {
    "ConnectionError",
    "ClientConnectionError",
    "ClientConnectorError",
    "HTTPClientError",  # botocore's base for everything below HTTP
    "TransportError",
    "TimeoutError",
    "gaierror",
}
_STORE_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("httpx", "HTTPError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
    ("datasets.exceptions", "DatasetsError"),
)

# How TensorStore names what a store answered (absl's status codes).
_REFUSED = re.compile(r"\b(PERMISSION_DENIED|UNAUTHENTICATED)\b")
_UNREACHABLE = re.compile(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|RESOURCE_EXHAUSTED)\b")

# Errors of the system about the content of a path: nothing is there, or something of another kind.
_OF_CONTENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


def store_errors() -> tuple[type[Exception], ...]:
    """Returns the classes that the libraries in use raise when a store or its data is not as it should be."""
    modules = ((sys.modules.get(module), name) for module, name in _STORE_ERRORS)
    return (OSError, ValueError, *(getattr(module, name) for module, name in modules if module))


@contextlib.contextmanager
def store_errors_are_user_errors(flag: str, url: str) -> Iterator[None]:
    """Turns the errors of a store's library inside the block into a UserError about `flag` and `url`."""
    logging.getLogger("gcsfs").addFilter(_has_no_trace)
    try:
        yield
    except store_errors() as e:
        raise UserError(_explain(e, url), field=flag) from e


@contextlib.contextmanager
def storage_errors_are_user_errors(doing: str, path: AnyPath) -> Iterator[None]:
    """Acts as `disk_errors_are_user_errors`, for a block that uses `path`, on a disk or in a bucket.

    Only for blocks that do little else: a bucket's libraries raise ValueErrors too.
    """
    if not is_bucket(path):
        with disk_errors_are_user_errors(doing):
            yield
        return
    with store_errors_are_user_errors(doing, str(path)):
        try:
            yield
        except (ValueError, RuntimeError) as e:
            if _REFUSED.search(str(e)):
                raise PermissionError(str(e)) from e
            if _UNREACHABLE.search(str(e)):
                raise ConnectionError(str(e)) from e
            raise


def storage_problem(error: Exception, path: AnyPath) -> str | None:
    """Describes a failure of the storage in a phrase for a person; None for any other error."""
    try:
        with storage_errors_are_user_errors("", path):
            raise error
    except UserError as e:
        return e.text
    except (OSError, ValueError, RuntimeError) as e:
        code = system_error(e)
        if code is None and not isinstance(e, OSError):
            return None
        return (os.strerror(code) if code else str(e) or type(e).__name__).lower()


def says_nothing_of_content(error: Exception) -> bool:
    """Tells whether reading failed for want of access, or by the disk itself, and not for what was read."""
    text = str(error)
    if _REFUSED.search(text) or is_silence(error):
        return True
    code = system_error(error)
    of_content = isinstance(error, FileNotFoundError) if code is None else code in _OF_CONTENT
    return not of_content and (code is not None or isinstance(error, OSError))


def is_silence(error: Exception) -> bool:
    """Tells whether a store gave no answer, or wants to be asked again later."""
    return isinstance(error, TimeoutError | ConnectionError) or bool(_UNREACHABLE.search(str(error)))


def _has_no_trace(record: logging.LogRecord) -> bool:
    # gcsfs logs, trace and all, what it also raises.
    return not record.exc_info


def _explain(error: BaseException, url: str) -> str:
    protocol, _, rest = url.partition("://")
    store = f"{protocol}://{rest.partition('/')[0]}"
    causes = list(_causes(error))
    names = {base.__name__ for cause in causes for base in type(cause).__mro__}
    says = str(causes[-1]) or type(causes[-1]).__name__
    codes = {getattr(cause, "status", None) or getattr(cause, "code", None) for cause in causes}
    if names & _REFUSALS or codes & {401, 403} or str(error).startswith("Forbidden"):
        advice = _CREDENTIALS.get(EXTRAS.get(protocol, ""), "check your credentials for it")
        return f"no access to {store} for {url!r} ({says}): {advice}"
    if names & _SILENCES:
        return f"{store} gives no answer for {url!r} ({says}): check the network and the address"
    if "FileNotFoundError" in names:
        return f"{url!r} matches no file, or there is no {store} ({says}): check the name"
    return f"{url!r} cannot be read ({type(error).__name__}: {says})"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def as_path(name: str | os.PathLike[str], flag: str = "path") -> AnyPath:
    """Parses a user's path: `pathlib.Path` for a local one, `etils.epath.Path` for gs://BUCKET/PATH.

    A leading `~` is expanded; `flag` says where it was written, e.g. "--workdir". UserError for a URL that is
    not of Google Cloud Storage, or that names no folder in a bucket, and for a name that is not UTF-8 or
    holds a NUL, which libraries refuse only after the work is done.
    """
    text = os.fspath(name)
    check_name(text, flag)
    if not text.startswith(_BUCKET_PREFIX):
        if "://" in text:
            raise UserError(f"{flag} = {text!r}: must be a local folder or gs://BUCKET/FOLDER")
        with contextlib.suppress(RuntimeError):  # nobody's home is known
            return Path(text).expanduser()
        return Path(text)
    bucket, _, folder = text.removeprefix(_BUCKET_PREFIX).partition("/")
    if not bucket or not folder.strip("/"):
        raise UserError(f"{flag} = {text!r}: must name a folder in a bucket, as gs://BUCKET/FOLDER")
    _set_libraries_up()
    return epath.Path(text.rstrip("/"))


def local_path(name: str, flag: str) -> Path:
    """Returns what a user wrote as a path on this machine's disk, as `as_path`; a bucket is refused."""
    path = as_path(name, flag)
    if is_bucket(path):
        raise UserError(f"{flag} = {name!r}: must be a local path")
    return Path(path)


def check_name(name: str, flag: str) -> None:
    """Refuses a path that is empty, holds a NUL, or is not UTF-8 as the system's locale reads it."""
    if not name:
        raise UserError(f"{flag} = {name!r}: must not be empty")
    if "\0" in name:
        raise UserError(f"{flag} = {name!r}: must not hold a NUL character")
    try:
        name.encode()
    except UnicodeEncodeError as e:
        raise UserError(
            f"{flag} = {name!r}: must be UTF-8: rename it, or set PYTHONUTF8=1 if the locale is not UTF-8"
        ) from e


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Tells whether a path leads into a bucket."""
    return os.fspath(path).startswith(_BUCKET_PREFIXES)


def absolute(path: AnyPath) -> epath.Path:
    """Returns a path as Orbax wants it; of one in a bucket `absolute()` would make a local one."""
    return epath.Path(path if is_bucket(path) else Path(path).absolute())


def for_tensorstore(path: AnyPath) -> str:
    r"""Returns a local path as TensorStore's file driver needs it, which takes a backslash for a slash.

    All before the last backslash is replaced by a symbolic link, which lives as long as the process.
    """
    parts = Path(path).absolute().parts
    last = max((n for n, part in enumerate(parts) if "\\" in part), default=None)
    if last is None:
        return os.path.join(*parts)
    return os.path.join(_link_to(os.path.join(*parts[: last + 1])), *parts[last + 1 :])


@functools.cache
def _link_to(folder: str) -> str:
    place = tempfile.mkdtemp(prefix="topklm-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    link = os.path.join(place, "link")
    os.symlink(folder, link)
    return link


def write_atomically(path: AnyPath, content: bytes) -> None:
    """Writes a file whole or not at all.

    On a disk it is written beside `path`, flushed and renamed into place; an object in a bucket becomes
    visible only when all of it is there.
    """
    if is_bucket(path):
        path.write_bytes(content)
        return
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside a local file, whose new content is flushed and renamed to it after the block."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a folder renamed to `path` after the block, all or nothing; UserError if something is there.

    Folders that processes which were killed began for the same path are removed.
    """
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise UserError(f"{path} exists: give a folder that is to be made, or delete it first")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with disk_errors_are_user_errors(f"writing {path}"):
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            with _held(left) as is_ours:
                if is_ours:
                    shutil.rmtree(left, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            with _held(temporary):
                yield temporary
                temporary.replace(path)
            fsync(path.absolute().parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Locks a folder without a file in it; yields False where another process has it, or nobody can tell."""
    with contextlib.ExitStack() as stack:
        is_held = False
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, descriptor)
            is_held = _lock(descriptor, fcntl.LOCK_NB)
        yield is_held


def beside(path: AnyPath, word: str) -> AnyPath:
    """Returns the first path `NAME.WORD-N` that is free, where something can be set aside."""
    n = 1
    while (place := path.with_name(f"{path.name}.{word}-{n}")).exists():
        n += 1
    return place


# How file systems say that they cannot flush a folder: CIFS before Linux 4.17, VirtualBox's shares.
_NO_FOLDER_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)


def fsync(path: Path) -> None:
    """Returns when a local file is on the disk itself; of a folder its names, as far as file systems can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in _NO_FOLDER_FSYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


LOCK_FILE = ".lock"

# How file systems say that they have no locks: NFS with nolock, or opened to read; Lustre without flock.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EINVAL)


@contextlib.contextmanager
def folder_lock(
    folder: Path, busy: Callable[[str], None], warn: Callable[[str], None] = print
) -> Iterator[None]:
    """Holds a folder that exists for this process; the kernel lets go when it ends, however it ends.

    The folder gets a lock file. `busy` is called with the process id of the owner when there is another one;
    it may raise, or return, and then the owner's end is waited for. `warn` is told if the file system has no
    locks; then nobody is kept out.
    """
    with (folder / LOCK_FILE).open("a+", encoding="utf-8") as lock:
        try:
            if not _lock(lock, fcntl.LOCK_NB):
                lock.seek(0)
                busy(lock.read().strip() or "unknown")
                _lock(lock)
        except OSError as e:
            if e.errno not in _NO_LOCKS:
                raise
            warn(f"warning: {folder} is on a file system without locks: nothing keeps another process out")
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def is_locked(folder: Path) -> bool:
    """Tells whether some process is known to hold the folder now."""
    try:
        with (folder / LOCK_FILE).open("rb") as lock:
            return not _lock(lock, fcntl.LOCK_NB)
    except OSError as e:
        if e.errno != errno.ENOENT and e.errno not in _NO_LOCKS:
            raise
        return False


def _lock(file: IO[Any] | int, flags: int = 0) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | flags)
    except BlockingIOError:
        return False
    return True


DIGEST = "sha256"  # the field of a JSON object that holds that of the others


def parse_json(content: str | bytes) -> dict[str, Any]:
    """Parses a JSON object; ValueError if it does not parse, nests too deeply, or is none."""
    try:
        value = json.loads(content)
    except RecursionError as e:
        raise ValueError("JSON that is nested too deeply") from e
    if not isinstance(value, dict):
        raise ValueError(f"JSON that holds a {type(value).__name__} and no dict")
    return value


def read_json(path: AnyPath, advice: str, *, sealed: bool = False) -> dict[str, Any]:
    """Reads a JSON object; FileNotFoundError if there is no file, UserError, which `advice` ends, for damage.

    `sealed` says that `sealed_json` wrote it, so that its digest is compared and left out.
    """
    try:
        content = path.read_bytes()
        value = parse_json(content)
        return unsealed(value) if sealed else value
    except FileNotFoundError:
        raise
    except OSError as e:
        with disk_errors_are_user_errors(f"reading {path}"):
            raise e
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e}): {advice}") from e


def sealed_json(value: Mapping[str, Any], indent: int | None = None) -> bytes:
    """Encodes a JSON object, which has no field `sha256`, with a digest of the rest of it under that name."""
    assert DIGEST not in value
    return (json.dumps({**value, DIGEST: json_digest(value)}, indent=indent) + "\n").encode()


def unsealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `sealed_json` was given; raises ValueError if the digest is missing or another one."""
    rest = {name: part for name, part in value.items() if name != DIGEST}
    if value.get(DIGEST) != json_digest(rest):
        raise ValueError("its digest is missing" if DIGEST not in value else "its digest differs")
    return rest


def json_digest(value: Any) -> str:
    """Returns the SHA-256 of anything that JSON can hold, in 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _set_libraries_up() -> None:
    """Sets the options of libraries that read them at the first use of a path into a bucket."""
    # Where TensorFlow is installed, epath would import it to read files, which has errors of its own.
    os.environ.setdefault("EPATH_USE_TF", "false")
    # For the sake of zonal buckets, which TensorStore does not know, gcsfs would ask for the kind of each
    # bucket, and complain where it may not.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # gcsfs would remember what a folder holds, and not see what other hosts, or TensorStore, write there.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
