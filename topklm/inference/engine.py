"""Continuous batching: one thread owns the device and decodes many sequences; they come and go at any time.

Updates on sequences are delivered from that thread. A sequence's tokens do not depend on the others.
"""

from collections import deque
from collections.abc import Callable, Iterable
import concurrent.futures
import logging
import threading
from typing import NamedTuple, TypeVar

from topklm.config import ModelConfig
from topklm.inference.scheduler import Scheduler, warm_up
from topklm.inference.sequence import Sequence, ServingBuckets, Token
from topklm.model import transformer

MOST_WAITING = 256

_STEPS = 4  # tokens of each sequence that are decoded before new requests are looked at
_TOKENS_BETWEEN = 4096  # of new sequences that are prefilled before the others get their next token
_PATIENCE = 16  # rounds, before the batch is made smaller

_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)


class SequenceUpdate(NamedTuple):
    """New tokens of a sequence, or its end.

    `finished` is "stop" (the last of `tokens` is the stop token), "length", "failed" (a fault of ours, which
    is in the log), "closed"; None while the sequence goes on.
    """

    sequence: Sequence
    tokens: list[Token]
    finished: str | None


OnUpdate = Callable[[list[SequenceUpdate]], None]


class FullError(Exception):
    """Raised when too many sequences wait already."""


class ClosedError(Exception):
    """Raised by an engine that has been closed."""


class EngineLoad(NamedTuple):
    """How busy an engine is, in sequences; and how many times it will compile programs when it is not."""

    running: int
    waiting: int
    most_running: int
    to_compile: int


