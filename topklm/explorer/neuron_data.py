"""The statistics, the text and the activations of one checkpoint of a run, for pages.

The token ids of the whole store are held in memory, 2 bytes each in most vocabularies; everything else stays
on the disk until a page asks for it.
"""

from collections.abc import Sequence
import dataclasses
import functools
import re
from typing import Any

import numpy as np
import pyarrow as pa

from topklm.checkpoint.run_folder import TOKENIZER_FILE
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError, visible
from topklm.neurons.labels import Labels
from topklm.neurons.paths import NeuronsFolder
from topklm.neurons.search import StoredText
from topklm.neurons.statistics import table
from topklm.neurons.store import NeuronBlock, Store

LISTED_TOKENS = 10  # of each kind on a page
_KEPT_EVENTS = 8  # neurons whose events are remembered: a page, and the contexts opened on it

# How what is not printed is shown inside of a token.
# A token that is only a part of a character is shown by its bytes.
_PART = re.compile(r"\\x[0-9a-f]{2}")
_MOST_PARTS = 4  # bytes of a character in UTF-8
_SPELLED = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "←"})


class NotThereError(UserError):
    """The requested neuron or token does not exist."""


@dataclasses.dataclass(frozen=True)
class StoreWindow:
    """A stretch of one document of the store.

    Attributes:
        begin: Its first token, counted through the store.
        ids: int[n].
        document: Its number.
    """

    begin: int
    ids: np.ndarray
    document: int


class _Column:
    """A column of the table; gives a row as Arrow's `as_py` does, in a tenth of the time.

    Args:
        column: Of numbers, or lists of numbers; null or not, but not within a list.
    """

    def __init__(self, column: pa.ChunkedArray):
        array = column.combine_chunks()
        self._is_null = array.is_null().to_numpy(zero_copy_only=False)
        self._offsets = None
        if pa.types.is_list(array.type):
            self._offsets, array = array.offsets.to_numpy(), array.values
        elif array.null_count:
            array = array.fill_null(0)
        self._values = array.to_numpy(zero_copy_only=False)

    def __getitem__(self, number: int) -> Any:
        if self._is_null[number]:
            return None
        if self._offsets is None:
            return self._values[number].item()
        return self._values[self._offsets[number] : self._offsets[number + 1]].tolist()


