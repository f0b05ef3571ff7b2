"""Parses requests, and gives them turns with what only a few can use at a time."""

from collections.abc import AsyncIterator, Callable, Mapping
import contextlib
import re
from typing import Any
from urllib.parse import parse_qsl, urlencode

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.convertors import IntegerConvertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from topklm.errors import UserError
from topklm.web.http import from_json

_LONGEST_LINK = 60_000  # characters
_MOST_WAITING = 16  # for the model, or for a regular expression
_WAITING_SECONDS = 30.0


class BusyError(Exception):
    """Too many wait for the same thing, or they have waited for too long."""


class _Number(IntegerConvertor):
    """A number in a path. Python refuses to read one of thousands of digits, so starlette's own may fail."""

    regex = "[0-9]{1,9}"


register_url_convertor("number", _Number())


async def run_limited(turn: anyio.CapacityLimiter, function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns the result of a function that takes long, once there is a turn, see `taken`."""
    async with taken(turn):
        return await run_in_threadpool(function, *arguments)


@contextlib.asynccontextmanager
async def taken(turn: anyio.CapacityLimiter) -> AsyncIterator[None]:
    """Has a turn inside the block; BusyError if too many wait already, or it does not come in time."""
    check_not_busy(turn)
    try:
        with anyio.fail_after(_WAITING_SECONDS):
            await turn.acquire()
    except TimeoutError as e:
        raise BusyError from e
    try:
        yield
    finally:
        turn.release()


def check_not_busy(turn: anyio.CapacityLimiter) -> None:
    """Raises BusyError if too many wait already."""
    if turn.statistics().tasks_waiting >= _MOST_WAITING:
        raise BusyError


async def field(request: Request, name: str) -> str:
    """Returns a text that was sent, in a form or as JSON; raises UserError if there is none."""
    value = (await fields(request)).get(name)
    if not isinstance(value, str):
        raise UserError(f"{name} is missing: send it as text")
    return value


async def fields(request: Request) -> dict[str, Any]:
    """Returns all fields sent, of a form (texts) or a JSON object (any values); UserError for neither."""
    body, kind = await request.body(), request.headers.get("content-type", "").partition(";")[0].strip()
    is_json, text = kind == "application/json", body.decode("utf-8", "replace")
    try:
        content: dict[str, Any] = (
            from_json(body) if is_json else dict(parse_qsl(text, keep_blank_values=True, max_num_fields=20))
        )
    except ValueError as e:
        raise UserError(str(e) if is_json else "the request is no form of ours: send it from the page") from e
    # Browsers make the longer line break of any in a form.
    return {
        name: value.replace("\r\n", "\n") if isinstance(value, str) else value
        for name, value in content.items()
    }


def whole_number(text: str) -> int | None:
    """Returns the number that a text writes in at most 15 digits; None if it is none."""
    return int(text) if re.fullmatch("[0-9]{1,15}", text) else None


def number(request: Request, name: str) -> int:
    """Returns a whole number in a link; raises UserError if there is none."""
    text = request.query_params.get(name, "")
    if (found := whole_number(text)) is None:
        raise UserError(f"{name} = {text}: must be a whole number")
    return found


def redirect_with(path: str, values: Mapping[str, str], anchor: str = "") -> Response:
    """Redirects to a page whose link holds the typed fields; UserError if that is too long."""
    address = f"{path}?{urlencode(values, errors='replace')}{anchor}"
    if len(address) > _LONGEST_LINK:
        name, text = next(iter(values.items()))
        raise UserError(f"{name} has {len(text):,} characters, which is too long: shorten it")
    return RedirectResponse(address, 303)


def file(content: bytes, media_type: str, name: str) -> Response:
    """Makes an answer that browsers store."""
    return Response(
        content, media_type=media_type, headers={"content-disposition": f'attachment; filename="{name}"'}
    )
