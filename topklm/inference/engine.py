"""Many texts continued at once, by one thread that owns the device; texts come and go at any time.

Who submits texts is told of their tokens from that thread. What a text gets does not depend on the others.
"""

import collections
from collections.abc import Callable, Sequence
import concurrent.futures
import logging
import threading
from typing import TypeVar

from topklm.config import ModelConfig
from topklm.inference.news import ClosedError, Deliver, FullError, Load, News
from topklm.inference.sizes import Sizes
from topklm.inference.slots import Slots
from topklm.inference.text import Text, Token
from topklm.inference.warm_up import warm_up as compile_early
from topklm.model import transformer

MOST_WAITING = 256

_STEPS = 4  # tokens of each text between two looks at who has come
_TOKENS_BETWEEN = 4096  # that are run of new texts before the others get their next token
_PATIENCE = 16  # looks, before the batch is made smaller

_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)


class Engine:
    """Continues texts; its methods may be called from any thread."""

    def __init__(
        self,
        config: ModelConfig,
        params: transformer.Parameters,
        stop_token: int,
        *,
        sizes: Sizes | None = None,
        most_waiting: int = MOST_WAITING,
    ):
        """Takes a model; `start` begins.

        Args:
            config: The model's shape.
            params: Its parameters, on one device or a mesh.
            stop_token: A text ends when it is drawn; see `News`.
            sizes: Of batches and so on; default `Sizes.of(config)`.
            most_waiting: Texts that may wait for a row.
        """
        self._sizes = sizes or Sizes.of(config)
        self._config, self._most_waiting = config, most_waiting
        self._slots = Slots(config, params, stop_token, self._sizes)
        self._deliver: dict[Text, Deliver] = {}  # of texts in rows; of this thread alone
        self._small_for = 0
        # What follows is shared, under the condition.
        self._changed = threading.Condition()
        self._waiting: collections.deque[tuple[Text, Deliver]] = collections.deque()
        self._given_up: set[Text] = set()
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._closed = False
        self._n_running = 0
        self._thread = threading.Thread(target=self._run, name="topklm-engine", daemon=True)

    def start(self, warm_up: Callable[[int, int], None] | None = None) -> None:
        """Begins to work.

        Args:
            warm_up: Compile first what most traffic needs, and tell this how many of how many parts are done;
                None: compile when it is needed, while all wait.
        """
        if warm_up is not None:
            compile_early(self._slots, self._config, self._sizes, warm_up)
        self._thread.start()

    def submit(self, texts: Sequence[Text], deliver: Deliver) -> None:
        """Queues texts, all or none.

        Args:
            texts: In the order in which they begin.
            deliver: Is called in the engine's thread with what has happened to some of them; must not block.

        Raises:
            FullError: If too many wait.
            ClosedError: If the engine has been closed.
        """
        ended = [News(text, [], text.finished) for text in texts if text.finished]
        going = [(text, deliver) for text in texts if not text.finished]
        with self._changed:
            if self._closed:
                raise ClosedError
            if len(self._waiting) + len(going) > self._most_waiting + max(0, self._n_free()):
                raise FullError
            self._waiting += going
            if ended:
                self._calls.append(lambda: _give(deliver, ended))
            self._changed.notify()

    def give_up(self, texts: Sequence[Text]) -> None:
        """Ends texts that nobody wants any more, and frees their rows; of them there will be no news."""
        with self._changed:
            self._given_up |= set(texts)
            self._waiting = collections.deque(one for one in self._waiting if one[0] not in self._given_up)
            self._changed.notify()

    def call(self, function: Callable[[], _Result]) -> "concurrent.futures.Future[_Result]":
        """Has a function called in the engine's thread, between tokens; for other work on the device.

        Raises:
            ClosedError: If the engine has been closed.
        """
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

    def load(self) -> Load:
        """How busy it is."""
        with self._changed:
            return Load(self._n_running, len(self._waiting), self._sizes.most_rows, self._most_waiting)

    def close(self) -> None:
        """Ends all texts, and the thread; waits for both."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _n_free(self) -> int:
        return self._sizes.most_rows - self._n_running

    # In the engine's thread

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._has_work():
                    self._changed.wait()
                if self._closed:
                    break
                given_up, self._given_up = self._given_up, set()
                calls, self._calls = list(self._calls), collections.deque()
            try:
                self._look(given_up, calls)
            except Exception:
                _log.exception("the engine failed; the texts that it was at are lost")
                self._fail()
        with self._changed:
            waiting, calls = list(self._waiting), list(self._calls)
            self._waiting.clear()
        for text, deliver in [*self._deliver.items(), *waiting]:
            _give(deliver, [News(text, [], "closed")])
        for call in calls:
            call()

    def _has_work(self) -> bool:
        return bool(self._closed or self._waiting or self._given_up or self._calls or self._n_running)

    def _look(self, given_up: set[Text], calls: Sequence[Callable[[], None]]) -> None:
        """Everything that is done between two looks at who has come."""
        for text in given_up:
            self._slots.take_out(text)
            self._deliver.pop(text, None)
        for call in calls:
            call()
        came = self._take_in()
        new = self._slots.advance(1 if came else _STEPS)
        with self._changed:  # before anybody is told, who may look at once
            self._n_running = len(self._slots.texts)
        self._tell(new)
        self._make_smaller()

    def _take_in(self) -> bool:
        """Puts texts that wait into free rows; whether there were any."""
        left, came = _TOKENS_BETWEEN, False
        while left > 0 and (group := self._next_group()):
            came = True
            for text, deliver in group:
                self._deliver[text] = deliver
            self._slots.put([text for text, _ in group])
            left -= len(group) * self._seen(group[0][0])
        return came

    def _next_group(self) -> list[tuple[Text, Deliver]]:
        """The text that has waited longest, and others of its size."""
        with self._changed:
            if not self._waiting or not self._slots.n_free:
                return []
            size = self._seen(self._waiting[0][0])
            most = min(self._slots.n_free, self._sizes.together(size))
            group = [one for one in self._waiting if self._seen(one[0]) == size][:most]
            chosen = {text for text, _ in group}
            self._waiting = collections.deque(one for one in self._waiting if one[0] not in chosen)
            self._n_running += len(group)
            return group

    def _seen(self, text: Text) -> int:
        """The size of what the model sees of a text."""
        return self._sizes.length(min(len(text.tokens) - text.first, self._config.context_length))

    def _tell(self, new: Sequence[tuple[Text, list[Token]]]) -> None:
        by_listener: dict[Deliver, list[News]] = {}
        for text, tokens in new:
            deliver = self._deliver[text]
            if text.finished:
                del self._deliver[text]
            if tokens or text.finished:
                by_listener.setdefault(deliver, []).append(News(text, tokens, text.finished))
        for deliver, news in by_listener.items():
            _give(deliver, news)

    def _make_smaller(self) -> None:
        """Where fewer rows would do for a while: growing and shrinking copy the cache."""
        n = len(self._slots.texts)
        fewer = self._slots.n_rows > self._sizes.rows(n)
        self._small_for = self._small_for + 1 if fewer else 0
        if not n or self._small_for >= _PATIENCE:
            self._slots.shrink()
            self._small_for = 0

    def _fail(self) -> None:
        lost, self._deliver = self._deliver, {}
        self._slots.clear()
        self._small_for = 0
        with self._changed:
            self._n_running = 0
        for text, deliver in lost.items():
            _give(deliver, [News(text, [], "failed")])


def _give(deliver: Deliver, news: list[News]) -> None:
    try:
        deliver(news)
    except Exception:  # theirs: it must not end the texts of others
        _log.exception("a listener failed")
