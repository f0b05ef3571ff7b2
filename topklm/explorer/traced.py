"""A trace for Python and notebooks: `topklm.trace("runs/small")`."""

from collections.abc import Sequence
import functools
import html
import os

import numpy as np
import pyarrow as pa

from topklm.checkpoint.run_folder import TOKENIZER_FILE
from topklm.data.tokenizer import Tokenizer
from topklm.errors import ArgumentError, UserError
from topklm.explorer import trace_figures
from topklm.inference.interventions import neuron_of
from topklm.neurons.display import Columns
from topklm.storage.files import local_path
from topklm.trace import formation, summary, tables
from topklm.trace.summary import Summary
from topklm.trace.tables import TraceFolder

_SHOWN = 8  # steps of a neuron, in text


def open_trace(run: str | os.PathLike[str], dictionary: str = "") -> "Trace":
    """Opens what `topklm trace run` wrote, of a Base LM for one dictionary; UserError without a trace."""
    return Trace(TraceFolder(local_path(os.fspath(run), "run"), tables.name_of(dictionary)))


class Trace:
    """The neurons of a run over its checkpoints.

    Attributes:
        steps: int[C], rising.
        settings: What all steps share (`topklm.trace.tables.Settings`).
        summary: Medians by step and layer (`topklm.trace.summary.Summary`).
    """

    def __init__(self, folder: TraceFolder):
        self._folder, self.summary = folder, Summary(folder)
        self.settings, self.steps = self.summary.settings, np.array(self.summary.steps)

    def __repr__(self) -> str:
        steps = f"{len(self.steps)} steps, {self.steps[0]:,} to {self.steps[-1]:,}"
        return f"Trace({steps}; {tables.described(self.settings)})"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{self.plot()}"

    @property
    def loss(self) -> np.ndarray:
        """float64[C], nats per token of the held-out text."""
        return self.summary.values()["loss"]

    def neuron(self, layer: int | str, neuron: int | None = None) -> "NeuronTrace":
        """Returns one neuron, named (2, 117) or "2:117"; ArgumentError if there is none such."""
        named = neuron_of(layer) if isinstance(layer, str) else (layer, neuron)
        if named[0] not in self.settings.layers or named[1] not in range(self.settings.width):
            layers = ", ".join(map(str, self.settings.layers))
            allowed = f"of layers {layers} and from 0 to {self.settings.width - 1}"
            raise ArgumentError(field="neuron", value=f"{named[0]}:{named[1]}", allowed=allowed)
        return NeuronTrace(self, int(named[0]), int(named[1] or 0))

    def layer(self, layer: int) -> "LayerTrace":
        """Returns one layer; ArgumentError if it was not read."""
        if layer not in self.settings.layers:
            allowed = f"one of {', '.join(map(str, self.settings.layers))}"
            raise ArgumentError(field="layer", value=layer, allowed=allowed)
        return LayerTrace(self, layer)

    def onsets(self, level: float = 0.5) -> np.ndarray:
        """Returns each neuron's onset at a level of r, float64[S, D]; NaN for never, or too few tokens."""
        before = self.steps < self.settings.reference
        found = []
        for layer in self.settings.layers:
            at = formation.onset(self.layer(layer).r[before], self.steps[before].astype(float), level)
            found.append(np.where(self.summary.living[layer], at, np.nan))
        return np.stack(found)

    def table(self, name: str = "neurons") -> pa.Table:
        """Returns a table: "neurons", "layers", "pairs", "heads", "run" or "formation" (`trace.tables`)."""
        if name == "formation":
            return self.summary.formation
        if name not in tables.SCHEMAS:
            allowed = f"one of {', '.join((*tables.SCHEMAS, 'formation'))}"
            raise ArgumentError(field="name", value=name, allowed=allowed)
        return self._folder.read(name)

    def against(self, other: "Trace", step: int | None = None) -> Columns:
        """Matches the neurons of two traces of the same text, at the reference, or a step kept by both.

        A row for each layer, as `summary.against` says. UserError if they cannot be compared.
        """
        pair = (self.settings.reference, other.settings.reference) if step is None else (step, step)
        rows = summary.against(self._folder, other._folder, pair)
        return Columns({name: [row[name] for row in rows] for name in rows[0]} if rows else {})

    def plot(self, name: str = "identity", others: Sequence["Trace"] = ()) -> "Svg":
        """Returns a figure of `trace_figures.FIGURES` as SVG; others are shown beside in "identity"."""
        if name not in trace_figures.FIGURES:
            allowed = f"one of {', '.join(trace_figures.FIGURES)}"
            raise ArgumentError(field="name", value=name, allowed=allowed)
        return Svg(trace_figures.FIGURES[name]([self.summary, *(other.summary for other in others)]))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's."""
        path = self._folder.path.parent.parent / TOKENIZER_FILE
        if not path.exists():
            raise UserError(f"{path} is missing: copy the whole run folder")
        return Tokenizer(path.read_bytes())

    @functools.cached_property
    def _rows(self) -> pa.Table:
        return self._folder.read("neurons")

    @functools.cached_property
    def _keys(self) -> np.ndarray:
        return np.stack([tables.numbers(self._rows, name) for name in ("layer", "neuron")])


