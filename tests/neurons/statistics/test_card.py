"""Measures of bases: dense loops over drawn documents, the statistics of tables, and planted codes."""

import functools

import jax
import numpy as np
import plain_model
from plain_model import SEPARATOR, configured, handed_on, params, random_documents
import pytest
import scipy.sparse

from topklm.config import MeshConfig
from topklm.errors import UserError
from topklm.layout import make_layout
from topklm.neurons import bases, card, documents, probing
from topklm.neurons.documents import TextModel
from topklm.neurons.labelled_texts import Located
from topklm.neurons.statistics import selectivity
from topklm.neurons.store import NeuronBlock

V, T = plain_model.V, 32
LENGTHS = (120, 40, 2, 31, 90, 60, 33, 80, 150, 75, 64, 30, 41, 222, 99, 120)


@pytest.fixture(scope="module", autouse=True)
def _small_batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_BATCH_TOKENS", 256)
        patch.setattr(bases, "_STRETCH_TOKENS", 300)
        yield


@pytest.fixture(scope="module")
def some_documents():
    return random_documents(LENGTHS, seed=1)


@pytest.fixture(scope="module")
def text(some_documents):
    clusters = np.arange(V) % 7
    clusters[3] = card.NO_CLUSTER
    return card.make_text(some_documents, V, clusters, draws=6)


def reader(config):
    return TextModel(config, params(), make_layout(MeshConfig(), jax.local_devices()[:1]), SEPARATOR)


def of_tokens(text, rng, n_neurons):
    """Draws a block of neurons that depend on the token, and their dense activations, [N, n]."""
    n = len(text.token_ids)
    dense = rng.random((n, n_neurons)) * (rng.random((V, n_neurons)) < 0.3)[text.token_ids]
    dense *= rng.random(dense.shape) < 0.8
    dense[:, -1] = 0
    dense = dense.astype(np.float32)
    tokens, neurons = np.nonzero(dense)
    order = np.lexsort((tokens, neurons))
    offsets = np.concatenate([[0], np.cumsum(np.count_nonzero(dense, axis=0))])
    return NeuronBlock(offsets, tokens[order], dense[tokens, neurons][order]), dense


def test_the_text_has_no_first_tokens_and_all_others(some_documents, text):
    assert len(text.token_ids) == sum(LENGTHS) - len(LENGTHS)
    assert text.token_ids.tolist() == [t for ids in some_documents for t in ids[1:].tolist()]
    assert text.previous_ids.tolist() == [t for ids in some_documents for t in ids[:-1].tolist()]
    assert text.n_tokens[0] == len(text.token_ids)


def test_figures_of_the_sample_are_those_of_the_statistics(text):
    block, _ = of_tokens(text, np.random.default_rng(0), 6)
    found = card.measure(block, text)
    ids = text.token_ids
    wanted = dict(selectivity.variance_columns(block, ids, text.previous_ids, V))
    without = NeuronBlock(
        block.offsets, block.tokens, np.where(text.clusters[block.tokens] < 0, 0, block.values)
    )
    kept = without.values != 0
    ends = np.concatenate([[0], np.cumsum(kept)])[without.offsets]
    clustered = NeuronBlock(ends, without.tokens[kept], without.values[kept])
    columns = selectivity.columns(block, ids, np.arange(V))
    wanted["token_entropy"] = columns["token_entropy_corrected"]
    wanted["semantic_entropy"] = selectivity.columns(clustered, ids, np.arange(V) % 7)[
        "semantic_entropy_corrected"
    ]
    assert (found.n_active[:5, 0] >= 30).all() and found.n_active[5, 0] == 0
    for name, values in found.by_neuron.items():
        np.testing.assert_allclose(values[:, 0], wanted[name], rtol=1e-9, atol=1e-12, err_msg=name)
    np.testing.assert_array_equal(found.n_distinct[:5], columns["n_distinct_tokens"][:5])


def test_every_draw_is_what_its_documents_give_when_they_are_written_out(text):
    block, dense = of_tokens(text, np.random.default_rng(1), 4)
    found = card.measure(block, text)
    takes_part = {
        "by_token": selectivity.group_sizes(text.token_ids, V) > 0,
        "by_context": selectivity.group_sizes(text.previous_ids, V) > 0,
    }
    keys = {"by_token": text.token_ids, "by_context": text.previous_ids}
    for draw in range(text.weights.shape[1]):
        times = text.weights[text.document_of, draw].astype(int)
        drawn = np.repeat(np.arange(len(times)), times)
        assert found.n_tokens[draw] == len(drawn)
        np.testing.assert_array_equal(found.n_active[:, draw], np.count_nonzero(dense[drawn], axis=0))
        for neuron in range(3):
            a = dense[drawn, neuron].astype(np.float64)
            shares = np.bincount(text.token_ids[drawn], a, V)
            shares = shares[shares > 0] / shares.sum()
            h = -(shares * np.log(shares)).sum() + (len(shares) - 1) / (2 * np.count_nonzero(a))
            assert found.by_neuron["token_entropy"][neuron, draw] == pytest.approx(h)
            for name, key in keys.items():
                part = drawn[takes_part[name][key[drawn]]]
                x = dense[part, neuron].astype(np.float64)
                groups = [x[key[part] == g] for g in np.unique(key[part])]
                within = sum(((g - g.mean()) ** 2).sum() for g in groups) / (len(x) - len(groups))
                assert found.by_neuron[name][neuron, draw] == pytest.approx(1 - within / x.var(ddof=1))


