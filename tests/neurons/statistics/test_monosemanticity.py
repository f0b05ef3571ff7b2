"""Monosemanticity against the sum over all pairs; neurons whose score is known."""

from activity_stores import make_store, random_dense
import numpy as np
import pytest

from topklm.neurons.statistics import embeddings as embeddings_lib
from topklm.neurons.statistics.embeddings import Contexts

N, D = 260, 6


def over_all_pairs(values, embeddings):
    """Returns the mean cosine over pairs of different tokens, weighed by scaled activations; a loop."""
    scaled = np.abs(values.astype(np.float64)) / np.abs(values).max()
    above = below = 0.0
    for n in np.flatnonzero(scaled):
        for m in np.flatnonzero(scaled):
            if n != m:
                above += scaled[n] * scaled[m] * embeddings[n] @ embeddings[m]
                below += scaled[n] * scaled[m]
    return above / below


def measured(store, contexts, **settings):
    """Returns scores and shuffled ones, [S, D] each."""
    found = embeddings_lib.monosemanticity(store, contexts, **settings)
    return found["monosemanticity"], found["monosemanticity_shuffled"]


@pytest.fixture
def text():
    """Contexts of N tokens, some of which are 0; the documents."""
    rng = np.random.default_rng(0)
    documents = np.repeat(np.arange(26), 10)
    vectors = rng.normal(size=(40, 8)).astype(np.float32)
    bounds = np.arange(0, N + 1, 10)
    return Contexts(rng.integers(0, 40, N).astype(np.uint8), bounds, vectors), documents


@pytest.mark.parametrize("share", [0.1, 0.6])  # sparse and dense products
@pytest.mark.parametrize("signed", [False, True])
def test_scores_are_those_of_all_pairs(text, tmp_path, share, signed):
    contexts, documents = text
    dense = random_dense(1, 2, N, D, share=share, signed=signed)
    store = make_store(tmp_path / "store", dense, np.zeros(N, int), documents, (3, 170))
    score, shuffled = measured(store, contexts, seed=4)
    own = contexts.at(np.arange(N)).astype(np.float64)
    order = np.random.default_rng(4).permutation(np.arange(N, dtype=np.uint16))
    for layer in range(2):
        for neuron in range(D - 1):
            for scores, embeddings in ((score, own), (shuffled, own[order])):
                wanted = over_all_pairs(dense[layer, :, neuron], embeddings)
                np.testing.assert_allclose(scores[layer, neuron], wanted, atol=2e-6)
        assert np.isnan([score[layer, D - 1], shuffled[layer, D - 1]]).all()


def scores_of(values, embeddings):
    """Returns the score of one neuron, [N], in contexts [N, d]."""
    pairs = embeddings_lib.Pairs(1, 1, embeddings.shape[1])
    places = np.flatnonzero(values)
    events = values[places].astype(np.float32)
    pairs.add(events, places, np.array([0, len(places)]), embeddings[:, None].astype(np.float32))
    with np.errstate(all="raise"):
        return pairs.scores()[0, 0]


def test_a_neuron_of_one_context_has_1_and_one_of_two_opposite_contexts_less_than_0():
    alike = np.tile([0.6, 0.8], (10, 1))
    values = np.linspace(0.1, 2, 10)
    np.testing.assert_allclose(scores_of(values, alike), 1, rtol=1e-6)
    opposite = alike * np.where(np.arange(10) % 2, 1, -1)[:, None]
    np.testing.assert_allclose(scores_of(np.ones(10), opposite), -1 / 9, rtol=1e-6)


def test_contexts_that_are_0_count_as_neither_alike_nor_unlike():
    embeddings = np.array([[1.0, 0], [1, 0], [0, 0]])
    np.testing.assert_allclose(scores_of(np.ones(3), embeddings), 1 / 3, rtol=1e-6)


def test_the_scale_of_activations_does_not_matter():
    rng = np.random.default_rng(2)
    embeddings = rng.normal(size=(50, 4))
    values = rng.random(50)
    np.testing.assert_allclose(scores_of(values * 37, embeddings), scores_of(values, embeddings), atol=1e-6)


@pytest.mark.parametrize("n_active", [0, 1])
def test_without_a_pair_there_is_no_score(n_active):
    values = np.zeros(5)
    values[:n_active] = 0.3
    assert np.isnan(scores_of(values, np.ones((5, 2))))


def test_a_neuron_for_a_topic_stands_out_from_chance(tmp_path):
    rng = np.random.default_rng(3)
    topic = np.repeat(rng.integers(0, 2, 40), 50)
    tokens = (20 * topic + rng.integers(0, 20, 2000)).astype(np.uint8)
    dense = np.zeros((1, 2000, 2), np.float32)
    dense[0, :, 0] = (topic == 1) & (rng.random(2000) < 0.3)
    dense[0, :, 1] = rng.random(2000) < 0.3
    vectors = rng.normal(size=(40, 16)).astype(np.float32)
    contexts = Contexts(tokens, np.arange(0, 2001, 50), vectors)
    store = make_store(tmp_path / "store", dense, tokens, np.repeat(np.arange(40), 50))
    score, shuffled = measured(store, contexts)
    assert score[0, 0] > 0.15
    assert np.abs([score[0, 1], *shuffled[0]]).max() < score[0, 0] / 10
