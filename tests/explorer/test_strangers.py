"""Clients that hold on to a server keep nobody else from it, and cannot fill its log."""

import contextlib
import logging
import socket
import time

import pytest
from serve_site import Site, answering
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from topklm import web

LARGE = b"a" * 2**24  # more than the buffers of a connection hold


async def hello(_request: Request) -> PlainTextResponse:
    return PlainTextResponse("hello")


async def large(_request: Request) -> PlainTextResponse:
    return PlainTextResponse(LARGE)


async def broken(_request: Request) -> PlainTextResponse:
    raise ZeroDivisionError


APP = Starlette(routes=[Route("/", hello), Route("/large", large), Route("/broken", broken)])


@pytest.fixture
def running(monkeypatch):
    """Yields a server of few connections, which waits for as long as it takes; its port and itself."""
    monkeypatch.setattr(web, "_MOST_CONNECTIONS", 12)
    for name in ("REQUEST_SECONDS", "_READING_SECONDS"):
        monkeypatch.setattr(web, name, 300.0)
    listening = web.listen("127.0.0.1", 0)
    with answering(APP, listening) as made:
        yield listening.getsockname()[1], made


@pytest.fixture
def small(running):
    return Site(running[0], None)


def connected(stack, port, sent=b""):
    client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
    client.sendall(sent)
    return client


HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
HOLDING_ON = {
    "silent": b"",
    "half a head": b"GET / HTTP/1.1\r\nHost: ",
    "half a body": HEAD + b"half",
    "answered, and still there": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "not reading": b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("sent", HOLDING_ON.values(), ids=HOLDING_ON)
def test_whoever_holds_on_to_connections_keeps_nobody_from_an_answer(small, sent):
    with contextlib.ExitStack() as stack:
        for number in range(60):
            client = connected(stack, small.port, sent)
            if sent.startswith(b"GET / HTTP/1.1\r\nHost: x\r\n"):
                assert b"hello" in client.recv(1000)
            if number % 7 == 0:
                answer = small.ask("/")
                assert (answer.status, answer.body) == (200, b"hello")
        for _ in range(20):
            assert small.ask("/").status == 200


def test_of_those_who_are_waited_for_the_longest_goes_first(small):
    with contextlib.ExitStack() as stack:
        clients = [connected(stack, small.port) for _ in range(12)]
        # A request that was asked and answered is newer than the silence of the others.
        clients[0].sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"hello" in clients[0].recv(1000)
        late = connected(stack, small.port)
        with contextlib.suppress(ConnectionResetError):
            assert clients[1].recv(1) == b""
        for client in (clients[0], clients[2], late):
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"hello" in client.recv(1000)


def test_who_reads_nothing_of_a_long_answer_is_hung_up_on(running, monkeypatch):
    monkeypatch.setattr(web, "_READING_SECONDS", 0.2)
    with contextlib.ExitStack() as stack:
        client = connected(stack, running[0], HOLDING_ON["not reading"])
        while not running[1].server_state.connections:
            time.sleep(0.01)
        while running[1].server_state.connections:
            time.sleep(0.01)
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while piece := client.recv(2**20):
                received += len(piece)
        assert received < len(LARGE)


def test_a_long_answer_that_is_read_arrives_whole(small):
    assert small.ask("/large").body == LARGE


def test_one_fault_is_logged_once_however_often_it_is_asked_for(small, caplog):
    web._seldom._last.clear()
    with caplog.at_level(logging.ERROR):
        for _ in range(20):
            assert small.ask("/broken").status == 500
    traces = [record for record in caplog.records if record.exc_info]
    assert [record.exc_info[0] for record in traces] == [ZeroDivisionError]


def test_different_faults_are_all_logged_and_the_same_one_again_after_a_while(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(web.time, "monotonic", lambda: now[0])
    seldom = web._Seldom()

    def passes(function):
        try:
            function()
        except Exception as e:
            about = (type(e), e, e.__traceback__)
            return seldom.filter(logging.LogRecord("x", logging.ERROR, "f.py", 1, "it failed", (), about))

    def divides():
        return 1 / 0

    def indexes():
        return {}["a"]

    assert [passes(divides), passes(divides), passes(indexes), passes(divides)] == [True, False, True, False]
    now[0] = 61.0
    assert [passes(divides), passes(divides)] == [True, False]


def test_what_clients_do_is_no_news_for_a_terminal(small):
    for name in ("asyncio", "uvicorn.error"):
        assert not logging.getLogger(name).isEnabledFor(logging.WARNING)
        assert logging.getLogger(name).isEnabledFor(logging.ERROR)
