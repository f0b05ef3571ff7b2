"""How the processes of a run write to each other: lines of JSON, and bytes passed on unread."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
import contextlib
import json
import time
from typing import Any

Message = dict[str, Any]
LONGEST_LINE_BYTES = 2**28  # a gathered list of every process's words


async def connect(
    host: str, port: int, timeout_s: float
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connects, trying again while nobody listens or the host's name is not known yet.

    Raises:
        OSError: That of the last attempt, after `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            async with asyncio.timeout(max(1.0, min(10.0, deadline - time.monotonic()))):
                return await asyncio.open_connection(host, port, limit=LONGEST_LINE_BYTES)
        except OSError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)


async def listen(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[None, None, None]],
    host: str | None,
    port: int,
) -> asyncio.Server:
    """Has `serve` run for each connection, in a task of its own; for port 0 the system chooses one.

    Raises:
        OSError: If the port is taken.
    """
    running: set[asyncio.Task[None]] = set()  # the event loop itself does not keep tasks alive

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        running.add(task := asyncio.create_task(serve(reader, writer)))
        task.add_done_callback(running.discard)

    return await asyncio.start_server(begin, host, port, limit=LONGEST_LINE_BYTES)


def send(writer: asyncio.StreamWriter, message: Message) -> None:
    """Queues one message; on a broken connection it is dropped, and the connection's reader sees the end."""
    if not writer.is_closing():
        writer.write(json.dumps(message).encode() + b"\n")


async def receive(reader: asyncio.StreamReader) -> Message | None:
    """The next message, or None at the connection's end; a line that is no message counts as its end."""
    try:
        line = await reader.readline()
        message = json.loads(line) if line.endswith(b"\n") else None
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None


async def relay(
    near_reader: asyncio.StreamReader,
    near_writer: asyncio.StreamWriter,
    far_reader: asyncio.StreamReader,
    far_writer: asyncio.StreamWriter,
) -> None:
    """Passes bytes on in both directions until the near end closes; it never learns if the far one broke."""
    returning = asyncio.create_task(_copy(far_reader, near_writer))
    try:
        await _copy(near_reader, far_writer)
    finally:
        returning.cancel()
        far_writer.close()
        near_writer.close()


async def ticks(interval_s: float) -> AsyncIterator[float]:
    """Wakes up every `interval_s` seconds, and yields the seconds in which this process could run.

    A process that was stopped (SIGSTOP, a laptop's sleep) has not heard anybody meanwhile, which says
    nothing about the others: such a gap counts as one interval.
    """
    before = time.monotonic()
    while True:
        await asyncio.sleep(interval_s)
        now = time.monotonic()
        yield now - before if now - before < 3 * interval_s else interval_s
        before = now


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until the reader's end; what a broken writer cannot take is dropped."""
    with contextlib.suppress(OSError):
        while data := await reader.read(2**16):
            with contextlib.suppress(OSError):
                writer.write(data)
                await writer.drain()
