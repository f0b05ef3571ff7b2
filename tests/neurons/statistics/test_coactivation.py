"""The nearest neurons by co-activation, against cosines of dense arrays in float64."""

import itertools

from activity_stores import make_store, random_dense
import numpy as np
import pytest

from topklm.neurons.statistics import activity

N, D = 500, 14


def cosines(dense):
    """Returns float64[D, D] of [N, D]; 0 for the dead."""
    products = dense.astype(np.float64).T @ dense
    lengths = np.sqrt(np.diagonal(products))
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(products / np.outer(lengths, lengths))


@pytest.fixture(params=[False, True], ids=["positive", "signed"])
def filled(request, tmp_path):
    """Returns a store of two layers in several segments, and what it is made of."""
    dense = random_dense(0, 2, N, D, share=0.3, signed=request.param)
    dense[:, :, 3] = dense[:, :, 5]  # the same
    store = make_store(tmp_path / "store", dense, np.zeros(N, int), np.arange(N) // 9, (1, 130, 333))
    return store, dense


@pytest.mark.parametrize("stretch", [1, 64, 4096])
def test_all_of_a_small_store_is_compared(filled, stretch, monkeypatch):
    monkeypatch.setattr(activity, "_STRETCH", stretch)
    store, dense = filled
    for layer in (1, 2):
        np.testing.assert_allclose(activity.coactivation(store, layer), cosines(dense[layer - 1]), atol=1e-6)


def test_of_a_large_one_stretches_from_everywhere_are(filled, monkeypatch):
    monkeypatch.setattr(activity, "_STRETCH", 8)
    monkeypatch.setattr(activity, "SAMPLE_TOKENS", 160)
    store, dense = filled
    places = np.concatenate([np.arange(a, b) for a, b in activity.sample(N)])
    assert len(places) == len(set(places.tolist())) == 160
    wanted = cosines(dense[1, places])
    np.testing.assert_allclose(activity.coactivation(store, 2), wanted, atol=1e-6)


@pytest.mark.parametrize("n_tokens", [1, 4096, 100_000, 2**18, 2**18 + 1, 2_000_003])
def test_the_sample_is_spread_over_the_store_and_no_token_is_in_it_twice(n_tokens):
    stretches = activity.sample(n_tokens)
    assert stretches[0][0] == 0
    assert stretches[-1][1] == n_tokens
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(stretches))
    assert sum(b - a for a, b in stretches) == min(n_tokens, 2**18)
    gaps = [after[0] - before[1] for before, after in itertools.pairwise(stretches)]
    assert max(gaps, default=0) <= min(gaps, default=0) + 1


def test_the_nearest_are_those_with_the_largest_cosine_above_0(filled):
    store, dense = filled
    wanted = cosines(dense[0])
    found = activity.coactive_columns(activity.coactivation(store, 1), 0, D)
    for neuron in range(D - 1):
        others = [other for other in range(D) if other != neuron and wanted[neuron, other] > 0]
        nearest = sorted(others, key=lambda other: -wanted[neuron, other])[:10]
        assert found["coactive"][neuron] == nearest
        np.testing.assert_allclose(found["coactive_similarity"][neuron], wanted[neuron, nearest], atol=1e-6)
    assert found["coactive"][3][0] == 5
    assert found["coactive"][5][0] == 3


def test_a_dead_neuron_has_no_neighbours_and_is_nobodys():
    rows = cosines(np.array([[1, 0, 2, 0], [1, 0, 1, 0], [0, 0, 0, 3]]))
    found = activity.coactive_columns(rows, 0, 4)
    assert found["coactive"] == [[2], None, [0], []]
    assert found["coactive_similarity"][1] is None


def test_columns_of_a_block_are_those_of_its_neurons(filled):
    similarities = activity.coactivation(filled[0], 1)
    whole, part = (
        activity.coactive_columns(similarities, 0, D),
        activity.coactive_columns(similarities, 4, 9),
    )
    assert {name: column[4:9] for name, column in whole.items()} == part


def test_equal_ones_come_by_rising_index():
    rows = np.array([[0.5, 1, 0.5, 0.7, 0.5]] * 2)
    assert activity.coactive_columns(rows, 1, 2)["coactive"] == [[3, 0, 2, 4]]
