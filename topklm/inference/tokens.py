"""Token ids as people give them, checked, and the text of tokens that come one after another.

Tokens are a text, ids, several of either, NumPy or JAX arrays, or traced ones. Text comes in pieces that
never end inside a character, up to a stop string. Of models only the size of the vocabulary is known here.
Dims: B rows, T tokens.
"""

from collections.abc import Callable, Sequence, Set
import numbers
import reprlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topklm.data.tokenizer import Tokenizer
from topklm.errors import ArgumentError

_LARGEST = 2**31 - 1

Encode = Callable[[str], np.ndarray]
_IDS = "token ids [T] or [B, T], or a list of such rows"
_ALLOWED = f"a text, several texts, {_IDS}"
_EMPTY = "is empty: every row must hold at least one token"
BROKEN = "\N{REPLACEMENT CHARACTER}"  # of bytes that are no whole character, or not one yet
_LONGEST_CHARACTER = 4  # bytes of UTF-8
_CONTEXT = 8  # tokens of the prompt that are decoded again, for what a token's text owes to the one before


class Row(NamedTuple):
    """One sequence: its ids, int32[n], and the text that they were made of, if it was given as a text."""

    ids: np.ndarray
    text: str | None = None


class Rows(NamedTuple):
    """Sequences as one array, of NumPy, or of JAX where it was traced or on several devices."""

    ids: Any  # int32[B, T], shorter rows padded on their right
    lengths: np.ndarray  # int32[B], tokens of each row


def is_traced(value: Any) -> bool:
    """Tells whether it, or something in a list, is known only when a program of JAX runs."""
    if isinstance(value, list | tuple):
        return any(map(is_traced, value))
    return isinstance(value, jax.core.Tracer)


def read(tokens: Any, vocab_size: int, encode: Encode, fill: int) -> Rows:
    """Makes one array of a text, or token ids [T]: one row; of [B, T], or a list of texts or of ids: several.

    Shorter rows are padded with `fill`; `encode` gives ids of a text, int[n]. ValueError, in one line, for
    anything else, for rows without a token, and for ids not below V; of traced ones that is not checked.
    """
    if is_traced(tokens) or (isinstance(tokens, jax.Array) and len(tokens.sharding.device_set) > 1):
        return _of_jax(jnp.asarray(tokens), vocab_size)
    rows, _ = rows_of(tokens, vocab_size, encode)
    if not rows or not all(len(row.ids) for row in rows):
        raise ArgumentError(_EMPTY, field="tokens")
    return joined([row.ids for row in rows], fill)


def joined(rows: Sequence[np.ndarray], fill: int) -> Rows:
    """Makes one array of rows int[n_i], each at the left."""
    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.full((len(rows), lengths.max(initial=0)), fill, np.int32)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    return Rows(ids, lengths)


def rows_of(
    tokens: Any, vocab_size: int, encode: Encode | None, name: str = "tokens"
) -> tuple[list[Row], bool]:
    """Reads ids that are known, as `read` does; returns rows, which may be empty, and whether it is a batch.

    One text, and ids [T], are none. Without `encode` a text is refused.
    """
    if is_traced(tokens):
        raise ArgumentError(field=name, allowed="known here, and not be traced by jax.jit, vmap or grad")
    if isinstance(tokens, str):
        return [_row(tokens, vocab_size, encode, name)], False
    if hasattr(tokens, "__array__"):
        array = np.asarray(tokens)
        if array.dtype.kind not in "OUT":
            if array.ndim not in (1, 2):
                raise ArgumentError(f"has shape {array.shape}: must be [T] or [B, T]", field=name)
            tokens = [array] if array.ndim == 1 else list(array)
            return [_row(row, vocab_size, encode, name) for row in tokens], array.ndim == 2
        tokens = array.tolist()  # texts, or rows of different lengths
        if isinstance(tokens, str):
            return rows_of(tokens, vocab_size, encode, name)
    if not _is_list(tokens):
        raise ArgumentError(field=name, value=reprlib.repr(tokens), allowed=_ALLOWED if encode else _IDS)
    items = list(tokens)
    if all(map(_is_number, items)):
        return [_row(items, vocab_size, encode, name)], False
    return [_row(item, vocab_size, encode, name) for item in items], True


