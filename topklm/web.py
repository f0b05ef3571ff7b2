"""The HTTP that both servers share: sockets, which requests are answered, JSON both ways, answers in pieces.

Nobody slow, silent or gone keeps others from their answers. A browser that runs somebody else's page can be
made to send requests to this machine. Hence: only the names under which the server was started are answered
(else another site's name could be pointed here), what changes anything has to come from our own pages, and on
other addresses than the loopback a token is needed.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
import contextlib
import hmac
import ipaddress
import json
import logging
import math
import os
import re
import socket
import time
import traceback
from types import FrameType
from typing import Any
from urllib.parse import parse_qsl, urlencode

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.convertors import IntegerConvertor, register_url_convertor
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request, cookie_parser
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from topklm.errors import UserError

MAX_BODY = 64 * 1024  # bytes
BODY_SECONDS = 10.0  # in which a body has to arrive
COOKIE = "topklm_token"

_DEEPEST = 16  # arrays and objects within each other that a request may hold
_TOO_DEEP = "the request is nested too deeply: send an object of few levels"
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
HEADERS: Mapping[str, str] = {
    "content-security-policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    # Not no-referrer: browsers would then send "Origin: null" with our own forms.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
# The first of these for a page that others may show in a frame.
EMBEDDED = HEADERS["content-security-policy"].replace("frame-ancestors 'none'", "frame-ancestors * file:")

Refuse = Callable[[int, str], Response]  # (status, one line) -> the answer
Say = Callable[[bytes], Awaitable[None]]


def is_loopback(host: str) -> bool:
    """Returns whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _refused(status: int, message: str) -> Response:
    return PlainTextResponse(message + "\n", status, {"connection": "close"})


class Guard:
    """Refuses requests that should not be answered, and adds the headers that keep pages in their place."""

    def __init__(
        self,
        app: ASGIApp,
        # Names, with ports, under which the server is asked for; None: any, for then there is a token.
        hosts: frozenset[str] | None,
        token: str | None = None,  # has to be sent by clients, as a bearer; None: they need none
        *,
        max_body: int = MAX_BODY,  # bytes that a request may carry
        refuse: Refuse = _refused,
        by_link: bool = True,  # also take the token as `?token=` in a link, then by a cookie: for browsers
        where_token_is: str = "open the address that topklm explore printed",
    ):
        self._app, self._hosts, self._token, self._max_body = app, hosts, token, max_body
        self._refuse, self._by_link, self._where_token_is = refuse, by_link, where_token_is

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or lets it through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    added.setdefault(name, value)
            await send(message)

        answer: ASGIApp = self._refusal(scope, Headers(scope=scope)) or self._app
        if answer is self._app and scope["method"] not in _SAFE_METHODS:
            try:
                body = await asyncio.wait_for(_read(receive, self._max_body), BODY_SECONDS)
            except TimeoutError:
                answer = self._refuse(408, "the request came too slowly")
            else:
                answer = self._too_large() if len(body) > self._max_body else self._app
                receive = _whole(body, receive)
        await answer(scope, receive, send_guarded)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        host = headers.get("host", "").lower()
        if self._hosts is not None and host not in self._hosts:
            return self._refuse(
                421, "this server does not answer under that name: open the address it printed"
            )
        if self._token is not None and (answer := self._without_token(scope, headers, self._token)):
            return answer
        # A link on another site's page may be followed; for pictures, scripts and the like it need not be.
        followed = not comes_from_elsewhere(headers) or headers.get("sec-fetch-mode") == "navigate"
        if scope["method"] in _SAFE_METHODS and followed:
            return None
        if not followed or not _from_own_page(headers, host):
            return self._refuse(403, "this request came from another site's page, and is not carried out")
        length = headers.get("content-length", "0")
        # Python refuses to read a number of thousands of digits.
        said = int(length[:18]) if length.isascii() and length.isdigit() else 0
        return self._too_large() if said > self._max_body else None

    def _without_token(self, scope: Scope, headers: Headers, token: str) -> Response | None:
        """Returns None for a client with the token; gives a browser with it in its link the cookie."""
        if _same(headers.get("authorization", "").removeprefix("Bearer "), token):
            return None
        if self._by_link:
            parameters = parse_qsl(scope["query_string"].decode("latin-1"))
            if _same(dict(parameters).get("token", ""), token):
                return _with_cookie(scope["path"], parameters, token)
            if _same(cookie_parser(headers.get("cookie", "")).get(COOKIE, ""), token):
                return None
        return self._refuse(401, f"a token is needed: {self._where_token_is}")

    def _too_large(self) -> Response:
        size = f"{self._max_body // 1024} kB"
        return self._refuse(413, f"the request is larger than {size}: shorten the text")


