"""Active neurons of one text, and columns of figures: for a notebook (HTML), a terminal, or a program.

Whatever a text holds, it is shown and never executed: HTML is escaped, control characters are spelled out.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import html
import math
import operator
from typing import Any, NamedTuple

import numpy as np
from rich.cells import cell_len

from topklm.errors import ArgumentError, UserError, visible
from topklm.neurons import SHOWN_PER_LAYER
from topklm.neurons.capture import SparseActivations

SHOWN_TOKENS = 200  # a page with more is no longer read, and slows a notebook down

_POSITIVE, _NEGATIVE = "33,102,172", "179,88,6"  # blue, orange: told apart by colour-blind readers too
_STRONGEST_SHADE = 0.55  # opacity that leaves dark text readable
# Light also in a dark notebook: the shades are made for it.
_PAGE = "background:#fff;color:#1a1a1a;font:13px/1.5 sans-serif;padding:8px;overflow-x:auto"
_CAPTION = "caption-side:top;text-align:left;color:#444;padding:0 0 6px"
_TOKEN = "font-family:monospace;white-space:pre;background:#fff3bf;padding:1px 3px;border-radius:3px"
_CHIP = "display:inline-block;padding:0 4px;margin:1px;border-radius:3px;white-space:nowrap"
_CELL = "text-align:left;vertical-align:top;border-top:1px solid #ddd;padding:2px 10px 2px 0"


class Activation(NamedTuple):
    """A neuron that is active at a token."""

    layer: int
    neuron: int
    value: float


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ActiveNeurons(Sequence[list[Activation]]):
    """The active neurons of a text; item t is those of token t, layer by layer, the strongest first.

    Attributes:
        tokens: The T pieces of the text.
        indices: int32[S, T, k], neurons, as in `SparseActivations`.
        values: float32[S, T, k]; 0 where none is active.
        d_model: D, neurons per layer.
    """

    tokens: Sequence[str]
    indices: np.ndarray
    values: np.ndarray
    d_model: int

    @classmethod
    def of(cls, tokens: Sequence[str], neurons: SparseActivations) -> "ActiveNeurons":
        """Takes the active neurons of one text, [S, 1, T, k]."""
        values = np.asarray(neurons.values[:, 0]).astype(np.float32)
        return cls(tuple(tokens), np.asarray(neurons.indices[:, 0]), values, neurons.d_model)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, position: int) -> list[Activation]:  # type: ignore[override]
        at = range(len(self))[operator.index(position)]
        return [found for layer in range(len(self.values)) for found in self.of_layer(at, layer)]

    def of_layer(self, position: int, layer: int) -> list[Activation]:
        """Returns the active neurons of a token in one layer, the strongest first."""
        pairs = zip(
            self.indices[layer, position].tolist(), self.values[layer, position].tolist(), strict=True
        )
        return [Activation(layer, neuron, value) for neuron, value in pairs if value]

    def neuron(self, layer: int, neuron: int) -> "NeuronOnText":
        """Returns one neuron from token to token; ValueError if there is no such layer or neuron."""
        if not 0 <= layer < len(self.values):
            allowed = f"from 0 to {len(self.values) - 1}" if len(self.values) else "none: no layer has TopK"
            raise ValueError(f"layer = {layer}: must be a TopK layer, {allowed}")
        if not 0 <= neuron < self.d_model:
            raise ValueError(f"neuron = {neuron}: must be from 0 to {self.d_model - 1}")
        found = np.where(self.indices[layer] == neuron, self.values[layer], 0.0)
        return NeuronOnText(layer, neuron, self.tokens, found.sum(axis=-1, dtype=np.float32))

    def __str__(self) -> str:
        rows = [["token", *self._layer_names()]]
        for at, token in enumerate(self.tokens[:SHOWN_TOKENS]):
            layers = (self.of_layer(at, layer) for layer in range(len(self.values)))
            cells = (_strongest(found, lambda f: f"{f.neuron}:{_short(f.value)}", ", ") for found in layers)
            rows.append([visible(token), *cells])
        return "\n".join([aligned(rows), *self._notes()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = [f'<th scope="col" style="{_CELL}">{name}</th>' for name in ["token", *self._layer_names()]]
        scales = [_largest(layer) for layer in self.values]
        rows = [self._row_html(at, scales) for at in range(min(len(self), SHOWN_TOKENS))]
        caption = (
            f"Active neurons of each token: number and activation, the {SHOWN_PER_LAYER} strongest of each "
            "layer and how many more there are. The darker, the nearer to the layer's strongest in this text."
        )
        return (
            f'<div style="{_PAGE}"><table style="border-collapse:collapse">'
            f'<caption style="{_CAPTION}">{caption}</caption>'
            f"<thead><tr>{''.join(head)}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
            f"{'<br>'.join(self._notes())}</div>"
        )

    def _layer_names(self) -> list[str]:
        return [f"layer {layer}" for layer in range(len(self.values))]

    def _notes(self) -> list[str]:
        return _left_out(len(self)) + ([] if len(self.values) else ["no layer of this model has TopK"])

    def _row_html(self, position: int, scales: Sequence[float]) -> str:
        def chip(f: Activation) -> str:
            return (
                f'<span title="layer {f.layer}, neuron {f.neuron}: {f.value:.6g}" '
                f'style="{_CHIP};{_shade(f.value, scales[f.layer])}"><b>{f.neuron}</b> {_short(f.value)}'
                "</span>"
            )

        label = f'<span style="{_TOKEN}">{html.escape(visible(self.tokens[position]))}</span>'
        layers = (self.of_layer(position, layer) for layer in range(len(self.values)))
        cells = (f'<td style="{_CELL}">{_strongest(found, chip, " ")}</td>' for found in layers)
        return f'<tr><th scope="row" style="{_CELL}">{label}</th>{"".join(cells)}</tr>'


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class NeuronOnText:
    """One neuron from token to token of a text.

    Attributes:
        layer: Of the neuron.
        neuron: Its number in the layer.
        tokens: The T pieces of the text.
        values: float32[T], its activation; 0 where it is not active.
    """

    layer: int
    neuron: int
    tokens: Sequence[str]
    values: np.ndarray

    def __str__(self) -> str:
        rows = [
            [visible(token), _short(value) if value else ""]
            for token, value in zip(self.tokens[:SHOWN_TOKENS], self.values.tolist(), strict=False)
        ]
        return "\n".join([self._headline(), aligned(rows), *_left_out(len(self.tokens))])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        scale = _largest(self.values)
        tokens = []
        for token, value in zip(self.tokens[:SHOWN_TOKENS], self.values.tolist(), strict=False):
            shade = _shade(value, scale) if value else "background:#f4f4f4"
            tokens.append(
                f'<span title="{value:.6g}" style="{_CHIP};text-align:center;{shade}">'
                f'<span style="font-family:monospace;white-space:pre">{html.escape(visible(token))}</span>'
                f"<br><small>{_short(value) if value else '&middot;'}</small></span>"
            )
        return (
            f'<div style="{_PAGE}"><div style="color:#444">{self._headline()}</div>'
            f"{''.join(tokens)}<br>{'<br>'.join(_left_out(len(self.tokens)))}</div>"
        )

    def _headline(self) -> str:
        n_active = int(np.count_nonzero(self.values))
        strongest = f", strongest {_short(max(self.values.tolist(), key=abs))}" if n_active else ""
        where = f"active at {n_active} of {len(self.tokens)} tokens"
        return f"layer {self.layer}, neuron {self.neuron}: {where}{strongest}"


def _shade(value: float, strongest: float) -> str:
    share = min(abs(value) / strongest, 1.0) if strongest > 0 else 1.0
    return f"background:rgba({_POSITIVE if value > 0 else _NEGATIVE},{_STRONGEST_SHADE * share:.2f})"


def _largest(values: np.ndarray) -> float:
    # The first token is the separator in most texts, with activations far from all others.
    return float(np.abs(values[1:] if len(values) > 1 else values).max(initial=0.0))


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _strongest(found: Sequence[Activation], shown: Callable[[Activation], str], between: str) -> str:
    more = [f"+{len(found) - SHOWN_PER_LAYER}"] if len(found) > SHOWN_PER_LAYER else []
    return between.join([*map(shown, found[:SHOWN_PER_LAYER]), *more])


def _left_out(n_tokens: int) -> list[str]:
    return [f"... and {n_tokens - SHOWN_TOKENS} more tokens"] if n_tokens > SHOWN_TOKENS else []


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Joins cells to columns of equal width in a terminal."""
    widths = [max(cell_len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell + " " * (w - cell_len(cell)) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


_SHOWN_ROWS = 20
_SHOWN_CHARACTERS = 60  # of a cell


class Columns:
    """Columns of one length, by name; a notebook and a terminal show a table.

    Of one, `columns["density"]` is an array of a column, `columns[["layer", "neuron"]]` the same rows with
    fewer columns, `columns[3]` a row as a dict; slices, arrays of row numbers and of booleans give rows.
    Numbers and texts become arrays, None among numbers NaN, anything else stays as it is, in an array of
    objects. Only the columns `shown` are shown; None: all.
    """

    def __init__(self, columns: Mapping[str, Any], shown: Sequence[str] | None = None):
        self._columns = {name: _array(values) for name, values in columns.items()}
        self._shown = [name for name in (self._columns if shown is None else shown) if name in self._columns]

    @property
    def columns(self) -> list[str]:
        """Names of all columns."""
        return list(self._columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()), ()))

    def __iter__(self) -> Any:
        """Yields the names of columns, as a DataFrame does."""
        return iter(self._columns)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self._columns[self._known(key)]
        if isinstance(key, list) and key and all(isinstance(name, str) for name in key):
            return Columns({self._known(name): self._columns[name] for name in key})
        if isinstance(key, int | np.integer):
            at = range(len(self))[key]
            return {name: values[at] for name, values in self._columns.items()}
        rows = key if isinstance(key, slice) else np.asarray(key)
        return Columns({name: values[rows] for name, values in self._columns.items()}, self._shown)

    def _known(self, name: str) -> str:
        if name not in self._columns:
            raise ArgumentError(field="column", value=name, allowed=f"one of {', '.join(self._columns)}")
        return name

    def sort(self, by: str, descending: bool = False) -> "Columns":
        """Returns the rows in the order of a column, equal ones as they stand, NaN last."""
        values = self[by]
        missing = np.array([_is_missing(value) for value in values], bool)
        there = np.flatnonzero(~missing)
        if descending:  # reversed twice, so that equal ones keep their order
            order = there[::-1][np.argsort(values[there][::-1], kind="stable")][::-1]
        else:
            order = there[np.argsort(values[there], kind="stable")]
        return self[np.concatenate([order, np.flatnonzero(missing)])]

    def to_pandas(self) -> Any:
        """Returns a pandas.DataFrame; UserError if pandas is not installed."""
        try:
            import pandas  # noqa: PLC0415 - not every user has it
        except ImportError as e:
            raise UserError(f"to_pandas needs the package pandas ({e}); run: pip install pandas") from e
        return pandas.DataFrame(dict(self._columns))

    def __repr__(self) -> str:
        cells = [[visible(cell) for cell in row] for row in self._cells()]
        return "\n".join([aligned([self._shown, *cells]), *self._left_out()])

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in self._shown)
        rows = "".join(
            f"<tr>{''.join(f'<td>{html.escape(visible(cell))}</td>' for cell in row)}</tr>"
            for row in self._cells()
        )
        note = "".join(f"<p>{line}</p>" for line in self._left_out())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{note}"

    def _cells(self) -> list[list[str]]:
        shown = [self._columns[name][:_SHOWN_ROWS] for name in self._shown]
        return [[_cell(value) for value in row] for row in zip(*shown, strict=True)]

    def _left_out(self) -> list[str]:
        return [f"{_SHOWN_ROWS} of {len(self):,} rows"] if len(self) > _SHOWN_ROWS else []


def _array(values: Any) -> np.ndarray:
    if isinstance(values, np.ndarray):
        return values
    values = list(values)
    kinds = {type(value) for value in values}
    if kinds <= {int} or kinds <= {bool}:
        return np.array(values, int if kinds <= {int} else bool)
    if kinds <= {int, float, type(None)}:
        return np.array([math.nan if value is None else value for value in values], np.float64)
    made = np.empty(len(values), object)
    made[:] = values
    return made


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _cell(value: Any) -> str:
    if _is_missing(value):
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple | np.ndarray):
        value = " ".join(map(str, value))
    text = str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
