"""Figures from drawn documents, against the drawn documents written out and compared pair by pair."""

from activity_stores import block_of, make_store, random_dense
import numpy as np
import pytest

from benchmarks import bootstrap
from topklm.neurons.statistics import embeddings, selectivity
from topklm.neurons.store import NeuronBlock

N, D, V, C, WIDTH = 60, 7, 9, 4, 5
BOUNDS = np.array([0, 3, 4, 20, 21, 40, 47, N])
DOCUMENTS = np.repeat(np.arange(7), np.diff(BOUNDS))


@pytest.fixture(scope="module")
def text():
    rng = np.random.default_rng(0)
    embeddings = rng.normal(0.3, 1, (N, WIDTH))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    embeddings[5] = 0
    clusters = rng.integers(0, C, V)
    ids = rng.integers(0, V, N)
    return bootstrap.Text(ids, clusters[ids], BOUNDS, embeddings.astype(np.float32))


@pytest.fixture(scope="module")
def dense():
    found = random_dense(1, 1, N, D, share=0.4)[0]
    found[:, 0] = 0
    found[22, 0] = 1.5  # one activation: no pairs
    return found


def of_ids(ids, strengths):
    """Returns entropy with the Miller-Madow correction, nats."""
    if not len(ids):
        return np.nan
    shares = [strengths[ids == v].sum() / strengths.sum() for v in set(ids.tolist())]
    return -sum(p * np.log(p) for p in shares) + (len(shares) - 1) / (2 * len(ids))


def by_brute_force(text, strengths, drawn):
    """Returns one neuron on documents that are written out one after another, copies and all."""
    places = np.concatenate([np.arange(BOUNDS[g], BOUNDS[g + 1]) for g in drawn])
    copies = np.repeat(np.arange(len(drawn)), [BOUNDS[g + 1] - BOUNDS[g] for g in drawn])
    active = strengths[places] > 0
    places, copies = places[active], copies[active]
    a, e = strengths[places].astype(float), text.embeddings[places].astype(float)
    similar = total = 0.0
    for i in range(len(places)):
        for j in range(len(places)):
            own_copy = copies[i] != copies[j] and DOCUMENTS[places[i]] == DOCUMENTS[places[j]]
            if i != j and not own_copy:
                similar += a[i] * a[j] * (e[i] @ e[j])
                total += a[i] * a[j]
    return {
        "token_entropy_corrected": of_ids(text.token_ids[places], a),
        "semantic_entropy_corrected": of_ids(text.groups[places], a),
        "monosemanticity": similar / total if total else np.nan,
    }


def test_every_draw_is_what_its_documents_give_when_they_are_written_out(tmp_path, text, dense, monkeypatch):
    monkeypatch.setattr(bootstrap, "_BLOCK_NEURONS", 3)
    store = make_store(tmp_path, dense[None], text.token_ids, DOCUMENTS, cuts=(17, 41))
    np.testing.assert_array_equal(store.document_bounds(), BOUNDS)
    draws = [[0, 1, 2, 3, 4, 5, 6], [2, 2, 2, 5, 0, 0, 6], [3] * 7, [4, 4, 1, 1, 1, 6, 6]]
    weights = np.stack([np.bincount(drawn, minlength=7) for drawn in draws], axis=1)
    done = []
    found = bootstrap.resample(store, 1, text, weights, done.append)
    assert sum(done) == D
    seen = 0
    for neuron in range(D):
        for draw, drawn in enumerate(draws):
            wanted = by_brute_force(text, dense[:, neuron], drawn)
            for name, value in wanted.items():
                where = f"{name} of {neuron}, draw {draw}"
                np.testing.assert_allclose(
                    found[name][neuron, draw], value, rtol=1e-5, atol=1e-7, err_msg=where
                )
                seen += not np.isnan(value)
    assert seen > 50