class NeuronData:
    """Opens a checkpoint's store and statistics.

    Args:
        folder: Where they are.

    Raises:
        UserError: If they are missing, damaged, or not of one another.
    """

    def __init__(self, folder: NeuronsFolder):
        self.folder = folder
        rows, self.measured = table.read(folder.table)
        self.store = Store(folder.store)
        self.tokenizer = Tokenizer.load(folder.run / TOKENIZER_FILE)
        self._check_same()
        self.rows: pa.Table = rows.combine_chunks()
        self._check_complete()
        self.labels = Labels(folder.labels)
        self._events = functools.lru_cache(_KEPT_EVENTS)(self.store.neuron)
        self._ahead: dict[tuple[int, int], NeuronBlock] = {}
        self._columns: dict[str, _Column] = {}
        self._texts: dict[int, str] = {}
        self._parts: set[int] = set()  # tokens, of those in _texts, that may be a part of a character
        self._characters: dict[tuple[int, ...], tuple[int, str | None]] = {}

    @property
    def n_neurons(self) -> int:
        """Of all layers together."""
        return len(self.measured.layers) * self.measured.d_model

    def named(self) -> dict[tuple[int, int], str]:
        """Returns the labels of neurons that there are, by layer and number.

        Raises:
            UserError: If the file of labels is damaged.
        """
        layers, d = self.measured.layers, self.measured.d_model
        return {
            place: text for place, text in self.labels.all().items() if place[0] in layers and place[1] < d
        }

    def number(self, layer: int, neuron: int) -> int:
        """Returns which row a neuron has.

        Raises:
            UserError: If there is no such neuron.
        """
        layers, d = self.measured.layers, self.measured.d_model
        if layer not in layers:
            raise NotThereError(f"layer {layer}: must be one of {', '.join(map(str, layers))}")
        if not 0 <= neuron < d:
            raise NotThereError(f"neuron {neuron}: must be from 0 to {d - 1}")
        return layers.index(layer) * d + neuron

    def place(self, number: int) -> tuple[int, int]:
        """Returns the inverse of `number`: layer and neuron."""
        layer, neuron = divmod(number, self.measured.d_model)
        return self.measured.layers[layer], neuron

    def row(self, number: int, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Columns of one row as plain Python values; all of them if none are named."""
        return {name: self._values(name)[number] for name in names or self.rows.schema.names}

    def _values(self, name: str) -> _Column:
        if name not in self._columns:
            self._columns[name] = _Column(self.rows[name])
        return self._columns[name]

    def column(self, name: str) -> np.ndarray:
        """Returns float64[n_neurons] of a column of numbers, NaN where there is none."""
        return self.rows[name].to_numpy().astype(np.float64)

    def events(self, layer: int, neuron: int) -> NeuronBlock:
        """Returns all events of a neuron; those of the last few neurons are remembered."""
        found = self._ahead.get((layer, neuron))
        return self._events(layer, neuron) if found is None else found

    def read_ahead(self, layer: int, begin: int, end: int) -> None:
        """Reads the events of neighbouring neurons, which is faster than one by one; lets earlier ones go."""
        block = self.store.block(layer, begin, end)
        self._ahead = {(layer, begin + number): block.one(number) for number in range(end - begin)}

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """int[N], all tokens of the store."""
        return self.store.tokens(0, self.store.n_tokens)

    @functools.cached_property
    def documents(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each document begins, int64[n + 1] with the end of the last; and their numbers, int[n]."""
        numbers = self.store.documents(0, self.store.n_tokens)
        starts = np.flatnonzero(np.diff(numbers.astype(np.int64), prepend=-1))
        return np.append(starts, len(numbers)), numbers[starts]

    @functools.cached_property
    def stored_text(self) -> StoredText:
        """The text of the store, to be searched."""
        return StoredText(self.store, self.tokenizer)

    def window(self, at: int, size: int) -> StoreWindow:
        """Returns text of one document around a token, with the token as far inside as can be.

        Args:
            at: The token, counted through the store.
            size: At most so many tokens.

        Raises:
            UserError: If the store has no such token.
        """
        return self.windows([at], size)[0]

    def windows(self, places: Sequence[int], size: int) -> list[StoreWindow]:
        """Returns `window` around each of some tokens."""
        for place in places:
            if not 0 <= place < self.store.n_tokens:
                raise NotThereError(f"token {place}: must be from 0 to {self.store.n_tokens - 1}")
        at = np.array(places, np.int64)
        starts, numbers = self.documents
        inside = np.searchsorted(starts, at, side="right") - 1
        first, stop = starts[inside], starts[inside + 1]
        begins = np.maximum(first, np.minimum(at - size // 2, stop - size))
        ends = np.minimum(begins + size, stop)
        facts = zip(begins.tolist(), ends.tolist(), numbers[inside].tolist(), strict=True)
        return [StoreWindow(begin, self.ids[begin:end], document) for begin, end, document in facts]

    def texts(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Returns each token as a page shows it: unprintable characters are spelled out."""
        wanted, known = _as_list(ids), self._texts
        try:
            return list(map(known.__getitem__, wanted))
        except KeyError:
            self._learn([i for i in set(wanted) if i not in known])
        return list(map(known.__getitem__, wanted))

    def running_texts(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Returns the same for text in a row: a character of several tokens stands at the last of them."""
        wanted = _as_list(ids)
        texts, at = self.texts(wanted), 0
        if self._parts.isdisjoint(wanted):
            return texts
        while at < len(texts):
            n, whole = 1, None
            if wanted[at] in self._parts:
                n, whole = self._character(tuple(wanted[at : at + _MOST_PARTS]))
            if whole is not None:
                texts[at : at + n] = [*[""] * (n - 1), whole]
            at += n
        return texts

    def _learn(self, ids: Sequence[int]) -> None:
        for token_id, text in zip(ids, self.tokenizer.token_strings(ids), strict=True):
            seen = shown(text)
            if _PART.search(seen):
                self._parts.add(token_id)
            self._texts[token_id] = seen

    def _character(self, ids: tuple[int, ...]) -> tuple[int, str | None]:
        """Returns how many of these tokens make whole characters, and those; (1, None) if none does."""
        if ids not in self._characters:
            found: tuple[int, str | None] = (1, None)
            for n in range(2, len(ids) + 1):
                whole = self.tokenizer.decode(ids[:n])
                if "\N{REPLACEMENT CHARACTER}" not in whole:
                    found = n, shown(whole)
                    break
            self._characters[ids] = found
        return self._characters[ids]

    def plain_text(self, begin: int, end: int) -> str:
        """Returns the text of a stretch of the store."""
        return self.tokenizer.decode(self.ids[begin:end])

    def _check_same(self) -> None:
        table.check_same(self.folder.table, self.measured, self.store)
        if self.tokenizer.sha256 != self.store.metadata.tokenizer_sha256:
            raise UserError(
                f"{self.folder.store} was made with another tokenizer than "
                f"{self.folder.run / TOKENIZER_FILE}: restore that, or delete the store and harvest again"
            )

    def _check_complete(self) -> None:
        d = self.measured.d_model
        layers = np.repeat(self.measured.layers, d)
        neurons = np.tile(np.arange(d), len(self.measured.layers))
        found = [self.rows[name].to_numpy() for name in ("layer", "neuron")]
        if not (np.array_equal(found[0], layers) and np.array_equal(found[1], neurons)):
            raise UserError(
                f"{self.folder.table} does not hold every neuron once: delete it, and run topklm "
                "neurons measure"
            )


def _as_list(ids: Sequence[int] | np.ndarray) -> list[int]:
    return ids.tolist() if isinstance(ids, np.ndarray) else list(ids)


def shown(text: str) -> str:
    """Returns text with line breaks as signs, and everything else that is not printed spelled out."""
    return visible(text.translate(_SPELLED))
