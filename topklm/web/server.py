"""Answers on one port until told to stop; nobody slow, silent or gone keeps others from their answers."""

import asyncio
from collections.abc import Callable
import contextlib
import logging
import socket
from types import FrameType
from typing import Any

from starlette.types import ASGIApp
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from topklm.errors import UserError

REQUEST_SECONDS = 10.0  # in which the head of a request has to arrive

_MOST_CONNECTIONS = 512
_MAX_HEAD = 128 * 1024  # bytes; a prompt may stand in a link
_CLOSING_SECONDS = 3  # that an answer has left when the server is told to stop


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; taken before anything else is done, so that a taken port shows at once.

    Raises:
        UserError: If there is none to be had.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port = {port}: must be from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as e:
        raise UserError(f"--host = {host}: is no address ({getattr(e, 'strerror', None) or e})") from e
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(socket.SOMAXCONN)
    except OSError as e:
        listening.close()
        raise UserError(
            f"--port = {port}: cannot listen on {host}:{port} ({e.strerror or e}): choose another, or 0 for "
            "any that is free"
        ) from e
    return listening


def name_of(host: str) -> str:
    """An address as it stands in links."""
    return f"[{host}]" if ":" in host else host


def names_of(host: str, port: int) -> frozenset[str]:
    """Under which a server that listens there is asked for by this machine's own programs."""
    return frozenset(f"{name}:{port}" for name in (name_of(host).lower(), "localhost", "127.0.0.1", "[::1]"))


def make_server(
    app: ASGIApp, closing_seconds: int = _CLOSING_SECONDS, closing: Callable[[], Any] = lambda: None
) -> uvicorn.Server:
    """A server that no slow or silent client can keep from answering the others.

    Args:
        app: What answers, behind a `Guard`.
        closing_seconds: That answers may take to leave when it is told to stop.
        closing: Called when it is told to stop, and takes no new connections any more.
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
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_keep_alive=int(REQUEST_SECONDS),
        timeout_graceful_shutdown=closing_seconds,
        h11_max_incomplete_event_size=_MAX_HEAD,
    )
    # What clients send wrongly, and that they are many, is not news for a terminal.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    return _Server(config, closing)


def run(server: uvicorn.Server, listening: socket.socket, ready: Callable[[], None]) -> None:
    """Answers until Ctrl-C, or until the process is asked to end.

    Args:
        server: From `make_server`.
        listening: From `listen`; closed in the end.
        ready: Called once requests are answered.
    """
    with contextlib.closing(listening), contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_run(server, listening, ready))


async def _run(server: uvicorn.Server, listening: socket.socket, ready: Callable[[], None]) -> None:
    async def tell() -> None:
        while not server.started:
            await asyncio.sleep(0.01)
        ready()

    telling = asyncio.create_task(tell())
    try:
        await server.serve([listening])
    finally:
        telling.cancel()


class _Server(uvicorn.Server):
    """Ends on a signal as on a request: uvicorn's own would let the signal kill the process afterwards."""

    def __init__(self, config: uvicorn.Config, closing: Callable[[], Any]):
        super().__init__(config)
        self._closing = closing

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit  # whoever asks twice does not want to wait
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._closing()
        await super().shutdown(sockets)


class _Patient(H11Protocol):
    """Hangs up on whoever takes too long to say what he wants; uvicorn itself would wait for ever."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._deadline is None and not self.transport.is_closing():
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._deadline = self.loop.call_later(REQUEST_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
