"""A server of the explorer's pages in a thread, and what asks it."""

from collections.abc import Iterator
import contextlib
import dataclasses
import http.client
import json
import socket
import threading
import time
from typing import Any
from urllib.parse import urlencode

from starlette.types import ASGIApp
import uvicorn

from topklm import web
from topklm.explorer import app
from topklm.explorer.neuron_data import NeuronData
from topklm.web import Guard


@dataclasses.dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclasses.dataclass(frozen=True)
class Site:
    """A server that runs in this process."""

    port: int
    source: NeuronData

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def address(self) -> str:
        return f"http://{self.host}"

    def ask(
        self,
        path: str,
        method: str = "GET",
        headers: dict[str, str] | None = None,
        body: bytes | None = None,
        form: dict[str, str] | None = None,
    ) -> Answer:
        """Sends one request, without following redirections."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = dict(headers or {})
        if form is not None:
            body, method = urlencode(form).encode(), "POST"
            headers.setdefault("Content-Type", "application/x-www-form-urlencoded")
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            named = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, named, answer.read())


@contextlib.contextmanager
def serving(source: NeuronData, token: str | None = None) -> Iterator[Site]:
    listening = web.listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    hosts = frozenset({f"127.0.0.1:{port}", f"localhost:{port}"}) if token is None else None
    pages = app.create(source, lambda line: None)
    with answering(Guard(pages, hosts, token), listening, closing=pages.state.closing):
        yield Site(port, source)


@contextlib.contextmanager
def answering(application: ASGIApp, listening: socket.socket, **options: Any) -> Iterator[uvicorn.Server]:
    running = web.make_server(application, **options)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    try:
        yield running
    finally:
        running.should_exit = True
        thread.join(timeout=30)
        listening.close()
