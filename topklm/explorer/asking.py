"""What requests carry, read with care, and work for them that is done in threads."""

from collections.abc import Callable
import functools
from typing import Any
from urllib.parse import parse_qsl

import anyio
import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response

from topklm.errors import UserError

_MOST_WAITING = 16  # for the model, or for a regular expression


class BusyError(Exception):
    """Too many wait for the same thing."""


async def in_thread(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What a function gives that may block, without others having to wait."""
    return await anyio.to_thread.run_sync(functools.partial(function, *arguments, **named))


async def in_turn(turn: anyio.CapacityLimiter, function: Callable[..., Any], *arguments: Any) -> Any:
    """The same for what takes long: as many at a time as `turn` lets in.

    Raises:
        BusyError: If too many wait already.
    """
    if turn.statistics().tasks_waiting >= _MOST_WAITING:
        raise BusyError
    return await anyio.to_thread.run_sync(functools.partial(function, *arguments), limiter=turn)


async def field(request: Request, name: str) -> str:
    """A text that was sent, in a form or as JSON.

    Raises:
        UserError: If there is none.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() == "application/json":
        try:
            content = await request.json()
        except (ValueError, RecursionError) as e:
            raise UserError("the request is no JSON: send an object") from e
        value = content.get(name) if isinstance(content, dict) else None
    else:
        value = _form(await request.body()).get(name)
    if not isinstance(value, str):
        raise UserError(f"{name} is missing: send it as text")
    return value.replace("\r\n", "\n")  # which is what browsers make of a line break in a form


def _form(body: bytes) -> dict[str, str]:
    try:
        return dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=20))
    except ValueError as e:
        raise UserError("the request is no form of ours: send it from the page") from e


def number(request: Request, name: str) -> int:
    """A whole number in a link.

    Raises:
        UserError: If there is none.
    """
    text = request.query_params.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise UserError(f"{name} = {text}: must be a whole number")
    return int(text)


def file(content: bytes, media_type: str, name: str) -> Response:
    """An answer that browsers store."""
    return Response(
        content, media_type=media_type, headers={"content-disposition": f'attachment; filename="{name}"'}
    )
