"""How often and how strongly neurons are active, against loops over dense arrays."""

from fractions import Fraction

from activity_stores import block_of, random_dense
from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from topklm.errors import UserError
from topklm.neurons.statistics import activity


@pytest.mark.parametrize("signed", [False, True])
def test_all_columns_are_what_a_loop_finds(signed):
    dense = random_dense(0, 1, 700, 6, signed=signed)[0]
    found = activity.columns(block_of(dense), n_tokens=1000)
    for neuron in range(5):
        strengths = np.abs(dense[:, neuron].astype(np.float64))
        strengths = strengths[strengths > 0]
        assert found["n_active"][neuron] == len(strengths)
        assert found["density"][neuron] == len(strengths) / 1000
        np.testing.assert_allclose(found["mean_activation"][neuron], strengths.mean(), rtol=1e-12)
        assert found["max_activation"][neuron] == strengths.max()
        assert found["histogram"][neuron] == exact_histogram(strengths, activity.HISTOGRAM_BINS)


def exact_histogram(strengths, n_bins):
    counts, largest = [0] * n_bins, Fraction(float(max(strengths)))
    for x in strengths:
        share = Fraction(float(x)) / largest
        counts[next(p for p in range(n_bins) if share <= Fraction(p + 1, n_bins))] += 1
    return counts


@given(st.lists(st.integers(1, 256), min_size=1, max_size=40), st.sampled_from([5, 40, 7]))
def test_what_lies_on_an_edge_belongs_to_the_part_below_it(whole, n_bins):
    dense = np.array(whole, np.float32)[:, None] / 64
    assert activity.histogram(block_of(dense), n_bins).tolist() == [exact_histogram(dense[:, 0], n_bins)]


def test_a_dead_neuron_has_no_mean_maximum_or_histogram():
    dense = np.zeros((50, 4), np.float32)
    dense[[3, 7], 1] = 2, 4
    found = activity.columns(block_of(dense), 50)
    assert found["n_active"].tolist() == [0, 2, 0, 0]
    assert found["density"].tolist() == [0, 0.04, 0, 0]
    np.testing.assert_array_equal(found["mean_activation"], [np.nan, 3.0, np.nan, np.nan])
    np.testing.assert_array_equal(found["max_activation"], [np.nan, 4.0, np.nan, np.nan])
    assert [row if row is None else sum(row) for row in found["histogram"]] == [None, 2, None, None]


def test_a_block_of_dead_neurons_has_nothing():
    found = activity.columns(block_of(np.zeros((50, 2), np.float32)), 50)
    assert np.isnan(found["max_activation"]).tolist() == [True, True]
    assert found["histogram"] == [None, None]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_activations_of_a_run_that_diverged_are_refused(value):
    dense = random_dense(4, 1, 60, 3)[0]
    dense[17, 1] = value
    with pytest.raises(UserError, match=r"activations that are NaN or infinite: .* harvest an earlier step"):
        activity.columns(block_of(dense), 60)


def test_densities_of_a_layer_add_up_to_k():
    rng = np.random.default_rng(3)
    dense = rng.random((400, 32)).astype(np.float32)
    dense[dense < -np.sort(-dense, axis=1)[:, 4:5]] = 0  # the 5 largest stay
    found = activity.columns(block_of(dense), len(dense))
    np.testing.assert_allclose(found["density"].sum(), 5, rtol=1e-12)


def test_every_event_has_its_owner():
    dense = random_dense(1, 1, 60, 5)[0]
    np.testing.assert_array_equal(activity.owners(block_of(dense)), np.nonzero(dense.T)[0])