class Svg(str):
    """A picture as text, which a notebook shows."""

    def _repr_svg_(self) -> str:
        return str(self)


class LayerTrace:
    """A layer over the steps."""

    def __init__(self, trace: Trace, layer: int):
        self._trace, self.layer = trace, layer

    def __repr__(self) -> str:
        return f"LayerTrace({self.layer} of {self._trace.settings.run})"

    @property
    def r(self) -> np.ndarray:
        """float64[C, D], correlation with the reference; NaN for dead neurons."""
        return self["r_reference"]

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns a column of the table "neurons", float64[C, D]."""
        return self._trace.summary.curves(self.layer, name)

    @property
    def medians(self) -> Columns:
        """Medians over the neurons, a row for each step."""
        return Columns({"step": self._trace.steps, **self._trace.summary.of_layer(self.layer)})


class NeuronTrace:
    """A neuron over the steps."""

    def __init__(self, trace: Trace, layer: int, neuron: int):
        self._trace, self.layer, self.number = trace, layer, neuron
        at = (trace._keys[0] == layer) & (trace._keys[1] == neuron)
        self.rows = trace._rows.filter(pa.array(at))

    @property
    def r(self) -> np.ndarray:
        """float64[C], correlation with the reference; NaN where dead."""
        return self["r_reference"]

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns a column of numbers of the table "neurons", float64[C]."""
        return tables.numbers(self.rows, name)

    def onset(self, level: float = 0.5) -> int | None:
        """Returns the first step from which on r is at least so much up to the reference; None: never."""
        steps = self._trace.steps
        before = steps < self._trace.settings.reference
        found = formation.onset(self.r[before][:, None], steps[before].astype(float), level)[0]
        return None if np.isnan(found) else int(found)

    def words(self, step: int) -> list[str]:
        """Returns the tokens it is strongest at, at a step; ArgumentError if that is not traced."""
        steps = self._trace.steps.tolist()
        if step not in steps:
            raise ArgumentError(field="step", value=step, allowed=f"one of {', '.join(map(str, steps))}")
        ids = self.rows["top_tokens"][steps.index(step)].as_py() or []
        return [self._trace.tokenizer.decode([token]) for token in ids]

    def __repr__(self) -> str:
        shown = summary.columns_of(self._trace.steps.tolist(), _SHOWN)
        lines = [f"neuron {self.layer}:{self.number}, onset {self.onset()}"]
        for at in shown:
            step = int(self._trace.steps[at])
            words = " ".join(map(repr, self.words(step)[:5]))
            lines.append(f"{step:>9,}  r {self.r[at]:5.2f}  {words}")
        return "\n".join(lines)
