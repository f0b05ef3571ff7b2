"""The figures of a trace, as SVG: identity, loss and entropies, onsets, layers."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from topklm.explorer import plots
from topklm.explorer.plots import Axis
from topklm.trace.summary import Summary

_FIRST = 0.5  # of a logarithmic axis, where step 0 is drawn

Curves = dict[str, list[tuple[float, float]]]


def identity(traces: Sequence[Summary]) -> str:
    """Draws r to the reference: by index and nulls of the first trace, of others by index and by match."""
    own, *others = traces
    curves = {
        "same index": own.over_layers("r_reference"),
        "best other index": own.over_layers("r_other"),
        "tokens shifted": own.over_layers("r_shifted"),
    }
    found = {name: _points(own.steps, values) for name, values in curves.items()}
    if own.settings.dictionary.startswith("sae"):
        found["one-to-one match"] = _points(own.steps, own.over_layers("r_matched"))
    for other in others:
        found[other.name] = _points(other.steps, other.over_layers("r_reference"))
        if other.settings.dictionary.startswith("sae"):
            found[f"{other.name}, matched"] = _points(other.steps, other.over_layers("r_matched"))
    return _lines(found, "r to the reference, median", (0, 1), f"Correlation with the reference, {own.name}")


def losses(traces: Sequence[Summary]) -> str:
    """Draws the loss and the medians of both entropies."""
    own = traces[0]
    found = {"loss": _points(own.steps, own.values()["loss"])}
    for name, title in (("token_entropy", "token entropy"), ("semantic_entropy", "semantic entropy")):
        found[title] = _points(own.steps, own.over_layers(name))
    return _lines(found, "nats", None, f"Held-out loss and entropies of neurons, {own.name}")


def onsets(traces: Sequence[Summary]) -> str:
    """Draws the steps at which neurons of each layer come to r of .5 and .9 for good."""
    own = traces[0]
    found = {}
    for layer in own.settings.layers:
        for name, level in (("onset_50", ".5"), ("onset_90", ".9")):
            steps = own.onsets(layer, name)
            found[f"{layer}: {level}"] = np.maximum(steps[~np.isnan(steps)], _FIRST)
    y = Axis("step of the onset", _FIRST, max(own.steps[-1], 1), logarithmic=True)
    about = f"Onsets of neurons by layer, at r of .5 and .9, {own.name}"
    return plots.standalone(plots.violins(found, y, about))


def layers(traces: Sequence[Summary]) -> str:
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


FIGURES: Mapping[str, Callable[[Sequence[Summary]], str]] = {
    "identity": identity,
    "loss": losses,
    "onsets": onsets,
    "layers": layers,
}


def _points(steps: Sequence[int], values: np.ndarray) -> list[tuple[float, float]]:
    return [
        (max(step, _FIRST), float(value))
        for step, value in zip(steps, values, strict=True)
        if np.isfinite(value)
    ]


def _lines(found: Curves, title: str, within: tuple[float, float] | None, about: str) -> str:
    curves = {name: points for name, points in found.items() if points}
    points = [point for curve in curves.values() for point in curve] or [(1.0, 0.0)]
    values = [value for _, value in points]
    low, high = within or (0, max(values))
    x = Axis("step (0 at the left end)", _FIRST, max(across for across, _ in points), logarithmic=True)
    y = Axis(title, min(low, *values), max(high, *values))
    return plots.standalone(plots.lines(curves, x, y, about))
