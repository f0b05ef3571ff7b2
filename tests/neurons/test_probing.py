"""Sparse probes: SciPy's minimiser and loops over pairs, and known answers."""

import numpy as np
import pytest
import scipy.optimize

from topklm.neurons import fit_dictionary, probing


def ones(n):
    return np.ones((n, 1))


def pairs(scores, is_label, weights):
    """Computes the area by all pairs of examples, ties half."""
    right = total = 0.0
    for i in np.flatnonzero(is_label):
        for j in np.flatnonzero(~is_label):
            w = weights[i] * weights[j]
            right += w * ((scores[i] > scores[j]) + (scores[i] == scores[j]) / 2)
            total += w
    return right / total


def test_area_is_that_of_all_pairs_with_ties_and_weights():
    rng = np.random.default_rng(0)
    scores = rng.integers(-3, 3, 60) / 4
    is_label = rng.random(60) < 0.3
    weights = rng.integers(0, 4, (60, 5)).astype(float)
    wanted = [pairs(scores, is_label, w) for w in weights.T]
    np.testing.assert_allclose(probing.auc(scores, is_label, weights), wanted, rtol=1e-12)


def test_balanced_accuracy_is_the_mean_of_both_shares():
    rng = np.random.default_rng(1)
    scores, is_label = rng.normal(size=80), rng.random(80) < 0.2
    weights = rng.integers(0, 3, (80, 4)).astype(float)
    for w, found in zip(weights.T, probing.balanced_accuracy(scores, is_label, weights), strict=True):
        drawn = np.repeat(np.arange(80), w.astype(int))
        says, truth = scores[drawn] > 0, is_label[drawn]
        assert found == pytest.approx((says[truth].mean() + (~says[~truth]).mean()) / 2)


def test_scores_of_a_draw_without_a_class_are_none():
    scores, is_label = np.array([1.0, 2.0]), np.array([True, False])
    weights = np.array([[1.0, 2.0], [1.0, 0.0]])
    for found in (probing.auc, probing.balanced_accuracy):
        assert np.isnan(found(scores, is_label, weights)).tolist() == [False, True]


def test_the_regression_is_the_minimum_that_another_optimizer_finds():
    rng = np.random.default_rng(2)
    x = rng.normal(2, 3, (300, 3))
    y = x[:, 0] + rng.normal(size=300) > 3.5
    z = (x - x.mean(axis=0)) / x.std(axis=0)

    def loss(w):
        margins = (z @ w[:-1] + w[-1]) * np.where(y, 1, -1)
        of_class = [np.logaddexp(0, -margins[part]).mean() / 2 for part in (y, ~y)]
        return sum(of_class) + probing.PENALTY / 2 * (w[:-1] ** 2).sum()

    best = scipy.optimize.minimize(loss, np.zeros(4), tol=1e-12).x
    found = probing.logistic(x, y)(x)
    np.testing.assert_allclose(found, z @ best[:-1] + best[-1], atol=1e-4)


def test_the_regression_ends_where_classes_are_apart_or_a_code_is_constant():
    x = np.stack([np.arange(40.0), np.full(40, 7.0)], axis=1)
    scores = probing.logistic(x, np.arange(40) > 20)(x)
    assert np.isfinite(scores).all() and (np.diff(scores) > 0).all()


def test_selection_is_by_difference_over_deviation():
    rng = np.random.default_rng(3)
    y = rng.random(500) < 0.4
    x = np.stack(
        [10 * rng.normal(size=500) + 3 * y, 0.1 * rng.normal(size=500) + 0.2 * y, np.ones(500)], axis=1
    )
    gap = [abs(x[y, m].mean() - x[~y, m].mean()) / max(x[:, m].std(), 1e-8) for m in range(3)]
    order = probing.select(x.astype(np.float32), y).tolist()
    assert order == sorted(range(3), key=lambda m: -gap[m]) == [1, 0, 2]


def planted(rng, n=1200, width=24):
    """Draws sparse codes, of which number 5 is a detector of the label."""
    y = rng.random(n) < 0.3
    x = 2 * np.maximum(rng.normal(-1, 1, (n, width)), 0)
    x[:, 5] = np.where(y, 1 + rng.random(n), 0)
    return x, y


def probed(x, y, **options):
    to_fit = np.arange(len(y)) % 2 == 0
    labels = np.where(y, "yes", "no")
    questions, _ = probing.ask(labels, np.zeros(len(y), int), to_fit)
    assert [q.label for q in questions] == ["yes"]  # of two labels one
    return probing.probe(x, questions, ones(len(y)), **options)


def test_a_planted_detector_is_found_and_a_rotation_of_it_is_worse():
    x, y = planted(np.random.default_rng(4))
    own = probed(x, y)
    assert own.auc[0, 0, 0] == own.balanced_accuracy[0, 0, 0] == 1
    rotation = fit_dictionary.random_rows(1, x.shape[1], 0)[0]
    rotated = probed((x - x.mean(axis=0)) @ rotation, y)
    assert rotated.auc[0, 0, 0] < 0.9
    # The rotation loses nothing but the axes: all codes together tell as much.
    assert probed(x @ rotation, y, ks=(24,)).auc[0, 0, 0] > 0.99
    assert (np.diff(rotated.auc[0, :, 0]) > 0).all()


def test_shuffled_labels_are_at_chance():
    rng = np.random.default_rng(5)
    x, y = planted(rng)
    scores = np.array([probed(x, rng.permutation(y)).auc[0, :, 0] for _ in range(30)])
    np.testing.assert_allclose(scores.mean(axis=0), 0.5, atol=0.02)


def test_labels_with_few_examples_are_left_out_and_families_are_apart():
    labels = np.array(["a"] * 60 + ["b"] * 60 + ["c"] * 30 + ["x"] * 60 + ["y"] * 60)
    families = np.array([0] * 150 + [1] * 120)
    to_fit = np.arange(270) % 2 == 0
    questions, left_out = probing.ask(labels, families, to_fit)
    assert ([q.label for q in questions], left_out) == (["a", "b", "y"], 1)
    for question in questions:
        rows = np.concatenate([question.fit, question.test])
        assert set(rows) == set(np.flatnonzero(families == (question.label == "y")))
        assert to_fit[question.fit].all() and not to_fit[question.test].any()
        np.testing.assert_array_equal(question.is_test, labels[question.test] == question.label)


def test_each_draw_is_of_the_examples_that_it_draws():
    x, y = planted(np.random.default_rng(6), n=300)
    x[:, 5] *= np.random.default_rng(7).random(300) < 0.5
    to_fit = np.arange(300) < 150
    questions, _ = probing.ask(np.where(y, "yes", "no"), np.zeros(300, int), to_fit)
    weights = np.random.default_rng(8).integers(0, 3, (300, 4)).astype(float)
    found = probing.probe(x, questions, weights, ks=(2,))
    for draw in range(4):
        only = probing.probe(x, questions, weights[:, [draw]], ks=(2,))
        np.testing.assert_allclose(found.auc[..., draw], only.auc[..., 0])
