"""Batches on their way to the devices: the next ones are transferred while the current step runs.

`topklm.data.stream` decides the content of a batch, `topklm.layout` how it lies over devices.
"""

from collections import deque
from collections.abc import Callable, Iterator
import time
from typing import Any

import grain
import jax

from topklm.config import Config
from topklm.data.dataset import Mixture
from topklm.data.stream import Batch, HeldoutPart, heldout_batches
from topklm.layout import Layout

DeviceBatch = dict[str, jax.Array]  # a Batch of global arrays [B, T]


class Feed:
    """Gives out a stream's batches on the devices, and keeps the next ones under way.

    Every `next` gives out a batch that was sent earlier, and sends another after it. JAX transfers
    asynchronously, so no thread is needed: only taking a batch from the stream, which reads ahead by
    itself, costs the caller time.
    """

    def __init__(self, stream: grain.DatasetIterator, put: Callable[[Batch], DeviceBatch], ahead: int = 2):
        """Reads nothing yet.

        Args:
            stream: Of batches; it may end.
            put: Starts a batch's transfer.
            ahead: Batches under way besides the one given out; they take device memory.
        """
        self.waited = 0.0  # seconds the caller has waited for the stream; sending is not waiting
        self._stream, self._put, self._ahead = stream, put, ahead
        self._under_way: deque[tuple[DeviceBatch, Any]] = deque()  # batch, the stream's state after it
        self._state = stream.get_state()
        self._seen = (0.0, 0.0)  # seconds of training and of waiting at the last `wait_share`

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> DeviceBatch:
        while len(self._under_way) <= self._ahead and self._send_one():
            pass
        if not self._under_way:
            raise StopIteration
        batch, self._state = self._under_way.popleft()
        return batch

    def state(self) -> Any:
        """Returns the stream's state after the last batch given out, whatever was read since."""
        return self._state

    def set_state(self, state: Any) -> None:
        """Goes on where `state` was taken; forgets the batches under way."""
        self._under_way.clear()
        self._stream.set_state(state)
        self._state = state

    def wait_share(self, seconds: float) -> float:
        """Returns the share of the training time since the last call that was spent waiting for the stream.

        Args:
            seconds: Spent in training so far.
        """
        (before, waited_before), self._seen = self._seen, (seconds, self.waited)
        return (self.waited - waited_before) / max(seconds - before, 1e-9)

    def _send_one(self) -> bool:
        began = time.perf_counter()
        try:
            batch = next(self._stream)
        except StopIteration:
            return False
        finally:
            self.waited += time.perf_counter() - began
        self._under_way.append((self._put(batch), self._stream.get_state()))
        return True


def heldout_feed(
    config: Config, mixture: Mixture, layout: Layout, part: HeldoutPart
) -> Iterator[DeviceBatch]:
    """Yields the held-out batches on the devices, for one evaluation."""
    batch_size = layout.round_up(config.eval.batch_size)
    # Documents are packed one after another, so every process makes whole batches.
    rows = layout.process_rows(batch_size)
    for batch in heldout_batches(
        mixture, context_length=config.model.context_length, batch_size=batch_size, part=part
    ):
        yield layout.put_batch(batch, batch_size, rows)
