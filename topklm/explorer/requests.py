"""Parses requests, and runs blocking work for them in threads."""

from collections.abc import AsyncIterator, Callable, Mapping
import contextlib
import functools
from typing import Any
from urllib.parse import parse_qsl, urlencode

import anyio
import anyio.to_thread
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from topklm.errors import UserError
from topklm.web.http import from_json

_LONGEST_LINK = 60_000  # characters
_MOST_WAITING = 16  # for the model, or for a regular expression
_WAITING_SECONDS = 30.0


class BusyError(Exception):
    """Too many wait for the same thing, or they have waited for too long."""


class _Number(Convertor[int]):
    """A number in a path. Python refuses to read one of thousands of digits, so starlette's own may fail."""

    regex = "[0-9]{1,9}"

    def convert(self, value: str) -> int:
        return int(value)

    def to_string(self, value: int) -> str:
        return str(value)


register_url_convertor("number", _Number())


async def run_in_thread(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Returns the result of a function that may block, without others having to wait."""
    return await anyio.to_thread.run_sync(functools.partial(function, *arguments, **named))


async def run_limited(turn: anyio.CapacityLimiter, function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns the result of a function that takes long; `turn` says how many may run at a time.

    Raises:
        BusyError: If too many wait already.
    """
    async with taken(turn):
        return await run_in_thread(function, *arguments)


@contextlib.asynccontextmanager
async def taken(turn: anyio.CapacityLimiter) -> AsyncIterator[None]:
    """Has a turn inside the block.

    Raises:
        BusyError: If too many wait already, or it does not come in time.
    """
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
    """Returns a text that was sent, in a form or as JSON.

    Raises:
        UserError: If there is none.
    """
    value = (await fields(request)).get(name)
    if not isinstance(value, str):
        raise UserError(f"{name} is missing: send it as text")
    return value


async def fields(request: Request) -> dict[str, Any]:
    """Returns all fields that were sent: texts in a form, or any values in a JSON object.

    Raises:
        UserError: If it is neither.
    """
    body = await request.body()
    try:
        if request.headers.get("content-type", "").partition(";")[0].strip() == "application/json":
            content = from_json(body)
        else:
            content = _form(body)
    except ValueError as e:
        raise UserError(str(e)) from e
    # Browsers make the longer line break of any in a form.
    return {
        name: value.replace("\r\n", "\n") if isinstance(value, str) else value
        for name, value in content.items()
    }


def _form(body: bytes) -> dict[str, Any]:
    try:
        return dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=20))
    except ValueError as e:
        raise ValueError("the request is no form of ours: send it from the page") from e


def number(request: Request, name: str) -> int:
    """Returns a whole number in a link.

    Raises:
        UserError: If there is none.
    """
    text = request.query_params.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise UserError(f"{name} = {text}: must be a whole number")
    return int(text)


def redirect_with(path: str, values: Mapping[str, str], anchor: str = "") -> Response:
    """Redirects to a page whose link holds the typed text, so that it can be reloaded and sent on.

    Args:
        path: Of the page.
        values: The fields that were typed, the text first.
        anchor: On the page, as "#own-text".

    Raises:
        UserError: If it is too long for a link.
    """
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
