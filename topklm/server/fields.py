"""Fields of a JSON object that somebody sent, read with care, and errors as OpenAI's clients expect them."""

from collections.abc import Collection
import json
from typing import Any

from starlette.responses import Response

from topklm.errors import one_line
from topklm.web.http import Json, from_json, kind_of

FAULT = "a fault of the server, which its terminal tells of"

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {401: "invalid_api_key", 404: "not_found", 413: "request_too_large", 429: "rate_limit_exceeded"}
_AGAIN_SECONDS = 1  # after which a client that was refused may try again


class ApiError(Exception):
    """A request that is not carried out: status of HTTP, the field that is wrong, and a code for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(one_line(message))
        self.status, self.param, self.code = status, param, code or _CODES.get(status)

    def content(self) -> dict:
        """Returns {"error": {"message", "type", "param", "code"}}."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Returns the answer."""
        headers = {"retry-after": str(_AGAIN_SECONDS)} if self.status in (429, 503) else None
        return Json(self.content(), self.status, headers)


def json_object(body: bytes) -> dict[str, Any]:
    """Parses the body of a request; raises ApiError if it is no JSON object."""
    try:
        return from_json(body)
    except ValueError as e:
        raise ApiError(400, str(e)) from e


def refuse_unknown(content: dict[str, Any], known: Collection[str]) -> None:
    """Raises ApiError for a field that there is not; a name that is mistyped must not pass for nothing."""
    if unknown := [name[:50] for name in content if name not in known]:
        message = f"there is no field {unknown[0]!r}: there are {', '.join(sorted(known))}"
        raise ApiError(400, message, unknown[0])


def boolean(content: dict[str, Any], name: str, default: bool) -> bool:
    """Returns True or False; null stands for the default."""
    value = content.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return default if value is None else value


def integer(
    content: dict[str, Any], name: str, default: int, lowest: int, highest: int, why: str = ""
) -> int:
    """Returns a whole number in a range; null stands for the default."""
    value = content.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
        raise wrong(name, value, f"an integer from {lowest} to {highest}{why and ', ' + why}")
    return value


def number(content: dict[str, Any], name: str, default: float) -> float:
    """Returns any number; null stands for the default."""
    value = content.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise wrong(name, value, "a number")
    try:
        return float(value)
    except OverflowError as e:
        raise wrong(name, value, "a number") from e


def required(content: dict[str, Any], name: str, allowed: str) -> Any:
    """Returns the value of a field that must be there."""
    if content.get(name) is None:
        raise ApiError(400, f"{name} is missing: send {allowed}", name)
    return content[name]


def text(value: Any, name: str) -> str:
    """Returns the value of a field, a text that can be written as UTF-8; raises ApiError for another."""
    if not isinstance(value, str):
        raise wrong(name, value, "a text")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise ApiError(
            400, f"{name}: half of a surrogate pair stands alone in it; send whole characters", name
        ) from e
    return value


def wrong(name: str, value: Any, allowed: str) -> ApiError:
    """Makes the error of a value of another kind, or outside of its range."""
    shown = json.dumps(value) if isinstance(value, int | float | str | None) else f"a JSON {kind_of(value)}"
    shown = shown if len(shown) <= 60 else shown[:60] + "..."
    return ApiError(400, f"{name} = {shown}: must be {allowed}", name)
