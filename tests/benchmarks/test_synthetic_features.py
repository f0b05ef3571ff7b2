"""Synthetic hidden states against a brute-force reading of their rules, and scores against scikit-learn."""

import itertools

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from benchmarks import synthetic_features

SCALE, N = 64, 4000  # 256 features of 12 dimensions, trees of 2 roots


@pytest.fixture(scope="module")
def model():
    return synthetic_features.make(SCALE, seed=3)


@pytest.fixture(scope="module")
def sample(model):
    x, values = model.sample(5, 0, N)
    return np.asarray(x), np.asarray(values)


def test_the_published_size_is_scale_one():
    assert synthetic_features.levels(128)[-1].stop == 128 * (1 + 4 + 16 + 64)
    assert synthetic_features._FEATURES // 4 == synthetic_features._WIDTH


def test_states_are_sums_of_features(model, sample):
    x, values = sample
    wanted = values.astype(np.float64) @ model.vectors + model.bias
    np.testing.assert_allclose(x, wanted, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(model.vectors, axis=1), 1, atol=1e-5)


def test_children_fire_with_their_parents_and_alone(model, sample):
    _, values = sample
    fires = values > 0
    levels = synthetic_features.levels(model.n_roots)
    n_children = 0
    for above, level in itertools.pairwise(levels):
        for parent in range(above.start, above.stop):
            first = level.start + 4 * (parent - above.start)
            family = fires[:, first : first + 4]
            assert not family[~fires[:, parent]].any()
            assert family.sum(axis=1).max() <= 1
            n_children += family.sum()
    assert n_children > 200
    # A value follows the parent's: of one child's values, the parts that differ are its own noise.
    child, parent = levels[1].start, 0
    both = fires[:, child]
    own = values[both, child] / (values[both, parent] / model.means[parent])
    assert stats.kstest(own, "norm", (model.means[child], model.deviations[child])).pvalue > 1e-3


def test_features_without_parents_fire_as_often_as_they_should(model, sample):
    _, values = sample
    last = synthetic_features.levels(model.n_roots)[-1].stop
    free = [*range(model.n_roots), *range(last, len(model.drawn))]
    n_firing = (values[:, free] > 0).sum(axis=0)
    p_values = [
        stats.binomtest(int(n), N, float(p)).pvalue
        for n, p in zip(n_firing, model.probabilities[free], strict=True)
    ]
    assert min(p_values) > 1e-3 / len(free)


def test_firing_is_a_gaussian_copula(model):
    values = np.concatenate([np.asarray(model.sample(0, number, N)[1]) for number in range(5)])
    fires = values[:, :2] > 0
    r = float(model.factors[0] @ model.factors[1])
    quantiles = stats.norm.ppf(model.drawn[:2].astype(np.float64))
    wanted = stats.multivariate_normal.cdf(quantiles, cov=[[1, r], [r, 1]])
    assert stats.binomtest(int(fires.all(axis=1).sum()), len(fires), wanted).pvalue > 1e-3
    assert wanted != pytest.approx(float(np.prod(model.drawn[:2])), rel=0.02)


def test_a_batch_depends_on_its_number_alone(model):
    one, again, other = (np.asarray(model.sample(1, number, 8)[0]) for number in (4, 4, 5))
    assert (one == again).all()
    assert (one != other).any()


def test_scores_are_those_of_scikit_learn(model, sample):
    x, values = sample
    rng = np.random.default_rng(0)
    decoder = model.vectors[[0, 1, 2, 1, 40]] + 0.05 * rng.standard_normal((5, x.shape[1]))
    decoder = np.concatenate([decoder, -model.vectors[7:8]])
    codes = np.maximum((x - model.bias) @ decoder.T - 2, 0)
    codes[:, 4] = 0
    reconstructed = codes @ decoder + model.bias
    scores = synthetic_features.Scores(model, decoder)
    for part in np.array_split(np.arange(N), 3):
        scores.add(x[part], reconstructed[part], codes[part], values[part])
    found = scores.recovery()
    cosines = np.abs(decoder @ model.vectors.T) / np.linalg.norm(decoder, axis=1)[:, None]
    nearest = cosines.argmax(axis=1)
    assert nearest.tolist()[:3] == [0, 1, 2]
    for name in ("f1", "precision", "recall"):
        score = getattr(metrics, f"{name}_score")
        each = [score(values[:, f] > 0, codes[:, m] > 0, zero_division=0) for m, f in enumerate(nearest)]
        assert getattr(found, name) == pytest.approx(np.mean(each), abs=1e-9)
    best = max(
        sum(cosines[m, f] for m, f in enumerate(order)) for order in itertools.permutations(range(8), 6)
    )
    assert found.mcc >= best / 6 - 1e-9  # of the pairs among the first eight features; more may be better
    assert found.uniqueness == pytest.approx(len(set(nearest.tolist())) / 6)
    wanted = metrics.r2_score(x, reconstructed, multioutput="variance_weighted")
    assert found.explained_variance == pytest.approx(wanted, abs=1e-5)
    assert found.l0 == pytest.approx((codes > 0).sum() / N)
    assert found.dead == 1


def test_features_themselves_are_found_whole(model, sample):
    x, values = sample
    scores = synthetic_features.Scores(model, model.vectors)
    scores.add(x, values @ model.vectors + model.bias, values, values)
    found = scores.recovery()
    fired = (values > 0).any(axis=0).mean()
    assert found.f1 == found.precision == found.recall == pytest.approx(fired)
    assert (found.mcc, found.uniqueness) == (pytest.approx(1, abs=1e-5), 1)
    assert found.explained_variance == pytest.approx(1, abs=1e-6)