def test_medians_leave_rare_neurons_out_and_dead_ones_are_counted(text):
    block, _ = of_tokens(text, np.random.default_rng(2), 7)
    summaries = card.measure(block, text).summaries()
    assert summaries["dead"][0] == pytest.approx(1 / 7)
    living = card.measure(block, text).by_neuron["by_token"][:6]
    np.testing.assert_allclose(summaries["by_token"], np.median(living, axis=0))
    found = card.with_interval(summaries["by_token"])
    assert found["low"] <= found["value"] <= found["high"]
    assert card.with_interval(np.full(5, np.nan)) == {"value": None, "low": None, "high": None}


@pytest.mark.parametrize(
    "settings", [{}, {"n_nontopk": 3}, {"n_nontopk": 1}], ids=["topk", "base", "last layer dense"]
)
def test_codes_of_bases_are_those_of_the_plain_model(settings, some_documents, text):
    config = configured(context_length=256, **settings)
    n_layers = config.n_topk_layers or config.n_layers
    model, k = reader(config), config.topk_k
    mean, covariance = bases.moments(model, n_layers, text.documents, lambda n: None)
    dense = [np.asarray(handed_on(config, np.concatenate([[SEPARATOR], ids]))) for ids in some_documents]
    states = np.concatenate([h[:n_layers, 1:] for h in dense], axis=1)
    np.testing.assert_allclose(mean, states.mean(axis=1), atol=1e-4)
    np.testing.assert_allclose(covariance[0], np.cov(states[0].T, bias=True), atol=1e-3)
    made = bases.make(config, mean, covariance, k)
    first = "own" if config.n_topk_layers else "coordinates"
    assert [basis.name for basis in made] == [first, "random", "pca"]
    blocks = bases.read_blocks(model, n_layers, made, text.documents, lambda n: None)
    counted = np.concatenate([h[:n_layers, 2:] for h in dense], axis=1)
    for layer in range(n_layers):
        h = counted[layer]
        if first == "coordinates":
            least = np.sort(h, axis=1)[:, -k, None]
            h = np.where((h >= least) & (h > 0), h, 0)
        found = scipy.sparse.csc_array(
            (blocks[0][layer].values, blocks[0][layer].tokens, blocks[0][layer].offsets), h.shape
        ).toarray()
        np.testing.assert_allclose(found, h, atol=2e-3)
        for of_basis in blocks[1:]:
            counts = np.bincount(of_basis[layer].tokens, minlength=len(h))
            assert counts.max() == k and (of_basis[layer].values > 0).all()


def test_pooled_codes_are_means_and_rotations_keep_all_of_them(some_documents):
    config = configured(context_length=256, n_nontopk=3)
    model, rng = reader(config), np.random.default_rng(3)
    n = sum(LENGTHS)
    pooling = scipy.sparse.csr_array(np.where(rng.random((5, n)) < 0.02, rng.random((5, n)), 0))
    pooling = scipy.sparse.csr_array(pooling / pooling.sum(axis=1)[:, None]).astype(np.float32)
    located = Located(some_documents, pooling, np.arange(5))
    text = card.make_text(some_documents, V, None, draws=1)
    made = bases.make(config, *bases.moments(model, 3, text.documents, lambda n: None), 4)
    pooled = dict(
        zip(
            ["coordinates", "random", "pca"], bases.pool(model, 3, made, located, lambda n: None), strict=True
        )
    )
    states = [
        np.asarray(handed_on(config, np.concatenate([[SEPARATOR], ids])))[:, 1:] for ids in some_documents
    ]
    h = np.concatenate(states, axis=1)
    least = np.sort(h, axis=2)[..., -4, None]
    cut = np.where((h >= least) & (h > 0), h, 0)
    np.testing.assert_allclose(pooled["coordinates"], np.stack([pooling @ x for x in cut]), atol=1e-3)
    means = np.stack([pooling @ x for x in h])
    for name in ("random", "pca"):
        distances = [np.linalg.norm(x[:, :, None] - x[:, None], axis=-1) for x in (pooled[name], means)]
        np.testing.assert_allclose(*distances, atol=1e-2)  # a rotation


def test_too_little_text_is_refused():
    with pytest.raises(UserError, match=r"--tokens: 18 tokens of 9 documents are too few for an interval"):
        card.make_text([np.arange(3)] * 9, V, None, draws=2)


