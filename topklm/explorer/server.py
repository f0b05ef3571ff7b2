"""Serves the explorer on one port until it is told to stop."""

from collections.abc import Callable
import secrets

from topklm.explorer import app
from topklm.explorer.source import Source
from topklm.web import server
from topklm.web.security import Guard, is_loopback


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
    listening = server.listen(host, port)
    port = listening.getsockname()[1]
    token = None if is_loopback(host) else secrets.token_urlsafe(24)
    pages = app.create(source)
    guarded = Guard(pages, server.names_of(host, port) if token is None else None, token)
    address = f"http://{server.name_of(host)}:{port}/" + (f"?token={token}" if token else "")
    running = server.make_server(guarded, closing=pages.state.closing)
    server.run(running, listening, lambda: ready(address))
