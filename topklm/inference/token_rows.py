"""Token ids as people give them, checked: a text, ids, several of either, NumPy or JAX arrays, traced ones.

Knows nothing of models but the size of their vocabulary. Dims: B rows, T tokens.
"""

from collections.abc import Callable, Sequence
import numbers
import reprlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topklm.errors import ArgumentError

_LARGEST = 2**31 - 1

Encode = Callable[[str], np.ndarray]
_IDS = "token ids [T] or [B, T], or a list of such rows"
_ALLOWED = f"a text, several texts, {_IDS}"

_EMPTY = "is empty: every row must hold at least one token"


class Row(NamedTuple):
    """One sequence: its ids, int32[n], and the text that they were made of, if it was given as a text."""

    ids: np.ndarray
    text: str | None = None


class Rows(NamedTuple):
    """Sequences as one array.

    Attributes:
        ids: int32[B, T], shorter rows padded on their right: NumPy, or JAX where it was traced or on
            several devices.
        lengths: int32[B], tokens of each row.
    """

    ids: Any
    lengths: np.ndarray


def is_traced(value: Any) -> bool:
    """Tells whether it, or something in a list, is known only when a program of JAX runs."""
    if isinstance(value, list | tuple):
        return any(map(is_traced, value))
    return isinstance(value, jax.core.Tracer)


def read(tokens: Any, vocab_size: int, encode: Encode, fill: int, name: str = "tokens") -> Rows:
    """Makes one array of what was given.

    Args:
        tokens: A text, or token ids [T], for one row; [B, T], or a list of texts or of ids, for several.
        vocab_size: V; of ids that are traced it is not checked that they are below it.
        encode: Ids of a text, int[n].
        fill: The id that shorter rows are padded with.
        name: Of the argument, for messages.

    Raises:
        ValueError: In one line, for anything else, for rows without a token, and for ids out of range.
    """
    if is_traced(tokens):
        return _of_jax(jnp.asarray(tokens), vocab_size, name)
    if isinstance(tokens, jax.Array) and len(tokens.sharding.device_set) > 1:
        return _of_jax(tokens, vocab_size, name)
    rows, _ = rows_of(tokens, vocab_size, encode, name)
    if not rows or not all(len(row.ids) for row in rows):
        raise ArgumentError(_EMPTY, field=name)
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
    """Reads ids that are known.

    Args:
        tokens: As in `read`.
        vocab_size: V.
        encode: As in `read`; None: a text is refused.
        name: As in `read`.

    Returns:
        The rows, and whether it is a batch: False for one text and for ids [T].

    Raises:
        ValueError: As `read`; rows may be empty here.
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
    """Reads a text, or the ids of one row."""
    if isinstance(item, str) and encode is not None:
        try:
            item.encode()
        except UnicodeEncodeError:
            raise ArgumentError(
                "half of a surrogate pair stands alone in the text; give whole characters", field=name
            ) from None
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
        raise ArgumentError(
            f"{reprlib.repr(item)} is no row of token ids: {name} must be {allowed}", field=name
        )
    least_and_most = [] if len(ids) == 0 else [np.min(ids), np.max(ids)]
    for token in map(int, least_and_most):
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
    """Tells whether it stands for one id, and not for a row."""
    return isinstance(value, numbers.Number) or getattr(value, "shape", None) == ()


def _is_list(value: Any) -> bool:
    """Tells whether it is a sequence of things."""
    # Bytes are a sequence of integers, but nobody means those as ids.
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def _of_jax(ids: jax.Array, vocab_size: int, name: str) -> Rows:
    """Reads an array that stays where it is."""
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ArgumentError(f"has dtype {ids.dtype}: must be integers", field=name)
    if ids.ndim not in (1, 2):
        raise ArgumentError(f"has shape {ids.shape}: must be [T] or [B, T]", field=name)
    if not ids.size:
        raise ArgumentError(_EMPTY, field=name)
    if not is_traced(ids) and ids.is_fully_addressable:
        rows_of(ids, vocab_size, None, name)
    ids = ids.astype(jnp.int32)
    ids = ids[None] if ids.ndim == 1 else ids
    return Rows(ids, np.full(ids.shape[0], ids.shape[1], np.int32))


def documents(segment_ids: Any, shape: tuple[int, int]) -> Any:
    """Checks which document each token belongs to.

    Args:
        segment_ids: Integers [T] or [B, T], of tokens that stand together the same ones; may be traced.
        shape: [B, T] of the tokens.

    Returns:
        int32[B, T].

    Raises:
        ValueError: In one line, for anything else.
    """
    traced = is_traced(segment_ids)
    try:
        array = jnp.asarray(segment_ids) if traced else np.asarray(segment_ids)
    except ValueError:
        raise ArgumentError("rows must have the same length", field="segment_ids") from None
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ArgumentError(f"has dtype {array.dtype}: must be integers", field="segment_ids")
    array = array[None] if array.ndim == 1 else array
    if array.shape != shape:
        raise ArgumentError(
            f"has shape {array.shape}: must be that of the tokens, {shape}", field="segment_ids"
        )
    if not traced and any(np.diff(row).astype(bool).sum() + 1 != len(np.unique(row)) for row in array):
        raise ArgumentError("the tokens of a document must stand together, in one piece", field="segment_ids")
    if not traced and array.size and not (abs(int(array.min())) <= _LARGEST >= abs(int(array.max()))):
        raise ArgumentError(field="segment_ids", allowed=f"from {-_LARGEST} to {_LARGEST}")
    return array.astype(np.int32)


def positions_in(segment_ids_BT: jax.Array) -> jax.Array:
    """Counts positions of tokens inside their documents, from 0, int32[B, T]; of ids as from `documents`."""
    index_BT = jnp.broadcast_to(jnp.arange(segment_ids_BT.shape[1]), segment_ids_BT.shape)
    begins_BT = segment_ids_BT != jnp.roll(segment_ids_BT, 1, axis=1)
    return index_BT - jax.lax.cummax(jnp.where(begins_BT, index_BT, 0), axis=1)
