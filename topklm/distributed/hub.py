"""Process 0's side: waits until all have come, passes words between them, and notices who goes missing.

All connections come to one port, also those of JAX's clients to the coordination service in process 0:
the firewalls of pods open few ports.
"""

import asyncio
from collections.abc import Iterator
import contextlib
import dataclasses
import functools

from topklm.distributed import wire
from topklm.distributed.ending import AGAIN, Ending, Kind
from topklm.distributed.places import Place
from topklm.distributed.runtime import CONNECT_S
from topklm.errors import UserError

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
# For connections that the system has accepted and this process has not looked at yet.
_ACCEPT_S = 0.5


@dataclasses.dataclass
class _Member:
    """A process that is here."""

    writer: asyncio.StreamWriter
    silent_s: float = 0.0


@dataclasses.dataclass
class _Round:
    """One use of a gather, until everybody has come to it."""

    timer: asyncio.TimerHandle
    values: dict[int, str | None] = dataclasses.field(default_factory=dict)


class Hub:
    """Serves all members, process 0 among them; lives in process 0's event loop.

    Args:
        place: Of process 0.
        start_timeout_s: For all to come.
        peer_timeout_s: For a sign of life from each, once it is here.
        jax_port: Where JAX's coordination service listens, on this host alone.
    """

    def __init__(self, place: Place, *, start_timeout_s: float, peer_timeout_s: float, jax_port: int):
        self._place = place
        self._start_timeout_s, self._peer_timeout_s = start_timeout_s, peer_timeout_s
        self._jax_port = jax_port
        self._members: dict[int, _Member] = {}
        self._newcomers = 0  # connections that have not said yet whose they are, or are refused
        self._rounds: dict[str, _Round] = {}
        self._versions: dict[str, str] = {}
        self._begun = False
        self._ending: Ending | None = None
        self._somebody_left = asyncio.Event()

    async def open(self) -> str:
        """Begins to listen.

        Returns:
            The host name under which process 0 itself finds it.

        Raises:
            UserError: If the port is taken.
        """
        # A run that stays on one machine need not be seen by others.
        local_host = self._place.host if self._place.host in _LOOPBACK else None
        try:
            self._server = await wire.listen(self._welcome, local_host, self._place.port)
        except OSError as e:
            raise UserError(
                f"process 0 cannot listen at port {self._place.port} ({e.strerror}): end the run that uses "
                "it on this host, or choose another with TOPKLM_COORDINATOR or JAX_COORDINATOR_PORT"
            ) from e
        asyncio.get_running_loop().call_later(self._start_timeout_s, self._check_start)
        return local_host or "127.0.0.1"

    def check(self, elapsed_s: float) -> None:
        """Gives up members that were silent for too long; to be called every now and then."""
        for index, member in self._members.items():
            member.silent_s += elapsed_s
            if member.silent_s > self._peer_timeout_s:
                self.declare(Ending(Kind.GONE, index, f"no sign of life for {self._peer_timeout_s:g} s"))
                member.writer.close()

    def declare(self, ending: Ending) -> None:
        """Tells everybody that the run ends; only the first ending counts."""
        if self._ending is None:
            self._ending = ending
            self._tell_all({"ending": ending.to_json()})

    async def wait_until_others_left(self, timeout_s: float) -> None:
        """Returns when all others have gone, or after `timeout_s` seconds.

        Those that are just coming count too: the news reaches them as the answer to their first word.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await asyncio.sleep(_ACCEPT_S)
                while self._newcomers or self._members.keys() - {self._place.index}:
                    self._somebody_left.clear()
                    await self._somebody_left.wait()

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        member: _Member | None = None
        try:
            with self._newcomer():
                match await wire.receive(reader):
                    case {
                        "hello": "member",
                        "index": int(index),
                        "count": int(count),
                        "versions": dict(versions),
                    }:
                        if refusal := self._ending or self._refusal(index, count, versions):
                            await self._refuse(refusal, reader, writer)
                            return
                        member = self._members[index] = _Member(writer)
                    case {"hello": "jax"}:
                        pass
                    case _:
                        return
            if member:
                await self._serve(index, member, reader)
            else:
                await self._connect_to_jax(reader, writer)
        finally:
            writer.close()

    @contextlib.contextmanager
    def _newcomer(self) -> Iterator[None]:
        self._newcomers += 1
        try:
            yield
        finally:
            self._newcomers -= 1
            self._somebody_left.set()

    async def _refuse(
        self, refusal: Ending, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Tells a newcomer why, and waits until it has gone."""
        wire.send(writer, {"ending": refusal.to_json()})
        if not self._begun:
            self.declare(refusal)
        while await wire.receive(reader):
            pass

    async def _connect_to_jax(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            jax_reader, jax_writer = await wire.connect("127.0.0.1", self._jax_port, CONNECT_S)
        except OSError:
            return  # JAX did not start here, and this process says why
        await wire.relay(reader, writer, jax_reader, jax_writer)

    def _refusal(self, index: int, count: int, versions: dict[str, str]) -> Ending | None:
        """Why a newcomer cannot take part, if so."""
        refuse = functools.partial(Ending, Kind.MISTAKE, index)
        if count != self._place.count:
            return refuse(f"started as one of {count} processes, process 0 as one of {self._place.count}")
        if self._begun:
            text = f"process {index} came when the run was under way: start the same command on every host"
            return Ending(Kind.LATE, index, text)
        if index in self._members:
            return refuse(f"there are two processes {index}: number them from 0 to {count - 1}")
        self._versions = self._versions or versions
        if versions != self._versions:
            return refuse(f"runs {_listed(versions)}, others {_listed(self._versions)}: install the same")
        return None

    async def _serve(self, index: int, member: _Member, reader: asyncio.StreamReader) -> None:
        if len(self._members) == self._place.count:
            self._begun = True
            self._tell_all({"begin": True})
        said_bye = False
        while message := await wire.receive(reader):
            member.silent_s = 0.0
            match message:
                case {"alive": _}:
                    wire.send(member.writer, message)
                case {"round": str(key), "value": value, "timeout_s": timeout_s}:
                    self._come(key, index, value, timeout_s)
                case {"ending": str(text)}:
                    self.declare(Ending.from_json(text))
                case {"bye": _}:
                    said_bye = True
        del self._members[index]
        self._somebody_left.set()
        if self._begun and not said_bye:
            self.declare(Ending(Kind.GONE, index, "its connection broke off"))

    def _come(self, key: str, index: int, value: str | None, timeout_s: float) -> None:
        """Notes that a process has come to a round, which ends when all have."""
        if key not in self._rounds:
            timer = asyncio.get_running_loop().call_later(timeout_s, self._give_up, key, timeout_s)
            self._rounds[key] = _Round(timer)
        values = self._rounds[key].values
        values[index] = value
        if len(values) == self._place.count:
            self._rounds.pop(key).timer.cancel()
            self._tell_all({"round": key, "values": [values[i] for i in range(self._place.count)]})

    def _give_up(self, key: str, timeout_s: float) -> None:
        came = self._rounds.pop(key).values
        missing = _numbers(set(range(self._place.count)) - came.keys())
        text = f"waited {timeout_s:g} s at {key.partition('#')[0]!r} for {missing}; {AGAIN}"
        for index in came.keys() & self._members.keys():
            wire.send(self._members[index].writer, {"round": key, "late": text})

    def _check_start(self) -> None:
        if not self._begun:
            here, count = len(self._members), self._place.count
            missing = ", ".join(str(i) for i in range(count) if i not in self._members)
            text = (
                f"waited {self._start_timeout_s:g} s for {count} processes, {here} came (missing: "
                f"{missing}): start the same command on every host"
            )
            self.declare(Ending(Kind.LATE, self._place.index, text))

    def _tell_all(self, message: wire.Message) -> None:
        for member in self._members.values():
            wire.send(member.writer, message)


def _numbers(indices: set[int]) -> str:
    """`process 2`, `processes 2, 3`."""
    return f"process{'es' * (len(indices) > 1)} {', '.join(map(str, sorted(indices)))}"


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
