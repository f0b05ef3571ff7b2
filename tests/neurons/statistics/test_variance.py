"""Variance that tokens explain: known answers, and a loop over dense activations in float64."""

from activity_stores import block_of, random_dense
import numpy as np
import pytest

from topklm.neurons.statistics import selectivity
from topklm.neurons.store import NeuronBlock

V = 12


def by_loop(dense, keys, least=selectivity.LEAST_IN_GROUP):
    """Takes one neuron, float[N], zeros included."""
    groups = [k for k in set(keys.tolist()) if k >= 0 and (keys == k).sum() >= least]
    if np.count_nonzero(dense[np.isin(keys, groups)]) < selectivity.LEAST_ACTIVE:
        return np.nan
    values = dense[np.isin(keys, groups)].astype(np.float64)
    within = sum(((dense[keys == k].astype(np.float64) - dense[keys == k].mean()) ** 2).sum() for k in groups)
    total = ((values - values.mean()) ** 2).sum()
    n = len(values)
    return 1 - (within / (n - len(groups))) / (total / (n - 1))


@pytest.mark.parametrize("signed", [False, True])
def test_it_is_what_a_loop_over_dense_activations_finds(signed):
    rng = np.random.default_rng(0)
    dense = random_dense(3, 1, 600, 9, share=0.3, signed=signed)[0]
    keys = rng.zipf(1.6, 600).clip(max=V) - 1
    keys[rng.random(600) < 0.1] = selectivity.NO_TOKEN
    dense[:, 0] *= 1 + keys  # depends on the token
    found = selectivity.explained(block_of(dense), keys, V)
    wanted = [by_loop(dense[:, neuron], keys) for neuron in range(9)]
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-9)
    assert np.isnan(found[-1])  # dead


def test_a_lookup_table_is_1_noise_is_0_and_a_mixture_of_both_between():
    rng = np.random.default_rng(1)
    n, n_neurons = 6000, 200
    keys = rng.integers(0, V, n)
    of_token = rng.normal(size=(V, n_neurons))
    of_token = (of_token - of_token.mean(axis=0)) / of_token.std(axis=0)
    lookup, noise = of_token[keys], rng.normal(size=(n, n_neurons))
    found = {
        name: selectivity.explained(block_of(dense.astype(np.float32)), keys, V)
        for name, dense in {"lookup": lookup, "noise": noise, "both": lookup + noise}.items()
    }
    np.testing.assert_allclose(found["lookup"], 1, atol=1e-6)
    # Without a bias: the mean over many neurons is 0, not the 12 / 6000 that groups of noise explain.
    standard_error = found["noise"].std() / n_neurons**0.5
    assert abs(found["noise"].mean()) < 3 * standard_error < 3e-4
    np.testing.assert_allclose(found["both"].mean(), 0.5, atol=0.01)


def test_noise_with_hundreds_of_groups_still_explains_nothing():
    rng = np.random.default_rng(2)
    keys = np.repeat(np.arange(400), 5)
    dense = np.maximum(rng.normal(size=(2000, 300)), 0).astype(np.float32)
    assert abs(selectivity.explained(block_of(dense), keys, 400).mean()) < 0.01


def test_the_token_before_is_of_the_same_document():
    ids = np.array([5, 7, 7, 2, 9])
    bounds = np.array([0, 2, 3, 5])
    assert selectivity.previous(ids, bounds).tolist() == [-1, 5, -1, -1, 2]


def test_both_columns_use_their_own_token():
    rng = np.random.default_rng(3)
    ids = rng.integers(0, V, 4000)
    bounds = np.arange(0, 4001, 100)
    before = selectivity.previous(ids, bounds)
    dense = np.stack([1 + ids % 3, 1 + before % 3, np.ones(4000), np.zeros(4000)], axis=1)
    dense[before < 0, 1] = rng.random((before < 0).sum())
    found = selectivity.variance_columns(block_of(dense.astype(np.float32)), ids, before, V)
    np.testing.assert_allclose(found["by_token"][0], 1, atol=1e-6)
    np.testing.assert_allclose(found["by_context"][1], 1, atol=1e-6)
    assert abs(found["by_token"][1]) < 0.01 and abs(found["by_context"][0]) < 0.01
    for shares in found.values():
        assert np.isnan(shares[2:]).all()  # a constant does not vary, the last is dead


def test_a_neuron_active_at_too_few_tokens_of_frequent_kinds_has_no_share():
    keys = np.concatenate([np.zeros(500, int), np.arange(1, 11)])
    dense = np.zeros((510, 2), np.float32)
    dense[:29, 0] = 1
    dense[500:, 0] = 1  # at tokens that come once
    dense[:30, 1] = 1
    found = selectivity.explained(block_of(dense), keys, V)
    assert np.isnan(found[0]) and not np.isnan(found[1])


def test_no_events_at_all():
    found = selectivity.explained(
        NeuronBlock(np.zeros(3, int), np.zeros(0, int), np.zeros(0)), np.zeros(9, int), 1
    )
    assert np.isnan(found).tolist() == [True, True]
