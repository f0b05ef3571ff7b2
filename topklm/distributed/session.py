"""One process's part in a run of several: it joins the others, hears how the run ends, and ends with them.

Two threads wait on the coordination service: one for the run's ending, the other for a process that is no
longer alive. After an error nothing is unwound: threads may hang in a collective for ever.
"""

import collections
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import jax

from topklm import errors
from topklm.distributed import coordination
from topklm.distributed.coordination import AGAIN, ClusterProcess, Ending, Kind, PeerLost, say_last_line
from topklm.errors import UserError
from topklm.imports import versions

# For the main thread to end by itself, in its own words, when another process has failed.
_GRACE_S = 1.0
# For the others to hear the ending, before process 0 and the service in it are gone.
_FAREWELL_S = 10.0
# After a good end all are about to leave.
_SHUTDOWN_S = 60.0
# An error may be the echo of another process's: time to hear of that.
_ECHO_S = 2.0
# XLA notices a silent process at its next look.
_SLACK_S = 3.0
_LEAVING_POLL_S = 0.1
_TICK_S = 0.5
# How XLA's errors begin when it cannot talk to a peer; they come as various exceptions.
_COMMUNICATION_ERRORS = (
    "UNKNOWN: ",
    "INTERNAL: ",
    "UNAVAILABLE: ",
    "ABORTED: ",
    "DEADLINE_EXCEEDED: ",
    "CANCELLED: ",
    "FAILED_PRECONDITION: ",
)
# Keys of the store, which JAX and Orbax use too, and names of exchanges.
_ENDING = "topklm/ending"
_BEGUN = "topklm/begun"
_COUNT = "topklm/count"
_HELLO = "hello"
_GOODBYE = "the end of the run"