class Engine:
    """Decodes sequences; its methods may be called from any thread."""

    def __init__(
        self,
        config: ModelConfig,
        params: transformer.Parameters,
        stop_token: int,
        buckets: ServingBuckets,
        *,
        most_waiting: int = MOST_WAITING,
    ):
        """Takes a model, see `Scheduler`, and how many sequences may wait for a slot; `start` begins."""
        self._buckets = buckets
        self._config, self._most_waiting = config, most_waiting
        self._scheduler = Scheduler(config, params, stop_token, self._buckets)
        self._on_update: dict[Sequence, OnUpdate] = {}  # of those in slots; only its thread changes it
        self._small_for = 0
        # The rest is shared, under the condition.
        self._changed = threading.Condition()
        self._waiting: list[tuple[Sequence, OnUpdate]] = []
        self._aborted: set[Sequence] = set()
        self._calls: list[Callable[[], None]] = []
        self._closed = False
        self._to_compile: deque[Callable[[], None]] = deque()
        self._compiled: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run, name="topklm-engine", daemon=True)

    def start(
        self, to_compile: Iterable[Callable[[], None]] = (), compiled: Callable[[], None] = lambda: None
    ) -> None:
        """Starts the thread, which calls these functions (of `programs`, say) one by one while it is idle.

        A request waits for the one that runs, and programs that it needs are compiled when it comes.
        `compiled` is called after each, in the engine's thread.
        """
        self._to_compile += to_compile
        self._compiled = compiled
        self._thread.start()

    def programs(self) -> list[Callable[[], None]]:
        """Returns functions for `start` that compile what most traffic needs, see `scheduler.warm_up`."""
        return warm_up(self._scheduler, self._config, self._buckets)

    def submit(self, sequences: Iterable[Sequence], on_update: OnUpdate) -> None:
        """Queues sequences, all or none; they begin in this order.

        `on_update` is called in the engine's thread with updates on some of them, and must not block.
        FullError if too many wait, ClosedError if the engine has been closed.
        """
        sequences = list(sequences)
        ended = [SequenceUpdate(one, [], one.finished) for one in sequences if one.finished]
        going = [(one, on_update) for one in sequences if not one.finished]
        with self._changed:
            if self._closed:
                raise ClosedError
            n_free = max(0, self._buckets.most_slots - len(self._on_update))
            if len(self._waiting) + len(going) > self._most_waiting + n_free:
                raise FullError
            self._waiting += going
            if ended:
                self._calls.append(lambda: _deliver(on_update, ended))
            self._changed.notify()

    def abort(self, sequences: Iterable[Sequence]) -> None:
        """Ends sequences that nobody wants any more, and frees their slots; no update on them will follow."""
        with self._changed:
            self._aborted |= set(sequences)
            self._waiting = [one for one in self._waiting if one[0] not in self._aborted]
            self._changed.notify()

    def call(self, function: Callable[[], _Result]) -> "concurrent.futures.Future[_Result]":
        """Calls a function in the engine's thread, between tokens; raises ClosedError as `submit`."""
        future: concurrent.futures.Future[_Result] = concurrent.futures.Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as e:
                future.set_exception(e)

        with self._changed:
            if self._closed:
                raise ClosedError
            self._calls.append(work)
            self._changed.notify()
        return future

    def load(self) -> EngineLoad:
        """Returns how busy it is."""
        with self._changed:
            n_running, n_waiting = len(self._on_update), len(self._waiting)
            return EngineLoad(n_running, n_waiting, self._buckets.most_slots, len(self._to_compile))

    def close(self) -> None:
        """Ends all sequences, and the thread; waits for both."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    # In the engine's thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._has_work() or self._to_compile)
                if self._closed:
                    break
                is_idle = not self._has_work()
                aborted, self._aborted = self._aborted, set()
                calls, self._calls = self._calls, []
            if is_idle:
                self._compile()
                continue
            try:
                self._round(aborted, calls)
            except Exception:
                _log.exception("the engine failed; the sequences that it was decoding are lost")
                self._fail()
        with self._changed:
            waiting, self._waiting = self._waiting, []
        for one, on_update in [*self._on_update.items(), *waiting]:
            _deliver(on_update, [SequenceUpdate(one, [], "closed")])
        for call in self._calls:
            call()

    def _compile(self) -> None:
        """Calls one of the functions that compile; without them, programs are compiled when needed."""
        function = self._to_compile[0]
        try:
            function()
        except Exception:
            _log.exception("programs could not be compiled early")
            self._scheduler.clear()
        with self._changed:
            self._to_compile.popleft()
        try:
            self._compiled()
        except Exception:  # theirs
            _log.exception("a listener failed")

    def _has_work(self) -> bool:
        return bool(self._closed or self._waiting or self._aborted or self._calls or self._on_update)

    def _round(self, aborted: set[Sequence], calls: list[Callable[[], None]]) -> None:
        """Admits sequences that wait, decodes a few tokens of all, and delivers them."""
        for one in aborted:
            self._scheduler.remove(one)
            self._on_update.pop(one, None)
        for call in calls:
            call()
        came = self._admit()
        self._report(self._scheduler.decode(1 if came else _STEPS))
        self._shrink()

    def _admit(self) -> bool:
        """Puts sequences that wait into free slots; returns whether there were any."""
        left, came = _TOKENS_BETWEEN, False
        while left > 0 and (group := self._next_group()):
            came = True
            self._scheduler.add([one for one, _ in group])
            left -= len(group) * self._prompt_bucket(group[0][0])
        return came

    def _next_group(self) -> list[tuple[Sequence, OnUpdate]]:
        """Takes the sequence that has waited longest, and others of its bucket."""
        with self._changed:
            n_free = self._buckets.most_slots - len(self._scheduler.sequences)
            if not self._waiting or not n_free:
                return []
            size = self._prompt_bucket(self._waiting[0][0])
            most = min(n_free, self._buckets.together(size))
            group = [one for one in self._waiting if self._prompt_bucket(one[0]) == size][:most]
            self._waiting = [one for one in self._waiting if one not in group]
            self._on_update |= dict(group)
            return group

    def _prompt_bucket(self, one: Sequence) -> int:
        return self._buckets.prompt(len(one.visible(self._config)))

    def _report(self, new: list[tuple[Sequence, list[Token]]]) -> None:
        by_listener: dict[OnUpdate, list[SequenceUpdate]] = {}
        for one, tokens in new:
            on_update = self._on_update[one]
            if one.finished:
                del self._on_update[one]
            if tokens or one.finished:
                by_listener.setdefault(on_update, []).append(SequenceUpdate(one, tokens, one.finished))
        for on_update, updates in by_listener.items():
            _deliver(on_update, updates)

    def _shrink(self) -> None:
        """Takes fewer slots if they would have done for a while: growing and shrinking copy the cache."""
        n = len(self._scheduler.sequences)
        fewer = self._scheduler.n_slots > self._buckets.batch(n)
        self._small_for = self._small_for + 1 if fewer else 0
        if not n or self._small_for >= _PATIENCE:
            self._scheduler.shrink()
            self._small_for = 0

    def _fail(self) -> None:
        lost, self._on_update = self._on_update, {}
        self._scheduler.clear()
        self._small_for = 0
        for one, on_update in lost.items():
            _deliver(on_update, [SequenceUpdate(one, [], "failed")])


def _deliver(on_update: OnUpdate, updates: list[SequenceUpdate]) -> None:
    try:
        on_update(updates)
    except Exception:  # theirs: it must not end the sequences of others
        _log.exception("a listener failed")
