"""Numbers as pages write them."""

import math
from typing import Any

from topklm.neurons.statistics import catalog

MISSING = "\N{EN DASH}"


def written(name: str, value: Any) -> str:
    """Returns a value of the statistic of this name as pages show it, without its unit."""
    return write_as(catalog.numbers()[name].kind, value)


def write_as(kind: str, value: Any) -> str:
    """Returns a value as text; a dash for one that there is not.

    Args:
        kind: As in `catalog.Statistic`.
        value: A number or None.
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if kind == "count":
        return f"{int(value):,}"
    if kind == "share":
        return percent(value)
    if kind == "effect":
        digits = 4 if abs(value) < 1 else 2
        return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
    return short(value)


def percent(share: float) -> str:
    """Returns a share in percent: 0.0123 -> "1.23 %"."""
    return f"{_three_digits(100 * share)}\N{NO-BREAK SPACE}%"


def short(value: float) -> str:
    """Returns three digits, in a way that columns of such numbers can be compared by eye."""
    return _three_digits(value).replace("-", "\N{MINUS SIGN}")


def effective_number(entropy: float | None) -> float | None:
    """Returns exp(H), the number of equally likely things that have an entropy of H nats."""
    return None if entropy is None else math.exp(entropy)


def _three_digits(value: float) -> str:
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 0.01:
        return f"{value:.2f}" if size >= 1 else f"{value:.3f}"
    return f"{value:.4f}" if size >= 0.001 else f"{value:.1e}"
