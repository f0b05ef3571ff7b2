"""Run folders in Google Cloud Storage: what must hold before one is used, and what its errors mean.

Paths are `etils.epath.Path` (see `topklm.storage.files`), which reads and writes through gcsfs, as Orbax
does; arrays go through TensorStore's own client.
"""

import os
from typing import Any

from etils.epath import backend

from topklm.errors import UserError
from topklm.imports import optional_module
from topklm.storage.errors import store_errors_are_user_errors
from topklm.storage.files import AnyPath, is_bucket

# The libraries try again for minutes when nobody is there; the first question to a bucket shall not.
_ANSWER_SECONDS = 15.0

_EXTRA = "gcs"


def check_usable(folder: AnyPath, flag: str, *, write: bool) -> None:
    """Finds out whether a folder in a bucket can be used, before anything is begun; a local one always can.

    Args:
        folder: A path that `topklm.storage.files.as_path` gave.
        flag: Where the user named it; the message begins with it.
        write: Whether a run shall be kept there, and not only read.

    Raises:
        UserError: If the packages are not installed, the bucket does not exist, or access is refused.
    """
    if not is_bucket(folder):
        return
    for module in ("gcsfs", "google.cloud.storage"):
        optional_module(module, _EXTRA, f"{flag} = {folder}")
    bucket = bucket_name(folder)
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
    """The file system of gcsfs that `epath` uses too, made to see what other machines write."""
    fs = backend.fsspec_backend.fs(path)
    fs.dircache.use_listings_cache = False
    fs.invalidate_cache()
    return fs


def bucket_name(path: AnyPath) -> str:
    """BUCKET of gs://BUCKET/FOLDER."""
    return os.fspath(path).split("/")[2]


def _check_settings_are_readable(fs: Any, bucket: str, flag: str) -> None:
    """Orbax asks for a bucket's kind (hierarchical or not) before it lists or deletes checkpoints."""
    try:
        fs.call("GET", "b/{}", bucket, timeout=_ANSWER_SECONDS)
    except OSError as e:
        if not str(e).startswith("Forbidden"):
            raise
        raise UserError(
            f"{flag}: reading the settings of gs://{bucket} is refused, but saving checkpoints needs it: "
            "grant roles/storage.legacyBucketReader (storage.buckets.get) beside roles/storage.objectUser"
        ) from e
