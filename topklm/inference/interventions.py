"""One intervention on one neuron, the modes that there are, and the file that keeps interventions.

Imports no JAX, so that commands can name the modes in their help; `intervention_batch` makes arrays of them.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import math
import os
import re
from reprlib import repr as short
import sys
from typing import Any, Literal, Protocol

import numpy as np

from topklm.config import ModelConfig
from topklm.errors import ArgumentError, UserError
from topklm.storage.files import as_path, parse_json, storage_errors_are_user_errors, write_atomically


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way to steer a neuron; after TopK its activation h becomes `h * factor(value) + term(value)`."""

    name: str  # in Python, files, requests and on command lines
    needs_value: bool  # whether an intervention has to say its value
    # Of a mode that acts inside of TopK too: the neuron "wins" one of the k entries there, or "loses".
    # None: it acts after TopK only, so in any layer.
    competes: Literal["wins", "loses"] | None
    help: str  # its effect, with {value} for the value
    factor: Callable[[Any], Any]  # of a value: a number, or an array with one axis
    term: Callable[[Any], Any]  # likewise

    @property
    def value_is_factor(self) -> bool:
        """Whether the activation is multiplied by the value, which then is not in units of activations."""
        return self.factor(0.0) != self.factor(1.0)


# Everything that reads or shows modes reads this table: the library, the server, the explorer, the commands.
MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("clamp", True, None, "set its activation to {value}", lambda _: 0.0, lambda value: value),
        Mode("add", True, None, "add {value} to its activation", lambda _: 1.0, lambda value: value),
        Mode("scale", True, None, "multiply its activation by {value}", lambda value: value, lambda _: 0.0),
        Mode("ablate", False, None, "set its activation to 0", lambda _: 0.0, lambda _: 0.0),
        Mode(
            "ban",
            False,
            "loses",
            "take it out of the competition; the next neuron is among the k instead",
            lambda _: 0.0,
            lambda _: 0.0,
        ),
        Mode(
            "force",
            True,
            "wins",
            "make it one of the k, with {value} for its activation; the weakest of the others is left out",
            lambda _: 0.0,
            lambda value: value,
        ),
    )
}
DEFAULT_MODE = "clamp"

Positions = str | tuple[int, int]
POSITIONS = ("all", "prompt", "generated")

_FORMAT, _VERSION = "topklm-interventions", 1
_LARGEST = 2**31 - 1
_LARGEST_VALUE = 3.4028234e38  # of float32


class HasEntries(Protocol):
    """Holds interventions in another form: an `InterventionBatch`."""

    def entries(self) -> list["Intervention"]:
        """Returns them one by one."""
        ...


@dataclasses.dataclass(frozen=True)
class Intervention:
    """An intervention on one neuron.

    Attributes:
        layer: Of the model, from 0. In a layer without TopK a neuron is a coordinate of the layer's output.
        neuron: From 0.
        value: Of the mode; "ablate" and "ban" ignore it. One that JAX traces is not checked. A text such as
            "0.7x" stands for 0.7 times the neuron's largest activation, see `in_activations`.
        mode: A name in `MODES`. After TopK, "clamp" sets the activation to the value, "add" adds it, "scale"
            multiplies by it, "ablate" sets the activation to 0. Inside of TopK, where k entries are kept as
            always, "ban" takes the neuron out, so that the next one is kept; "force" keeps it, instead of the
            weakest of the others, with the value for its activation.
        positions: "all"; "prompt"; "generated", the tokens after the prompt, of which the first is still
            predicted from the prompt alone; or a range (begin, end) of positions without its end, 0 being the
            separator before the text.
        row: Which sequence of a batch; None: all.
    """

    layer: int
    neuron: int
    value: float | str = 0.0
    mode: str = DEFAULT_MODE
    positions: Positions = "all"
    row: int | None = None

    def check(self, config: ModelConfig | None = None) -> None:
        """Raises ValueError, in one line, for what cannot be, in general or in a model."""
        n_layers, width = (config.n_layers, config.d_model) if config else (_LARGEST, _LARGEST)
        _check_index("layer", self.layer, n_layers, "the model's layers")
        _check_index("neuron", self.neuron, width, "the neurons of a layer")
        if self.row is not None:
            _check_index("row", self.row, _LARGEST, "rows")
        if not isinstance(self.mode, str) or self.mode not in MODES:
            raise ArgumentError(field="mode", value=short(self.mode), allowed=f"one of {', '.join(MODES)}")
        if config and MODES[self.mode].competes and self.layer >= config.n_topk_layers:
            with_one = f"0 to {config.n_topk_layers - 1}" if config.n_topk_layers else "none"
            text = f"the layer has no TopK, layers with one: {with_one}; use 'clamp' or 'ablate'"
            raise ArgumentError(text, field="mode", value=f"{short(self.mode)} of {self._name}")
        if not _is_number(self.value):
            raise self._wrong_value("a finite number")
        if not _is_traced(self.value) and abs(float(self.value)) > _LARGEST_VALUE:
            raise self._wrong_value(f"at most {_LARGEST_VALUE:g}")
        named = isinstance(self.positions, str) and self.positions in POSITIONS
        if not named and not _is_range(self.positions):
            allowed = f"one of {', '.join(POSITIONS)}, or (begin, end) with 0 <= begin < end"
            raise ArgumentError(field="positions", value=short(self.positions), allowed=allowed)

    def _wrong_value(self, allowed: str) -> ArgumentError:
        return ArgumentError(field="value", value=f"{short(self.value)} of {self._name}", allowed=allowed)

    @property
    def _name(self) -> str:
        return f"layer {self.layer}, neuron {self.neuron}"

    def may_meet(self, other: "Intervention") -> bool:
        """Returns whether both can act on one token, if they are of one neuron."""
        if None not in (self.row, other.row) and self.row != other.row:
            return False
        if {self.positions, other.positions} == {"prompt", "generated"}:
            return False
        if isinstance(self.positions, str) or isinstance(other.positions, str):
            return True
        return max(self.positions[0], other.positions[0]) < min(self.positions[1], other.positions[1])


