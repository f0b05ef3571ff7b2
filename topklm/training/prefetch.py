"""Batches on their way to the devices: the next ones are transferred while the current step runs.

`topklm.data.stream` decides the content of a batch, `topklm.layout` how it lies over devices.
"""

from collections import deque
from collections.abc import Callable
import time
from typing import TYPE_CHECKING, Any

import jax

from topklm.data.stream import Batch

if TYPE_CHECKING:
    import grain

DeviceBatch = dict[str, jax.Array]  # a Batch of global arrays [B, T]


class Feed:
    """Gives out a stream's batches on the devices, and keeps the next ones under way.

    Every `next` gives out a batch that was sent earlier, and sends another after it. JAX transfers
    asynchronously, so no thread is needed: only taking a batch from the stream, which reads ahead by
    itself, costs the caller time.
    """

    def __init__(self, stream: "grain.DatasetIterator", put: Callable[[Batch], DeviceBatch], ahead: int = 2):
        """Reads nothing yet; `put` starts a batch's transfer, of `ahead` besides the one given out."""
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
        """Returns the share of the training time since the last call, in seconds, that went into waiting."""
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
