"""Figures, differences and their intervals, against loops, SciPy and simulation."""

import math

import numpy as np
import pytest
import scipy.stats

from topklm.errors import UserError
from topklm.eval import tasks
from topklm.eval.tasks import PAIRS, Figure, Item, Outcome, Task


def figure(sums, weights=None, measure="acc"):
    sums = np.asarray(sums, float)
    return Figure("t", "", measure, "item", sums, np.ones(len(sums)) if weights is None else weights)


def test_one_pair_of_runs_has_a_bootstrap_over_units():
    rng = np.random.default_rng(0)
    weights = rng.integers(50, 500, 80).astype(float)
    theirs = weights * rng.normal(1.6, 0.2, 80)
    ours = theirs + weights * rng.normal(0.03, 0.02, 80)
    found = tasks.difference([figure(ours, weights)], [figure(theirs, weights)])
    assert found.value == pytest.approx((ours - theirs).sum() / weights.sum())
    draws = scipy.stats.bootstrap(
        (ours - theirs, weights),
        lambda gaps, weights, axis: gaps.sum(axis=axis) / weights.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=4000,
        random_state=1,
    ).confidence_interval
    np.testing.assert_allclose([found.low, found.high], draws, atol=0.0005)


def test_several_runs_have_an_interval_over_units_and_runs():
    rng = np.random.default_rng(1)
    gaps = rng.normal(0.1, 0.3, (3, 40)) + np.array([[0.0], [0.1], [-0.1]])
    theirs = rng.normal(0, 1, (3, 40))
    pairs = [[figure(row) for row in table] for table in (theirs + gaps, theirs)]
    found = tasks.difference(*pairs)
    assert found.value == pytest.approx(gaps.mean())
    np.testing.assert_allclose(found.by_run, gaps.mean(axis=1))
    over_units = scipy.stats.sem(gaps.mean(axis=0)) ** 2
    over_runs = scipy.stats.sem(gaps.mean(axis=1)) ** 2
    degrees = (over_units + over_runs) ** 2 / (over_units**2 / 39 + over_runs**2 / 2)
    low, high = scipy.stats.t.interval(0.95, degrees, gaps.mean(), math.sqrt(over_units + over_runs))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_the_interval_over_units_and_runs_holds_the_truth_as_often_as_it_says():
    rng, held = np.random.default_rng(2), []
    for _ in range(600):
        values = 0.2 + rng.normal(0, 0.1, (3, 1)) + rng.normal(0, 0.5, (1, 30)) + rng.normal(0, 0.3, (3, 30))
        found = tasks.difference([figure(row) for row in values], [figure(np.zeros(30))] * 3)
        held.append(found.low <= 0.2 <= found.high)
    assert 0.94 <= np.mean(held) <= 0.995  # it may be too wide, not too narrow


def test_pairing_takes_out_what_makes_units_hard_for_both():
    rng = np.random.default_rng(3)
    theirs = rng.normal(0, 5, 100)
    ours = theirs + rng.normal(0.1, 0.05, 100)
    found = tasks.difference([figure(ours)], [figure(theirs)])
    alone = figure(ours).estimate()
    assert 0.08 < found.low < found.high < 0.12
    assert alone.high - alone.low > 20 * (found.high - found.low)


@pytest.mark.parametrize(
    ("measure", "gap", "verdict"),
    [
        ("acc", 0.0, "no worse"),
        ("acc", 0.2, "no worse"),
        ("acc", -0.2, "worse"),
        ("acc", -0.05, "open"),
        ("bits_per_byte", 0.2, "worse"),
        ("bits_per_byte", -0.2, "no worse"),
    ],
)
def test_the_verdict_is_where_the_interval_lies_about_the_margin(measure, gap, verdict):
    noise = np.random.default_rng(4).normal(0, 0.1, 100)
    noise -= noise.mean()
    found = tasks.difference([figure(gap + noise, measure=measure)], [figure(0 * noise)], margin=0.05)
    assert (found.verdict, found.margin) == (verdict, 0.05)


def test_margins_of_measures_are_the_defaults():
    same = [figure([1.0, 2.0], measure="bits_per_byte")]
    assert tasks.difference(same, same).margin == tasks.MEASURES["bits_per_byte"].margin == 0.01


def test_one_unit_decides_nothing():
    found = tasks.difference([figure([1.0])], [figure([0.5])])
    assert found.value == 0.5
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert found.verdict == "open"


def test_equal_runs_differ_by_nothing():
    same = [figure([1.0, 0.0, 1.0])] * 2
    found = tasks.difference(same, same)
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_paradigms_count_the_same_whatever_their_size_and_fields_have_figures():
    groups = ["a"] * 4 + ["b"] * 2 + ["c"] * 2
    parts = ["syntax"] * 6 + ["semantics"] * 2
    right = np.array([1, 1, 1, 0, 0, 0, 1, 0], float)
    bits, n_bytes = np.arange(8, dtype=float), np.arange(10, 18, dtype=float)
    items = [Item("", (" x", " y"), 0, g, p) for g, p in zip(groups, parts, strict=True)]
    task = Task("blimp", PAIRS.title, PAIRS.measures, "here", "0", items)
    outcome = Outcome(task, {"acc": (right, np.ones(8)), "bits_per_byte": (bits, n_bytes)}, [], 0)
    found = {one.key[1:]: one for one in tasks.figures_of(outcome)}
    values = {key: one.sums.sum() / one.weights.sum() for key, one in found.items()}
    assert values == pytest.approx(
        {
            ("", "acc"): (0.75 + 0 + 0.5) / 3,
            ("", "bits_per_byte"): bits.sum() / n_bytes.sum(),
            ("syntax", "acc"): (0.75 + 0) / 2,
            ("semantics", "acc"): 0.5,
        }
    )
    assert {one.unit for one in found.values()} == {"paradigm"}
    assert len(found["", "acc"].sums) == 3


def test_a_mean_over_runs_has_an_interval_over_both():
    values = np.random.default_rng(5).normal(1, 0.1, (2, 20))
    found = tasks.mean_over_runs([figure(row) for row in values])
    assert found.value == pytest.approx(values.mean())
    assert found.low < found.value < found.high
    assert tasks.mean_over_runs([figure(values[0])]) == figure(values[0]).estimate()


def test_margins_are_read_by_measure():
    assert tasks.margins(None) == {}
    assert tasks.margins("acc=0.01, bits_per_byte=0") == {"acc": 0.01, "bits_per_byte": 0}


@pytest.mark.parametrize("text", ["acc", "0.1", "acc=x", "acc=-1", "accuracy=0.1", "acc=inf", "acc=nan"])
def test_other_margins_are_refused(text):
    with pytest.raises(UserError, match=rf"--margin = {text}: must be MEASURE=NUMBER"):
        tasks.margins(text)