_NEURON = re.compile(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*")


def neuron_of(name: Any, field: str = "neuron") -> tuple[int, int]:
    """Returns layer and neuron of (2, 106) or "2:106"; ArgumentError for another form. No model is asked."""
    if isinstance(name, str) and (found := _NEURON.fullmatch(name)):
        return int(found[1]), int(found[2])
    if isinstance(name, tuple) and len(name) == 2:
        return name
    allowed = "LAYER:NEURON, e.g. 3:117" if isinstance(name, str) else "(layer, neuron)"
    raise ArgumentError(f"{short(name)} names no neuron: must be {allowed}", field=field)


_TIMES = re.compile(r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)x\s*")
Largest = Callable[[int, int], float]  # largest activation of a neuron, by layer and number


def times_of(value: Any) -> float | None:
    """Reads "0.7x", times a neuron's largest activation; None for a value that is in units of activations."""
    found = _TIMES.fullmatch(value) if isinstance(value, str) else None
    return None if found is None else float(found[1])


def in_activations(one: Intervention, largest: Largest) -> Intervention:
    """Returns an intervention with its value in units of activations, the same if it is.

    ArgumentError for a mode that multiplies already, and errors of `largest` where the activation is not
    known.
    """
    if (times := times_of(one.value)) is None:
        return one
    if one.mode in MODES and MODES[one.mode].value_is_factor:
        text = f"mode {one.mode} multiplies already; leave the x out"
        raise ArgumentError(text, field="value", value=f"{one.value} of {one.layer}:{one.neuron}")
    return dataclasses.replace(one, value=times * largest(one.layer, one.neuron))


# People give interventions as {(layer, neuron): value}, as one or several, or as an `InterventionBatch`.
Steer = (
    HasEntries | Mapping[tuple[int, int], float] | Mapping[str, float] | Intervention | Sequence[Intervention]
)


def needs_value(mode: Any) -> bool:
    """Returns whether an intervention with this mode has to say its value; True if there is no such mode."""
    return not (isinstance(mode, str) and mode in MODES) or MODES[mode].needs_value


def entries_of(steer: "Steer", mode: str = DEFAULT_MODE) -> list[Intervention]:
    """Returns interventions one by one, those of a mapping with a mode; raises ValueError for no `Steer`."""
    if isinstance(steer, Intervention):
        return [steer]
    if hasattr(steer, "entries"):
        return steer.entries()
    if isinstance(steer, Mapping):
        return [Intervention(*neuron_of(name, "steer"), value, mode) for name, value in steer.items()]
    if not hasattr(steer, "__iter__"):
        allowed = "{(layer, neuron): value} or Interventions"
        raise ArgumentError(field="steer", value=short(steer), allowed=allowed)
    entries = list(steer)
    for entry in entries:
        if not isinstance(entry, Intervention):
            text = f"{short(entry)} is no Intervention: must be one; or give {{(layer, neuron): value}}"
            raise ArgumentError(text, field="steer")
    return entries


def save_interventions(
    path: str | os.PathLike[str],
    steer: "Steer",
    mode: str = DEFAULT_MODE,
    *,
    model: Mapping[str, Any] | None = None,
) -> None:
    """Writes a small JSON file, local or in a bucket, whole or not at all; errors as `entries_of`.

    `model` are facts that identify the model whose neurons these are; None: the file names no model.
    """
    content = as_json(entries_of(steer, mode), model=model)
    with storage_errors_are_user_errors("writing interventions", as_path(path)):
        write_atomically(as_path(path), content)


def as_json(entries: Sequence[Intervention], *, model: Mapping[str, Any] | None = None) -> bytes:
    """Returns the content of a file of interventions; raises ValueError for one that cannot be."""
    rows = []
    for one in entries:
        one.check()
        row = {} if one.row is None else {"row": int(one.row)}
        positions = one.positions if isinstance(one.positions, str) else [int(p) for p in one.positions]
        neuron = {"layer": int(one.layer), "neuron": int(one.neuron), "mode": one.mode}
        rows.append({**neuron, "value": float(one.value), "positions": positions, **row})
    of = {} if model is None else {"model": dict(model)}
    content = {"format": _FORMAT, "version": _VERSION, **of, "interventions": rows}
    return json.dumps(content, indent=1).encode() + b"\n"


def load_interventions(path: str | os.PathLike[str], config: ModelConfig | None = None) -> list[Intervention]:
    """Reads a file of interventions, for a model if one is given; raises UserError for what does not fit."""
    file = as_path(path)
    with storage_errors_are_user_errors(f"reading {path}", file):
        if not file.exists():
            raise UserError(f"{path}: there is no such file of interventions")
        content = file.read_bytes()
    where = str(path)
    try:
        found = []
        for number, entry in enumerate(_entries(content)):
            where = f"{path}: interventions[{number}]"
            found.append(from_json(entry))
            found[-1].check(config)
        return found
    except ValueError as e:
        raise UserError(f"{where}: {e}") from e


def _entries(content: bytes) -> list[Any]:
    try:
        parts = parse_json(content)
    except ValueError as e:
        raise ValueError(f"it is no JSON object ({e})") from e
    if parts.get("format") != _FORMAT:
        raise ValueError(f"it is no file of interventions: must be an object with format = {_FORMAT!r}")
    if (version := parts.get("version")) != _VERSION:
        raise ArgumentError(f"this program reads {_VERSION}", field="version", value=repr(version))
    if not isinstance(parts.get("interventions"), list):
        raise ArgumentError(field="interventions", allowed="a list")
    return parts["interventions"]


def from_json(
    entry: Any, names: Sequence[str] = ("layer", "neuron", "value", "mode", "positions", "row")
) -> Intervention:
    """Reads one of a file or a request, values unchecked; raises ValueError for missing or other names."""
    if not isinstance(entry, dict) or not {"layer", "neuron"} <= set(entry):
        raise ValueError("must be an object with layer and neuron")
    if unknown := sorted(set(entry) - set(names)):
        raise ValueError(f"{unknown[0][:50]!r} is none of {', '.join(names)}")
    if "value" not in entry and needs_value(entry.get("mode", DEFAULT_MODE)):
        raise ValueError("value is missing")
    positions = entry.get("positions", "all")
    return Intervention(
        **{**entry, "positions": tuple(positions) if isinstance(positions, list) else positions}
    )


def _is_number(value: Any) -> bool:
    """Tells whether it is one finite number; of one that is traced only the shape is known."""
    if isinstance(value, bool | np.bool_ | str) or not hasattr(value, "__float__"):
        return False
    if np.shape(value) != () or np.iscomplexobj(value):
        return False
    try:
        return _is_traced(value) or math.isfinite(float(value))
    except OverflowError:
        return False


def _is_index(value: Any) -> bool:
    """Tells whether it is an integer that is known, as the number of a neuron must be."""
    return hasattr(value, "__index__") and not isinstance(value, bool | np.bool_) and not _is_traced(value)


def _check_index(name: str, value: Any, size: int, what: str) -> None:
    if not _is_index(value) or not 0 <= value < size:
        allowed = f"an integer from 0 to {size - 1}, {what}"
        raise ArgumentError(field=name, value=short(value), allowed=allowed)


def _is_range(positions: Any) -> bool:
    return (
        isinstance(positions, tuple)
        and len(positions) == 2
        and all(_is_index(p) and p <= _LARGEST for p in positions)
        and 0 <= positions[0] < positions[1]
    )


def _is_traced(value: Any) -> bool:
    # Where nobody has imported JAX, which takes seconds, nothing is.
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.core.Tracer)
