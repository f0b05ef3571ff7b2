"""Plots as SVG text, which say in words what they show; a page's stylesheet colours them, by class."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
import dataclasses
import math
from typing import NamedTuple

from markupsafe import Markup, escape
import numpy as np

LEFT, RIGHT, TOP, BOTTOM = 54, 8, 12, 34  # around the plot itself, for axes
_BINS = 36  # of a violin
DEPTHS = 6  # colours of layers
CURVES = 8  # kinds of curves
SHADES = 10  # steps of the shading of tokens and cells
_TICKS = 4  # of an axis, about
_NAME, LETTER = 12, 5.8  # height of a curve's name, and width of a letter of it


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis from its least to its largest value."""

    title: str  # with the unit
    low: float
    high: float
    logarithmic: bool = False
    text: Callable[[float], str] = "{:g}".format  # writes a value at a tick

    def share(self, value: float) -> float:
        """Returns the position of a value on the axis, from 0 to 1."""
        low, high, value = (math.log10(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return (value - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[float]:
        """Returns round values to write at the axis."""
        if self.logarithmic:
            powers = range(
                math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1
            )
            return [10.0**p for p in powers][:: max(1, math.ceil(len(powers) / (_TICKS + 1)))]
        step = _round_step((self.high - self.low) / _TICKS)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def histogram(counts: Sequence[int], high: float, x_title: str, y_title: str, about: str) -> Markup:
    """Draws bars from 0 to `high`, as high as square roots; each says its range and count when pointed at."""
    largest = int(max([*counts, 1]))
    x, y = Axis(x_title, 0, high or 1), Axis(y_title, 0, math.sqrt(largest))
    frame = Frame((340, 170), x, y)
    width = frame.width / max(len(counts), 1)
    drawn = []
    for place, count in enumerate(counts):
        if count:
            low, top = (high * (place + step) / len(counts) for step in (0, 1))
            height = max(frame.height * math.sqrt(count) / y.high, 1)
            drawn.append(
                f'<rect class="bar" x="{LEFT + place * width:.1f}" y="{frame.base - height:.1f}" '
                f'width="{max(width - 1, 0.5):.1f}" height="{height:.1f}">'
                f"<title>{low:.3g} to {top:.3g}: {count:,}</title></rect>"
            )
    ticks = sorted({0, *(_round_down(largest * share) for share in (0.1, 0.4, 1.0))})
    return frame.svg(about, drawn, y_ticks=[(math.sqrt(tick), _short(tick)) for tick in ticks])


def violins(layers: Mapping[str, np.ndarray], y: Axis, about: str) -> Markup:
    """Draws how many neurons have which value, finite, float[n] of each layer; with a line at the median."""

    def draw(name: str, frame: Frame, centre: float, slot: float) -> str:
        values = layers[name]
        shares = np.clip([y.share(v) for v in values if v > 0 or not y.logarithmic], 0, 1)
        if not len(shares):
            return ""
        slot = min(slot, 90)
        middle, half = frame.base - frame.height * float(np.median(shares)), 0.3 * slot
        return (
            f'{_violin(shares, centre, 0.42 * slot, frame)}<line class="median" x1="{centre - half:.1f}" '
            f'x2="{centre + half:.1f}" y1="{middle:.1f}" y2="{middle:.1f}"><title>layer {escape(name)}: '
            f"median {escape(y.text(float(np.median(values))))}</title></line>"
        )

    return _side_by_side(layers, y, about, draw)


def bars(layers: Mapping[str, int], high: int, y_title: str, about: str) -> Markup:
    """Draws a number for each layer, written above its bar."""
    y = Axis(y_title, 0, max(high, 1), text="{:,.0f}".format)

    def draw(name: str, frame: Frame, centre: float, slot: float) -> str:
        height, width = frame.height * y.share(layers[name]), min(slot * 0.6, 48)
        top = frame.base - height
        return (
            f'<rect class="bar" x="{centre - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}"/><text class="value" x="{centre:.1f}" y="{top - 4:.1f}" '
            f'text-anchor="middle">{layers[name]:,}</text>'
        )

    return _side_by_side(layers, y, about, draw)


class Point(NamedTuple):
    """A point of `scatter`."""

    x: float
    y: float
    title: str
    address: str
    depth: int  # its colour, 0 to DEPTHS - 1


def depth(place: int, n: int) -> int:
    """Returns the colour of one of n layers: those of few lie far apart."""
    return round((DEPTHS - 1) * place / max(n - 1, 1))


def scatter(points: Iterable[Point], x: Axis, y: Axis, about: str, names: tuple[str, str]) -> Markup:
    """Draws points; a script opens and selects them, tables by keyboard. `names` are of both axes."""
    frame = Frame((860, 300), x, y)
    drawn = [
        f'<circle class="point d{point.depth}" cx="{LEFT + frame.width * x.share(point.x):.1f}" '
        f'cy="{TOP + frame.height * (1 - y.share(point.y)):.1f}" r="2.6" '
        f'data-address="{escape(point.address)}"><title>{escape(point.title)}</title></circle>'
        for point in points
    ]
    facts = {
        "frame": f"{LEFT} {TOP} {frame.width} {frame.height}",
        **{f"{axis}-name": name for axis, name in zip("xy", names, strict=True)},
        **{name: f"{axis.low:g} {axis.high:g}" for name, axis in (("x", x), ("y", y))},
    }
    return frame.svg(about, drawn, facts=facts)


def lines(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    x: Axis,
    y: Axis,
    about: str,
    size: tuple[int, int] = (860, 300),
) -> Markup:
    """Draws points (x, y) of each curve joined by a line, with the curve's name after its end."""
    frame = Frame(size, x, y, right=RIGHT + round(LETTER * max(map(len, curves), default=0)))
    paths, ends = [], []
    for number, (name, points) in enumerate(curves.items()):
        places = [
            (LEFT + frame.width * x.share(across), TOP + frame.height * (1 - y.share(up)))
            for across, up in points
        ]
        path = " L".join(f"{across:.1f} {up:.1f}" for across, up in places)
        kind = f"c{number % CURVES}"
        paths.append(f'<path class="curve {kind}" d="M{path}"><title>{escape(name)}</title></path>')
        ends.append((places[-1][1] + 3.5, places[-1][0] + 6, kind, name))
    names, last = [], 0.0
    for up, across, kind, name in sorted(ends):
        last = max(up, last + _NAME)
        named = f'<text class="value n{kind}" x="{across:.1f}" y="{last:.1f}">'
        names.append(f"{named}{escape(name)}</text>")
    return frame.svg(about, [*paths, *names])


# Where no stylesheet of a page applies; colours of curves are those of Okabe and Ito.
_STYLE = (
    ".plot { font: 10.5px sans-serif; background: #fff } .plot text { fill: #565f6a } "
    ".plot .grid { stroke: #e1e4e0 } .plot .axis { stroke: #8b949e } .plot .median { stroke: #1b1f24; "
    "stroke-width: 2.2 } .plot .violin { fill: #c3d6ea; stroke: #2171b5 } .plot .bar { fill: #2171b5 } "
    ".plot .curve { fill: none; stroke-width: 1.8 } .plot .dot { fill: #2171b5; stroke: #2171b5 } "
    ".plot .dot.hollow { fill: none } .plot .span { stroke: #9ebcda; stroke-width: 3 }"
)
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#666666", "#000000")


def standalone(plot: str) -> str:
    """Returns a plot as a file of its own, with its colours."""
    kinds = " ".join(
        f".plot .c{number} {{ stroke: {colour} }} .plot .nc{number} {{ fill: {colour} }}"
        for number, colour in enumerate(_COLOURS)
    )
    head, rest = plot.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{_STYLE} {kinds}</style>{rest}'


def _side_by_side(
    names: Collection[str], y: Axis, about: str, draw: Callable[[str, "Frame", float, float], str]
) -> Markup:
    """Draws each layer by its name, the frame, and the centre and width of its slot."""
    n = max(len(names), 1)
    frame = Frame((330, 210), Axis("layer", 0, n), y)
    slot = frame.width / n
    drawn = [draw(name, frame, LEFT + (at + 0.5) * slot, slot) for at, name in enumerate(names)]
    ticks = [(at + 0.5, name) for at, name in enumerate(names)]
    return frame.svg(about, drawn, x_ticks=ticks[:: max(1, len(ticks) // 16)])


class Frame:
    """The axes of a plot, and the space between them."""

    def __init__(
        self,
        size: tuple[int, int],
        x: Axis,
        y: Axis,
        top: int = TOP,
        bottom: int = BOTTOM,
        left: int = LEFT,
        right: int = RIGHT,
    ):
        self._size, self._x, self._y, self.top, self.left = size, x, y, top, left
        self.width, self.height = size[0] - left - right, size[1] - top - bottom
        self.base = top + self.height

    def svg(
        self,
        about: str,
        content: Iterable[str],
        x_ticks: Sequence[tuple[float, str]] | None = None,
        y_ticks: Sequence[tuple[float, str]] | None = None,
        facts: Mapping[str, str] | None = None,
        upright: bool = False,
    ) -> Markup:
        """Returns the plot; ticks are values with text, by default round ones; `facts` are for scripts."""
        data = "".join(f' data-{name}="{escape(value)}"' for name, value in (facts or {}).items())
        x_ticks = x_ticks if x_ticks is not None else [(v, self._x.text(v)) for v in self._x.ticks()]
        y_ticks = y_ticks if y_ticks is not None else [(v, self._y.text(v)) for v in self._y.ticks()]
        left, right, base = self.left, self.left + self.width, self.base
        drawn = [
            f'<svg class="plot" viewBox="0 0 {self._size[0]} {self._size[1]}" role="img" '
            f'aria-label="{escape(about)}"{data}>'
        ]
        for value, text in y_ticks:
            at = base - self.height * self._y.share(value)
            drawn.append(
                f'<line class="grid" x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
                f'<text x="{left - 5}" y="{at + 3.5:.1f}" text-anchor="end">{escape(text)}</text>'
            )
        for value, text in x_ticks:
            at = left + self.width * self._x.share(value)
            # Steps in narrow columns stand upright.
            turned = f' transform="rotate(-90 {at:.1f} {base + 10})"' if upright else ""
            anchor = "end" if upright else "middle"
            up = base + (13 if upright else 14)
            drawn.append(f'<text x="{at:.1f}" y="{up}" text-anchor="{anchor}"{turned}>{escape(text)}</text>')
        middle, below = self.top + self.height / 2, base + (46 if upright else 29)
        drawn.append(
            f'<text class="title" x="{left + self.width / 2:.1f}" y="{below}" text-anchor="middle">'
            f'{escape(self._x.title)}</text><text class="title" x="11" y="{middle:.1f}" text-anchor="middle" '
            f'transform="rotate(-90 11 {middle:.1f})">{escape(self._y.title)}</text>'
            f'<line class="axis" x1="{left}" x2="{right}" y1="{base}" y2="{base}"/>'
        )
        return Markup("".join([*drawn, *content, "</svg>"]))


def _violin(shares: np.ndarray, centre: float, half: float, frame: Frame) -> str:
    counts, edges = np.histogram(shares, _BINS, (0, 1))
    # The shape is smoothed a little: a neuron more or less says nothing.
    smooth = np.convolve(np.pad(counts, 1), [0.25, 0.5, 0.25], "valid")
    widths = half * smooth / max(smooth.max(), 1e-9)
    inside = np.flatnonzero(smooth > 0)
    first, last = inside[0], inside[-1] + 1
    ups = TOP + frame.height * (1 - (edges[first:last] + edges[first + 1 : last + 1]) / 2)
    widths = widths[first:last]
    right = [f"{centre + w:.1f} {up:.1f}" for w, up in zip(widths, ups, strict=True)]
    left = [f"{centre - w:.1f} {up:.1f}" for w, up in zip(widths[::-1], ups[::-1], strict=True)]
    return f'<path class="violin" d="M{" L".join(right + left)} Z"/>'


def _short(count: int) -> str:
    """Returns a short form, 4000 -> "4k": there is little space beside an axis."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:g}{letter}"
    return str(count)


def _round_step(about: float) -> float:
    """Returns 1, 2 or 5 times a power of ten, at least `about`."""
    if not about > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(about))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= about * (1 - 1e-9))


def _round_down(value: float) -> int:
    """Rounds down to one digit and zeros."""
    if value < 1:
        return 0
    power = 10 ** int(math.log10(value))
    return int(value // power) * power
