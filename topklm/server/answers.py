"""Answers that take long: whole, or piece by piece; no longer made once the client has gone."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
import contextlib
import json
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from topklm.server.choices import joined
from topklm.server.errors import ApiError
from topklm.server.requests import Completion
from topklm.web.client import gone


async def whole_answer(
    about: dict[str, Any], asked: Completion, pieces: AsyncIterator[dict[str, Any]]
) -> Response:
    """All pieces as one JSON object, or the error that came instead."""
    found: list[list[dict[str, Any]]] = [[] for _ in asked.texts]
    usage = None
    try:
        async for piece in pieces:
            if "usage" in piece:
                usage = piece["usage"]
            else:
                found[piece["index"]].append(piece)
    except ApiError as e:
        return e.response()
    return JSONResponse({**about, "choices": [joined(some) for some in found], "usage": usage})


class WhileThere(Response):
    """An answer that takes long, and is no longer made once the client has gone."""

    def __init__(self, make: Callable[[], Awaitable[Response]]):
        self._make = make
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Makes and sends it."""
        answer = await _unless_gone(self._make(), receive)
        if answer is not None:
            await answer(scope, receive, send)


class Events(Response):
    """A stream of server-sent events, one for each piece."""

    def __init__(
        self,
        about: dict[str, Any],
        asked: Completion,
        pieces: AsyncIterator[dict[str, Any]],
        seconds: float,
    ):
        self._about, self._asked, self._pieces, self._seconds = about, asked, pieces, seconds
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends what comes; hangs up on who does not read it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._seconds):
                await _unless_gone(self._send_all(scope, receive, send), receive)

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def event(content: str) -> None:
            body = f"data: {content}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})

        async def start() -> None:
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})

        usage = {"usage": None} if self._asked.include_usage else {}
        async with contextlib.aclosing(self._pieces) as pieces:  # type: ignore[type-var]
            try:
                async for piece in pieces:
                    if not started:
                        await start()
                        started = True
                    if "usage" not in piece:
                        await event(_json({**self._about, "choices": [piece], **usage}))
                    elif self._asked.include_usage:
                        await event(_json({**self._about, "choices": [], "usage": piece["usage"]}))
            except ApiError as e:
                if not started:
                    await e.response()(scope, receive, send)
                    return
                await event(_json(e.content()))
        await event("[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _unless_gone(work: Awaitable[Any], receive: Receive) -> Any:
    """What a piece of work gives; None once the client has gone, when the work is ended."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


def _json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
