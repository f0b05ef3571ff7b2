"""Serves a model on one port until it is told to stop."""

from collections.abc import Callable
import socket

from topklm.server import app
from topklm.server.errors import refused
from topklm.server.service import Service
from topklm.web import server
from topklm.web.security import Guard

_LEAVING_SECONDS = 3  # that answers have to leave when the time of grace is over


def serve(
    service: Service,
    listening: socket.socket,
    host: str,
    token: str | None,
    ready: Callable[[str], None] = print,
) -> None:
    """Answers until Ctrl-C, or until the process is asked to end; then texts have a time of grace.

    Args:
        service: What answers; its engine has been started, and is closed in the end.
        listening: From `topklm.web.server.listen`.
        host: Where it listens.
        token: What clients have to show as their API key; None: nothing.
        ready: Is told the address, once it answers.
    """
    port = listening.getsockname()[1]
    guarded = Guard(
        app.create(service),
        server.names_of(host, port) if token is None else None,
        token,
        max_body=service.limits.body,
        refuse=refused,
        by_link=False,
        where_token_is="send the one that topklm serve printed as your API key (Authorization: Bearer TOKEN)",
    )
    closing_seconds = round(service.limits.grace) + _LEAVING_SECONDS
    running = server.make_server(guarded, closing_seconds, service.stop)
    try:
        server.run(running, listening, lambda: ready(f"http://{server.name_of(host)}:{port}/v1"))
    finally:
        service.engine.close()
