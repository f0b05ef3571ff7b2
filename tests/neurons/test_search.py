"""Ranking neurons against loops over dense activations; rows of a text's neurons against all of them."""

import dataclasses
from fractions import Fraction

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from topklm.errors import UserError
from topklm.neurons import search
from topklm.neurons import segment as segment_lib
from topklm.neurons.capture import SparseActivations
from topklm.neurons.display import ActiveNeurons
from topklm.neurons.search import neurons_of_text, rank
from topklm.neurons.store import Metadata, Store, StoreWriter

LAYERS, D = (1, 4), 20  # not numbered from 0: a store says which layers it is of
METADATA = Metadata(
    run="village",
    step=24,
    tokenizer_sha256="ab" * 32,
    source="made up",
    kind="topk",
    layers=LAYERS,
    d_model=D,
    topk_k=5,
    topk_activation="identity",
    context_length=64,
)


def make_store(folder, *parts):
    """Returns a store with a segment for each part, [S, n, D]."""
    writer = StoreWriter(folder, METADATA)
    for dense in parts:
        n = dense.shape[1]
        zeros = np.zeros(n, np.int64)
        writer.append(segment_lib.from_dense(zeros, zeros, zeros, dense))
    return Store(folder)


def random_dense(n, seed):
    """Draws [S, n, D], rounded as the store does; some neurons never active, some values negative."""
    rng = np.random.default_rng(seed)
    dense = rng.normal(size=(len(LAYERS), n, D)) * (rng.random((len(LAYERS), n, D)) < rng.random(D) ** 2)
    dense[:, :, [0, 7]] = 0
    return dense.astype(ml_dtypes.bfloat16).astype(np.float64)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    parts = [random_dense(n, seed) for seed, n in enumerate((400, 1, 150))]
    return make_store(tmp_path_factory.mktemp("find") / "store", *parts), np.concatenate(parts, axis=1)


def by_loops(dense, matched):
    """Returns every neuron that hits, in order, in exact arithmetic but for the sum of activations."""
    found = []
    for place, layer in enumerate(LAYERS):
        for neuron in range(D):
            sizes = np.abs(dense[place, :, neuron])
            best = None
            for threshold in sorted(set(sizes[sizes > 0].tolist()), reverse=True):
                firing = [
                    bool(match) for size, match in zip(sizes, matched, strict=True) if size >= threshold
                ]
                precision, recall = (
                    Fraction(sum(firing), len(firing)),
                    Fraction(sum(firing), int(matched.sum())),
                )
                f1 = 2 * precision * recall / (precision + recall) if sum(firing) else Fraction(0)
                if best is None or f1 > best[0]:
                    best = f1, threshold, len(firing), sum(firing), precision, recall
            if best and best[0]:
                f1, threshold, n_firing, hits, precision, recall = best
                weighted = float(sizes[matched].sum() / sizes.sum())
                active = int((sizes > 0).sum())
                found.append(
                    (layer, neuron, active, threshold, n_firing, hits, precision, recall, f1, weighted)
                )
    return sorted(found, key=lambda r: (-r[8], -r[9], r[0], r[1]))


@pytest.mark.parametrize("block_events", [1, 60, 2_000_000])
@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_ranking_is_what_loops_over_all_tokens_give(filled, monkeypatch, block_events, share):
    monkeypatch.setattr(search, "BLOCK_EVENTS", block_events)
    store, dense = filled
    matched = np.random.default_rng(9).random(dense.shape[1]) < share
    wanted, ranked = by_loops(dense, matched), rank(store, matched, limit=1000)
    assert len(ranked) == len(wanted) > D
    for got, reference in zip(ranked, wanted, strict=True):
        assert dataclasses.astuple(got)[:6] == reference[:6]
        figures = (got.precision, got.recall, got.f1, got.weighted_precision)
        np.testing.assert_allclose(figures, [float(figure) for figure in reference[6:]], rtol=1e-12)
    assert rank(store, matched, limit=3) == ranked[:3]


def test_only_the_layers_that_are_asked_for_are_ranked(filled):
    store, dense = filled
    matched = np.arange(dense.shape[1]) % 3 == 0
    everything = rank(store, matched, limit=1000)
    for layer in LAYERS:
        only = rank(store, matched, limit=1000, layers=[layer])
        assert only == [r for r in everything if r.layer == layer]
    with pytest.raises(UserError, match="layer = 0: must be one of 1, 4"):
        rank(store, matched, layers=[0])


