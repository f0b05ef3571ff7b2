"""When neurons, and the run, changed over training steps: onsets, turnovers, breaks. Pure NumPy.

Curves of neurons are r to the reference (`measure`), float64[C, n] over C steps, rising; NaN where there is
none. The reference itself, whose r with itself is 1, does not count, nor do steps after it. Curves of the run
are on the axis log2(1 + step), so that step 0 has a place and doublings are equally far apart.

`tables.FORMATION_DEFINITIONS` says what each column is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MOST_POINTS = 30  # of the exact search for several breaks, whose time is the cube of them
_FACTOR = 1.4  # a little less than sqrt 2: `checkpoint.trace = "log"` rounds its steps
_PIECE = 3  # points that a piece has at least: a line through two always fits


def log_spaced(steps: Sequence[int]) -> list[int]:
    """Chooses from rising steps: the first, the last, and between them those about sqrt 2 apart."""
    chosen = list(steps[:1])
    for step in steps[1:-1]:
        if step >= max(chosen[-1] * _FACTOR, chosen[-1] + 1):
            chosen.append(step)
    return [*chosen, *(steps[-1:] if len(steps) > 1 else [])]


def log_steps(steps: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns log2(1 + step), float64[C]; ValueError if steps do not rise from 0 or more."""
    steps = np.asarray(steps, np.float64)
    if len(steps) and (steps[0] < 0 or np.any(np.diff(steps) <= 0)):
        raise ValueError("steps: must rise, from 0 or more")
    return np.log2(1 + steps)


def acceleration(steps: Sequence[int] | np.ndarray, values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Computes the second difference of values over the log step, at all steps but the outer two.

    Divided differences, for steps need not be evenly spaced: float64[C - 2], in units per squared doubling.
    """
    x, y = log_steps(steps), np.asarray(values, np.float64)
    if len(x) != len(y):
        raise ValueError(f"values: {len(y)} for {len(x)} steps: must be one for each")
    slopes = np.diff(y) / np.diff(x)
    return 2 * np.diff(slopes) / (x[2:] - x[:-2])


def onset(
    steps: Sequence[int] | np.ndarray, values: Sequence[float] | np.ndarray, *, rises: bool = True
) -> int | None:
    """Returns the step from which values rise, or fall, faster than before: the largest acceleration.

    The rule by which Chen et al. 2023 (arXiv 2309.07311) date an onset. Values that are not finite are left
    out, and those of steps that `log_spaced` leaves out, whose small distance would magnify noise; None where
    fewer than three are left, or no acceleration has this sign. The first of equal ones.
    """
    log_steps(steps)  # refuses steps that do not rise
    known_steps, known = _finite(steps, values)
    chosen = np.isin(known_steps, log_spaced(known_steps.tolist()))
    known_steps, known = known_steps[chosen], known[chosen]
    if len(known) < 3:
        return None
    found = acceleration(known_steps, known if rises else -known)
    best = int(found.argmax())
    return int(known_steps[best + 1]) if found[best] > 0 else None


def points_needed(n_breaks: int) -> int:
    """Returns the fewest points that `breaks` takes."""
    return _PIECE * (n_breaks + 1)


def most_breaks(n_points: int) -> int:
    """Returns into how many breaks so many points can be cut; 0 where `breaks` takes so many not at all."""
    return max(n_points // _PIECE - 1, 0) if n_points <= MOST_POINTS else 0


def breaks(
    steps: Sequence[int] | np.ndarray, values: Sequence[float] | np.ndarray, n_breaks: int
) -> list[int]:
    """Returns the steps at which the n + 1 pieces begin, but the first, that straight lines fit best.

    Lines are fitted to each piece of three points or more by least squares over the log step, and need not
    meet. The result is exact, by dynamic programming over all cuts; of equal ones the earliest. Values that
    are not finite are left out.

    Raises:
        ValueError: If there are too few points for so many pieces, or more than `MOST_POINTS`.
    """
    known_steps, known = _finite(steps, values)
    n_points, n_pieces = len(known), n_breaks + 1
    if n_breaks < 0 or n_points < points_needed(n_breaks) or n_points > MOST_POINTS:
        allowed = f"from {points_needed(n_breaks)}, three for each piece, to {MOST_POINTS}"
        raise ValueError(f"steps: {n_points} with a value: must be {allowed}, for {n_breaks} breaks")
    cost = _costs(log_steps(known_steps), known)
    best = cost[0].copy()  # of the points before each end, in the pieces so far
    cuts = np.zeros((n_pieces, n_points + 1), int)
    for piece in range(1, n_pieces):
        totals = best[:, None] + cost  # [begin of the last piece, end]
        cuts[piece], best = totals.argmin(axis=0), totals.min(axis=0)
    found, end = list[int](), n_points
    for piece in range(n_pieces - 1, 0, -1):
        end = cuts[piece, end]
        found.append(int(known_steps[end]))
    return found[::-1]


def _finite(
    steps: Sequence[int] | np.ndarray, values: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps with a finite value, and their values, float64."""
    known = np.asarray(values, np.float64)
    return np.asarray(steps)[np.isfinite(known)], known[np.isfinite(known)]


def _costs(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the squared residuals of a line through points begin to end - 1, float64[C + 1, C + 1]."""
    n = len(x)
    cost = np.full((n + 1, n + 1), np.inf)
    for begin in range(n):
        for end in range(begin + _PIECE, n + 1):
            dx, dy = x[begin:end] - x[begin:end].mean(), y[begin:end] - y[begin:end].mean()
            cost[begin, end] = max(0.0, dy @ dy - (dx @ dy) ** 2 / (dx @ dx))
    return cost


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


def onset_at(r: np.ndarray, steps: np.ndarray, level: float) -> np.ndarray:
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
    found = {f"onset_{level * 100:.0f}": onset_at(r, there, level) for level in LEVELS}
    found |= {
        "onset_excess": onset_at(excess(r), there, EXCESS_LEVEL) if len(r) else np.full(n, np.nan),
        "onset_best": onsets(curves["best"][before] == np.arange(n), there),
        "stage0_r": r[0] if len(r) else np.full(n, np.nan),
        "settled": settled.astype(np.float64),
        "turnovers": turned.astype(np.float64),
    }
    return {"n_active": n_active} | {name: np.where(living, x, np.nan) for name, x in found.items()}
