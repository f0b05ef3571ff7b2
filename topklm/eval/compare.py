"""Figures of evaluations, and runs against others: paired differences, intervals, non-inferiority.

A figure is a ratio of sums over units: documents, items, or groups of items (BLiMP's paradigms), of which
each group's mean counts the same. Differences are taken unit by unit, since units are easy or hard for both.

With one run on each side the interval is by bootstrap over units (`ablate_set.estimate`). With S runs on each
side, paired by their order, both units and runs are samples. Their variances are added,

    v = v_units + v_runs,   v_runs = s^2 / S,   v_units = n / (n - 1) sum_i (d_i - r w_i)^2 / (sum_i w_i)^2

s^2 being the variance of the S differences, d_i the mean difference of unit i, w_i its weight and r their
ratio. The interval is r +- t sqrt(v), t with Satterthwaite's degrees of freedom, v^2 / sum v_x^2 / df_x. The
sum counts what runs and units do together twice, so the interval is rather too wide, as the one of Owen's
pigeonhole bootstrap (2007, Annals of Applied Statistics 1, 386).
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math

import numpy as np

from topklm.errors import UserError
from topklm.eval.tasks import Outcome
from topklm.neurons.ablate_set import Estimate, estimate

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Measure:
    """One thing that is measured of tasks."""

    title: str
    is_better_up: bool
    margin: float  # by which a run may be worse and still counts as no worse


MEASURES = {
    "acc": Measure("accuracy", True, 0.005),
    "acc_bytes": Measure("accuracy by byte", True, 0.005),
    "nats": Measure("nats", False, 0.02),
    "bits_per_byte": Measure("bits per byte", False, 0.01),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Figure:
    """A figure of one run, as sums over n units."""

    task: str
    part: str  # of the task: a field of linguistics; "" for all of it
    measure: str  # in `MEASURES`
    unit: str  # "paradigm" and the like
    sums: np.ndarray  # float64[n]
    weights: np.ndarray  # float64[n]

    @property
    def key(self) -> tuple[str, str, str]:
        """Identifies the same figure of other runs."""
        return self.task, self.part, self.measure

    def estimate(self, seed: int = 0) -> Estimate:
        """Returns the figure with its interval by bootstrap over units."""
        return estimate(self.sums, self.weights, np.random.default_rng(seed))


@dataclasses.dataclass(frozen=True)
class Difference:
    """A figure of runs less that of others, with its 95 % interval; NaN where there is one unit only."""

    value: float
    low: float
    high: float
    by_run: tuple[float, ...]  # of each pair of runs
    margin: float
    verdict: str  # "no worse", "worse" or "open"


def figures_of(outcome: Outcome) -> Iterator[Figure]:
    """Yields the figures of an outcome: of its measures, and its first measure for each part."""
    task, items = outcome.task, outcome.task.items
    unit = "document" if task.documents else "item"
    groups = np.array([item.group for item in items])
    if len(items) == 0 or not all(item.group for item in items):
        for measure, (sums, weights) in outcome.ratios.items():
            yield Figure(task.name, "", measure, unit, sums, weights)
        return
    _, first, of_group = np.unique(groups, return_index=True, return_inverse=True)
    parts = np.array([items[number].part for number in first])

    def grouped(measure: str) -> tuple[np.ndarray, np.ndarray]:
        sums, weights = (np.bincount(of_group, values) for values in outcome.ratios[measure])
        return (sums, weights) if measure == "bits_per_byte" else (sums / weights, np.ones(len(sums)))

    for measure in outcome.ratios:
        yield Figure(task.name, "", measure, "paradigm", *grouped(measure))
    main = task.measures[0]
    sums, weights = grouped(main)
    for part in sorted(set(parts.tolist()) - {""}):
        is_in = parts == part
        yield Figure(task.name, part, main, "paradigm", sums[is_in], weights[is_in])


def difference(
    ours: Sequence[Figure], theirs: Sequence[Figure], margin: float | None = None, seed: int = 0
) -> Difference:
    """Computes the difference of the same figure of runs and others, one or more, paired by their order.

    They are of the same units with the same weights; the margin is by default that of the measure.
    """
    weights, measure = ours[0].weights, MEASURES[ours[0].measure]
    gaps = np.array([one.sums - other.sums for one, other in zip(ours, theirs, strict=True)])
    by_run = gaps.sum(axis=1) / weights.sum()
    if len(ours) == 1:
        found = estimate(gaps[0], weights, np.random.default_rng(seed))
        value, low, high = found.value, found.low, found.high
    else:
        value, low, high = _over_both(gaps, weights)
    if len(weights) < 2:
        low = high = math.nan
    margin = measure.margin if margin is None else margin
    sign = 1 if measure.is_better_up else -1
    worst, best = sorted((sign * low, sign * high))
    verdict = "no worse" if worst > -margin else "worse" if best < -margin else "open"
    return Difference(value, low, high, tuple(by_run.tolist()), margin, verdict)


def mean_over_runs(figures: Sequence[Figure], seed: int = 0) -> Estimate:
    """Returns the mean of the same figure over runs, with its interval over runs and units."""
    if len(figures) == 1:
        return figures[0].estimate(seed)
    return Estimate(*_over_both(np.array([one.sums for one in figures]), figures[0].weights))


def _over_both(values: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """Returns the mean of float64[S, n] over n weights, and its interval over runs and units."""
    n_runs, n = values.shape
    of_units = values.mean(axis=0)
    ratio = of_units.sum() / weights.sum()
    if n < 2:
        return ratio, math.nan, math.nan
    v_units = n / (n - 1) * np.sum((of_units - ratio * weights) ** 2) / weights.sum() ** 2
    v_runs = np.var(values.sum(axis=1) / weights.sum(), ddof=1) / n_runs
    variance = v_units + v_runs
    if variance == 0:
        return ratio, ratio, ratio
    degrees = variance**2 / (v_units**2 / (n - 1) + v_runs**2 / (n_runs - 1))
    import scipy.stats  # noqa: PLC0415 - a third of a second, which the trainer does without

    reach = scipy.stats.t.ppf((1 + LEVEL) / 2, degrees) * math.sqrt(variance)
    return float(ratio), float(ratio - reach), float(ratio + reach)


def margins(text: str | None) -> Mapping[str, float]:
    """Reads margins by measure, "acc=0.01,bits_per_byte=0.02"; UserError for another form or measure."""
    found = {}
    for part in (text or "").split(",") if text else ():
        name, equals, value = (piece.strip() for piece in part.partition("="))
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if name not in MEASURES or not equals or not 0 <= number < math.inf:
            allowed = f"MEASURE=NUMBER with commas between, of {', '.join(MEASURES)}, each 0 or more"
            raise UserError(field="--margin", value=text, allowed=allowed)
        found[name] = number
    return found
