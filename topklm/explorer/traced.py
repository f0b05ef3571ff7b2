"""A trace for Python and notebooks, `topklm.trace("runs/small")`, and its figures as SVG."""

from collections.abc import Callable, Mapping, Sequence
import functools
import html
import itertools
import math
import os
from typing import NamedTuple

from markupsafe import Markup, escape
import numpy as np
import pyarrow as pa

from topklm.checkpoint.run_folder import TOKENIZER_FILE
from topklm.data.tokenizer import Tokenizer
from topklm.errors import ArgumentError, UserError
from topklm.explorer import plots
from topklm.explorer.markup import Link
from topklm.explorer.plots import BOTTOM, LETTER, SHADES, TOP, Axis, Frame
from topklm.inference.interventions import neuron_of
from topklm.neurons.display import Columns
from topklm.storage.files import local_path
from topklm.trace import changes, summary, tables
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
            at = changes.onset_at(self.layer(layer).r[before], self.steps[before].astype(float), level)
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
        """Returns a figure of `FIGURES` as SVG; others are shown beside in "identity"."""
        if name not in FIGURES:
            allowed = f"one of {', '.join(FIGURES)}"
            raise ArgumentError(field="name", value=name, allowed=allowed)
        return Svg(FIGURES[name]([self.summary, *(other.summary for other in others)]))

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
        found = changes.onset_at(self.r[before][:, None], steps[before].astype(float), level)[0]
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


_CURVE, _GAP, _CELLS = 64, 14, 240  # heights: of the curve above the cells, between them, of all cells
_UPRIGHT = 16  # more height for steps that stand upright
_MOST_TICKS = 24
_LINE, _WIDTH = 20, 1000  # height of a row of `timeline`, and its width


class Row(NamedTuple):
    """A row of `shaded`, of one thing or of several that lie together."""

    values: Sequence[float]  # one for each column, from -1 to 1; NaN: none
    edge: float  # where a line stands, in columns; NaN: nowhere
    title: str
    address: str = ""  # opened by a script


def shaded(
    columns: Sequence[str], rows: Sequence[Row], n_neurons: int, top: Axis, curve: Sequence[float], about: str
) -> Markup:
    """Draws rows of shaded cells, a column for each step, below a curve on the same axis.

    All rows together are `n_neurons`, counted from above; `curve` has a value of the axis `top` for each
    column.
    """
    y, n = Axis("neurons", 0, max(n_neurons, 1)), max(len(columns), 1)
    above = TOP + _CURVE + _GAP
    size = (400, above + _CELLS + BOTTOM + _UPRIGHT)
    frame = Frame(size, Axis("step", 0, n), y, above, BOTTOM + _UPRIGHT)
    wide, high = frame.width / n, _CELLS / max(len(rows), 1)
    drawn = [*_cells(rows, frame, wide, high), _edge(rows, frame, wide, high)]
    for place, row in enumerate(rows):
        address = f' data-address="{escape(row.address)}"' if row.address else ""
        drawn.append(
            f'<rect class="row" x="{frame.left}" y="{frame.top + place * high:.2f}" width="{frame.width}" '
            f'height="{high:.2f}"{address}><title>{escape(row.title)}</title></rect>'
        )
    drawn += _above(top, curve, frame, wide)
    names = [(place + 0.5, name) for place, name in enumerate(columns)]
    y_ticks = [(n_neurons - value, f"{value:g}") for value in y.ticks()]
    x_ticks = names[:: math.ceil(n / _MOST_TICKS)]
    return frame.svg(about, drawn, x_ticks=x_ticks, y_ticks=y_ticks, upright=True)


def _cells(rows: Sequence[Row], frame: Frame, wide: float, high: float) -> list[str]:
    """Draws all cells of one shade as one path; neighbours in a row as one rectangle."""
    parts: dict[tuple[str, int], list[str]] = {}
    for place, row in enumerate(rows):
        up, at = frame.top + place * high, 0
        for shade, run in itertools.groupby(map(_shade, row.values)):
            length = len(list(run))
            if shade:
                left, width = frame.left + at * wide, length * wide
                box = f"M{left:.1f} {up:.2f}h{width:.1f}v{high:.2f}h-{width:.1f}z"
                parts.setdefault(shade, []).append(box)
            at += length
    return [
        f'<path class="cell {kind}" fill-opacity="{step / SHADES:.1f}" d="{"".join(boxes)}"/>'
        for (kind, step), boxes in sorted(parts.items())
    ]