def comes_from_elsewhere(headers: Mapping[str, str]) -> bool:
    """Returns whether another site's page, not a person, asks for a page that takes long to make."""
    return headers.get("sec-fetch-site") == "cross-site"


def _with_cookie(path: str, parameters: list[tuple[str, str]], token: str) -> Response:
    rest = urlencode([(name, value) for name, value in parameters if name != "token"])
    path = "/" + path.lstrip("/")  # "//host" would lead elsewhere
    answer = RedirectResponse(path + (f"?{rest}" if rest else ""), 303)
    answer.set_cookie(COOKIE, token, httponly=True, samesite="lax")
    return answer


def _from_own_page(headers: Headers, host: str) -> bool:
    origin = headers.get("origin")
    if origin is not None:
        return origin.lower() in (f"http://{host}", f"https://{host}")
    # Every browser of today says where a request that changes something comes from; programs need not.
    return headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")


def _same(shown: str, token: str) -> bool:
    return hmac.compare_digest(shown.encode(), token.encode())


async def _read(receive: Receive, max_body: int) -> bytes:
    """Reads the body, or as much of it as shows that it is too large."""
    body = b""
    while len(body) <= max_body:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            break
    return body


def _whole(body: bytes, receive: Receive) -> Receive:
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def give() -> Message:
        return messages.pop() if messages else await receive()

    return give


def from_json(body: bytes) -> dict[str, Any]:
    """Reads a JSON object that was sent, 16.0 as an integer; ValueError with a line for the client."""
    try:
        content = json.loads(body, parse_float=_number)
    except RecursionError as e:
        raise ValueError(_TOO_DEEP) from e
    except ValueError as e:
        said = f" ({e})" if isinstance(e, json.JSONDecodeError) else ""
        raise ValueError(f"the request is no JSON{said}: send an object") from e
    if not isinstance(content, dict):
        raise ValueError(f"the request is a JSON {kind_of(content)}: send an object")
    if _deeper_than(_DEEPEST, content):
        raise ValueError(_TOO_DEEP)
    return content


def _number(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _deeper_than(levels: int, value: Any) -> bool:
    inside = value.values() if isinstance(value, dict) else value
    return levels < 1 or any(_deeper_than(levels - 1, one) for one in inside if isinstance(one, dict | list))


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
    """An answer sent in pieces, until the client has gone; an error before the first is still an answer."""

    def __init__(
        self, write: Callable[[Say], Awaitable[None]], media_type: str, seconds: float | None = None
    ):
        """Takes the function that makes the answer, and the seconds that a client may take for all."""
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

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._seconds):
                await unless_gone(say_all(), receive)


async def unless_gone(work: Awaitable[Any], receive: Receive) -> Any:
    """Returns what a piece of work gives; None once the client has hung up, when the work is ended.

    Of the client's connection, whose request has been read, the rest is ignored.
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


REQUEST_SECONDS = 10.0  # in which the head of a request has to arrive
_SELDOM_SECONDS = 60.0  # between two equal lines of a log
_READING_SECONDS = 30.0  # in which a client has to read some of what it is told
_MOST_CONNECTIONS = 512
_MAX_HEAD = 128 * 1024  # bytes; a prompt may stand in a link
_CLOSING_SECONDS = 3  # that an answer has left when the server is told to stop


def listen(host: str, port: int) -> socket.socket:
    """Opens a socket that listens, or raises UserError; done first, so that a taken port shows at once."""
    if not 0 <= port <= 65535:
        raise UserError(field="--port", value=port, allowed="from 0 to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as e:
        raise UserError(f"--host = {host}: is no address ({getattr(e, 'strerror', None) or e})") from e
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    try:
        return socket.create_server(address, family=family, backlog=socket.SOMAXCONN, dualstack_ipv6=both)
    except OSError as e:
        why = os.strerror(e.errno) if e.errno else e
        text = f"cannot listen on {host}:{port} ({why}): choose another, or 0 for any that is free"
        raise UserError(text, field="--port", value=port) from e


def name_of(host: str) -> str:
    """Returns an address as it stands in links."""
    return f"[{host}]" if ":" in host else host


def names_of(host: str, port: int) -> frozenset[str]:
    """Returns the names under which this machine's own programs ask for a server that listens there."""
    return frozenset(f"{name}:{port}" for name in (name_of(host).lower(), "localhost", "127.0.0.1", "[::1]"))


