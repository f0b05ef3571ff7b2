"""Contrasts against counting by hand over all ways to deal units, and on text in which nothing differs."""

from fractions import Fraction
import itertools
import math

import numpy as np
import pytest
import scipy.stats

from topklm.neurons.contrast import ORDERS, contrast, ranked


def difference(counts, tokens, chosen):
    """Returns the difference of one neuron, as a fraction."""
    rest = [g for g in range(len(tokens)) if g not in chosen]
    return Fraction(sum(counts[g] for g in chosen), sum(tokens[g] for g in chosen)) - Fraction(
        sum(counts[g] for g in rest), sum(tokens[g] for g in rest)
    )


def scale(counts, tokens):
    share = sum(counts) / sum(tokens)
    return math.sqrt(sum((c - share * n) ** 2 for c, n in zip(counts, tokens, strict=True)))


def drawn_counts(rng, n_units, n_neurons, length=(20, 60)):
    """Units in which a neuron is active often or seldom as a whole: tokens are far from independent."""
    tokens = rng.integers(*length, n_units)
    rates = rng.beta(0.5, 2.0, (n_units, n_neurons))
    return rng.binomial(tokens[:, None], rates)[:, None], tokens


@pytest.mark.parametrize("positive", [(0, 2, 5), (1, 4)])
def test_exact_p_values_are_those_of_counting_over_all_ways(positive):
    rng = np.random.default_rng(1)
    tokens = [int(n) for n in rng.integers(4, 9, 6)]
    active = np.minimum(rng.integers(0, 6, (6, 2, 3)), np.array(tokens)[:, None, None])
    active[:, 1, 2] = 0
    found = contrast(active, np.array(tokens), np.isin(np.arange(6), positive))
    ways = list(itertools.combinations(range(6), len(positive)))
    assert (found.is_exact, found.n_permutations) == (True, len(ways))
    neurons = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    columns = {at: [int(c) for c in active[:, at[0], at[1]]] for at in neurons}
    scales = {at: scale(columns[at], tokens) for at in neurons}
    p_values = []
    for at in neurons:
        observed = difference(columns[at], tokens, positive)
        assert found.difference[at] == pytest.approx(float(observed))
        dealt = [abs(difference(columns[at], tokens, way)) for way in ways]
        p_values.append(sum(d >= abs(observed) for d in dealt) / len(ways))
        assert found.p_value[at] == p_values[-1]
        reached = [
            max(abs(float(difference(columns[other], tokens, way))) / scales[other] for other in neurons)
            >= abs(float(observed)) / scales[at] - 1e-12
            for way in ways
        ]
        assert found.family_p_value[at] == pytest.approx(sum(reached) / len(ways))
    # Benjamini and Hochberg (1995): the least p' M / rank of p' of those p' that are at least p.
    ranks = [sum(other <= p for other in p_values) for p in p_values]
    q_values = [
        min(1.0, *(other * 5 / rank for other, rank in zip(p_values, ranks, strict=True) if other >= p))
        for p in p_values
    ]
    np.testing.assert_allclose([found.q_value[at] for at in neurons], q_values)
    assert min(p_values) >= found.lowest_p_value == (0.1 if len(positive) == 3 else 1 / 15)
    for figures in (found.p_value, found.q_value, found.family_p_value, found.score):
        assert np.isnan(figures[1, 2])  # it is active nowhere
    assert found.n_tested == 5


def test_drawn_p_values_come_near_the_exact_ones_and_are_never_0():
    counts, tokens = drawn_counts(np.random.default_rng(2), 14, 30)
    counts[:7, 0, 0], counts[7:, 0, 0] = tokens[:7], 0
    is_positive = np.arange(14) < 7
    exact = contrast(counts, tokens, is_positive)
    drawn = contrast(counts, tokens, is_positive, permutations=3000, seed=3)
    assert (exact.n_permutations, drawn.n_permutations, drawn.is_exact) == (math.comb(14, 7), 3000, False)
    for one, other in ((exact.p_value, drawn.p_value), (exact.family_p_value, drawn.family_p_value)):
        error = np.sqrt(one * (1 - one) / 3000)
        assert np.all(np.abs(other - one) < 4 * error + 1 / 3000)
        assert np.all(np.round(other * 3001, 6) % 1 == 0)
    assert drawn.p_value.min() >= drawn.lowest_p_value == 1 / 3001
    assert exact.p_value[0, 0] == exact.lowest_p_value == 2 / math.comb(14, 7)
    again = contrast(counts, tokens, is_positive, permutations=3000, seed=3)
    np.testing.assert_array_equal(again.p_value, drawn.p_value)


def test_a_planted_neuron_is_found_and_no_other_is():
    rng = np.random.default_rng(4)
    counts, tokens = drawn_counts(rng, 40, 200)
    is_positive = rng.permutation(np.arange(40) < 20)
    counts[:, 0, 77] = rng.binomial(tokens, np.where(is_positive, 0.3, 0.05))
    found = contrast(counts, tokens, is_positive, permutations=4000)
    assert found.family_p_value[0, 77] < 0.01 and found.q_value[0, 77] <= 0.06
    others = np.delete(found.family_p_value[0], 77)
    assert others.min() > 0.05
    assert [r.neuron for r in ranked(found, [3], by="score", top=1)] == [77]
    # The other way round its difference is the smallest, and as sure.
    swapped = contrast(counts, tokens, ~is_positive, permutations=4000)
    assert ranked(swapped, [3], by="score")[-1].neuron == 77
    assert swapped.p_value[0, 77] == found.p_value[0, 77]


