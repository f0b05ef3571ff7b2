"""Errors of requests, in the form in which OpenAI's clients expect them."""

import math

from starlette.responses import Response

from topklm.errors import ArgumentError, one_line
from topklm.web.client import Json

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {401: "invalid_api_key", 404: "not_found", 413: "request_too_large", 429: "rate_limit_exceeded"}
_AGAIN_SECONDS = 1  # after which a client that was refused may try again


class ApiError(Exception):
    """A request that is not carried out.

    Attributes:
        status: Of HTTP.
        param: The field that is wrong, if it is one.
        code: For programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(one_line(message))
        self.status, self.param, self.code = status, param, code

    def content(self) -> dict:
        """Returns {"error": {"message", "type", "param", "code"}}."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": _TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code or _CODES.get(self.status),
            }
        }

    def response(self) -> Response:
        """Returns the answer."""
        headers = {"retry-after": str(_AGAIN_SECONDS)} if self.status in (429, 503) else None
        return Json(self.content(), self.status, headers)


def refused(status: int, message: str) -> Response:
    """Returns the answer with which `Guard` refuses a request."""
    answer = ApiError(status, message).response()
    answer.headers["connection"] = "close"
    return answer


def of_field(error: ValueError) -> ApiError:
    """Makes the error of a field that the library refuses."""
    return ApiError(400, str(error), error.field if isinstance(error, ArgumentError) else None)


def number(value: float) -> float:
    """Returns a log probability that JSON can hold; it is NaN where a model was steered out of all bounds."""
    return max(value, -9999.0) if math.isfinite(value) else -9999.0
