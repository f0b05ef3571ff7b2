"""Token entropy and semantic entropy: known answers, and SciPy's entropy over counted tokens."""

import collections
import math

from activity_stores import block_of, random_dense
import numpy as np
import pytest
import scipy.stats

from topklm.neurons.statistics import selectivity


def test_a_neuron_of_one_token_has_entropy_0():
    dense = np.array([[1.25], [0], [3], [0.1]], np.float32)
    found = selectivity.columns(block_of(dense), np.array([7, 3, 7, 7]), np.zeros(9, int))
    assert found["token_entropy"].tolist() == found["token_entropy_corrected"].tolist() == [0.0]
    assert math.copysign(1, found["token_entropy"][0]) == 1
    assert found["semantic_entropy"].tolist() == [0.0]
    assert found["n_distinct_tokens"].tolist() == [1]
    assert (found["top_tokens"], found["top_token_shares"]) == ([[7]], [[1.0]])


@pytest.mark.parametrize("m", [2, 3, 10, 37])
def test_a_neuron_uniform_over_m_tokens_has_entropy_ln_m(m):
    ids = np.tile(np.arange(m), 4)
    dense = np.full((4 * m, 1), 0.5, np.float32)
    found = selectivity.columns(block_of(dense), ids, np.arange(m) % 2)
    np.testing.assert_allclose(found["token_entropy"], [math.log(m)], rtol=1e-12)
    np.testing.assert_allclose(
        found["token_entropy_corrected"], [math.log(m) + (m - 1) / (8 * m)], rtol=1e-12
    )
    share = np.array([(m + 1) // 2, m // 2]) / m
    np.testing.assert_allclose(found["semantic_entropy"], [-(share * np.log(share)).sum()], rtol=1e-12)
    np.testing.assert_allclose(
        found["semantic_entropy_corrected"][0] - found["semantic_entropy"][0], 1 / (8 * m), rtol=1e-9
    )


@pytest.mark.parametrize("signed", [False, True])
def test_all_columns_are_what_counting_finds(signed):
    rng = np.random.default_rng(2)
    dense = random_dense(5, 1, 900, 7, signed=signed)[0]
    ids, clusters = rng.zipf(1.5, 900).clip(max=49).astype(np.uint16), rng.integers(0, 6, 50)
    found = selectivity.columns(block_of(dense), ids, clusters)
    for neuron in range(6):
        by_token, by_cluster = collections.Counter(), collections.Counter()
        n_active = np.count_nonzero(dense[:, neuron])
        for token, value in zip(ids.tolist(), dense[:, neuron].tolist(), strict=True):
            if value:
                by_token[token] += abs(value)
                by_cluster[clusters[token]] += abs(value)
        assert found["n_distinct_tokens"][neuron] == len(by_token)
        for name, groups in (("token", by_token), ("semantic", by_cluster)):
            wanted = scipy.stats.entropy(list(groups.values()))
            corrected = wanted + (len(groups) - 1) / (2 * n_active)
            np.testing.assert_allclose(found[f"{name}_entropy"][neuron], wanted, rtol=1e-9)
            np.testing.assert_allclose(found[f"{name}_entropy_corrected"][neuron], corrected, rtol=1e-9)
        top = sorted(by_token, key=lambda token: (-by_token[token], token))[:10]
        assert found["top_tokens"][neuron] == top
        shares = np.array([by_token[token] for token in top]) / by_token.total()
        np.testing.assert_allclose(found["top_token_shares"][neuron], shares, rtol=1e-9)


def test_a_dead_neuron_has_no_entropies():
    dense = np.zeros((5, 2), np.float32)
    dense[2, 1] = 1
    found = selectivity.columns(block_of(dense), np.arange(5), np.arange(5))
    assert found["n_distinct_tokens"].tolist() == [0, 1]
    for name in found.keys() - {"n_distinct_tokens"}:
        if name.startswith("top_"):
            assert found[name][0] is None
            assert found[name][1] is not None
        else:
            assert np.isnan(found[name]).tolist() == [True, False]


def test_merging_never_adds_entropy_and_clusters_of_one_change_nothing():
    rng = np.random.default_rng(8)
    strengths = rng.random((20, 30)) * (rng.random((20, 30)) < 0.4)
    np.testing.assert_array_equal(selectivity.merged(strengths, np.arange(30)), strengths)
    clusters = rng.permutation(np.arange(30) % 7)
    merged = selectivity.merged(strengths, clusters)
    wanted = [[row[clusters == c].sum() for c in range(7)] for row in strengths]
    np.testing.assert_allclose(merged, wanted, rtol=1e-12)
    assert np.all(selectivity.plug_in(merged) <= selectivity.plug_in(strengths) + 1e-12)


def test_equal_shares_come_by_rising_id():
    strengths = np.array([[0, 2.0, 1, 1, 0, 1, 2], [0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    ids = [found.tolist() for found, _ in selectivity.top_tokens(strengths, 3)]
    assert ids == [[1, 6, 2], [], [0, 1, 2]]
    assert next(found.tolist() for found, _ in selectivity.top_tokens(strengths, 9)) == [1, 6, 2, 3, 5]


def test_the_correction_takes_most_of_the_bias_away():
    rng = np.random.default_rng(0)
    n_neurons, n_active, m = 300, 200, 40
    strengths = np.stack([np.bincount(rng.integers(0, m, n_active), minlength=m) for _ in range(n_neurons)])
    plain = selectivity.plug_in(strengths.astype(float))
    corrected = plain + selectivity.miller_madow(strengths, np.full(n_neurons, n_active))
    assert abs(corrected.mean() - math.log(m)) < 0.15 * abs(plain.mean() - math.log(m))
