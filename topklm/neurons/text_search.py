"""Text found in a store, and the tokens that it is made of.

The text of a document is what its tokens spell, byte by byte, so a character may be of several tokens and a
token may end within one. A byte that is of no character counts as a character of its own. Tokens of a
tokenizer that changes its text spell what `Tokenizer.token_strings` shows, byte tokens apart.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import math
import re
import time
from typing import Any

import numpy as np

from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError, visible
from topklm.neurons.store import Store

try:
    import regex
except ImportError:  # it comes with an extra, and only patterns need it
    regex = None

OVERLAP = 1024  # tokens before and after a stretch that a match in it may look at
MAX_PATTERN = 1000  # characters

_STRETCH = 16_384  # tokens of a document that are searched at once
_READ = 1 << 18  # tokens read from the store at once
# Characters of a pattern once its repetitions are written out, as the library does: it takes 0.5 kB for each.
_MAX_WRITTEN_OUT = 200_000
# (?R), (?1), (?&name) and the like: without an end, the library takes a gigabyte to find out.
_CALLS = re.compile(r"\(\?(?:R|[+-]?\d|&|P>)")
_SHOWN = 60  # characters of a pattern in a message
_FIRST_TRY_S = 0.05
_SHORTEST_TRY_S = 0.01


@dataclasses.dataclass(frozen=True, eq=False)
class Matches:
    """Where a pattern matches in the N tokens of a store.

    Attributes:
        count: How often; matches do not overlap.
        touched: bool[N], the tokens that hold a part of a match.
        ends: bool[N], the last token of each match: a neuron of a causal model cannot know the match before.
    """

    count: int
    touched: np.ndarray
    ends: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class _Stretch:
    """A part of a document, with some text before and after it.

    Attributes:
        text: The spelling of its n tokens.
        first_token: Which token of the store is the first of the n.
        first_byte: Of the text, counted from the start of the store.
        begins: int64[n + 1], the byte of the text with which each token begins.
        inside: The bytes of the text from which on, and before which, a match of this stretch starts.
    """

    text: str
    first_token: int
    first_byte: int
    begins: np.ndarray
    inside: tuple[int, int]


class StoredText:
    """The text of a store's documents.

    Decodes a stretch at a time, so memory does not grow with the length of documents.

    Args:
        store: Of activations.
        tokenizer: The one that made its tokens.

    Raises:
        UserError: If it is another one.
    """

    def __init__(self, store: Store, tokenizer: Tokenizer):
        if tokenizer.sha256 != store.metadata.tokenizer_sha256:
            raise UserError(
                f"{store.folder} holds tokens of another tokenizer: delete it, and run topklm neurons harvest"
            )
        self._store = store
        self._pieces = tokenizer.token_bytes(range(tokenizer.vocab_size))
        self._lengths = np.array([len(piece) for piece in self._pieces], np.int64)

    def matches(self, pattern: str, *, ignore_case: bool = True, timeout_s: float = 10.0) -> Matches:
        """Searches all documents for a regular expression of the package `regex`.

        A match lies within a document, at whose ends `^` and `$` match. Long documents are searched in
        stretches, each with `OVERLAP` tokens before and after. A match within so many tokens,
        including its looking ahead and back, is found once and whole; of a longer match, parts may
        be found, or nothing.

        Args:
            pattern: At most `MAX_PATTERN` characters; may not match the empty text.
            ignore_case: Whether "sea" also finds "Sea".
            timeout_s: For the whole search, seconds by the clock.

        Raises:
            UserError: For a pattern that is none, calls itself, matches the empty text, or takes too much
                time or memory.
        """
        compiled = _compile(pattern, ignore_case)
        patience = _Patience(timeout_s)
        touched, ends = np.zeros((2, self._store.n_tokens), bool)
        count, searched = 0, 0  # bytes of the store up to the end of the last match
        for stretch in self._stretches():
            with _limits(pattern, timeout_s):
                spans = _spans(compiled, stretch, searched - stretch.first_byte, patience)
            if not len(spans):
                continue
            count += len(spans)
            first = np.searchsorted(stretch.begins[1:], spans[:, 0], side="right")
            last = np.searchsorted(stretch.begins[:-1], spans[:, 1], side="left") - 1
            n = len(stretch.begins) - 1
            depth = np.cumsum(np.bincount(first, minlength=n + 1) - np.bincount(last + 1, minlength=n + 1))
            touched[stretch.first_token :][:n] |= depth[:n] > 0
            ends[stretch.first_token + last] = True
            searched = stretch.first_byte + int(spans[-1, 1])
        return Matches(count, touched, ends)

    def tokens_equal(self, *token_ids: int) -> np.ndarray:
        """Returns bool[N], the tokens that are one of these.

        Raises:
            UserError: For an id that is not in the vocabulary.
        """
        wanted = np.zeros(len(self._pieces), bool)
        for token_id in token_ids:
            if not 0 <= token_id < len(wanted):
                raise UserError(f"token {token_id}: must be from 0 to {len(wanted) - 1}")
            wanted[token_id] = True
        found = np.zeros(self._store.n_tokens, bool)
        for begin in range(0, len(found), _READ):
            found[begin : begin + _READ] = wanted[self._store.tokens(begin, begin + _READ)]
        return found

    def _stretches(self) -> Iterator[_Stretch]:
        n_bytes = 0  # of what came before
        read, ids = 0, np.zeros(0, np.int64)  # tokens that are in memory, and the place of the first
        for begin, end in self._documents():
            for first in range(begin, end, _STRETCH):
                stop = min(first + _STRETCH, end)
                seen = max(first - OVERLAP, begin), min(stop + OVERLAP, end)
                if seen[1] > read + len(ids):
                    read, ids = seen[0], self._store.tokens(seen[0], max(seen[1], seen[0] + _READ))
                tokens = ids[seen[0] - read : seen[1] - read]
                begins = np.concatenate([[0], np.cumsum(self._lengths[tokens])])
                inside = int(begins[first - seen[0]]), int(begins[stop - seen[0]])
                text = b"".join([self._pieces[i] for i in tokens.tolist()]).decode("utf-8", "surrogateescape")
                yield _Stretch(text, seen[0], n_bytes - inside[0], begins, inside)
                n_bytes += inside[1] - inside[0]

    def _documents(self) -> Iterator[tuple[int, int]]:
        """Yields the first token of each, and the one after its last."""
        begin, number = 0, None
        for at in range(0, self._store.n_tokens, _READ):
            numbers = self._store.documents(at, at + _READ)
            changes = at + np.flatnonzero(np.diff(numbers, prepend=numbers[0] if number is None else number))
            for end in changes.tolist():
                yield begin, end
                begin = end
            number = numbers[-1]
        if begin < self._store.n_tokens:
            yield begin, self._store.n_tokens


def _compile(pattern: str, ignore_case: bool) -> Any:
    if regex is None:
        raise UserError("regular expressions need the package regex; run: pip install 'topklm[explore]'")
    if not pattern:
        raise UserError("regex is empty: give a pattern such as 'sea|ocean'")
    if len(pattern) > MAX_PATTERN:
        raise UserError(f"regex has {len(pattern):,} characters: at most {MAX_PATTERN:,}; shorten it")
    name = _name(pattern)
    # The library would take minutes and all memory, and does not listen to a timeout yet.
    if _written_out(pattern) > _MAX_WRITTEN_OUT:
        raise UserError(f"{name}: repeats too much, as {{1000}} within {{1000}} does; lower the counts")
    if _CALLS.search(pattern):
        raise UserError(f"{name}: calls itself or a group of it, which is not supported; write it out")
    try:
        compiled = regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)
    except RecursionError as e:
        raise UserError(f"{name}: nested too deeply; use fewer groups") from e
    except Exception as e:  # the library raises its own error, and others for patterns that it stumbles over
        raise UserError(f"{name}: is no regular expression ({visible(str(e))}); mend it") from e
    if compiled.flags & regex.REVERSE:
        raise UserError(f"{name}: (?r) searches backwards, which is not supported; leave it out")
    with _limits(pattern, timeout := 1.0):
        if compiled.search("", timeout=timeout):
            raise _EmptyMatchError
    return compiled


class _Patience:
    """How long a search may go on by the clock; the library knows processor time of the whole process only.

    Of that, a search may get much less than goes by on the clock, where others compute, or be charged for
    more than it takes, where other threads do. So it is tried for a short time, and for longer ones from
    where it came to, each in proportion to what the clock showed before.
    """

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds
        self._try, self._rate = _FIRST_TRY_S, 1.0  # processor seconds; those per second of the clock

    def spans(self, compiled: Any, text: str, first: int, stop: int) -> list[tuple[int, int]]:
        """Returns all matches that start from `first` on and before `stop`, as begin and end.

        Raises:
            TimeoutError: When the time is over.
            _EmptyMatchError: For a match of no characters.
        """
        spans: list[tuple[int, int]] = []
        while True:
            began, used = time.monotonic(), time.process_time()
            if began >= self._end:
                raise TimeoutError
            seconds = max(min(self._try, (self._end - began) * self._rate), _SHORTEST_TRY_S)
            try:
                for match in compiled.finditer(text, first, timeout=seconds, concurrent=True):
                    span = match.span()
                    if span[0] >= stop:
                        break
                    if span[0] == span[1]:
                        raise _EmptyMatchError
                    spans.append(span)
                return spans
            except TimeoutError:
                first = spans[-1][1] if spans else first
                self._rate = (time.process_time() - used) / max(time.monotonic() - began, 1e-9)
                self._try *= 2


def _spans(compiled: Any, stretch: _Stretch, searched: int, patience: _Patience) -> np.ndarray:
    """Returns int64[m, 2], the bytes with which the matches of a stretch begin, and those after their last.

    Args:
        compiled: The pattern.
        stretch: Of a document.
        searched: The byte from which on a match may start.
        patience: Of the search.

    Raises:
        TimeoutError: When the time is over.
        _EmptyMatchError: For a match of no characters.
    """
    text, ends = stretch.text, None
    first, stop = 0, len(text)
    if stretch.inside != (0, stretch.begins[-1]):
        ends = _bytes_of_characters(text)
        first, stop = np.searchsorted(ends, [max(stretch.inside[0], searched), stretch.inside[1]]).tolist()
    spans = patience.spans(compiled, text, first, stop)
    if not spans:
        return np.zeros((0, 2), np.int64)
    return (_bytes_of_characters(text) if ends is None else ends)[np.array(spans)]


class _EmptyMatchError(Exception):
    """A match of no characters."""


@contextlib.contextmanager
def _limits(pattern: str, timeout_s: float) -> Iterator[None]:
    """Tells the user, if what happens inside says that a pattern is of no use."""
    name = _name(pattern)
    try:
        yield
    except _EmptyMatchError as e:
        raise UserError(
            f"{name}: matches the empty text, and so everywhere; have it match at least a character"
        ) from e
    except TimeoutError as e:
        raise UserError(
            f"{name}: not done within {timeout_s:g} s; make it simpler: repetitions within repetitions, as "
            "in (a+)+, may take for ever"
        ) from e
    except MemoryError as e:
        raise UserError(f"{name}: takes too much memory; make it simpler") from e


def _bytes_of_characters(text: str) -> np.ndarray:
    """Returns int64[n + 1], the byte with which each character begins, and the number of bytes."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    lengths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    lengths[(points >= 0xDC80) & (points <= 0xDCFF)] = 1  # a byte that is of no character
    return np.concatenate([[0], np.cumsum(lengths)])


def _written_out(pattern: str) -> int:
    """Returns at most so many characters when every repetition is written as often as it has to match.

    Counts all as nested, also in comments and sets; and once more without what `(?x)` skips, if that is more.
    """
    forms = pattern, re.sub(r"\s|#.*", "", pattern)
    counts = [[max(int(n), 1) for n in re.findall(r"\{\s*(\d+)", form)] for form in forms]
    return len(pattern) * max(math.prod(some) for some in counts)


def _name(pattern: str) -> str:
    shown = pattern if len(pattern) <= _SHOWN else pattern[:_SHOWN] + "..."
    return f"regex = {visible(shown)}"