class Session:
    """This process's part in a run of several; `topklm.distributed.session` explains the arguments."""

    def __init__(
        self,
        process: ClusterProcess,
        start_timeout_s: float,
        peer_timeout_s: float,
        told_to_stop: Callable[[], bool],
    ):
        self.process = process
        self._start_timeout_s, self._peer_timeout_s = start_timeout_s, peer_timeout_s
        self._told_to_stop = told_to_stop
        self._client: coordination.CoordinationClient | None = None  # once all have come
        self._uses: collections.Counter[str] = collections.Counter()
        self._stale_keys: dict[str, str] = {}
        # A word that ends the run carries its sender's secret, whose hash all have known since the start.
        self._secret = secrets.token_hex(16)
        self._hashes: dict[int, str] = {}
        self._count = process.count
        self._met = threading.Event()  # the hashes are known
        self._ending: Ending | None = None
        self._ending_known = threading.Event()
        self._hurry = threading.Event()  # the end of the run has begun, good or bad
        self._announced = False  # this process began the end
        self._leaving = False
        self._threads: list[threading.Thread] = []
        self._alone = threading.Event()  # only process 0 is connected still
        self._exit = threading.Lock()  # taken once: by the thread that ends the process
        self._last_words: tuple[Ending | None, int] | None = None
        self._last_contact = self._last_tick = self._stopped_until = time.monotonic()

    def join(self) -> None:
        """Waits until all processes have come, and refuses those that do not fit in."""
        client = coordination.connect(
            self.process,
            start_timeout_s=self._start_timeout_s,
            peer_timeout_s=self._peer_timeout_s,
            on_abort=self._end_aborted,
        )
        if client.get(_BEGUN) is not None:
            text = f"process {self.process.index} came when the run was under way"
            raise PeerLost(f"{text}: start the same command on every host")
        if self.process.index == 0:
            client.set(_COUNT, str(self.process.count))
        self._count = int(client.wait_for(_COUNT))  # of the service, also where this process was told another
        self._client, self._last_tick = client, time.monotonic()
        for work in (self._watch, self._listen, self._tick):
            self._threads.append(threading.Thread(target=self._guarded, args=(work,), daemon=True))
            self._threads[-1].start()
        hello = {
            "count": self.process.count,
            "versions": versions("topklm", "jax"),
            "hash": _sha256(self._secret),
        }
        values = self._exchange(_HELLO, json.dumps(hello), self._start_timeout_s)
        hellos = {int(index): json.loads(value) for index, value in sorted(values.items())}
        self._hashes = {index: hello["hash"] for index, hello in hellos.items()}
        self._met.set()
        _check_fit(hellos)
        client.set(_BEGUN, "")

    def gather(self, name: str, value: str, timeout_s: float) -> list[str]:
        """Returns the values of all processes, in their order; see `topklm.distributed.gather`."""
        if self._ending:
            raise PeerLost(self._ending.last_line(self.process.index))
        values = self._exchange(name, value, timeout_s)
        if len(values) != self.process.count:
            raise PeerLost(self._stranger)
        return [values[str(index)] for index in range(self.process.count)]

    @property
    def _service(self) -> coordination.CoordinationClient:
        assert self._client is not None
        return self._client

    def _exchange(self, name: str, value: str, timeout_s: float) -> dict[str, str]:
        """Returns the values of all processes by their indices, once all have called it."""
        self._uses[name] += 1
        folder = f"topklm/{name}#{self._uses[name]}"
        key = f"{folder}/{self.process.index}"
        if not self._service.set(key, value):
            raise PeerLost(self._stranger)
        came_in_time = self._service.barrier(folder, timeout_s)
        values = self._service.values(folder)
        if not came_in_time:
            missing = [str(i) for i in range(self.process.count) if str(i) not in values]
            named = f"process{'es' * (len(missing) > 1)} {', '.join(missing)}"
            raise PeerLost(f"waited {timeout_s:g} s at {name!r} for {named}; {AGAIN}")
        # All have read the value before, because they came to this barrier; of the same name, for other names
        # may be used by other threads at the same time.
        if stale_key := self._stale_keys.get(name):
            self._service.delete(stale_key)
        self._stale_keys[name] = key
        return values

    def announce(self, kind: Kind, text: str) -> None:
        """Ends the run for all; returns when they know, in process 0 when they have gone."""
        self._announced = True
        if self._client and not self._ending:
            self._declare(Ending(kind, self.process.index, text))
        self._let_others_leave()

    def leave(self, timeout_s: float) -> None:
        """Ends this process's part after all others have done theirs; process 0 leaves last."""
        self.gather(_GOODBYE, "", timeout_s)
        self._leaving = True
        self._hurry.set()
        self._let_others_leave(_SHUTDOWN_S)
        if self.process.index == 0 and self._client:
            self._client.disconnect()
        # A thread in the middle of a call would crash the interpreter's end. The third is in none.
        for thread in self._threads[:2]:
            thread.join(_FAREWELL_S)

    def end_because_of(self, error: BaseException) -> NoReturn:
        """Says this process's last words, tells the others, and ends it with the exit code that fits."""
        echoed = self._cause_elsewhere(error)
        if self._announced or not self._exit.acquire(blocking=False):
            threading.Event().wait()  # another thread is ending the process
        if echoed:
            self._end(echoed)
        else:
            self._end_by_own_fault(error)

    def end_hung(self, text: str) -> NoReturn:
        """Ends this process from another thread than the main one, which hangs; see `topklm.distributed`."""
        if not self._exit.acquire(blocking=False):
            threading.Event().wait()
        me = self.process.index
        ending = Ending(Kind.HANG, me, f"{text} (process {me})")
        say_last_line(ending, me)
        self._last_words = (None, errors.EXIT_TRY_AGAIN)
        self.announce(ending.kind, ending.text)
        os._exit(errors.EXIT_TRY_AGAIN)

    def _guarded(self, work: Callable[[], None]) -> None:
        """Does a thread's work; a bug in it would leave the run unwatched, and so ends the process."""
        try:
            work()
        except jax.errors.JaxRuntimeError:
            # Mostly this process is leaving, or process 0 is gone, and XLA ends this one at any moment.
            if not self._hurry.wait(_FAREWELL_S):
                traceback.print_exc()
                os._exit(errors.EXIT_TRY_AGAIN)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    # Words that end the run.

    def _declare(self, ending: Ending) -> None:
        """Tells all processes how the run ends; only the first ending counts."""
        word = {"by": self.process.index, "secret": self._secret, **dataclasses.asdict(ending)}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone: then XLA ends all
            if self._client and self._client.set(_ENDING, json.dumps(word)):
                self._hear(ending)

    def _hear(self, ending: Ending) -> None:
        self._ending = ending
        self._ending_known.set()
        self._hurry.set()

    def _listen(self) -> None:
        """Waits for the run's ending, and then ends this process unless its main thread is about to."""
        ending = self._read(self._service.wait_for(_ENDING))
        self._hear(ending)
        if ending.process == self.process.index and self._announced:
            return
        time.sleep(_GRACE_S)
        if not self._announced and self._exit.acquire(blocking=False):
            self._end(ending)

    def _read(self, word: str) -> Ending:
        """Reads a word that ends the run; one that no process of the run can have written is a stranger's."""
        try:
            values = json.loads(word)
            by, hashed = values["by"], _sha256(values["secret"])
            ending = Ending(Kind(values["kind"]), int(values["process"]), errors.one_line(values["text"]))
            harmless = ending.heard(told_to_stop=False).exit_code == errors.EXIT_TRY_AGAIN
            if harmless and not self._met.is_set():
                return ending  # a process may be gone before all have met
            self._met.wait(_FAREWELL_S)
            if self._hashes.get(by) == hashed:
                return ending
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        return Ending(Kind.LATE, self.process.index, self._stranger)

    @property
    def _stranger(self) -> str:
        where = f"its coordination service at {self.process.address}"
        advice = f"let only the run's own hosts reach that port; {AGAIN}"
        return f"somebody outside of the run wrote to {where}: {advice}"

    # Processes that are gone.

    def _watch(self) -> None:
        """Declares a process gone that has no heartbeats, or whose number another process has taken."""
        interval_s = min(self._peer_timeout_s / 4, 5.0)
        first: dict[int, int] = {}
        while not (self._leaving and self.process.index):
            now = self._service.alive(self._count)
            self._last_contact = time.monotonic()
            if now.keys() == {self.process.index}:
                self._alone.set()
                if self._leaving:
                    return
            first = first or now
            if not self._ending:
                self._check_alive(first, now)
            if self._hurry.wait(interval_s):
                time.sleep(_LEAVING_POLL_S)

    def _check_alive(self, first: dict[int, int], now: dict[int, int]) -> None:
        silent = f"no sign of life for {self._peer_timeout_s:g} s"
        for index in range(self._count):
            if index in now and now[index] == first.get(index):
                continue
            if str(index) in self._service.values(f"topklm/{_GOODBYE}#1"):
                continue  # it has done its part
            if self._was_stopped():
                self._declare(Ending(Kind.GONE, self.process.index, silent))
            elif index not in now:
                self._declare(Ending(Kind.GONE, index, silent))
            else:
                self._declare(Ending(Kind.GONE, index, f"another process came as process {index}"))

    def _tick(self) -> None:
        """Notes when this whole process was stopped (SIGSTOP, a laptop's sleep)."""
        while True:
            time.sleep(_TICK_S)
            self._was_stopped()
            self._last_tick = time.monotonic()

    def _was_stopped(self) -> bool:
        """Returns whether this process did not run for about the peer timeout, a moment ago."""
        now = time.monotonic()
        if now - self._last_tick > self._peer_timeout_s / 2:
            self._stopped_until = now + self._peer_timeout_s
        return now < self._stopped_until

    # The end of this process.

    def _end(self, ending: Ending, *, aborted: bool = False) -> NoReturn:
        """Ends this process because of another one; the caller holds `_exit`."""
        ending = ending.heard(told_to_stop=self._told_to_stop())
        say_last_line(ending, self.process.index)
        self._last_words = (ending, ending.exit_code)
        if not aborted:  # else this thread may hold the client's lock
            self._let_others_leave()
        os._exit(ending.exit_code)

    def _let_others_leave(self, timeout_s: float = _FAREWELL_S) -> None:
        """Disconnects; process 0 instead waits until all others have, because the service goes with it."""
        if self._client is None:
            return
        if self.process.index == 0:
            self._alone.wait(timeout_s)
            return
        # The client's lock may be held by a thread that hangs.
        leaving = threading.Thread(target=self._client.disconnect, daemon=True)
        leaving.start()
        leaving.join(timeout_s)

    def _cause_elsewhere(self, error: BaseException) -> Ending | None:
        """Returns how another process ended the run, if that is why this one has an error."""
        if self._client is None or isinstance(error, KeyboardInterrupt) or errors.explain(error):
            return None  # these speak for themselves
        if isinstance(error, PeerLost):
            return self._ending
        # Collectives fail at once when a process dies; that it is gone is known after the peer timeout.
        in_collective = any(str(e).startswith(_COMMUNICATION_ERRORS) for e in _chain(error))
        self._ending_known.wait(_ECHO_S + (self._peer_timeout_s + _SLACK_S) * in_collective)
        if self._ending and not in_collective:
            traceback.print_exception(error)
        return self._ending

    def _end_by_own_fault(self, error: BaseException) -> NoReturn:
        """Reports an error that began here, as a single process would, and ends."""

        def fail() -> None:
            raise error

        me = self.process.index
        if text := errors.explain(error):
            code = errors.guarded(fail, errors.EXIT_TRY_AGAIN)
            kind = Kind.MISTAKE if code == errors.EXIT_USER_ERROR else Kind.FAILURE
            ending = Ending(kind, me, errors.one_line(text))
        elif isinstance(error, KeyboardInterrupt):
            code = errors.guarded(fail)
            ending = Ending(Kind.STOP, me, f"process {me} was interrupted; what was saved before stays")
        elif isinstance(error, PeerLost):
            code = errors.EXIT_TRY_AGAIN
            ending = Ending(Kind.LATE, me, str(error))
            say_last_line(ending, me)
        else:
            code = 1
            traceback.print_exception(error)
            ending = Ending(Kind.FAILURE, me, f"{type(error).__name__}: {' '.join(str(error).split())}")
        self._last_words = (None, code)
        self.announce(ending.kind, ending.text)
        sys.stdout.flush()
        os._exit(code)

    def _end_aborted(self, said: str) -> None:
        """Ends this process in place of XLA's abort."""
        if not self._exit.acquire(blocking=False):
            # Another thread is ending the process, and XLA's text may have come after its last line.
            deadline = time.monotonic() + _ECHO_S
            while self._last_words is None and time.monotonic() < deadline:
                time.sleep(_LEAVING_POLL_S)
            ending, code = self._last_words or (None, errors.EXIT_TRY_AGAIN)
            if ending:
                say_last_line(ending, self.process.index)
            os._exit(code)
        why = self._ending or (self._why_lost() if self._client else self._why_not_joined(said))
        self._end(why, aborted=True)

    def _why_not_joined(self, said: str) -> Ending:
        """Reads from XLA's text why this process could not connect, or the others did not."""
        count, me, address = self.process.count, self.process.index, self.process.address
        if found := coordination.missing_processes(said):
            waited = f"waited {self._start_timeout_s:g} s for {count} processes"
            came = f"{found[0]} came (missing: {found[1]})"
            text = f"{waited}, {came}: start the same command on every host"
        elif "from the same task" in said:
            text = f"another process came as process {me}: number them from 0 to {count - 1}"
        else:
            sys.stderr.write(said)
            text = f"process 0 at {address} is gone, or did not take this process, {me} (see above): {AGAIN}"
        return Ending(Kind.LATE, me, text)

    def _why_lost(self) -> Ending:
        """Returns why this process has lost the service."""
        me, silent = self.process.index, f"no sign of life for {self._peer_timeout_s:g} s"
        if me == 0 or self._was_stopped():
            return Ending(Kind.GONE, me, silent)
        if not coordination.is_listening(self.process, _ECHO_S):
            return Ending(Kind.GONE, 0, "its connection broke off")
        if time.monotonic() - self._last_contact > self._peer_timeout_s / 2:
            return Ending(Kind.GONE, 0, silent)
        return Ending(Kind.GONE, me, "the service closed its connection, or another process took its number")


def _check_fit(hellos: dict[int, dict[str, Any]]) -> None:
    """Refuses processes that were started for another number of them, or with other versions."""
    first = hellos[0]
    for index, hello in hellos.items():
        if hello["count"] != first["count"]:
            problem = f"started as one of {hello['count']} processes, process 0 as one of {first['count']}"
            raise UserError(f"process {index} failed: {problem}")
        if hello["versions"] != first["versions"]:
            theirs, ours = _listed(hello["versions"]), _listed(first["versions"])
            raise UserError(f"process {index} failed: runs {theirs}, process 0 {ours}: install the same")


def _listed(packages: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(packages.items()))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception and those it came from."""
    while error:
        yield error
        error = error.__cause__ or error.__context__
