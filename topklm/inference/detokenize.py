"""Text out of tokens that come one after another: pieces that never end inside a character, and stop strings.

Knows nothing of models.
"""

from collections.abc import Sequence, Set
from typing import Any

from topklm.data.tokenizer import Tokenizer
from topklm.errors import ArgumentError

BROKEN = "\N{REPLACEMENT CHARACTER}"  # of bytes that are no whole character, or not one yet
_LONGEST_CHARACTER = 4  # bytes of UTF-8
_CONTEXT = 8  # tokens of the prompt that are decoded again, for what a token's text owes to the one before


class TextStream:
    """The text of tokens as they come, up to the first stop string.

    The pieces, one after another, are the text. A character whose bytes have not all come waits; so does the
    beginning of a stop string.

    Attributes:
        stopped: Whether a stop string has come; nothing follows.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()):
        """Begins after a prompt, whose text is not returned and in which no stop string is looked for."""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = check_stop(stop)
        self._ids = [int(token) for token in prompt[-_CONTEXT:]]
        # Of the tokens, those before `_given` are in the text; decoding begins at `_begin`, so that what a
        # token costs does not grow with the text.
        self._begin, self._given = 0, len(self._ids)
        self._tried = 0  # tokens that had come at the call before
        self._waiting = ""  # decoded, but perhaps the beginning of a stop string

    def add(self, tokens: Sequence[int]) -> str:
        """Returns the text that some more tokens make certain; often longer or shorter than theirs."""
        return self._next(tokens, last=False)

    def end(self) -> str:
        """Returns the text that was still waiting; no tokens may follow."""
        return self._next([], last=True)

    def _next(self, tokens: Sequence[int], last: bool) -> str:
        if self.stopped:
            return ""
        self._tried = len(self._ids)
        self._ids += [int(token) for token in tokens]
        self._waiting += self._decoded(last)
        if (found := first_stop(self._waiting, self._stop)) is not None:
            self.stopped = True
            piece, self._waiting = self._waiting[:found], ""
            return piece
        held = 0 if last else _beginning_of_a_stop(self._waiting, self._stop)
        cut = len(self._waiting) - held
        piece, self._waiting = self._waiting[:cut], self._waiting[cut:]
        return piece

    def _decoded(self, last: bool) -> str:
        """Decodes the tokens that were not returned yet, unless their text ends inside a character."""
        before = self._tokenizer.decode(self._ids[self._begin : self._given])
        now = self._tokenizer.decode(self._ids[self._begin :])
        if now.endswith(BROKEN) and not last:
            # The prompt's own tokens may end so; nothing is lost by waiting. Whole
            # characters are returned at once.
            whole = now.rstrip(BROKEN)
            return self._give_part(before, whole)
        self._begin, self._given = self._given, len(self._ids)
        return now[len(before) :]

    def _give_part(self, before: str, whole: str) -> str:
        """Returns the text of the tokens that end before a broken last character."""
        # Where text that came before ended, it ended broken, else it had been given.
        for end in range(len(self._ids) - 1, max(self._given, self._tried), -1):
            text = self._tokenizer.decode(self._ids[self._begin : end])
            if not text.endswith(BROKEN) and len(text) <= len(whole):
                self._begin, self._given = self._given, end
                return text[len(before) :]
        return ""


def split_at_character(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, Sequence[int]]:
    """Gives the text of tokens up to their last whole character, and those that begin one more."""
    for n in range(min(_LONGEST_CHARACTER, len(ids) + 1)):
        text = tokenizer.decode(ids[: len(ids) - n])
        if not text.endswith(BROKEN):
            break
    # After bytes that are no text, nothing is whole; those of a character that goes on are among the last.
    return text, ids[len(ids) - n :]


def until_stopped(stream: TextStream, tokens: Sequence[int]) -> int:
    """Counts the tokens that it takes until a stop string is complete; all without one."""
    for number, token in enumerate(tokens):
        stream.add([token])
        if stream.stopped:
            return number + 1
    return len(tokens)


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Returns where the stop string begins that is the first to be complete; None without one.

    Of several that end together it is the longest. So what is found does not depend on how much text comes
    at once.
    """
    found = [(place + len(one), place) for one in stop if (place := text.find(one)) >= 0]
    return min(found)[1] if found else None


def check_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns stop strings as a tuple.

    Raises:
        ValueError: If one is no text, or empty.
    """
    # Anything else is refused as if it were one text.
    is_several = stop is None or (isinstance(stop, Sequence | Set) and not isinstance(stop, str))
    several: tuple[Any, ...] = tuple(stop or ()) if is_several else (stop,)
    for one in several:
        if not isinstance(one, str) or not one:
            raise ArgumentError(field="stop", value=repr(one), allowed="a text that is not empty, or several")
    return several


def _beginning_of_a_stop(text: str, stop: Sequence[str]) -> int:
    """Counts the last characters that may be the beginning of a stop string."""
    longest = max((len(one) for one in stop), default=1) - 1
    return next(
        (n for n in range(min(longest, len(text)), 0, -1) if any(one.startswith(text[-n:]) for one in stop)),
        0,
    )
