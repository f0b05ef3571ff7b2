"""The statistics, the text and the activations of one checkpoint of a run, for pages.

`NeuronRows` has a row for each neuron, and text: `NeuronData` those of a harvested checkpoint,
`topklm.explorer.traces.StepData` those of a traced step.

The token ids of the whole store are held in memory once a page shows text, 2 bytes each in most vocabularies;
everything else stays on the disk until a page asks for it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import functools
import math
from pathlib import Path
import re
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from topklm.checkpoint.run_folder import TOKENIZER_FILE
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError, visible
from topklm.neurons import NeuronsFolder
from topklm.neurons.labels import Labels
from topklm.neurons.search import StoredText
from topklm.neurons.statistics import catalog, table
from topklm.neurons.store import NeuronBlock, Store

LISTED_TOKENS = 10  # of each kind on a page
_KEPT_EVENTS = 8  # neurons whose events are remembered: a page, and the contexts opened on it
_AHEAD_EVENTS = 2**21  # read at once, some 80 MB with all that is made of them

# A token that is only a part of a character is shown by its bytes.
_PART = re.compile(r"\\x[0-9a-f]{2}")
_MOST_PARTS = 4  # bytes of a character in UTF-8
# How what is not printed is shown inside of a token.
_SPELLED = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "←", "\N{NO-BREAK SPACE}": "⍽"})


class NotThereError(UserError):
    """The requested neuron or token does not exist."""


class StoreWindow(NamedTuple):
    """A stretch of one document of the store."""

    begin: int  # its first token, counted through the store
    ids: np.ndarray  # int[n]
    document: int


class RowReader:
    """A column of numbers or lists of them, or nulls; gives a row in a tenth of Arrow's `as_py` time."""

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


