"""Answers that take long: whole, or piece by piece; no longer made once the client has gone."""

from collections.abc import AsyncIterator, Awaitable, Callable
import contextlib
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from topklm.server.choices import joined
from topklm.server.errors import ApiError
from topklm.server.requests import Completion
from topklm.web.client import Json, Say, Stream, to_json, unless_gone


async def whole_answer(
    about: dict[str, Any], asked: Completion, pieces: AsyncIterator[dict[str, Any]]
) -> Response:
    """Returns all pieces as one JSON object.

    Raises:
        ApiError: As `pieces`.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in asked.sequences]
    usage = None
    async for piece in pieces:
        if "usage" in piece:
            usage = piece["usage"]
        else:
            found[piece["index"]].append(piece)
    return Json({**about, "choices": [joined(some) for some in found], "usage": usage})


class WhileThere(Response):
    """An answer that takes long, and is no longer made once the client has gone."""

    def __init__(self, make: Callable[[], Awaitable[Response]]):
        self._make = make
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Makes and sends it."""
        answer = await unless_gone(self._make(), receive)
        if answer is not None:
            await answer(scope, receive, send)


def events(
    about: dict[str, Any], asked: Completion, pieces: AsyncIterator[dict[str, Any]], seconds: float
) -> Response:
    """Returns an answer of server-sent events, one for each piece; see `Stream`.

    An error that comes behind the first piece is an event too.
    """
    usage = {"usage": None} if asked.include_usage else {}

    async def write(say: Say) -> None:
        begun = False

        async def event(content: bytes) -> None:
            nonlocal begun
            begun = True
            await say(b"data: " + content + b"\n\n")

        async with contextlib.aclosing(pieces) as some:  # type: ignore[type-var]
            try:
                async for piece in some:
                    if "usage" not in piece:
                        await event(to_json({**about, "choices": [piece], **usage}))
                    elif asked.include_usage:
                        await event(to_json({**about, "choices": [], "usage": piece["usage"]}))
            except ApiError as e:
                if not begun:
                    raise
                await event(to_json(e.content()))
        await event(b"[DONE]")

    return Stream(write, "text/event-stream", seconds)
