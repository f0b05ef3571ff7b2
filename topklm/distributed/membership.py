"""Each process's side: a thread that talks with process 0, and ends this process when the run ends badly.

It also stands between JAX and the coordination service. XLA aborts the process, without asking Python, the
moment its connection to that service breaks; here process 0 may go, and that connection stays.
"""

import asyncio
import collections
import concurrent.futures
import os
import socket
import threading
import traceback

from topklm.distributed import wire
from topklm.distributed.ending import Ending, Kind, PeerLost, say_last_line
from topklm.distributed.hub import Hub
from topklm.distributed.places import Place
from topklm.errors import UserError
from topklm.imports import versions

# For the main thread to end by itself, in its own words, when another process has failed.
_GRACE_S = 1.0
# For the others to hear the last news, before process 0, which passes them on, is gone.
_FAREWELL_S = 10.0


class Membership:
    """This process's part in a run of several processes.

    Args:
        place: Which part.
        start_timeout_s: For all processes to come.
        peer_timeout_s: After which a silent process counts as gone.
    """

    def __init__(self, place: Place, start_timeout_s: float, peer_timeout_s: float):
        self.place = place
        self.start_timeout_s, self.peer_timeout_s = start_timeout_s, peer_timeout_s
        self._thread = threading.Thread(target=self._work, name="distributed", daemon=True)
        self._begun: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._lock = threading.Lock()
        self._rounds: dict[str, concurrent.futures.Future[list[str]]] = {}
        self._uses: collections.Counter[str] = collections.Counter()
        self._ending: concurrent.futures.Future[Ending] = concurrent.futures.Future()
        self._connected = self._closing = self._exit_claimed = False
        self._hub: Hub | None = None
        self._silent_s = 0.0

    def join(self) -> str:
        """Waits until all processes have come.

        Returns:
            The address, on this host, at which JAX finds its coordination service.

        Raises:
            PeerLost: If they do not come in time.
            UserError: If this process does not fit in.
        """
        self._thread.start()
        self._begun.result()
        return f"127.0.0.1:{self._jax_port}"

    def gather(self, name: str, value: str | None, timeout_s: float) -> list[str]:
        """All values, in the order of the processes; see `topklm.distributed.gather`."""
        future: concurrent.futures.Future[list[str]] = concurrent.futures.Future()
        with self._lock:
            if ending := self.ending:
                raise PeerLost(ending.last_line(self.place.index))
            self._uses[name] += 1
            key = f"{name}#{self._uses[name]}"
            self._rounds[key] = future
        self._send({"round": key, "value": value, "timeout_s": timeout_s})
        return future.result()

    @property
    def ending(self) -> Ending | None:
        """How the run ends, once that is known."""
        return self._ending.result() if self._ending.done() else None

    def wait_for_ending(self, timeout_s: float) -> Ending | None:
        """How the run ends, if that becomes known in time."""
        concurrent.futures.wait([self._ending], timeout_s)
        return self.ending

    def announce(self, kind: Kind, text: str) -> None:
        """Ends the run for all; returns when they know, in process 0 when they have gone."""
        if self._connected and not self.ending:
            self._send({"ending": Ending(kind, self.place.index, text).to_json()})
            self.wait_for_ending(_FAREWELL_S)
        self.wait_for_others()

    def wait_for_others(self) -> None:
        """In process 0 only: gives the others time to hear the news before it goes."""
        if self._hub and self._connected:
            leaving = self._hub.wait_until_others_left(_FAREWELL_S)
            asyncio.run_coroutine_threadsafe(leaving, self._loop).result()

    def claim_exit(self) -> bool:
        """True for the first caller: the thread that then prints the last line and ends the process."""
        with self._lock:
            first, self._exit_claimed = not self._exit_claimed, True
        return first

    def close(self) -> None:
        """Leaves in good order, process 0 last."""
        self._closing = True
        self._send({"bye": True})
        self.wait_for_others()
        self._loop.call_soon_threadsafe(self._writer.close)
        self._thread.join()

    def _work(self) -> None:
        try:
            asyncio.run(self._talk())
        except (UserError, PeerLost) as e:
            self._begun.set_exception(e)
        except BaseException:
            # A bug here would leave the run unwatched.
            traceback.print_exc()
            os._exit(1)

    async def _talk(self) -> None:
        self._loop = asyncio.get_running_loop()
        place, host = self.place, self.place.host
        if place.index == 0:
            self._jax_port = _free_port()
            self._hub = Hub(
                place,
                start_timeout_s=self.start_timeout_s,
                peer_timeout_s=self.peer_timeout_s,
                jax_port=self._jax_port,
            )
            host = await self._hub.open()
        else:
            relay = await wire.listen(self._relay, "127.0.0.1", 0)
            self._jax_port = relay.sockets[0].getsockname()[1]
        reader, self._writer = await self._reach_hub(host)
        self._connected = True
        hello = {"hello": "member", "index": place.index, "count": place.count}
        self._send({**hello, "versions": versions("topklm", "jax")})
        async with asyncio.TaskGroup() as tasks:
            beating = tasks.create_task(self._beat(tasks))
            await self._listen(reader, tasks)
            beating.cancel()

    async def _reach_hub(self, host: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        port, timeout_s = self.place.port, self.start_timeout_s
        try:
            return await wire.connect(host, port, timeout_s)
        except OSError as e:
            why = str(e) or "no answer"
            raise PeerLost(
                f"waited {timeout_s:g} s for process 0 to answer at {host}:{port} ({why}): start the same "
                "command on every host, and let them reach that port"
            ) from e

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Passes a connection of JAX's on to process 0."""
        hub_reader, hub_writer = await self._reach_hub(self.place.host)
        wire.send(hub_writer, {"hello": "jax"})
        await wire.relay(reader, writer, hub_reader, hub_writer)

    async def _beat(self, tasks: asyncio.TaskGroup) -> None:
        """Shows that this process lives, and looks whether process 0 does."""
        async for elapsed_s in wire.ticks(min(1.0, self.peer_timeout_s / 5)):
            wire.send(self._writer, {"alive": True})
            if self._hub:
                self._hub.check(elapsed_s)
            self._silent_s += elapsed_s
            if self._silent_s > self.peer_timeout_s:
                self._hear(Ending(Kind.GONE, 0, f"no sign of life for {self.peer_timeout_s:g} s"), tasks)

    async def _listen(self, reader: asyncio.StreamReader, tasks: asyncio.TaskGroup) -> None:
        while message := await wire.receive(reader):
            self._silent_s = 0.0
            match message:
                case {"ending": str(text)}:
                    self._hear(Ending.from_json(text), tasks)
                case _ if self.ending:
                    pass  # too late for anything else
                case {"begin": True}:
                    self._begun.set_result(None)
                case {"round": str(key), "values": list(values)}:
                    self._rounds.pop(key).set_result(values)
                case {"round": str(key), "late": str(text)}:
                    self._rounds.pop(key).set_exception(PeerLost(text))
        if not self._closing:
            self._hear(Ending(Kind.GONE, 0, "its connection broke off"), tasks)

    def _hear(self, ending: Ending, tasks: asyncio.TaskGroup) -> None:
        """Learns how the run ends."""
        with self._lock:
            if self.ending:
                return
            self._ending.set_result(ending)
            waiting, self._rounds = list(self._rounds.values()), {}
        lost = PeerLost(ending.last_line(self.place.index))
        for future in waiting:
            future.set_exception(lost)
        if not self._begun.done():
            self._begun.set_exception(lost)
        elif ending.process != self.place.index or ending.kind is Kind.GONE:
            tasks.create_task(self._end(ending))

    async def _end(self, ending: Ending) -> None:
        """Ends this process, unless its main thread is about to."""
        await asyncio.sleep(_GRACE_S)
        if self.claim_exit():
            say_last_line(ending, self.place.index)
            if self._hub:
                await self._hub.wait_until_others_left(_FAREWELL_S)
            os._exit(ending.exit_code)

    def _send(self, message: wire.Message) -> None:
        self._loop.call_soon_threadsafe(wire.send, self._writer, message)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
