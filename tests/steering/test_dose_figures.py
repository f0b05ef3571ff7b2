"""Figures of texts against loops and SciPy."""

import math

import numpy as np
import pytest
import scipy.stats

from topklm.steering import dose

TEXT = [5, 5, 7, 5, 5, 7, 9]


@pytest.mark.parametrize(("n", "expected"), [(1, 3 / 7), (2, 4 / 7), (3, 4 / 7), (8, 0.0)])
def test_distinct_n_counts_different_n_grams_for_each_token(n, expected):
    seen = []
    for first in range(len(TEXT)):
        gram = TEXT[first : first + n]
        if len(gram) == n and gram not in seen:
            seen.append(gram)
    assert dose.distinct(TEXT, n) == len(seen) / len(TEXT) == expected


def test_distinct_n_of_no_text_is_0():
    assert dose.distinct([], 1) == 0


def test_a_ratio_is_that_of_the_sums_with_the_interval_of_drawing_whole_groups():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(40), 3)
    below = rng.integers(5, 20, 120).astype(float)
    above = below * rng.random(120) + 0.3 * groups
    found = dose.ratio(above, below, groups)
    by_group = [(above[groups == g].sum(), below[groups == g].sum()) for g in range(40)]
    assert found.value == pytest.approx(above.sum() / below.sum())

    def statistic(rows):
        return sum(by_group[g][0] for g in rows) / sum(by_group[g][1] for g in rows)

    expected = scipy.stats.bootstrap(
        (np.arange(40),), statistic, vectorized=False, method="percentile", n_resamples=2000, random_state=2
    ).confidence_interval
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.1 * width)
    assert found.high == pytest.approx(expected.high, abs=0.1 * width)
    alone = dose.ratio(above[:3], below[:3], groups[:3])
    assert math.isnan(alone.low)
    assert math.isnan(dose.ratio(np.zeros(2), np.zeros(2), np.arange(2)).value)