def test_the_rotation_less_itself_is_nothing_and_the_error_is_over_labels():
    rng = np.random.default_rng(4)
    auc, other = rng.random((2, 6, 4, 30))
    own, random = probing.Scores(auc, auc + 0.1), probing.Scores(other, other)
    entry = card.probing_entry(own, {"random": random})
    gap = (auc - other)[:, 1, 0]
    found = entry["less_random"]["auc"]["2"]
    assert found["value"] == pytest.approx(gap.mean())
    assert found["standard_error"] == pytest.approx(gap.std(ddof=1) / 6**0.5)
    assert found["low"] < found["value"] < found["high"]
    assert entry["balanced_accuracy"]["1"]["value"] == pytest.approx(auc[:, 0, 0].mean() + 0.1)
    nothing = card.probing_entry(own, {"random": own})["less_random"]["auc"]["1"]
    assert [nothing[name] for name in ("value", "low", "high", "standard_error")] == [0, 0, 0, 0]


def test_readable_neurons_are_in_the_order_of_pages_without_the_dead(text):
    layers = [card.measure(of_tokens(text, np.random.default_rng(seed), 5)[0], text) for seed in (5, 6)]
    found = card.readable(layers, 40)
    assert len(found) == 8 and {layer for layer, _ in found} == {0, 1}
    assert all(number < 4 for _, number in found)
    fair = [
        (layer, n) for layer, n in found if layers[layer].n_active[n, 0] / layers[layer].n_tokens[0] <= 0.05
    ]
    assert found[: len(fair)] == fair
    assert card.readable(layers, 3) == found[:3]


def test_specificity_splits_effects_by_the_next_token(some_documents, text):
    config = configured(context_length=T)
    neurons = [(0, 3), (2, 5), (2, 7)]
    specific = functools.partial(
        card.specificity, config, params(), text, neurons, separator_id=SEPARATOR, samples=400, seed=1
    )
    targets = [np.array([1, 2, 3]), np.array([4, 5]), np.array([6])]
    found = specific(targets=targets)
    everything = specific(targets=[np.arange(V)] * 3)
    nothing = specific(targets=[np.zeros(0, int)] * 3)
    n = found["own"]["samples"] + found["elsewhere"]["samples"]
    assert 0 < found["own"]["samples"] < 0.2 * n
    assert everything["own"] == pytest.approx(nothing["elsewhere"], rel=1e-9)
    assert (everything["own"]["samples"], everything["elsewhere"]["effect"]) == (n, None)
    total = sum(found[side]["effect"] * found[side]["samples"] for side in ("own", "elsewhere"))
    assert total / n == pytest.approx(everything["own"]["effect"], rel=1e-6)
    assert found["compared"] == 3 and everything["compared"] == 0


def test_clusters_of_vectors_are_of_stripped_words(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_text("4 2\nsea 1 0.1\nocean 1 0\nsea 0 1\nsun 0 1\nstar 0 0.9\nmoon 0.1 1\n")
    tokens = [" sea", "Ocean", "qq", "sun", " star ", "moon", ""] * 8
    found = card.clusters_of_vectors(path, tokens)
    assert (found[[2, 6]] == card.NO_CLUSTER).all()
    assert found[0] == found[1] and found[3] == found[4] == found[5] and found[0] != found[3]
    path.write_text("sea 1 x\n")
    with pytest.raises(UserError, match=r"--vectors = .*: line 1 must be a word and its numbers"):
        card.clusters_of_vectors(path, tokens)
    path.write_text("shore 1 2\n")
    with pytest.raises(UserError, match="has no vectors of one length"):
        card.clusters_of_vectors(path, tokens)
    with pytest.raises(UserError, match="check the path"):
        card.clusters_of_vectors(tmp_path / "none", tokens)


def test_a_rotation_of_a_planted_code_is_worse():
    """Plants codes of which half are lookup tables of tokens; a rotation mixes them with the others."""
    rng = np.random.default_rng(7)
    text = card.make_text([rng.integers(1, V, 120) for _ in range(40)], V, np.arange(V) % 5, draws=3)
    n = len(text.token_ids)
    of_tokens = (rng.random((V, 16)) < 0.1) * (1 + rng.random((V, 16)))
    others = (rng.random((n, 16)) < 0.1) * (1 + rng.random((n, 16)))
    h = np.concatenate([of_tokens[text.token_ids], others], axis=1).astype(np.float32)
    own, random, _ = bases.make(configured(), h.mean(axis=0)[None], np.cov(h.T)[None], 4)
    search = card.detector_search(text, [bytes([65 + token]) for token in range(V)])
    found = {}
    for basis in (own, random):
        dense = h if basis.encode is None else np.asarray(basis.encode(h[None]))[0]
        tokens, neurons = np.nonzero(dense)
        block = bases._block([(tokens, neurons, dense[tokens, neurons], 32)])
        found[basis.name] = (
            card.measure(block, text).by_neuron["by_token"][:, 0],
            np.array([card.detect(search, block, number, n).f1 for number in range(32)]),
        )
    by_token, f1 = found["own"]
    np.testing.assert_allclose(by_token[:16], 1, atol=1e-6)
    np.testing.assert_allclose(by_token[16:], 0, atol=0.03)
    assert (f1[:16] == 1).all() and (f1[16:] < 0.4).all()
    by_token, f1 = found["random"]
    assert np.median(by_token) > 0.1 and by_token.max() < 0.9
    assert (f1 < 0.9).all()