def test_without_drawing_the_figures_are_those_of_the_table(text, dense):
    block = block_of(dense)
    clusters = np.zeros(V, np.int64)
    clusters[text.token_ids] = text.groups
    columns = selectivity.columns(block, text.token_ids, clusters)
    pairs = embeddings.Pairs(D, 1, WIDTH)
    pairs.add(block.values, block.tokens, block.offsets, text.embeddings[:, None])
    columns = {**columns, "monosemanticity": pairs.scores()[:, 0]}
    for neuron in range(D):
        found = bootstrap.of_neuron(block, neuron, text, np.ones((7, 1)))
        for name in bootstrap.FIGURES:
            wanted = columns[name][neuron]
            np.testing.assert_allclose(found[name][0], np.nan if wanted is None else wanted, rtol=1e-5)


def test_documents_are_drawn_evenly_with_replacement():
    weights = bootstrap.document_weights(20, 3000, seed=1)
    assert weights.shape == (20, 3000) and (weights.sum(axis=0) == 20).all()
    np.testing.assert_allclose(weights.mean(axis=1), 1, atol=0.1)
    np.testing.assert_allclose(weights.var(axis=1), 1 - 1 / 20, rtol=0.15)
    np.testing.assert_array_equal(weights, bootstrap.document_weights(20, 3000, seed=1))
    assert not np.array_equal(weights, bootstrap.document_weights(20, 3000, seed=2))


def of_new_text(rng, n_documents=80, n_tokens=12):
    """Makes a neuron that is active at every token of documents about few tokens each; and the text."""
    topics = rng.dirichlet(np.linspace(0.02, 0.8, V) ** 2, n_documents)
    ids = np.concatenate([rng.choice(V, n_tokens, p=topic) for topic in topics])
    bounds = np.arange(0, n_documents * n_tokens + 1, n_tokens)
    embeddings = np.eye(V, WIDTH, dtype=np.float32)[ids]
    text = bootstrap.Text(ids, ids // 3, bounds, embeddings)
    return NeuronBlock(np.array([0, len(ids)]), np.arange(len(ids)), np.ones(len(ids), np.float32)), text


@pytest.mark.parametrize("name", bootstrap.FIGURES)
def test_draws_differ_as_new_texts_do_and_more_than_single_tokens_would(name):
    rng = np.random.default_rng(5)
    ones = np.ones((80, 1))
    samples = [of_new_text(rng) for _ in range(300)]
    wanted = np.std([bootstrap.of_neuron(block, 0, text, ones)[name][0] for block, text in samples])
    weights = bootstrap.document_weights(80, 300)
    spreads = [np.std(bootstrap.of_neuron(block, 0, text, weights)[name]) for block, text in samples[:20]]
    assert np.mean(spreads) == pytest.approx(wanted, rel=0.15)
    block, text = samples[0]
    alone = bootstrap.Text(text.token_ids, text.groups, np.arange(961), text.embeddings)
    of_tokens = np.std(bootstrap.of_neuron(block, 0, alone, bootstrap.document_weights(960, 300))[name])
    assert of_tokens < 0.7 * wanted


def test_an_interval_lies_around_the_figure_and_says_how_far_it_was_moved():
    draws = np.concatenate([np.random.default_rng(0).normal(4, 0.1, 20_000), [np.nan]])
    found = bootstrap.interval(5.0, draws)
    assert (found.figure, found.shift) == (5.0, pytest.approx(-1, abs=0.01))
    assert (found.low, found.high) == (pytest.approx(5 - 0.196, abs=0.01), pytest.approx(5 + 0.196, abs=0.01))
    narrow = bootstrap.interval(5.0, draws, level=0.5)
    assert found.low < narrow.low < 5 < narrow.high < found.high


def test_summaries_leave_out_neurons_without_the_figure():
    found = bootstrap.summaries(np.array([[1.0, 1.0], [np.nan, np.nan], [3.0, np.nan], [8.0, 3.0]]))
    np.testing.assert_array_equal(found["median"], [3, 2])
    np.testing.assert_array_equal(found["mean"], [4, 2])
