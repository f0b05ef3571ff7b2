"""Fields of a JSON object that somebody sent, read with care."""

from collections.abc import Collection
import json
from typing import Any

from topklm.server.errors import ApiError
from topklm.web.client import from_json, kind_of


def json_object(body: bytes) -> dict[str, Any]:
    """Parses the body of a request.

    Raises:
        ApiError: If it is no JSON object.
    """
    try:
        return from_json(body)
    except ValueError as e:
        raise ApiError(400, str(e)) from e


def refuse_unknown(content: dict[str, Any], known: Collection[str]) -> None:
    """Raises ApiError for a field that there is not; a name that is mistyped must not pass for nothing."""
    for name in content:
        if name not in known:
            raise ApiError(
                400, f"there is no field {name[:50]!r}: there are {', '.join(sorted(known))}", name[:50]
            )


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


def text(content: dict[str, Any], name: str) -> str:
    """Returns a text; raises ApiError if there is none."""
    value = content.get(name)
    if not isinstance(value, str):
        raise wrong(name, value, "a text") if name in content else missing(name, "a text")
    return checked_text(value, name)


def checked_text(value: str, name: str) -> str:
    """Returns a text if it can be written as UTF-8; raises ApiError if not."""
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise ApiError(
            400, f"{name}: half of a surrogate pair stands alone in it; send whole characters", name
        ) from e
    return value


def missing(name: str, allowed: str) -> ApiError:
    """Makes the error of a field that must be there."""
    return ApiError(400, f"{name} is missing: send {allowed}", name)


def wrong(name: str, value: Any, allowed: str) -> ApiError:
    """Makes the error of a value of another kind, or outside of its range."""
    shown = json.dumps(value) if isinstance(value, int | float | str | None) else f"a JSON {kind_of(value)}"
    shown = shown if len(shown) <= 60 else shown[:60] + "..."
    return ApiError(400, f"{name} = {shown}: must be {allowed}", name)