class NeuronRows:
    """A row of figures for each neuron at one step, and the text that they were measured on."""

    def __init__(
        self,
        rows: pa.Table,
        measured: table.TableMetadata,
        store: Store,
        tokenizer: Tokenizer,
        labels: Labels,
        origin: tuple[Path, str],
    ):
        self.measured, self.store, self.tokenizer, self.labels = measured, store, tokenizer, labels
        self.rows = rows.combine_chunks()
        if not holds_every_neuron(self.rows, measured.layers, measured.d_model):
            raise UserError(f"{origin[0]} does not hold every neuron once: {origin[1]}")
        self._values = functools.cache(lambda name: RowReader(self.rows[name]))
        self._text = functools.cache(self._shown)
        self._parts: set[int] = set()  # tokens, of those shown, that may be a part of a character
        self._characters = functools.cache(self._whole_characters)
        self._ordered = functools.cache(self._in_order)

    @property
    def figures(self) -> Mapping[str, catalog.Figure]:
        """The numbers of a row that pages show, by the names of their columns."""
        return catalog.numbers()

    @property
    def n_neurons(self) -> int:
        """Of all layers together."""
        return self.rows.num_rows

    @functools.cached_property
    def readable(self) -> np.ndarray:
        """int64[n_neurons], numbers of all neurons, see `table.readable_first`."""
        return table.readable_first(self.rows)

    def named(self) -> dict[tuple[int, int], str]:
        """Returns labels of neurons that there are, by layer and number; UserError for a damaged file."""
        layers, d = self.measured.layers, self.measured.d_model
        return {
            at: text
            for at, text in self.labels.all(self.measured.step).items()
            if at[0] in layers and at[1] < d
        }

    def number(self, layer: int, neuron: int) -> int:
        """Returns which row a neuron has; UserError if there is no such neuron."""
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
        """Returns columns of one row as plain Python values; all of them if none are named."""
        return {name: self._values(name)[number] for name in names or self.rows.schema.names}

    def strongest_examples(self, number: int) -> list[int]:
        """Returns where in the store the strongest examples of a neuron are, the strongest first."""
        row = self.row(number, ["examples", "example_parts"])
        found = zip(row["examples"] or (), row["example_parts"] or (), strict=True)
        return [at for at, part in found if part == 0]

    @functools.cached_property
    def occurrences(self) -> np.ndarray:
        """int64[V], how often each token stands in the store."""
        return np.bincount(self.ids, minlength=self.tokenizer.vocab_size)

    def rank(self, number: int, name: str) -> float | None:
        """Returns the share of a layer's neurons whose figure is below that of a neuron; None without one."""
        value = self.row(number, [name])[name]
        if value is None:
            return None
        ordered = self._ordered(name, number // self.measured.d_model)
        return float(np.searchsorted(ordered, value) / len(ordered))

    def _in_order(self, name: str, place: int) -> np.ndarray:
        d = self.measured.d_model
        values = self.column(name)[place * d : (place + 1) * d]
        return np.sort(values[np.isfinite(values)])

    def column(self, name: str) -> np.ndarray:
        """Returns float64[n_neurons] of a column of numbers, NaN where there is none."""
        return self.rows[name].to_numpy().astype(np.float64)

    def events(self, layer: int, neuron: int) -> NeuronBlock:
        """Returns the events of a neuron that are known: all, or those of its examples."""
        raise NotImplementedError

    def activations(self, layer: int, neuron: int, bounds: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Returns a neuron's activations on stretches of the store, float32[n] of each; 0: not known either.

        `bounds` are the first token of each stretch, counted through the store, and the one after its last.
        """
        events, found = self.events(layer, neuron), []
        inside = np.searchsorted(events.tokens, np.reshape(bounds, (-1, 2))).tolist()
        for (begin, end), (first, stop) in zip(bounds, inside, strict=True):
            values = np.zeros(end - begin, np.float32)
            values[events.tokens[first:stop] - begin] = events.values[first:stop]
            found.append(values)
        return found

    def counted(self, layer: int, neuron: int, ids: Sequence[int]) -> list[int] | None:
        """Returns at how many tokens of each kind the neuron is active; None where that is not known."""
        active = self.ids[self.events(layer, neuron).tokens]
        return [int(np.count_nonzero(active == one)) for one in ids]

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """int[N], all tokens of the store."""
        return self.store.tokens(0, self.store.n_tokens)

    @functools.cached_property
    def _losses(self) -> np.ndarray:
        return self.store.losses(0, self.store.n_tokens)

    def loss(self, at: int, after: int | None = None) -> float | None:
        """Returns the loss of a token of the store, nats; None if it is not of the document of `after`."""
        starts, _ = self.documents
        if at >= self.store.n_tokens or (after is not None and at in starts):
            return None
        value = float(self._losses[at])
        return value if math.isfinite(value) else None

    @functools.cached_property
    def documents(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each document begins, int64[n + 1] with the end of the last; and their numbers, int[n]."""
        numbers = self.store.documents(0, self.store.n_tokens)
        starts = document_starts(numbers)
        return starts, numbers[starts[:-1]]

    def window(self, at: int, size: int) -> StoreWindow:
        """Returns at most `size` tokens of a document around one; UserError if there is no such token."""
        return self.windows([at], size)[0]

    def windows(self, positions: Sequence[int], size: int) -> list[StoreWindow]:
        """Returns `window` around each of some tokens."""
        for position in positions:
            if not 0 <= position < self.store.n_tokens:
                raise NotThereError(f"token {position}: must be from 0 to {self.store.n_tokens - 1}")
        starts, numbers = self.documents
        documents, begins, ends = window_bounds(starts, np.array(positions, np.int64), size)
        facts = zip(begins.tolist(), ends.tolist(), numbers[documents].tolist(), strict=True)
        return [StoreWindow(begin, self.ids[begin:end], document) for begin, end, document in facts]

    def plain_text(self, begin: int, end: int) -> str:
        """Returns the text of a stretch of the store."""
        return self.tokenizer.decode(self.ids[begin:end])

    def texts(self, ids: Sequence[int]) -> list[str]:
        """Returns each token as a page shows it: unprintable characters are spelled out."""
        return list(map(self._text, ids))

    def _shown(self, token_id: int) -> str:
        text = shown(self.tokenizer.token_strings([token_id])[0])
        if _PART.search(text):
            self._parts.add(token_id)
        return text

    def running_texts(self, ids: np.ndarray) -> list[str]:
        """Returns the same for text in a row: a character of several tokens stands at the last of them."""
        wanted, at = ids.tolist(), 0
        texts = self.texts(wanted)
        if self._parts.isdisjoint(wanted):
            return texts
        while at < len(texts):
            n, whole = 1, None
            if wanted[at] in self._parts:
                n, whole = self._characters(tuple(wanted[at : at + _MOST_PARTS]))
            if whole is not None:
                texts[at : at + n] = [*[""] * (n - 1), whole]
            at += n
        return texts

    def _whole_characters(self, ids: tuple[int, ...]) -> tuple[int, str | None]:
        """Returns how many of these tokens make whole characters, and those; (1, None) if none does."""
        for n in range(2, len(ids) + 1):
            text = self.tokenizer.decode(ids[:n])
            if "\N{REPLACEMENT CHARACTER}" not in text:
                return n, shown(text)
        return 1, None


class NeuronData(NeuronRows):
    """Opens a checkpoint's store and statistics; UserError if missing, damaged, or not of one another."""

    def __init__(self, folder: NeuronsFolder):
        self.folder = folder
        rows, measured = table.read(folder.table)
        store, tokenizer = Store(folder.store), Tokenizer.load(folder.run / TOKENIZER_FILE)
        table.check_same(folder.table, measured, store)
        if tokenizer.sha256 != store.metadata.tokenizer_sha256:
            raise UserError(
                f"{folder.store} was made with another tokenizer than "
                f"{folder.run / TOKENIZER_FILE}: restore that, or delete the store and harvest again"
            )
        again = "delete it, and run topklm neurons measure"
        super().__init__(rows, measured, store, tokenizer, Labels(folder.labels), (folder.table, again))
        self._events = functools.lru_cache(_KEPT_EVENTS)(self.store.neuron)
        self._ahead: dict[int, NeuronBlock] = {}

    def events(self, layer: int, neuron: int) -> NeuronBlock:
        """Returns all events of a neuron; those of the last few neurons are remembered."""
        found = self._ahead.get(self.number(layer, neuron))
        return self._events(layer, neuron) if found is None else found

    def reading_ahead(self, numbers: Iterable[int]) -> Iterator[int]:
        """Yields rising numbers of neurons; `events` of neighbours are read together, as memory allows."""
        group: list[int] = []
        n_events = 0
        for number in numbers:
            n_active = self.row(number, ["n_active"])["n_active"] or 0
            follows = group and number == group[-1] + 1 and number % self.measured.d_model
            if not follows or n_events + n_active > _AHEAD_EVENTS:
                yield from self._read(group)
                group, n_events = [], 0
            group.append(number)
            n_events += n_active
        yield from self._read(group)
        self._ahead = {}

    def _read(self, group: list[int]) -> list[int]:
        if group:
            layer, begin = self.place(group[0])
            block = self.store.block(layer, begin, begin + len(group))
            self._ahead = {number: block.one(at) for at, number in enumerate(group)}
        return group

    @functools.cached_property
    def stored_text(self) -> StoredText:
        """The text of the store, to be searched."""
        return StoredText(self.store, self.tokenizer)


def holds_every_neuron(rows: pa.Table, layers: Sequence[int], width: int, n_steps: int = 1) -> bool:
    """Returns whether rows are those of all neurons, by step, layer and neuron, each once."""
    wanted = {"layer": np.repeat(layers, width), "neuron": np.tile(np.arange(width), len(layers))}
    found = ((rows[name].to_numpy(), np.tile(values, n_steps)) for name, values in wanted.items())
    return all(np.array_equal(one, other) for one, other in found)


def document_starts(numbers: np.ndarray) -> np.ndarray:
    """Returns where documents begin, given that of each of N tokens, int64[n + 1] with N at the end."""
    starts = np.flatnonzero(np.diff(numbers.astype(np.int64), prepend=-1))
    return np.append(starts, len(numbers))


def window_bounds(starts: np.ndarray, at: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns of each token at[M] its document, and the bounds of `NeuronData.window` around it."""
    documents = np.searchsorted(starts, at, side="right") - 1
    first, stop = starts[documents], starts[documents + 1]
    begins = np.maximum(first, np.minimum(at - size // 2, stop - size))
    return documents, begins, np.minimum(begins + size, stop)


def shown(text: str) -> str:
    """Returns text with line breaks as signs, and everything else that is not printed spelled out."""
    return visible(text.translate(_SPELLED))