def row_of(ids: Any, vocab_size: int, name: str = "tokens") -> np.ndarray:
    """Reads the ids [n] of one sequence, int32[n]; errors as `read`."""
    row = _row(ids, vocab_size, None, name).ids
    if row.size == 0:
        raise ArgumentError(_EMPTY, field=name)
    return row


def _row(item: Any, vocab_size: int, encode: Encode | None, name: str) -> Row:
    if isinstance(item, str) and encode is not None:
        try:
            item.encode()
        except UnicodeEncodeError:
            text = "half of a surrogate pair stands alone in the text; give whole characters"
            raise ArgumentError(text, field=name) from None
        return Row(np.asarray(encode(item), np.int32), item)
    if hasattr(item, "__array__"):
        array = np.asarray(item)
        if array.dtype.kind not in "iuO":
            raise ArgumentError(f"has dtype {array.dtype}: must be integers", field=name)
        if array.ndim != 1:
            raise ArgumentError(f"a row has shape {array.shape}: must be [T]", field=name)
        ids = array if array.dtype.kind != "O" else [_id(one, name) for one in array.tolist()]
    elif _is_list(item):
        ids = [_id(one, name) for one in item]
    else:
        allowed = _ALLOWED if encode else _IDS
        text = f"{reprlib.repr(item)} is no row of token ids: {name} must be {allowed}"
        raise ArgumentError(text, field=name)
    for token in [] if len(ids) == 0 else [int(np.min(ids)), int(np.max(ids))]:
        if not 0 <= token < vocab_size:
            raise ArgumentError(f"token {reprlib.repr(token)} must be from 0 to {vocab_size - 1}", field=name)
    return Row(np.asarray(ids, np.int32))


def _id(value: Any, name: str) -> int:
    """Reads one id, which may be an array without axes."""
    value = np.asarray(value).item() if hasattr(value, "__array__") and np.shape(value) == () else value
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentError(f"{reprlib.repr(value)} is no token id: must be an integer", field=name)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Number) or getattr(value, "shape", None) == ()


def _is_list(value: Any) -> bool:
    # Bytes are a sequence of integers, but nobody means those as ids.
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def _of_jax(ids: jax.Array, vocab_size: int) -> Rows:
    """Reads an array that stays where it is."""
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ArgumentError(f"has dtype {ids.dtype}: must be integers", field="tokens")
    if ids.ndim not in (1, 2):
        raise ArgumentError(f"has shape {ids.shape}: must be [T] or [B, T]", field="tokens")
    if not ids.size:
        raise ArgumentError(_EMPTY, field="tokens")
    if not is_traced(ids) and ids.is_fully_addressable:
        rows_of(ids, vocab_size, None)
    ids = jnp.atleast_2d(ids.astype(jnp.int32))
    return Rows(ids, np.full(ids.shape[0], ids.shape[1], np.int32))


def documents(segment_ids: Any, shape: tuple[int, int]) -> Any:
    """Returns documents of tokens, integers [T] or [B, T], as int32[B, T]; raises ValueError for others."""
    traced = is_traced(segment_ids)
    try:
        array = jnp.asarray(segment_ids) if traced else np.asarray(segment_ids)
    except ValueError:
        raise ArgumentError("rows must have the same length", field="segment_ids") from None
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ArgumentError(f"has dtype {array.dtype}: must be integers", field="segment_ids")
    array = array[None] if array.ndim == 1 else array
    if array.shape != shape:
        text = f"has shape {array.shape}: must be that of the tokens, {shape}"
        raise ArgumentError(text, field="segment_ids")
    if traced:
        return array.astype(np.int32)
    if any(np.count_nonzero(np.diff(row)) + 1 != len(np.unique(row)) for row in array):
        raise ArgumentError("the tokens of a document must stand together, in one piece", field="segment_ids")
    if array.size and not (abs(int(array.min())) <= _LARGEST >= abs(int(array.max()))):
        raise ArgumentError(field="segment_ids", allowed=f"from {-_LARGEST} to {_LARGEST}")
    return array.astype(np.int32)


