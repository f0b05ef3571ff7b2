"""Change points: known answers, and brute force over all cuts."""

import itertools

import numpy as np
import pytest

from topklm.config import resolve
from topklm.trace import changes

STEPS = [0, *(2**n for n in range(11))]


def test_a_curve_that_bends_once_has_its_onset_there():
    x = changes.log_steps(STEPS)
    bend = np.log2(65)
    values = 0.2 + 0.3 * np.maximum(x - bend, 0)
    assert changes.onset(STEPS, values) == 64
    assert changes.onset(STEPS, -values, rises=False) == 64
    assert changes.onset(STEPS, 5 - 0.1 * x) is None or changes.acceleration(STEPS, 5 - 0.1 * x).max() < 1e-12
    # Of two bends the sharper one, wherever it stands.
    assert changes.onset(STEPS, values + 0.5 * np.maximum(x - np.log2(9), 0)) == 8


def test_steps_need_not_be_even():
    steps = [0, 4, 16, 20, 91, 400]
    x = np.log2(1 + np.array(steps))
    assert np.allclose(changes.acceleration(steps, 3 * x + 1), 0)
    assert np.allclose(changes.acceleration(steps, x**2), 2)


def test_steps_close_together_do_not_magnify_noise():
    steps = resolve({"checkpoint": {"trace": "log"}, "train": {"steps": 1300}}).traced_steps
    assert changes.log_spaced(steps) == steps
    more = sorted([*steps, 1200, 1250])
    assert changes.log_spaced(more) == steps
    values = np.maximum(changes.log_steps(more) - np.log2(65), 0)
    values[more.index(1250)] += 0.05
    assert changes.acceleration(more, values).argmax() + 1 != more.index(64)
    assert changes.onset(more, values) == 64


def test_values_that_are_not_finite_are_left_out():
    values = np.maximum(changes.log_steps(STEPS) - 5, 0)
    values[[0, 3]] = np.nan
    assert changes.onset(STEPS, values) == 32
    assert changes.onset(STEPS[:3], [1, np.nan, 2]) is None


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n_breaks", [0, 1, 2, 3])
def test_breaks_are_the_best_of_all_cuts(seed, n_breaks):
    values = np.random.default_rng(seed).standard_normal(len(STEPS)).cumsum()
    x = changes.log_steps(STEPS)

    def cost(cuts):
        total = 0.0
        for begin, end in itertools.pairwise([0, *cuts, len(STEPS)]):
            line = np.polyfit(x[begin:end], values[begin:end], 1)
            total += ((np.polyval(line, x[begin:end]) - values[begin:end]) ** 2).sum()
        return total

    allowed = [
        cuts
        for cuts in itertools.combinations(range(len(STEPS)), n_breaks)
        if min(np.diff([0, *cuts, len(STEPS)])) >= 3
    ]
    best = min(allowed, key=cost)
    assert changes.breaks(STEPS, values, n_breaks) == [STEPS[cut] for cut in best]


def test_three_lines_are_cut_where_they_were_joined():
    steps = np.arange(30)
    x = changes.log_steps(steps)
    values = np.where(steps < 5, 0, np.where(steps < 16, 3 + x, 9 - 2 * x))
    assert changes.breaks(steps, values, 2) == [5, 16]


@pytest.mark.parametrize(("n", "n_breaks"), [(5, 1), (31, 1), (9, -1)])
def test_too_few_or_too_many_points_are_refused(n, n_breaks):
    with pytest.raises(ValueError, match=r"steps: .* with a value: must be from"):
        changes.breaks(range(n), np.zeros(n), n_breaks)


@pytest.mark.parametrize("steps", [[0, 0, 1], [-1, 0, 2], [3, 2, 1]])
def test_steps_that_do_not_rise_are_refused(steps):
    with pytest.raises(ValueError, match="steps: must rise"):
        changes.onset(steps, [0, 1, 2])
