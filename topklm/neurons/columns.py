"""A table of named columns for Python and notebooks: as much of a DataFrame as looking at neurons takes."""

from collections.abc import Mapping, Sequence
import html
import math
from typing import Any

import numpy as np

from topklm.errors import ArgumentError, UserError, visible
from topklm.neurons.display import aligned

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
