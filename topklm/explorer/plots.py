"""Plots as SVG text. Colours come from the page's stylesheet, by class, so that they follow light and dark.

Every plot says what it shows in words too, for whoever cannot see it.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math

from markupsafe import Markup, escape
import numpy as np

_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 8, 12, 34  # around the plot itself, for axes


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
        title: With the unit.
        low: Its least value.
        high: Its largest.
        logarithmic: Whether equal distances are equal ratios.
        text: How a value is written at a tick.
    """

    title: str
    low: float
    high: float
    logarithmic: bool = False
    text: Callable[[float], str] = "{:g}".format

    def share(self, value: float) -> float:
        """Returns the position of a value on the axis, from 0 to 1."""
        low, high, value = (math.log10(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return (value - low) / (high - low) if high > low else 0.5

    def ticks(self, about: int = 4) -> list[float]:
        """Returns round values to write at the axis."""
        if self.logarithmic:
            powers = range(
                math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1
            )
            return [10.0**p for p in powers][:: max(1, math.ceil(len(powers) / (about + 1)))]
        step = _round_step((self.high - self.low) / about)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclasses.dataclass(frozen=True)
class Group:
    """The values of one layer.

    Attributes:
        name: Stands below.
        values: float[n].
    """

    name: str
    values: np.ndarray


def histogram(
    counts: Sequence[int],
    high: float,
    x_title: str,
    y_title: str,
    about: str,
    size: tuple[int, int] = (340, 170),
) -> Markup:
    """Bars of equal width from 0 to `high`; each says its range and count when it is pointed at.

    The heights are square roots: rare strong activations would not be seen beside the many weak ones.
    """
    x, y = Axis(x_title, 0, high or 1), Axis(y_title, 0, math.sqrt(max([*counts, 1])))
    frame = _Frame(size, x, y)
    width = frame.width / max(len(counts), 1)
    bars = []
    for place, count in enumerate(counts):
        if count:
            low, top = (high * (place + step) / len(counts) for step in (0, 1))
            bar_height = max(frame.height * math.sqrt(count) / y.high, 1)
            left, upper = _LEFT + place * width, _TOP + frame.height - bar_height
            bars.append(
                f'<rect class="bar" x="{left:.1f}" y="{upper:.1f}" width="{max(width - 1, 0.5):.1f}" '
                f'height="{bar_height:.1f}"><title>{low:.3g} to {top:.3g}: {count:,}</title></rect>'
            )
    largest = int(max([*counts, 1]))
    ticks = sorted({0, *(_round_down(largest * share) for share in (0.1, 0.4, 1.0))})
    y_ticks = [(math.sqrt(tick), _short(tick)) for tick in ticks]
    return _svg(size, about, frame.axes(y_ticks=y_ticks) + "".join(bars))


def violins(
    groups: Sequence[Group],
    y: Axis,
    x_title: str,
    about: str,
    size: tuple[int, int] = (330, 210),
    bins: int = 36,
) -> Markup:
    """Layers side by side: how many neurons have which value, as a shape with a line at the middle one."""
    frame = _Frame(size, Axis(x_title, 0, max(len(groups), 1)), y)
    slot, drawn = frame.width / max(len(groups), 1), []
    for place, group in enumerate(groups):
        centre = _LEFT + (place + 0.5) * slot
        shares = np.clip([y.share(v) for v in group.values if math.isfinite(v) and _fits(y, v)], 0, 1)
        if len(shares):
            drawn.append(_violin(shares, centre, 0.42 * min(slot, 90), frame.height, bins))
            middle = _TOP + frame.height * (1 - float(np.median(shares)))
            value = y.text(float(np.median(group.values[np.isfinite(group.values)])))
            half = 0.3 * min(slot, 90)
            drawn.append(
                f'<line class="median" x1="{centre - half:.1f}" x2="{centre + half:.1f}" y1="{middle:.1f}" '
                f'y2="{middle:.1f}"><title>layer {escape(group.name)}: median {escape(value)}</title></line>'
            )
    names = [(place + 0.5, group.name) for place, group in enumerate(groups)]
    return _svg(size, about, frame.axes(x_ticks=names[:: max(1, len(names) // 16)]) + "".join(drawn))


def bars(
    groups: Sequence[tuple[str, int]],
    high: int,
    x_title: str,
    y_title: str,
    about: str,
    size: tuple[int, int] = (330, 210),
) -> Markup:
    """Returns a number for each layer, written above its bar."""
    y = Axis(y_title, 0, max(high, 1), text="{:,.0f}".format)
    frame = _Frame(size, Axis(x_title, 0, max(len(groups), 1)), y)
    slot, drawn = frame.width / max(len(groups), 1), []
    for place, (_, count) in enumerate(groups):
        bar_height = frame.height * y.share(count)
        centre, top, width = (
            _LEFT + (place + 0.5) * slot,
            _TOP + frame.height - bar_height,
            min(slot * 0.6, 48),
        )
        drawn.append(
            f'<rect class="bar" x="{centre - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" '
            f'height="{bar_height:.1f}"/><text class="value" x="{centre:.1f}" y="{top - 4:.1f}" '
            f'text-anchor="middle">{count:,}</text>'
        )
    names = [(place + 0.5, name) for place, (name, _) in enumerate(groups)]
    return _svg(size, about, frame.axes(x_ticks=names[:: max(1, len(names) // 16)]) + "".join(drawn))


def scatter(
    points: Sequence[tuple[float, float, str, str]],
    x: Axis,
    y: Axis,
    about: str,
    size: tuple[int, int] = (330, 210),
) -> Markup:
    """Points of (x, y, title, address); a script makes them clickable, tables offer the same by keyboard."""
    frame = _Frame(size, x, y)
    drawn = []
    for across, up, title, address in points:
        drawn.append(
            f'<circle class="point" cx="{_LEFT + frame.width * x.share(across):.1f}" '
            f'cy="{_TOP + frame.height * (1 - y.share(up)):.1f}" r="2.6" data-address="{escape(address)}">'
            f"<title>{escape(title)}</title></circle>"
        )
    return _svg(size, about, frame.axes() + "".join(drawn))


class _Frame:
    """The axes of a plot, and the space between them."""

    def __init__(self, size: tuple[int, int], x: Axis, y: Axis):
        self._x, self._y = x, y
        self.width, self.height = size[0] - _LEFT - _RIGHT, size[1] - _TOP - _BOTTOM

    def axes(
        self,
        x_ticks: Sequence[tuple[float, str]] | None = None,
        y_ticks: Sequence[tuple[float, str]] | None = None,
    ) -> str:
        """Ticks are values with what is written there; by default round ones."""
        x_ticks = x_ticks if x_ticks is not None else [(v, self._x.text(v)) for v in self._x.ticks()]
        y_ticks = y_ticks if y_ticks is not None else [(v, self._y.text(v)) for v in self._y.ticks()]
        right, base = _LEFT + self.width, _TOP + self.height
        drawn = []
        for value, text in y_ticks:
            at = base - self.height * self._y.share(value)
            drawn.append(
                f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
                f'<text x="{_LEFT - 5}" y="{at + 3.5:.1f}" text-anchor="end">{escape(text)}</text>'
            )
        for value, text in x_ticks:
            at = _LEFT + self.width * self._x.share(value)
            drawn.append(f'<text x="{at:.1f}" y="{base + 14}" text-anchor="middle">{escape(text)}</text>')
        middle = _TOP + self.height / 2
        drawn.append(
            f'<text class="title" x="{_LEFT + self.width / 2:.1f}" y="{base + 29}" text-anchor="middle">'
            f'{escape(self._x.title)}</text><text class="title" x="11" y="{middle:.1f}" text-anchor="middle" '
            f'transform="rotate(-90 11 {middle:.1f})">{escape(self._y.title)}</text>'
            f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{base}" y2="{base}"/>'
        )
        return "".join(drawn)


def _violin(shares: np.ndarray, centre: float, half: float, height: float, bins: int) -> str:
    counts, edges = np.histogram(shares, bins, (0, 1))
    # The shape is smoothed a little: a neuron more or less says nothing.
    smooth = np.convolve(np.pad(counts, 1), [0.25, 0.5, 0.25], "valid")
    widths = half * smooth / max(smooth.max(), 1e-9)
    inside = np.flatnonzero(smooth > 0)
    first, last = inside[0], inside[-1] + 1
    ups = _TOP + height * (1 - (edges[first:last] + edges[first + 1 : last + 1]) / 2)
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


def _fits(axis: Axis, value: float) -> bool:
    return value > 0 or not axis.logarithmic


def _svg(size: tuple[int, int], about: str, content: str) -> Markup:
    return Markup(
        f'<svg class="plot" viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(about)}">'
        f"{content}</svg>"
    )


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
