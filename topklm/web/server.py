"""Answers on one port until told to stop; nobody slow, silent or gone keeps others from their answers."""

import asyncio
from collections.abc import Callable
import contextlib
import logging
import math
import os
import socket
import time
import traceback
from types import FrameType
from typing import Any

from starlette.types import ASGIApp
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from topklm.errors import UserError

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
    connections, whoever has been waited for the longest has to go, so that nobody shuts others out.
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
