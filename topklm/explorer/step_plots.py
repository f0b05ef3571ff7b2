"""Plots over the steps of a run: neurons as rows of shaded cells, and when things change."""

from collections.abc import Mapping, Sequence
import itertools
import math
from typing import NamedTuple

from markupsafe import Markup, escape

from topklm.explorer.plots import BOTTOM, LETTER, SHADES, TOP, Axis, Frame

_CURVE, _GAP, _CELLS = 64, 14, 240  # heights: of the curve above the cells, between them, of all cells
_UPRIGHT = 16  # more height for steps that stand upright
_MOST_TICKS = 24
_LINE, _WIDTH = 20, 1000  # height of a row of `timeline`, and its width


class Row(NamedTuple):
    """A row of `heat`, of one thing or of several that lie together."""

    values: Sequence[float]  # one for each column, from -1 to 1; NaN: none
    edge: float  # where a line stands, in columns; NaN: nowhere
    title: str
    address: str = ""  # opened by a script


def heat(
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
