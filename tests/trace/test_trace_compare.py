"""Comparisons of neurons on the same tokens, against SciPy, NumPy and brute force."""

import itertools

import numpy as np
import pytest
from scipy.stats import pearsonr

from topklm.neurons.statistics import selectivity
from topklm.neurons.store import NeuronBlock
from topklm.trace import changes, measure


def block_of(dense):
    """The events of dense activations, [N, D]."""
    neurons, tokens = np.nonzero(dense.T)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(neurons, minlength=dense.shape[1]))])
    return NeuronBlock(offsets, tokens.astype(np.int32), dense[tokens, neurons].astype(np.float32))


def sparse(n_tokens, width, share, seed):
    rng = np.random.default_rng(seed)
    return np.where(rng.random((n_tokens, width)) < share, rng.standard_normal((n_tokens, width)), 0).astype(
        np.float32
    )


X, Y = sparse(5000, 7, 0.2, 0), sparse(5000, 7, 0.3, 1)
Y[:, :3] += X[:, :3]  # alike
X[:, 6] = 0  # dead


@pytest.mark.parametrize("cells", [1, 12_000, 2**22])
def test_r_is_that_of_scipy_however_neurons_are_cut(monkeypatch, cells):
    monkeypatch.setattr(measure, "_LOOKED_UP", cells)
    x, y = block_of(X), block_of(Y)
    products, both = measure.joint(x, y, len(X))
    r = measure.correlation(len(X), measure.sums(x), measure.sums(y), products)
    wanted = [
        pearsonr(a.astype(np.float64), b.astype(np.float64))[0] for a, b in zip(X.T[:6], Y.T, strict=False)
    ]
    np.testing.assert_allclose(r[:6], wanted, rtol=1e-12)
    assert np.isnan(r[6])
    np.testing.assert_array_equal(both, ((X != 0) & (Y != 0)).sum(axis=0))
    overlap = both / ((X != 0) | (Y != 0)).sum(axis=0)
    np.testing.assert_array_equal(measure.jaccard(both, x, y), overlap)


def test_neurons_dead_in_both_have_no_overlap():
    dead = block_of(np.zeros((10, 2), np.float32))
    assert np.isnan(measure.jaccard(np.zeros(2), dead, dead)).all()


def test_shifted_tokens_are_those_of_a_rolled_text():
    moved = np.roll(X, 1234, axis=0)
    products, _ = measure.joint(block_of(X), block_of(Y), len(X), shift=1234)
    np.testing.assert_allclose(products, (moved.astype(np.float64) * Y).sum(axis=0), rtol=1e-12)
    there = measure.shifted(block_of(X), len(X), 1234)
    for name in ("offsets", "tokens", "values"):
        np.testing.assert_array_equal(getattr(there, name), getattr(block_of(moved), name))


def test_correlations_of_all_pairs_are_those_of_numpy():
    r = measure.correlations(block_of(X), block_of(Y), len(X))
    wanted = np.corrcoef(X[:, :6].T.astype(np.float64), Y.T.astype(np.float64))[:6, 6:]
    np.testing.assert_allclose(r[:6], wanted, atol=2e-6)
    assert np.isnan(r[6]).all()


def test_partners_are_those_of_brute_force():
    r = np.random.default_rng(3).uniform(-1, 1, (6, 6))
    found = measure.partners(r)
    wanted = max(itertools.permutations(range(6)), key=lambda p: sum(r[i, j] for i, j in enumerate(p)))
    assert tuple(found.matched) == wanted
    np.testing.assert_array_equal(found.r_matched, r[np.arange(6), found.matched])
    np.testing.assert_array_equal(found.best, r.argmax(axis=1))
    others = [max(x for j, x in enumerate(row) if j != i) for i, row in enumerate(r)]
    np.testing.assert_array_equal(found.r_other, others)


def test_a_dead_neuron_has_no_partner_and_is_nobodys_best():
    r = np.array([[0.2, np.nan, 0.1], [np.nan] * 3, [0.3, np.nan, -0.5]])
    found = measure.partners(r)
    assert found.best.tolist() == [0, -1, 0]
    assert found.matched.tolist() == [2, -1, 0]
    assert np.isnan([found.r_best[1], found.r_other[1], found.r_matched[1]]).all()


def test_overlap_of_sets_of_tokens():
    np.testing.assert_array_equal(
        measure.overlap([[1, 2, 3], None, [5]], [[3, 4], [1], [5]]), [0.25, np.nan, 1.0]
    )


@pytest.mark.parametrize(("weight", "share"), [(0.0, 0.0), (1.0, 1.0), (0.5, 0.5)])
def test_by_token_of_noise_of_a_detector_and_of_their_half_mixture(weight, share):
    rng = np.random.default_rng(0)
    ids, of_token = rng.integers(0, 50, 60_000), rng.standard_normal(50)
    of_token = (of_token - of_token[ids].mean()) / of_token[ids].std()
    dense = np.sqrt(weight) * of_token[ids] + np.sqrt(1 - weight) * rng.standard_normal(len(ids))
    found = selectivity.explained(block_of(dense[:, None].astype(np.float32)), ids, 50)
    assert found[0] == pytest.approx(share, abs=0.01)


STEPS = np.array([0.0, 4, 16, 64])
CURVES = np.array(
    [
        [0.2, 0.6, 0.7, 0.9],  # from 4
        [0.2, 0.6, 0.3, 0.8],  # falls back: from 64
        [0.6, 0.6, 0.6, 0.6],  # from the start
        [0.1, 0.2, 0.3, 0.4],  # never
        [np.nan, 0.9, 0.9, np.nan],  # dead at the last
    ]
).T


def test_an_onset_is_where_a_curve_begins_to_stay():
    np.testing.assert_array_equal(changes.onset_at(CURVES, STEPS, 0.5), [4, 64, 0, np.nan, np.nan])
    np.testing.assert_array_equal(changes.onset_at(CURVES[:0], STEPS[:0], 0.5), [np.nan] * 5)


def test_the_excess_takes_the_start_off():
    np.testing.assert_allclose(changes.excess(CURVES)[:, 0], [0, 0.5, 0.625, 0.875])
    # Of a curve that does not move there is none.
    np.testing.assert_array_equal(changes.excess(CURVES)[:, 2], [0, 0, 0, 0])
