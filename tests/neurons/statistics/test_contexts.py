"""Context embeddings against a loop over tokens; whatever the stretches, and at the ends of documents."""

from activity_stores import make_store
import numpy as np
import pytest

from topklm.neurons.statistics import embeddings
from topklm.neurons.statistics.embeddings import Contexts


def by_loop(tokens, documents, vectors):
    """Returns float64[N, d], straight from the definition."""
    means = []
    for n in range(len(tokens)):
        window = [tokens[m] for m in range(max(n - 15, 0), n + 1) if documents[m] == documents[n]]
        means.append(vectors[window].astype(np.float64).mean(axis=0))
    centred = np.array(means) - np.mean(means, axis=0)
    return centred / np.linalg.norm(centred, axis=1, keepdims=True)


@pytest.fixture
def text():
    """Tokens, documents of 1 to 60 tokens, vectors."""
    rng = np.random.default_rng(0)
    documents = np.repeat(np.arange(30) * 3, rng.integers(1, 61, 30))  # numbers need not follow one another
    tokens = rng.integers(0, 40, len(documents)).astype(np.uint16)
    return tokens, documents, rng.normal(size=(40, 9)).astype(np.float32)


def bounds_of(documents):
    return np.concatenate([[0], np.flatnonzero(np.diff(documents)) + 1, [len(documents)]])


@pytest.mark.parametrize("stretch", [1, 7, 64, 65_536])
def test_they_are_what_a_loop_finds(text, stretch, monkeypatch):
    monkeypatch.setattr(embeddings, "_STRETCH", stretch)
    tokens, documents, vectors = text
    found = Contexts(tokens, bounds_of(documents), vectors)
    wanted = by_loop(tokens, documents, vectors)
    np.testing.assert_allclose(found.at(np.arange(len(tokens))), wanted, atol=3e-6)
    somewhere = np.random.default_rng(1).integers(0, len(tokens), 50)
    np.testing.assert_allclose(found.at(somewhere), wanted[somewhere], atol=3e-6)
    assert (found.n_tokens, found.width) == (len(tokens), 9)


def test_nothing_of_another_document_matters(text):
    tokens, documents, vectors = text
    last = np.flatnonzero(documents == documents[-1])
    changed = np.concatenate([(tokens[: last[0]] + 1) % 40, tokens[last]])
    own = Contexts(tokens, bounds_of(documents), vectors).rows(last)
    np.testing.assert_array_equal(own, Contexts(changed, bounds_of(documents), vectors).rows(last))


def test_what_equals_the_mean_of_all_stays_0():
    found = Contexts(np.full(100, 3, np.uint8), np.array([0, 40, 100]), np.full((5, 4), 0.3, np.float32))
    np.testing.assert_array_equal(found.at(np.arange(100)), np.zeros((100, 4)))


def test_all_others_have_unit_length_and_no_embedding_is_asked_of_an_empty_store(text):
    tokens, documents, vectors = text
    lengths = np.linalg.norm(
        Contexts(tokens, bounds_of(documents), vectors).at(np.arange(len(tokens))), axis=1
    )
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)
    empty = Contexts(np.zeros(0, np.uint8), np.zeros(1, np.int64), vectors)
    assert empty.at(np.zeros(0, np.int64)).shape == (0, 9)


def test_bounds_of_documents_are_found_across_segments(text, tmp_path):
    tokens, documents, _ = (array[:150] for array in text)
    store = make_store(tmp_path / "store", np.zeros((1, 150, 3), np.float32), tokens, documents, (1, 20, 90))
    np.testing.assert_array_equal(store.document_bounds(), bounds_of(documents))


def test_directions_keep_as_much_of_the_distances_as_any_can():
    rng = np.random.default_rng(5)
    unembedding = (rng.normal(size=(100, 100)) @ rng.normal(size=(100, 300)) + 2).astype(np.float32)
    found = embeddings.token_vectors(unembedding).astype(np.float64)
    rows = unembedding.T / np.linalg.norm(unembedding.T, axis=1, keepdims=True)
    u, s, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    wanted = u[:, :64] * s[:64]
    assert found.shape == (300, 64)
    np.testing.assert_allclose(found @ found.T, wanted @ wanted.T, atol=1e-5)


def test_up_to_64_dimensions_nothing_is_left_out():
    unembedding = np.random.default_rng(6).normal(size=(64, 200)).astype(np.float32)
    found = embeddings.token_vectors(unembedding)
    rows = unembedding.T / np.linalg.norm(unembedding.T, axis=1, keepdims=True)
    np.testing.assert_allclose(found, rows, rtol=1e-5, atol=1e-7)