def _shade(value: float) -> tuple[str, int] | None:
    """Returns the kind and the depth of the shade of a value from -1 to 1; None where nothing is drawn."""
    if not math.isfinite(value) or not value:
        return None
    return ("up" if value > 0 else "down"), min(SHADES, max(1, math.ceil(SHADES * abs(value))))


def _edge(rows: Sequence[Row], frame: Frame, wide: float, high: float) -> str:
    """Draws the line through all rows that have one."""
    path = ""
    for place, row in enumerate(rows):
        if math.isfinite(row.edge):
            across, up = frame.left + row.edge * wide, frame.top + place * high
            path += f"{'L' if path else 'M'}{across:.1f} {up:.2f}V{up + high:.2f}"
    return f'<path class="edge" d="{path}"/>' if path else ""


def _above(axis: Axis, curve: Sequence[float], frame: Frame, wide: float) -> list[str]:
    """Draws the curve above the cells, and its axis."""

    def height(value: float) -> float:
        return TOP + _CURVE * (1 - axis.share(value))

    places = enumerate(curve)
    known = [(frame.left + (n + 0.5) * wide, height(value)) for n, value in places if math.isfinite(value)]
    drawn = []
    if known:
        path = " L".join(f"{across:.1f} {up:.1f}" for across, up in known)
        drawn.append(f'<path class="curve c0" d="M{path}"><title>{escape(axis.title)}</title></path>')
    for value in (axis.low, axis.high):
        up, text = height(value) + 3.5, escape(axis.text(value))
        drawn.append(f'<text x="{frame.left - 5}" y="{up:.1f}" text-anchor="end">{text}</text>')
    middle = TOP + _CURVE / 2
    turned = f'transform="rotate(-90 11 {middle:.1f})"'
    title = f'<text class="title" x="11" y="{middle:.1f}" text-anchor="middle" {turned}>'
    return [*drawn, f"{title}{escape(axis.title)}</text>"]


class Mark(NamedTuple):
    """A mark of `timeline`, perhaps on a span."""

    x: float
    title: str
    kind: str = "dot"  # of `_MARKS`
    span: tuple[float, float] | None = None


_MARKS = {
    "dot": '<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="5">{title}</circle>',
    "break": '<circle class="dot hollow" cx="{x:.1f}" cy="{y:.1f}" r="5">{title}</circle>',
    "rises": '<path class="dot" d="M{x:.1f} {y:.1f}m-5 4h10l-5 -9z">{title}</path>',
    "falls": '<path class="dot" d="M{x:.1f} {y:.1f}m-5 -4h10l-5 9z">{title}</path>',
}


def timeline(rows: Mapping[str, Sequence[Mark]], x: Axis, about: str) -> Markup:
    """Draws marks on one axis, a row for each name."""
    n = max(len(rows), 1)
    left = 20 + round(LETTER * max(map(len, rows), default=0))
    frame = Frame((_WIDTH, TOP + BOTTOM + _LINE * n), x, Axis("", 0, n), left=left)

    def across(value: float) -> float:
        return frame.left + frame.width * x.share(value)

    drawn = []
    for place, (name, marks) in enumerate(rows.items()):
        up = frame.top + _LINE * (place + 0.5)
        level = f'y1="{up:.1f}" y2="{up:.1f}"'
        begin, end = across(x.low), across(x.high)
        drawn.append(f'<line class="grid" x1="{begin:.1f}" x2="{end:.1f}" {level}/>')
        named = f'<text class="value" x="{frame.left - 10}" y="{up + 3.5:.1f}" text-anchor="end">'
        drawn.append(f"{named}{escape(name)}</text>")
        for mark in marks:
            if mark.span:
                low, high = map(across, mark.span)
                drawn.append(f'<line class="span" x1="{low:.1f}" x2="{high:.1f}" {level}/>')
            title = f"<title>{escape(mark.title)}</title>"
            drawn.append(_MARKS[mark.kind].format(x=across(mark.x), y=up, title=title))
    return frame.svg(about, drawn, y_ticks=[])


