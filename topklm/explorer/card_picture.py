"""Figures with intervals, as dots in rows, and charts of them in one file of SVG: a card, and claims.

A chart of the readability card is a measure, a row a basis, a dot a layer, with its interval; a chart of the
claims is a figure, a row a model or a baseline, a dot a seed.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import operator
from typing import Any

from markupsafe import escape

from topklm.explorer.plots import Axis
from topklm.neurons.bases import TITLES
from topklm.neurons.card import MEASURES

# Of the colour-blind-safe palette of Okabe and Ito; one for each run.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#666666")
_LONGEST_NAME = 20  # of a run; its end is shown
_COLUMNS = 2
_WIDTH, _LEFT, _RIGHT = 640, 236, 20  # of a chart, in pixels
_ROW, _SPREAD, _DOT, _HEAD, _FOOT = 24, 16, 5, 26, 30  # heights, in pixels


@dataclasses.dataclass(frozen=True)
class _Row:
    colour: str
    label: str  # run and basis
    figures: Mapping[int, Mapping[str, Any]]  # by layer: value, low, high


def draw(facts: Mapping[str, Any]) -> str:
    """Returns the picture of a card, the JSON object; figures that are null are left out."""

    def rows(get: Any) -> list[_Row]:
        found = []
        for number, run in enumerate(facts["runs"]):
            name = run["run"].rstrip("/").rpartition("/")[2][-_LONGEST_NAME:]
            for basis in run["bases"]:
                figures = {layer["layer"]: get(layer) for layer in basis["layers"]}
                known = {at: x for at, x in figures.items() if x is not None and x["value"] is not None}
                if known:
                    colour = _COLOURS[number % len(_COLOURS)]
                    found.append(_Row(colour, f"{name}: {TITLES[basis['name']]}", known))
        return found

    charts = [
        (
            ", ".join(filter(None, (measure.title, measure.unit))),
            rows(operator.methodcaller("get", measure.name)),
        )
        for measure in MEASURES
    ]
    for given in facts["probing"]["sets"]:
        for k in ("1", "16"):

            def auc(layer: Mapping[str, Any], name: str = given["name"], k: str = k) -> Any:
                return layer.get("probing", {}).get(name, {}).get("auc", {}).get(k)

            charts.append((f"{given['name']}: AUC of probes of {k}", rows(auc)))
    runs = ", ".join(run["run"] for run in facts["runs"])
    return _charts([chart for chart in charts if chart[1]], f"Readability of {runs}", "layers")


def draw_claims(study: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """Returns the picture of the claims of a study, the JSON object; `titles` name bases."""
    charts = []
    for figure in (figure for claim in study["claims"] for figure in claim["figures"]):
        rows = {"TopK LM": figure["ours"], **figure["others"]}
        charts.append(
            (
                ", ".join(filter(None, (figure["name"], figure["unit"]))),
                [
                    _Row(
                        _COLOURS[0 if place == 0 else 1 if name == figure["rival"] else -1],
                        titles.get(name, name),
                        {n: {"value": x, "low": None, "high": None} for n, x in enumerate(values)},
                    )
                    for place, (name, values) in enumerate(rows.items())
                ],
            )
        )
    return _charts(charts, "The claims, figure by figure", "seeds")


def _charts(charts: Sequence[tuple[str, Sequence[_Row]]], about: str, dots: str) -> str:
    """Lays charts out side by side; `dots` says what their numbers count."""
    top, content = 8.0, list[str]()
    for first in range(0, len(charts), _COLUMNS):
        side_by_side = charts[first : first + _COLUMNS]
        for column, (title, of_measure) in enumerate(side_by_side):
            content.append(f'<g transform="translate({_WIDTH * column} {top})">')
            content += [*_chart(title, of_measure, dots), "</g>"]
        top += _HEAD + _ROW * max(len(of_measure) for _, of_measure in side_by_side) + _FOOT
    style = "text{font:12px sans-serif;fill:#222}.title{font-weight:600}.grid{stroke:#ddd}"
    style += ".layer{font:8px sans-serif;fill:#fff;text-anchor:middle}"
    width = _WIDTH * _COLUMNS
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top}" role="img" '
        f'aria-label="{escape(about)}">'
        f'<style>{style}</style><rect width="{width}" height="{top}" fill="#fff"/>'
        f"{''.join(content)}</svg>\n"
    )


def _chart(title: str, rows: Sequence[_Row], dots: str) -> Iterator[str]:
    ends = [end for row in rows for figure in row.figures.values() for end in _ends(figure)]
    low, high = min(ends), max(ends)
    margin = 0.04 * ((high - low) or abs(high) or 1.0)
    x = Axis(title, max(low - margin, 0.0) if low >= 0 else low - margin, high + margin)
    base = _HEAD + _ROW * len(rows)

    def at(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * x.share(value)

    yield f'<text class="title" x="{_LEFT}" y="14">{escape(title)} (numbers: {dots})</text>'
    for tick in x.ticks():
        yield (
            f'<line class="grid" x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="{_HEAD - 4}" y2="{base}"/>'
            f'<text x="{at(tick):.1f}" y="{base + 14}" text-anchor="middle">{x.text(round(tick, 10))}</text>'
        )
    for number, row in enumerate(rows):
        middle = _HEAD + _ROW * (number + 0.5)
        yield f'<text x="{_LEFT - 10}" y="{middle + 4:.1f}" text-anchor="end">{escape(row.label)}</text>'
        for place, (layer, figure) in enumerate(row.figures.items()):
            y = middle + _SPREAD * ((place + 0.5) / len(row.figures) - 0.5)
            begin, end = _ends(figure)
            centre = at(figure["value"])
            yield (
                f'<line x1="{at(begin):.1f}" x2="{at(end):.1f}" y1="{y:.1f}" y2="{y:.1f}" '
                f'stroke="{row.colour}" stroke-width="1.5"/><circle cx="{centre:.1f}" cy="{y:.1f}" '
                f'r="{_DOT}" fill="{row.colour}" stroke="#fff" stroke-width="0.5"><title>'
                f"{escape(row.label)}, {dots[:-1]} {layer}: {figure['value']:.4g}</title></circle>"
                f'<text class="layer" x="{centre:.1f}" y="{y + 2.8:.1f}">{layer}</text>'
            )


def _ends(figure: Mapping[str, Any]) -> tuple[float, float]:
    """Returns both ends of an interval, or the figure twice where there is none."""
    value, given = figure["value"], (figure["low"], figure["high"])
    low, high = (value if end is None else end for end in given)
    return low, high
