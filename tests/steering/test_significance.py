"""Verdicts against loops over one neuron at a time, and an interval against the equation of its ends."""

import math

import numpy as np
import pytest

from topklm.steering import dose
from topklm.steering.dose import MeasuredLayer

X, N, R, K = 3, 12, 40, 2
OTHERS_AT = np.array([0, 3, 4, 9])
BOUND = 1.0


@pytest.fixture(scope="module")
def measured():
    rng = np.random.default_rng(5)
    others = rng.normal(0, 1, (X, len(OTHERS_AT), N, K))
    own = rng.normal(1, 1, (X, N, K))
    own[:, OTHERS_AT] = others[:, np.arange(len(OTHERS_AT)), OTHERS_AT]
    divergences = np.sort(rng.random((X, N)) * 2, axis=0)
    divergences[:, 5] = 3.0  # never within
    divergences[1, 6], divergences[2, 6] = 5.0, 0.2  # comes back
    random = rng.normal(0, 0.7, (X, R, N, K))
    return MeasuredLayer(own, divergences, divergences, random, divergences[:, :1], others, OTHERS_AT)


def quantile(values):
    """Returns the 95th percentile, by linear interpolation between sorted values."""
    values = sorted(values)
    at = dose.QUANTILE * (len(values) - 1)
    low = math.floor(at)
    return values[low] + (at - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def strength_of(measured, neuron):
    within = [x for x in range(X) if measured.divergences[x, neuron] <= BOUND]
    return max(within, default=-1)


def test_each_verdict_is_that_of_the_definition(measured):
    found = dose.judge(measured, BOUND)
    for j in range(N):
        x = strength_of(measured, j)
        assert found.strength[j] == x
        for k in range(K):
            if x == -1:
                assert not found.steerable[j, k]
                assert np.isnan(found.gain[j, k])
                continue
            gain = measured.own[x, j, k]
            of_random = quantile(measured.random[x, :, j, k])
            others = [measured.others[x, s, j, k] for s, i in enumerate(OTHERS_AT) if i != j]
            steerable = gain > 0 and gain > of_random
            assert found.random[j, k] == pytest.approx(of_random)
            assert found.others[j, k] == pytest.approx(quantile(others))
            assert found.steerable[j, k] == steerable
            assert found.specific[j, k] == (steerable and gain > quantile(others))
    assert 0 < found.specific.sum() < found.steerable.sum() < N * K


def test_mismatched_pairs_are_counted_one_by_one(measured):
    found = dose.judge(measured, BOUND)
    for k in range(K):
        passed = []
        for s, neuron in enumerate(OTHERS_AT):
            x = strength_of(measured, neuron)
            for i in range(N):
                if i != neuron:
                    gain = measured.others[x, s, i, k]
                    passed.append(x != -1 and gain > 0 and gain > quantile(measured.random[x, :, i, k]))
        assert found.mismatched[k] == pytest.approx(np.mean(passed))


def test_a_gain_below_zero_is_none_whatever_random_directions_do(measured):
    low = MeasuredLayer(
        own=-0.1 * np.ones((X, N, K)),
        divergences=np.zeros((X, N)),
        losses=np.zeros((X, N)),
        random=measured.random - 100,
        random_divergences=measured.random_divergences,
        others=measured.others - 100,
        others_at=OTHERS_AT,
    )
    assert not dose.judge(low, BOUND).steerable.any()


def test_random_numbers_are_steerable_in_five_of_a_hundred_cases():
    rng = np.random.default_rng(0)
    n = 2000
    own = rng.normal(3, 1, (1, n, 1))
    zeros = np.zeros((1, n))
    random = rng.normal(3, 1, (1, 200, n, 1))
    others = np.zeros((1, 0, n, 1))
    chance = MeasuredLayer(own, zeros, zeros, random, np.zeros((1, 200)), others, np.zeros(0, np.int64))
    found = dose.judge(chance, BOUND)
    assert 0.035 < found.steerable.mean() < 0.065
    assert not found.specific.any()  # there was nothing to compare with


@pytest.mark.parametrize(("count", "n"), [(0, 10), (3, 10), (10, 10), (170, 256)])
def test_the_interval_of_a_share_is_wilsons(count, n):
    # Its ends are the shares p from which count / n is 1.96 standard deviations sqrt(p (1 - p) / n) away.
    low, high = dose.wilson(count, n)
    for end in (low, high):
        assert (count / n - end) ** 2 == pytest.approx(1.959963984540054**2 * end * (1 - end) / n, abs=1e-12)
    assert low <= count / n <= high
    assert low < high
    assert math.isnan(dose.wilson(0, 0)[0])