_FIRST = 0.5  # of a logarithmic axis, where step 0 is drawn
_SIZE = (600, 290)
_X_TITLE = "step (0 at the left end)"
_MOST_ROWS = 2048  # of all heat maps of a page, in as many as can be told apart
_FEWEST_ROWS = 48

Curves = dict[str, list[tuple[float, float]]]


def identity(traces: Sequence[Summary]) -> Markup:
    """Draws r to the reference, which is left out: by index and nulls of one trace; of others, by match."""
    own, *others = traces
    found = {
        "same index": _before(own, "r_reference"),
        "best other index": _before(own, "r_other"),
        "tokens shifted": _before(own, "r_shifted"),
    }
    if own.settings.dictionary.startswith("sae"):
        found["one-to-one match"] = _before(own, "r_matched")
    for other in others:
        found[other.name] = _before(other, "r_reference")
        if other.settings.dictionary.startswith("sae"):
            found[f"{other.name}, matched"] = _before(other, "r_matched")
    return _lines(found, "r to the reference, median", (0, 1), f"Correlation with the reference, {own.name}")


def _before(own: Summary, name: str) -> list[tuple[float, float]]:
    """Returns the median of a column by step, but of the reference."""
    values = np.where(np.array(own.steps) == own.settings.reference, np.nan, own.over_layers(name))
    return _points(own.steps, values)


def losses(traces: Sequence[Summary]) -> Markup:
    """Draws the loss and the medians of both entropies."""
    own = traces[0]
    found = {"loss": _points(own.steps, own.values()["loss"])}
    for name, title in (("token_entropy", "token entropy"), ("semantic_entropy", "semantic entropy")):
        found[title] = _points(own.steps, own.over_layers(name))
    return _lines(found, "nats", None, f"Held-out loss and entropies of neurons, {own.name}")


def distances(traces: Sequence[Summary]) -> Markup:
    """Draws how far the model is from n-grams, where that was measured."""
    own = traces[0]
    names = {"kl_unigram": "KL to unigram", "kl_bigram": "KL to bigram", "entropy": "entropy of the output"}
    values = own.values()
    found = {title: _points(own.steps, values[name]) for name, title in names.items() if name in values}
    return _lines(found, "nats", None, f"The model's output beside n-grams, {own.name}")


def change_points(traces: Sequence[Summary]) -> Markup:
    """Draws when curves and neurons change, as `Summary.changes`: the model, attachment, onsets by layer."""
    own = traces[0]
    rows: dict[str, list[Mark]] = {}
    for name, at in own.changes(1).items():
        if name == "bits_per_byte":  # changes where the loss does
            continue
        title = f"attachment, {name}" if name in own.relations else name.replace("_", " ")
        found = {"rises": [at["rises"]], "falls": [at["falls"]], "break": at["breaks"]}
        rows[title] = [
            Mark(max(step, _FIRST), f"{title}: {kind}, step {step:,}", kind)
            for kind, steps in found.items()
            for step in steps
            if step is not None
        ]
    for layer in own.settings.layers:
        steps = own.onsets(layer, "onset_50")
        steps = steps[~np.isnan(steps)]
        if len(steps):
            low, middle, high = np.quantile(steps, (0.25, 0.5, 0.75), method="nearest").tolist()
            said = f"half of {len(steps):,} onsets from step {low:,.0f} to {high:,.0f}, median {middle:,.0f}"
            span = max(low, _FIRST), max(high, _FIRST)
            mark = Mark(max(middle, _FIRST), f"layer {layer}: {said}", span=span)
            rows[f"onset .5, layer {layer}"] = [mark]
    x = Axis(_X_TITLE, _FIRST, max(own.steps[-1], 1), logarithmic=True)
    marked = {name: marks for name, marks in rows.items() if marks}
    return timeline(marked, x, f"When curves and neurons change, {own.name}")