def make_server(
    app: ASGIApp, closing_seconds: int = _CLOSING_SECONDS, closing: Callable[[], Any] = lambda: None
) -> "_Server":
    """Returns a server of a guarded app that no slow or silent client can keep from answering the others.

    When it is told to stop, and takes no new connections any more, it calls `closing`, and answers may take
    so many seconds to leave.
    """
    config = uvicorn.Config(
        app,
        http=_Patient,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_MOST_CONNECTIONS + 1,  # beyond those that `_Patient` hangs up on
        timeout_keep_alive=int(REQUEST_SECONDS),
        timeout_graceful_shutdown=closing_seconds,
        h11_max_incomplete_event_size=_MAX_HEAD,
    )
    # Wrong requests, too many clients, and clients that have gone are of no interest in a terminal.
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("uvicorn.error", "asyncio", "topklm.inference.engine"):
        logging.getLogger(name).addFilter(_seldom)
    return _Server(config, closing)


def run(server: "_Server", listening: socket.socket, ready: Callable[[], None]) -> None:
    """Answers on a socket until Ctrl-C or asked to end, and closes it; `ready` is called once it answers."""
    server.ready = ready
    with contextlib.closing(listening), contextlib.suppress(KeyboardInterrupt):
        asyncio.run(server.serve([listening]))


class _Server(uvicorn.Server):
    """Ends on a signal as on a request: uvicorn's own would let the signal kill the process afterwards."""

    def __init__(self, config: uvicorn.Config, closing: Callable[[], Any]):
        super().__init__(config)
        self._closing = closing
        self.ready: Callable[[], None] = lambda: None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit  # a second signal: do not wait
        self.should_exit = True

    def end(self) -> None:
        """Ends it from another thread."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._closing()
        await super().shutdown(sockets)


class _Patient(H11Protocol):
    """Hangs up on clients that take too long over what is theirs to do; uvicorn itself would wait for ever.

    That is to say what they want, to send all of it, and to read the answer. Where there are too many
    connections, the one that has been waited for the longest is closed, so that nobody shuts others out.
    """

    # When what is theirs to do began to be waited for; None while the answer is made
    since: float | None = None
    _awaited: str | None = None  # one of "request", "body", "reading"
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._look()
        there = (one for one in self.connections if isinstance(one, _Patient) and one is not self)
        awaited = {one: one.since for one in there if one.since is not None}
        if len(self.connections) > _MOST_CONNECTIONS and awaited:
            longest = min(awaited, key=awaited.__getitem__)
            self.connections.discard(longest)
            longest.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()

    def _look(self) -> None:
        """Starts another deadline if something else is waited for than before."""
        awaited = self._what_is_awaited()
        if awaited == self._awaited:
            return
        self._stop_waiting()
        self._awaited = awaited
        self.since = None if awaited is None else time.monotonic()
        if awaited in ("request", "reading"):
            seconds = REQUEST_SECONDS if awaited == "request" else _READING_SECONDS
            self._deadline = self.loop.call_later(seconds, self._hang_up)

    def _what_is_awaited(self) -> str | None:
        if self.flow.write_paused or self.transport.is_closing():
            return "reading"
        if self.cycle is None or self.cycle.response_complete:
            return "request"
        return "body" if self.cycle.more_body else None  # for which the guard has a time of its own

    def _hang_up(self) -> None:
        if self._awaited == "request" and not self.transport.get_write_buffer_size():
            self.transport.close()
        else:
            self.transport.abort()  # closing would wait until all is read

    def _stop_waiting(self) -> None:
        self.since = self._awaited = None
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class _Seldom(logging.Filter):
    """Passes what is logged or raised at one place once a minute: no client can fill a log with it."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[Any, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        place: Any = (record.pathname, record.lineno)
        if record.exc_info and record.exc_info[1] is not None:
            frames = list(traceback.walk_tb(record.exc_info[2]))
            place = (*place, record.exc_info[0], *(frames and (frames[-1][0].f_code, frames[-1][1])))
        now = time.monotonic()
        if now - self._last.get(place, -math.inf) < _SELDOM_SECONDS:
            return False
        self._last[place] = now
        return True


_seldom = _Seldom()
