"""Subjects take turns, and samples are seconds of one call."""

import numpy as np
import pytest
import scipy.stats

from benchmarks.harness.timing import Samples, alternate, interval, quartiles, ratio_interval, timed


def recorded(calls_made, name, seconds):
    def side(calls):
        calls_made.append((name, calls))
        return calls * seconds

    return side


def test_sides_take_turns_in_alternating_order():
    made = []
    alternate({"a": recorded(made, "a", 0.1), "b": recorded(made, "b", 0.2)}, repeats=3, warmup=2)
    assert [name for name, _ in made] == [*"aabb", *"ab", *"ba", *"ab"]


def test_a_fast_side_is_called_often_enough_for_a_sample_to_last():
    made = []
    subjects = {"fast": recorded(made, "fast", 0.01), "slow": recorded(made, "slow", 3.0)}
    found = alternate(subjects, repeats=2, warmup=1, at_least=0.055)
    assert made[2:] == [("fast", 6), ("slow", 1), ("slow", 1), ("fast", 6)]
    assert found["fast"].seconds == pytest.approx((0.01, 0.01))
    assert found["slow"].seconds == (3.0, 3.0)


def test_a_function_is_called_as_often_as_asked():
    called = []
    assert timed(lambda: called.append(1))(5) >= 0
    assert len(called) == 5


def test_quartiles_are_those_of_numpy():
    for n in (1, 2, 3, 7, 10):
        values = np.random.default_rng(n).normal(size=n)
        np.testing.assert_allclose(quartiles(values.tolist()), np.quantile(values, [0.25, 0.75]))


def test_figures_of_two_sides_are_compared_round_by_round():
    ours, theirs = Samples((1.0, 2.0, 4.0)), Samples((2.0, 2.0, 2.0))
    assert ours.speedup_over(theirs) == (2.0, 1.0, 0.5)
    assert ours.rates(8) == (8.0, 4.0, 2.0)
    assert (ours.median, ours.minimum) == (2.0, 1.0)


def test_nothing_is_printed_where_there_is_no_terminal(capfd):
    alternate({"a": lambda calls: 1e-3}, repeats=2, label="quiet")
    assert capfd.readouterr() == ("", "")


def test_the_interval_of_a_median_is_that_of_scipy():
    values = np.random.default_rng(3).gamma(2.0, size=40)
    want = scipy.stats.bootstrap(
        (values,), np.median, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    np.testing.assert_allclose(interval(values.tolist()), (want.low, want.high), rtol=0.05)
    assert interval([2.0]) == (2.0, 2.0)


def test_the_interval_of_a_ratio_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)

    def holds(factor):
        low, high = ratio_interval(
            (factor * rng.gamma(50, size=30)).tolist(), rng.gamma(50, size=30).tolist()
        )
        return low <= factor <= high

    assert np.mean([holds(1.5) for _ in range(200)]) > 0.88
