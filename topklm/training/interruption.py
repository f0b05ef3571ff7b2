"""Ctrl-C and SIGTERM: the first asks the loop to finish its step and save, the second ends at once."""

from collections.abc import Iterator
import contextlib
import os
import signal
import types

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Truthy once a signal has asked to stop; `signal_name` says which."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        if self:
            os._exit(128 + number)
        self.signal_name = signal.Signals(number).name


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Catches SIGINT and SIGTERM inside the block; only the main thread may enter it."""
    request = StopRequest()
    before = {number: signal.signal(number, request._receive) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
