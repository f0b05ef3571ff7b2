"""When a neuron became what it is: onsets and turnovers. Pure NumPy.

Curves are r to the reference (`compare`), float64[C, n] over C steps, rising; NaN where there is none. The
reference itself, whose r with itself is 1, does not count, nor do steps after it.

`tables.FORMATION_DEFINITIONS` says what each column is.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

LEVELS = (0.5, 0.9)
EXCESS_LEVEL = 0.5
SETTLED = 0.9
TURNOVER = 0.2


def onsets(holds: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Returns the first step from which on bool[C, n] holds to the end, float64[n]; NaN: it does not."""
    stays = np.flip(np.logical_and.accumulate(np.flip(holds, 0), axis=0), 0)
    if not len(stays):
        return np.full(holds.shape[1], np.nan)
    return np.where(stays.any(axis=0), steps[stays.argmax(axis=0)], np.nan)


def onset(r: np.ndarray, steps: np.ndarray, level: float) -> np.ndarray:
    """Returns the onset of curves [C, n] without the reference, at a level; NaN: never, or there is no r."""
    with np.errstate(invalid="ignore"):  # NaN is not above anything
        return onsets(r >= level, steps)


def excess(r: np.ndarray) -> np.ndarray:
    """Returns (r - r0) / (1 - r0) of curves [C, n]; r0 counts as 0 where there is no r at the first step."""
    r0 = np.where(np.isnan(r[:1]), 0.0, r[:1])
    with np.errstate(divide="ignore", invalid="ignore"):
        return (r - r0) / (1 - r0)


def columns(
    steps: np.ndarray, reference: int, curves: Mapping[str, np.ndarray], min_tokens: int
) -> Mapping[str, Any]:
    """Returns the columns of neurons, one value each; NaN for those active at fewer tokens of the reference.

    Steps int[C] rise, the reference is one of them; curves are [C, n]: r_reference, r_previous, top_previous,
    best and n_active.
    """
    before, at = np.flatnonzero(steps < reference), int(np.flatnonzero(steps == reference)[0])
    r, there = curves["r_reference"][before], steps[before].astype(np.float64)
    n_active = curves["n_active"][at]
    n = len(n_active)
    living = n_active >= min_tokens
    with np.errstate(invalid="ignore"):
        turned = (curves["top_previous"][: at + 1] < TURNOVER).sum(axis=0)
        settled = curves["r_previous"][at] >= SETTLED
    found = {f"onset_{level * 100:.0f}": onset(r, there, level) for level in LEVELS}
    found |= {
        "onset_excess": onset(excess(r), there, EXCESS_LEVEL) if len(r) else np.full(n, np.nan),
        "onset_best": onsets(curves["best"][before] == np.arange(n), there),
        "stage0_r": r[0] if len(r) else np.full(n, np.nan),
        "settled": settled.astype(np.float64),
        "turnovers": turned.astype(np.float64),
    }
    return {"n_active": n_active} | {name: np.where(living, x, np.nan) for name, x in found.items()}
