"""The hub against members made of bare connections."""

import asyncio
import contextlib
import socket
import time

import pytest

from topklm.distributed import wire
from topklm.distributed.ending import Ending, Kind
from topklm.distributed.hub import Hub
from topklm.distributed.places import Place
from topklm.errors import UserError

VERSIONS = {"topklm": "1", "jax": "2"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Peer:
    """A member's end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer

    async def hears(self) -> wire.Message | None:
        return await asyncio.wait_for(wire.receive(self.reader), 60)

    async def hears_ending(self) -> Ending:
        return Ending.from_json((await self.hears())["ending"])


@contextlib.asynccontextmanager
async def hub_of(count: int, **timeouts: float):
    """A hub, and a function that has a member say hello to it."""
    place = Place(0, count, "localhost", free_port())
    hub = Hub(place, jax_port=free_port(), **{"start_timeout_s": 60, "peer_timeout_s": 60, **timeouts})
    await hub.open()

    async def join(index: int, **differing: object) -> Peer:
        peer = Peer(*await wire.connect("localhost", place.port, 60))
        hello = {"hello": "member", "index": index, "count": count, "versions": VERSIONS, **differing}
        wire.send(peer.writer, hello)
        return peer

    yield hub, join


def test_a_member_that_does_not_fit_ends_the_start_for_all():
    async def refused(**differing: object) -> Ending:
        async with hub_of(3) as (_, join):
            first = await join(1)
            wire.send(first.writer, {"alive": True})
            assert await first.hears() == {"alive": True}
            misfit = await join(differing.pop("index", 2), **differing)
            ending = await misfit.hears_ending()
            assert await first.hears_ending() == ending
            return ending

    def ending_of(**differing: object) -> str:
        ending = asyncio.run(refused(**differing))
        assert ending.kind is Kind.MISTAKE
        return ending.last_line(0)

    assert "process 1 failed: there are two processes 1: number them from 0 to 2" in ending_of(index=1)
    assert "process 2 failed: started as one of 4 processes, process 0 as one of 3" in ending_of(count=4)
    versions = ending_of(versions={"topklm": "1", "jax": "3"})
    assert "process 2 failed: runs jax 3, topklm 1, others jax 2, topklm 1: install the same" in versions


def test_who_comes_to_a_run_under_way_does_not_disturb_it():
    async def scene() -> None:
        async with hub_of(2) as (_, join):
            members = [await join(0), await join(1)]
            assert [await member.hears() for member in members] == [{"begin": True}] * 2
            late = await (await join(1)).hears_ending()
            assert (late.kind, late.exit_code) == (Kind.LATE, 75)
            assert "came when the run was under way" in late.text
            wire.send(members[0].writer, {"alive": True})
            assert await members[0].hears() == {"alive": True}

    asyncio.run(scene())


def test_connections_that_are_none_of_ours_are_dropped():
    async def scene() -> None:
        async with hub_of(1) as (_, join):
            member = await join(0)
            assert await member.hears() == {"begin": True}
            stranger = Peer(*await wire.connect(*member.writer.get_extra_info("peername")[:2], 60))
            stranger.writer.write(b"GET / HTTP/1.1\n")
            assert await stranger.hears() is None
            wire.send(member.writer, {"alive": True})
            assert await member.hears() == {"alive": True}

    asyncio.run(scene())


def test_only_the_first_ending_counts():
    async def scene() -> None:
        async with hub_of(2) as (hub, join):
            members = [await join(0), await join(1)]
            first = Ending(Kind.FAILURE, 1, "KeyError: 'x'")
            wire.send(members[1].writer, {"ending": first.to_json()})
            for member in members:
                assert await member.hears() == {"begin": True}
                assert await member.hears_ending() == first
            hub.declare(Ending(Kind.STOP, 0, "stopped"))
            members[1].writer.close()
            await hub.wait_until_others_left(60)
            assert await (await join(1)).hears_ending() == first

    asyncio.run(scene())


def test_silence_is_counted_only_while_the_hub_itself_runs():
    async def scene() -> None:
        async with hub_of(2, peer_timeout_s=30) as (hub, join):
            members = [await join(0), await join(1)]
            assert [await member.hears() for member in members] == [{"begin": True}] * 2
            hub.check(20)
            wire.send(members[0].writer, {"alive": True})
            assert await members[0].hears() == {"alive": True}
            hub.check(20)
            ending = await members[0].hears_ending()
            assert (ending.kind, ending.process) == (Kind.GONE, 1)

    asyncio.run(scene())


def test_a_port_in_use_is_a_users_matter():
    async def scene() -> None:
        with socket.create_server(("localhost", 0)) as taken:
            place = Place(0, 2, "127.0.0.1", taken.getsockname()[1])
            hub = Hub(place, start_timeout_s=1, peer_timeout_s=1, jax_port=free_port())
            with pytest.raises(UserError, match=r"cannot listen at port \d+ \("):
                await hub.open()

    asyncio.run(scene())


def test_a_relay_hides_that_its_far_end_broke():
    async def scene() -> None:
        far_connections: asyncio.Queue[Peer] = asyncio.Queue()

        async def far(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_connections.put_nowait(Peer(reader, writer))

        async def near(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await wire.relay(reader, writer, *await wire.connect("localhost", far_port, 60))

        far_port, near_port = free_port(), free_port()
        servers = [
            await wire.listen(far, "localhost", far_port),
            await wire.listen(near, "localhost", near_port),
        ]
        client = Peer(*await wire.connect("localhost", near_port, 60))
        server = await far_connections.get()
        for writer, other in ((client.writer, server), (server.writer, client)):
            wire.send(writer, {"alive": True})
            assert await other.hears() == {"alive": True}
        server.writer.transport.abort()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(wire.receive(client.reader), 0.5)
        for _ in range(3):
            wire.send(client.writer, {"alive": True})
            await client.writer.drain()
        assert not client.writer.is_closing()
        del servers

    asyncio.run(scene())


def test_the_time_in_which_a_process_was_stopped_is_not_counted():
    async def elapsed(blocked_s: float) -> float:
        ticks = wire.ticks(0.02)
        await anext(ticks)
        waiting = asyncio.ensure_future(anext(ticks))
        await asyncio.sleep(0)
        # Stands in for SIGSTOP: nothing in the process runs.
        time.sleep(blocked_s)
        return await waiting

    assert asyncio.run(elapsed(1.0)) == 0.02
