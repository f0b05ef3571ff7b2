"""Errors of disks and of remote stores, and what a user is told; `topklm.errors` has those with a number."""

from collections.abc import Iterator
import contextlib
import errno
import logging
import os
import re
import sys

from topklm.errors import UserError, disk_errors_are_user_errors, system_error
from topklm.storage.files import AnyPath, is_bucket

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