def positions_in(segment_ids_BT: jax.Array) -> jax.Array:
    """Counts positions of tokens inside their documents, from 0, int32[B, T]; of ids as from `documents`."""
    index_BT = jnp.broadcast_to(jnp.arange(segment_ids_BT.shape[1]), segment_ids_BT.shape)
    begins_BT = segment_ids_BT != jnp.roll(segment_ids_BT, 1, axis=1)
    return index_BT - jax.lax.cummax(jnp.where(begins_BT, index_BT, 0), axis=1)


class TextStream:
    """The text of tokens as they come, up to the first stop string.

    The pieces, one after another, are the text. A character whose bytes have not all come waits; so does the
    beginning of a stop string.

    Attributes:
        stopped: Whether a stop string has come; nothing follows.
        n_tokens: Tokens so far, the prompt's included, up to the one that completed a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()):
        """Begins after a prompt, whose text is not returned and in which no stop string is looked for."""
        self.stopped, self.n_tokens = False, len(prompt)
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
        # One by one, where it matters which of them completes a stop string.
        groups = [[token] for token in tokens] if self._stop else [tokens]
        return "".join(self._next(some, last=False) for some in groups)

    def end(self) -> str:
        """Returns the text that was still waiting; no tokens may follow."""
        return self._next([], last=True)

    def _next(self, tokens: Sequence[int], last: bool) -> str:
        if self.stopped:
            return ""
        self._tried = len(self._ids)
        self.n_tokens += len(tokens)
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
            # The prompt's own tokens may end so; nothing is lost by waiting. Whole characters are returned
            # at once. Where text that came before ended, it ended broken, else it had been given.
            whole = now.rstrip(BROKEN)
            for end in range(len(self._ids) - 1, max(self._given, self._tried), -1):
                text = self._tokenizer.decode(self._ids[self._begin : end])
                if not text.endswith(BROKEN) and len(text) <= len(whole):
                    self._begin, self._given = self._given, end
                    return text[len(before) :]
            return ""
        self._begin, self._given = self._given, len(self._ids)
        return now[len(before) :]


def split_at_character(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, Sequence[int]]:
    """Gives the text of tokens up to their last whole character, and those that begin one more."""
    for n in range(min(_LONGEST_CHARACTER, len(ids) + 1)):
        text = tokenizer.decode(ids[: len(ids) - n])
        if not text.endswith(BROKEN):
            break
    # After bytes that are no text, nothing is whole; those of a character that goes on are among the last.
    return text, ids[len(ids) - n :]


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Returns where the stop string begins that is the first to be complete; None without one.

    Of several that end together it is the longest. So what is found does not depend on how much text comes
    at once.
    """
    found = [(place + len(one), place) for one in stop if (place := text.find(one)) >= 0]
    return min(found)[1] if found else None


def check_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns stop strings as a tuple; raises ValueError if one is no text, or empty."""
    # Anything else is refused as if it were one text.
    is_several = stop is None or (isinstance(stop, Sequence | Set) and not isinstance(stop, str))
    several: tuple[Any, ...] = tuple(stop or ()) if is_several else (stop,)
    for one in several:
        if not isinstance(one, str) or not one:
            raise ArgumentError(field="stop", value=repr(one), allowed="a text that is not empty, or several")
    return several


def _beginning_of_a_stop(text: str, stop: Sequence[str]) -> int:
    """Counts the last characters that may be the beginning of a stop string."""
    longest = max((len(one) - 1 for one in stop), default=0)
    lengths = range(min(longest, len(text)), 0, -1)
    return next((n for n in lengths if any(one.startswith(text[-n:]) for one in stop)), 0)
