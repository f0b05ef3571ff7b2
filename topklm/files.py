"""Paths that lead to a local disk or into a bucket, and writing files so that they are never half there.

What a bucket needs before it can be used, and what its errors mean, is `topklm.buckets`' affair.
"""

import os
from pathlib import Path
from typing import TypeAlias
import uuid

from etils import epath
import fsspec

from topklm.errors import UserError

AnyPath: TypeAlias = Path | epath.Path

_BUCKET_PREFIX = "gs://"


def as_path(name: str | os.PathLike[str], what: str = "path") -> AnyPath:
    """What a user wrote as a path: `pathlib.Path` for a local one, `etils.epath.Path` for gs://BUCKET/PATH.

    Args:
        name: As written; `pathlib.Path` would make one slash of the two.
        what: Where the user wrote it, for the message, e.g. "--workdir".

    Raises:
        UserError: For a URL that is not of Google Cloud Storage, or that names no folder in a bucket.
    """
    text = os.fspath(name)
    if not text.startswith(_BUCKET_PREFIX):
        if "://" in text:
            raise UserError(f"{what} = {text!r}: must be a local folder or gs://BUCKET/FOLDER")
        return Path(text)
    bucket, _, folder = text.removeprefix(_BUCKET_PREFIX).partition("/")
    if not bucket or not folder.strip("/"):
        raise UserError(f"{what} = {text!r}: must name a folder in a bucket, as gs://BUCKET/FOLDER")
    _set_libraries_up()
    return epath.Path(text.rstrip("/"))


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path leads into a bucket."""
    return os.fspath(path).startswith(_BUCKET_PREFIX)


def absolute(path: AnyPath) -> epath.Path:
    """The path as Orbax wants it; of one in a bucket, `absolute()` and `resolve()` would make a local one."""
    return epath.Path(path if is_bucket(path) else Path(path).absolute())


def write_atomically(path: AnyPath, content: bytes) -> None:
    """Writes a file whole or not at all.

    On a disk it is written beside `path`, flushed and renamed into place; an object in a bucket becomes
    visible only when all of it is there.
    """
    if is_bucket(path):
        path.write_bytes(content)
        return
    temporary = Path(path).with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        fsync(temporary)
        temporary.replace(path)
        fsync(temporary.parent)
    finally:
        temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Returns when a local file, or the names in a local folder, are on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_libraries_up() -> None:
    """Must come before the first use of a path into a bucket, which is when these are read."""
    # Where TensorFlow is installed, epath would import it to read files, which has errors of its own.
    os.environ.setdefault("EPATH_USE_TF", "false")
    # For the sake of zonal buckets, which TensorStore does not know, gcsfs would ask for the kind of each
    # bucket, and complain where it may not.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # gcsfs would remember what a folder holds, and not see what other hosts, or TensorStore, write there.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
