"""JSON from clients and to them, answers in pieces, and work that ends once the client has gone."""

import asyncio
from collections.abc import Awaitable, Callable
import contextlib
import json
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

_DEEPEST = 16  # arrays and objects within each other that a request may hold

Say = Callable[[bytes], Awaitable[None]]


def from_json(body: bytes) -> dict[str, Any]:
    """Reads a JSON object that somebody sent; whole numbers are integers, also 16.0.

    Raises:
        ValueError: If it is none, or is nested too deeply; one line for the client.
    """
    try:
        content = json.loads(body, parse_float=_number)
    except RecursionError as e:
        raise ValueError("the request is nested too deeply: send an object of few levels") from e
    except ValueError as e:
        said = f" ({e})" if isinstance(e, json.JSONDecodeError) else ""
        raise ValueError(f"the request is no JSON{said}: send an object") from e
    if not isinstance(content, dict):
        raise ValueError(f"the request is a JSON {kind_of(content)}: send an object")
    if _deeper_than(_DEEPEST, content):
        raise ValueError("the request is nested too deeply: send an object of few levels")
    return content


def kind_of(value: Any) -> str:
    """Returns what JSON calls the kind of a value."""
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


def to_json(content: Any) -> bytes:
    """Writes JSON in ASCII: it holds any text, halves of surrogate pairs and all kinds of line ends too."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class Json(JSONResponse):
    """An answer in JSON, see `to_json`."""

    def render(self, content: Any) -> bytes:
        """Returns its bytes."""
        return to_json(content)


class Stream(Response):
    """An answer that is sent in pieces, as they are made; ended once the client has gone.

    Nothing is sent before the first piece, so an error before that can be answered otherwise.
    """

    def __init__(
        self, write: Callable[[Say], Awaitable[None]], media_type: str, seconds: float | None = None
    ):
        """Takes the function that makes the answer.

        Args:
            write: Called with a function that sends a piece.
            media_type: Of all pieces together.
            seconds: For the whole answer; a client that reads slower is hung up on. None: any time.
        """
        super().__init__(media_type=media_type, headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._write, self._seconds = write, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Makes and sends it."""
        started = False

        async def say(piece: bytes, more: bool = True) -> None:
            nonlocal started
            if not started:
                started = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": piece, "more_body": more})

        async def say_all() -> None:
            await self._write(say)
            await say(b"", more=False)

        deadline = None if self._seconds is None else asyncio.get_running_loop().time() + self._seconds
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await unless_gone(say_all(), receive)


async def unless_gone(work: Awaitable[Any], receive: Receive) -> Any:
    """Returns what a piece of work gives; None once the client has hung up, when the work is ended.

    Args:
        work: Makes the answer.
        receive: Of the client's connection, when its request has been read; the rest is ignored.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


def _number(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _deeper_than(levels: int, value: Any) -> bool:
    inside = value.values() if isinstance(value, dict) else value
    return levels < 1 or any(_deeper_than(levels - 1, one) for one in inside if isinstance(one, dict | list))