def test_where_nothing_differs_p_values_are_uniform_though_tokens_are_not_independent():
    counts, tokens = drawn_counts(np.random.default_rng(5), 14, 400)
    is_positive = np.arange(14) < 7
    p_values = contrast(counts, tokens, is_positive).p_value[0]
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 0.05
    # A test that takes tokens for independent would find differences everywhere.
    totals = counts[is_positive, 0].sum(axis=0), counts[~is_positive, 0].sum(axis=0)
    n = tokens[is_positive].sum(), tokens[~is_positive].sum()
    of_tokens = [
        scipy.stats.fisher_exact([[a, n[0] - a], [b, n[1] - b]]).pvalue for a, b in zip(*totals, strict=True)
    ]
    assert np.mean(np.array(of_tokens) < 0.05) > 0.4
    assert 0.02 < np.mean(p_values <= 0.05) < 0.08


def test_where_nothing_differs_any_neuron_is_called_as_seldom_as_was_asked_for():
    called = 0
    for seed in range(200):
        counts, tokens = drawn_counts(np.random.default_rng([6, seed]), 10, 20)
        found = contrast(counts, tokens, np.arange(10) < 5)
        called += found.family_p_value.min() <= 0.1
    assert abs(called / 200 - 0.1) < 3 * math.sqrt(0.1 * 0.9 / 200)


def test_the_score_is_the_difference_in_standard_deviations_over_all_ways():
    counts, _ = drawn_counts(np.random.default_rng(7), 8, 4)
    tokens = np.full(8, 60)
    found = contrast(counts, tokens, np.arange(8) < 3)
    for neuron in range(4):
        column = [int(c) for c in counts[:, 0, neuron]]
        ways = [float(difference(column, [60] * 8, way)) for way in itertools.combinations(range(8), 3)]
        assert found.score[0, neuron] == pytest.approx(found.difference[0, neuron] / np.std(ways))


def test_a_neuron_with_the_same_share_everywhere_is_as_likely_as_can_be():
    tokens = np.array([3, 6, 9, 12])
    counts = np.stack([tokens, tokens // 3, [0, 0, 9, 12]], axis=1)[:, None]
    found = contrast(counts, tokens, np.array([True, True, False, False]))
    np.testing.assert_allclose(found.difference[0, :2], 0, atol=1e-15)
    assert found.p_value[0, :2].tolist() == found.family_p_value[0, :2].tolist() == [1.0, 1.0]
    assert found.score[0, :2].tolist() == [0.0, 0.0]
    assert found.family_p_value[0, 2] == pytest.approx(1 / 3)


def test_neurons_are_ranked_layer_by_layer_and_those_active_nowhere_left_out():
    tokens = np.full(4, 10)
    active = np.zeros((4, 2, 4), int)
    active[:2, 0, 1], active[:, 0, 2], active[2:, 0, 0] = 5, 3, 4
    active[0, 1, 3], active[:2, 1, 1], active[:2, 1, 2] = 9, 4, 4
    found = contrast(active, tokens, np.arange(4) < 2)
    rows = ranked(found, [1, 4])
    assert [(r.layer, r.neuron) for r in rows] == [(1, 1), (1, 2), (1, 0), (4, 3), (4, 1), (4, 2)]
    first = rows[0]
    assert (first.frequency_positive, first.frequency_negative, first.difference) == (0.5, 0.0, 0.5)
    assert (first.p_value, first.q_value) == (found.p_value[0, 1], found.q_value[0, 1])
    assert [(r.layer, r.neuron) for r in ranked(found, [1, 4], only=[4], top=2)] == [(4, 3), (4, 1)]
    # In standard deviations, one document is less than two.
    assert [r.neuron for r in ranked(found, [1, 4], only=[4], by=ORDERS[1])] == [1, 2, 3]
    for wrong, message in (({"only": [2]}, "layer = 2: must be one of 1, 4"), ({"by": "x"}, "by = 'x'")):
        with pytest.raises(ValueError, match=message):
            ranked(found, [1, 4], **wrong)


def test_nothing_active_gives_nothing():
    found = contrast(np.zeros((4, 1, 3), int), np.full(4, 5), np.arange(4) < 2)
    assert found.n_tested == 0 and ranked(found, [0]) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_positive": np.array([True, True])}, "2 of 2 units: both texts must have one"),
        ({"n_tokens": np.array([3, 0])}, "every unit must have one at least"),
        ({"permutations": 0}, "permutations = 0: must be 1 or more"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes, message):
    arguments = {
        "active": np.ones((2, 1, 1), int),
        "n_tokens": np.array([3, 3]),
        "is_positive": np.array([True, False]),
    }
    with pytest.raises(ValueError, match=message):
        contrast(**{**arguments, **changes})