def test_a_neuron_that_fires_on_all_matches_and_nowhere_else_comes_first_with_1_everywhere(tmp_path):
    dense = np.zeros((2, 10, D))
    matched = np.arange(10) % 2 == 0
    dense[1, matched, 6] = 2.0
    dense[0, :, 3] = 1.0  # always
    dense[0, 0, 9] = 5.0  # once
    first, *others = rank(make_store(tmp_path / "store", dense), matched)
    assert (first.layer, first.neuron) == (4, 6)
    assert first.precision == first.weighted_precision == first.recall == first.f1 == 1.0
    assert [(r.layer, r.neuron, r.precision, r.recall) for r in others] == [
        (1, 3, 0.5, 1.0),
        (1, 9, 1.0, 0.2),
    ]


def test_weighted_precision_tells_strong_from_weak_activations(tmp_path):
    dense = np.zeros((2, 4, D))
    dense[0, :, 2] = [3.0, 0.5, 0.25, 0.25]
    dense[0, :, 5] = [-3.0, 0.5, 0.25, -0.25]  # by magnitude
    ranked = rank(make_store(tmp_path / "store", dense), np.array([True, False, False, False]))
    assert [(r.neuron, r.threshold, r.precision, r.weighted_precision) for r in ranked] == [
        (2, 3.0, 1.0, 0.75),
        (5, 3.0, 1.0, 0.75),
    ]


def test_equally_good_neurons_come_by_weighted_precision_then_layer_then_number(tmp_path):
    dense = np.zeros((2, 6, D))
    matched = np.array([True, True, False, False, False, False])
    for place, neuron in ((1, 2), (0, 11), (0, 4), (1, 19)):
        dense[place, :3, neuron] = 1.0
    dense[1, 0, 19] = 2.0
    store = make_store(tmp_path / "store", dense)
    order = [(r.layer, r.neuron) for r in rank(store, matched)]
    assert order == [(4, 19), (1, 4), (1, 11), (4, 2)]
    for limit in (1, 2, 3):
        assert [(r.layer, r.neuron) for r in rank(store, matched, limit=limit)] == order[:limit]


def test_where_nothing_matches_or_nothing_fires_there_is_no_ranking(tmp_path):
    dense = np.zeros((2, 6, D))
    dense[0, 0, 0] = 1.0
    store = make_store(tmp_path / "store", dense)
    assert rank(store, np.zeros(6, bool)) == []
    assert rank(store, np.arange(6) == 5) == []


def test_marks_for_another_number_of_tokens_are_refused(filled):
    with pytest.raises(ValueError, match=r"matched has shape \(3,\): must be \[551\]"):
        rank(filled[0], np.zeros(3, bool))


@pytest.fixture
def found():
    dense = np.zeros((2, 1, 3, 12), np.float32)
    dense[0, 0, 0, 3] = 100.0
    dense[0, 0, 1, [7, 2, 5]] = 1.5, 4.25, -3.0
    dense[1, 0, 1, 11] = 0.125
    dense[1, 0, 2, :7] = np.arange(1, 8)
    sparse = SparseActivations.from_dense(jnp.asarray(dense), 8)
    return ActiveNeurons.of(["<|endoftext|>", "The", " sea"], sparse)


def test_each_token_of_a_text_has_the_neurons_of_each_layer_the_strongest_first(found):
    rows = neurons_of_text(found)
    assert rows[1] == {0: [(0, 2, 4.25), (0, 5, -3.0), (0, 7, 1.5)], 1: [(1, 11, 0.125)]}
    assert rows[2] == {0: [], 1: [(1, neuron, neuron + 1.0) for neuron in range(6, -1, -1)]}


def test_the_rows_hold_every_active_neuron(found):
    rows = neurons_of_text(found)
    assert [[a for active in row.values() for a in active] for row in rows] == list(found)


def test_one_layer_is_shown_alone_and_one_without_topk_is_refused(found):
    assert [set(row) for row in neurons_of_text(found, [1])] == [{1}] * 3
    for layer in (-1, 2):
        with pytest.raises(UserError, match=f"layer = {layer}: must be a TopK layer, from 0 to 1"):
            neurons_of_text(found, [layer])
    none = ActiveNeurons.of(["a"], SparseActivations.from_dense(jnp.ones((0, 1, 1, 4)), 2))
    with pytest.raises(UserError, match="no layer of this model has TopK"):
        neurons_of_text(none)