def heat(own: Summary, layer: int, address: Link | None = None) -> Markup:
    """Draws r to the reference of all living neurons of a layer by step, those first whose onset is early.

    The line is at the onset of .5; the loss is above, on the same axis. Of very many neurons, neighbours in
    this order are averaged.
    """
    alive = own.living[layer]
    numbers = np.flatnonzero(alive)
    r, starts = own.curves(layer, "r_reference")[:, alive], own.onsets(layer, "onset_50")
    means = np.where(np.isnan(r), 0, r).mean(axis=0)
    order = np.lexsort((-means, np.where(np.isnan(starts), np.inf, starts)))
    columns = {step: place for place, step in enumerate(own.steps)}
    groups = _groups(len(order), max(_FEWEST_ROWS, _MOST_ROWS // max(len(own.settings.layers), 8)))
    rows = []
    for group in groups:
        some = order[group]
        first, start = int(numbers[some[0]]), starts[some[0]]
        said = "never for good" if np.isnan(start) else f"from step {start:,.0f} on"
        more = f" and {len(some) - 1} more" if len(some) > 1 else ""
        title = f"{layer}:{first}{more}, above .5 {said}"
        known = ~np.isnan(r[:, some])
        sums = np.where(known, r[:, some], 0).sum(axis=1)
        values = np.where(known.any(axis=1), sums / np.maximum(known.sum(axis=1), 1), np.nan)
        edge = np.nan if np.isnan(start) else float(columns[int(start)])
        link = address(layer, first) if address and len(some) == 1 else None
        rows.append(Row(values.tolist(), edge, title, link or ""))
    loss = own.values()["loss"]
    top = Axis("loss, nats", *_bounds(loss), text="{:.3g}".format)
    reference = f"r with step {own.settings.reference:,}"
    about = f"{len(order):,} neurons of layer {layer} of {own.name} by onset: {reference}"
    return shaded([f"{step:,}" for step in own.steps], rows, len(order), top, loss.tolist(), about)


def _groups(n: int, most: int) -> list[slice]:
    """Returns at most so many slices of n things that follow one another, as even as can be."""
    bounds = np.linspace(0, n, min(n, most) + 1).round().astype(int).tolist()
    return [slice(begin, end) for begin, end in itertools.pairwise(bounds)]


def _bounds(values: np.ndarray) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    return (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)


def onsets(traces: Sequence[Summary]) -> Markup:
    """Draws the steps at which neurons of each layer come to r of .5 and .9 for good."""
    own = traces[0]
    found = {}
    for layer in own.settings.layers:
        for name, level in (("onset_50", ".5"), ("onset_90", ".9")):
            steps = own.onsets(layer, name)
            found[f"{layer}: {level}"] = np.maximum(steps[~np.isnan(steps)], _FIRST)
    y = Axis("step of the onset", _FIRST, max(own.steps[-1], 1), logarithmic=True)
    about = f"Onsets of neurons by layer, at r of .5 and .9, {own.name}"
    return plots.violins(found, y, about)


def layers(traces: Sequence[Summary]) -> Markup:
    """Draws r of the same index of two layers, and of what the upper one writes with what it keeps."""
    own = traces[0]
    found: Curves = {}
    for a, b in own.pairs():
        of_pair = own.of_pair(a, b)
        if a >= 0:
            found[f"{a}-{b}, r"] = _points(own.steps, of_pair["r"])
        if "r_written" in of_pair:
            found[f"{b}, r written"] = _points(own.steps, of_pair["r_written"])
    return _lines(found, "r of the same index, median", (0, 1), f"Layers of {own.name}")


def _alone(draw: Callable[[Sequence[Summary]], Markup], traces: Sequence[Summary]) -> str:
    return plots.standalone(draw(traces))


FIGURES: Mapping[str, Callable[[Sequence[Summary]], str]] = {
    "identity": functools.partial(_alone, identity),
    "loss": functools.partial(_alone, losses),
    "distances": functools.partial(_alone, distances),
    "changes": functools.partial(_alone, change_points),
    "onsets": functools.partial(_alone, onsets),
    "layers": functools.partial(_alone, layers),
}


def _points(steps: Sequence[int], values: np.ndarray) -> list[tuple[float, float]]:
    return [
        (max(step, _FIRST), float(value))
        for step, value in zip(steps, values, strict=True)
        if np.isfinite(value)
    ]


def _lines(found: Curves, title: str, within: tuple[float, float] | None, about: str) -> Markup:
    curves = {name: points for name, points in found.items() if points}
    points = [point for curve in curves.values() for point in curve] or [(1.0, 0.0)]
    values = [value for _, value in points]
    low, high = within or (0, max(values))
    x = Axis(_X_TITLE, _FIRST, max(1, *(across for across, _ in points)), logarithmic=True)
    y = Axis(title, min(low, *values), max(high, *values))
    return plots.lines(curves, x, y, about, _SIZE)
