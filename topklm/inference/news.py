"""What an engine says to those who give it texts."""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple

from topklm.inference.text import Text, Token


class FullError(Exception):
    """Too many texts wait already."""


class ClosedError(Exception):
    """The engine has been closed."""


class News(NamedTuple):
    """What has happened to a text.

    `finished` is "stop" (the last of `tokens` is the stop token), "length", "failed" (a fault of ours, which
    is in the log), "closed"; None while the text goes on.
    """

    text: Text
    tokens: list[Token]
    finished: str | None


Deliver = Callable[[list[News]], None]


@dataclasses.dataclass(frozen=True)
class Load:
    """How busy an engine is, in texts."""

    running: int
    waiting: int
    most_running: int
    most_waiting: int
