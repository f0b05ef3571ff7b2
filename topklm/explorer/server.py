"""Serves the explorer on one port until it is told to stop."""

import asyncio
from collections.abc import Callable
import contextlib
import logging
import secrets
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from topklm.errors import UserError
from topklm.explorer import app
from topklm.explorer.security import Guard, is_loopback
from topklm.explorer.source import Source

REQUEST_SECONDS = 10.0  # in which the head of a request has to arrive

_MOST_CONNECTIONS = 512
_MAX_HEAD = 128 * 1024  # bytes; a prompt may stand in a link
_CLOSING_SECONDS = 3  # that an answer has left when the server is told to stop


def serve(source: Source, host: str, port: int, ready: Callable[[str], None] = print) -> None:
    """Answers until Ctrl-C.

    Args:
        source: What the pages are about.
        host: Address to listen on; on others than the loopback a token is needed.
        port: 0 takes a free one.
        ready: Is told the address to open, once it can be opened.

    Raises:
        UserError: If the port is taken, or the address is none of this machine.
    """
    listening = listen(host, port)
    port = listening.getsockname()[1]
    token = None if is_loopback(host) else secrets.token_urlsafe(24)
    name = f"[{host}]" if ":" in host else host
    hosts = frozenset(f"{n}:{port}" for n in (name.lower(), "localhost", "127.0.0.1", "[::1]"))
    pages = app.create(source)
    server = make_server(Guard(pages, hosts if token is None else None, token))
    address = f"http://{name}:{port}/" + (f"?token={token}" if token else "")
    with contextlib.closing(listening), contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(server, listening, lambda: ready(address)))


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
    except OSError as e:
        raise UserError(f"--host = {host}: is no address ({e.strerror or e})") from e
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


def make_server(guarded: Guard) -> uvicorn.Server:
    """A server that no slow or silent client can keep from answering the others."""
    config = uvicorn.Config(
        guarded,
        http=_Patient,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_keep_alive=int(REQUEST_SECONDS),
        timeout_graceful_shutdown=_CLOSING_SECONDS,
        h11_max_incomplete_event_size=_MAX_HEAD,
    )
    # What clients send wrongly, and that they are many, is not news for a terminal.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    return uvicorn.Server(config)


async def _serve(server: uvicorn.Server, listening: socket.socket, ready: Callable[[], None]) -> None:
    async def tell() -> None:
        while not server.started:
            await asyncio.sleep(0.01)
        ready()

    telling = asyncio.create_task(tell())
    try:
        await server.serve([listening])
    finally:
        telling.cancel()


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
