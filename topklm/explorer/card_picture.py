"""The readability card as a picture: a row of dots with intervals for each measure, in one file of SVG."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import operator
from typing import Any

from markupsafe import escape

from topklm.explorer.plots import Axis
from topklm.neurons.bases import TITLES
from topklm.neurons.card import MEASURES

# Of the colour-blind-safe palette of Okabe and Ito.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#999999", "#000000")
_LONGEST_NAME = 20  # of a run; its end is shown
_WIDTH, _LEFT, _RIGHT = 860, 250, 24
_ROW, _DOT, _GAP, _HEAD = 13, 3.2, 10, 26  # heights, in pixels


@dataclasses.dataclass(frozen=True)
class _Dot:
    colour: str
    label: str  # run, basis and layer
    figure: Mapping[str, Any]  # value, low, high


def draw(facts: Mapping[str, Any]) -> str:
    """Returns the picture of a card, the JSON object; figures that are null are left out."""
    bases = [(run["run"], basis["name"]) for run in facts["runs"] for basis in run["bases"]]
    colours = {both: _COLOURS[number % len(_COLOURS)] for number, both in enumerate(bases)}

    def dots(get: Any) -> list[_Dot]:
        found = []
        for run in facts["runs"]:
            for basis in run["bases"]:
                for layer in basis["layers"]:
                    figure = get(layer)
                    if figure is not None and figure["value"] is not None:
                        name = run["run"][-_LONGEST_NAME:]
                        label = f"{name}, {TITLES[basis['name']]}, layer {layer['layer']}"
                        found.append(_Dot(colours[run["run"], basis["name"]], label, figure))
        return found

    charts = [
        (
            ", ".join(filter(None, (measure.title, measure.unit))),
            dots(operator.methodcaller("get", measure.name)),
        )
        for measure in MEASURES
    ]
    for given in facts["probing"]["sets"]:
        for k in ("1", "16"):

            def auc(layer: Mapping[str, Any], name: str = given["name"], k: str = k) -> Any:
                return layer.get("probing", {}).get(name, {}).get("auc", {}).get(k)

            charts.append((f"AUC, k = {k}: {given['name']}", dots(auc)))
    height, content = 8, list[str]()
    for title, of_measure in charts:
        if of_measure:
            content += _chart(title, of_measure, height)
            height += _HEAD + _ROW * len(of_measure) + 18 + _GAP
    style = "text{font:11px sans-serif;fill:#222}.title{font-weight:600}.grid{stroke:#ddd}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="Readability of {escape(", ".join(run["run"] for run in facts["runs"]))}">'
        f'<style>{style}</style><rect width="{_WIDTH}" height="{height}" fill="#fff"/>'
        f"{''.join(content)}</svg>\n"
    )


def _chart(title: str, dots: Sequence[_Dot], top: float) -> Iterator[str]:
    """Yields one measure, from the height `top` on."""
    ends = [end for dot in dots for end in _ends(dot)]
    low, high = min(ends), max(ends)
    margin = 0.04 * ((high - low) or abs(high) or 1.0)
    x = Axis(title, max(low - margin, 0.0) if low >= 0 else low - margin, high + margin)
    base = top + _HEAD + _ROW * len(dots)

    def at(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * x.share(value)

    yield f'<text class="title" x="{_LEFT}" y="{top + 14}">{escape(title)}</text>'
    for tick in x.ticks():
        yield (
            f'<line class="grid" x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="{top + _HEAD - 4}" y2="{base}"/>'
            f'<text x="{at(tick):.1f}" y="{base + 13}" text-anchor="middle">{x.text(round(tick, 10))}</text>'
        )
    for number, dot in enumerate(dots):
        y = top + _HEAD + _ROW * (number + 0.5)
        begin, end = _ends(dot)
        yield (
            f'<text x="{_LEFT - 8}" y="{y + 3.5:.1f}" text-anchor="end">{escape(dot.label)}</text>'
            f'<line x1="{at(begin):.1f}" x2="{at(end):.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{dot.colour}" '
            f'stroke-width="1.5"/><circle cx="{at(dot.figure["value"]):.1f}" cy="{y:.1f}" r="{_DOT}" '
            f'fill="{dot.colour}"><title>{escape(dot.label)}: {dot.figure["value"]:.4g}</title></circle>'
        )


def _ends(dot: _Dot) -> tuple[float, float]:
    """Returns both ends of an interval, or the figure twice where there is none."""
    value = dot.figure["value"]
    given = dot.figure["low"], dot.figure["high"]
    low, high = (value if end is None else end for end in given)
    return low, high
