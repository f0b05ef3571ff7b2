"""Sparse activations against dense ones, computed by plain NumPy and without the code under test."""

import dataclasses
import functools

from helpers import assert_same_bits
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import saved_runs

from topklm.model import transformer
from topklm.model.block import NO_HOOKS
from topklm.neurons import capture as capture_lib
from topklm.neurons.capture import TOPK, ActivationCache, SparseActivations, all_hook_names, hook_name

B, T, K = 2, 9, saved_runs.MODEL.topk_k
S, L = 2, 3
TOKENS = np.random.default_rng(0).integers(0, 257, (B, T), dtype=np.int32)
COMBINATIONS = [
    {"topk_activation": "relu", "layer_stack": "unrolled", "dtype": "float32"},
    {"topk_activation": "identity", "layer_stack": "scanned", "dtype": "float32"},
    {"topk_activation": "abs", "layer_stack": "scanned", "dtype": "bfloat16"},
]


def configured(**fields):
    return dataclasses.replace(saved_runs.MODEL, n_layers=L, **fields)


@functools.cache
def params():
    """Returns random numbers, small enough that layers differ; the same for every configuration."""
    draw = np.random.default_rng(1).standard_normal
    shapes = jax.eval_shape(functools.partial(transformer.create, configured(), 0))
    return jax.tree.map(lambda leaf: 0.2 * draw(leaf.shape, dtype=np.float32), shapes)


def capture(model, tokens, *packing):
    """Returns the hidden state and what the TopK layers hand on, sparse."""
    wanted = [hook_name(layer, TOPK) for layer in range(model.config.n_topk_layers)]
    return capture_lib.capture(model, tokens, wanted, NO_HOOKS, 0, *packing)[:2]


def captured(config):
    """Returns the hidden state and the activations; and the hidden state without capture, and what
    enters TopK and what leaves it in every layer, [L, B, T, D] each."""

    def run(params):
        model = transformer.bind(config, params)
        return capture(model, TOKENS), model.hidden(TOKENS, capture=lambda h, u, h_next: (u, h_next))

    (hidden, neurons), (expected_hidden, (entering, leaving)) = jax.jit(run)(params())
    return hidden, neurons, expected_hidden, np.asarray(entering), np.asarray(leaving)


def strongest(row, k, activation):
    """Finds (neuron, value) of the kept entries, one row at a time, by falling magnitude, then neuron."""
    score = np.abs(row) if activation == "abs" else row
    winners = sorted(range(len(row)), key=lambda j: (-score[j], j))[:k]
    kept = [(j, row[j]) for j in winners if row[j] > 0 or activation != "relu"]
    return sorted(((j, v) for j, v in kept if v != 0), key=lambda entry: (-abs(entry[1]), entry[0]))


@pytest.mark.parametrize("fields", COMBINATIONS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_what_is_captured_is_what_a_reference_picks_from_the_dense_layers(fields):
    config = configured(**fields)
    hidden, neurons, expected_hidden, entering, leaving = captured(config)
    assert (neurons.indices.dtype, neurons.values.dtype) == (np.int32, np.dtype(fields["dtype"]))
    assert neurons.indices.shape == neurons.values.shape == (S, B, T, K)
    indices, values = (np.asarray(x).reshape(-1, K) for x in (neurons.indices, neurons.values))
    for row, found, value in zip(entering[:S].reshape(-1, 32), indices, values, strict=True):
        expected = strongest(row, K, fields["topk_activation"])
        assert list(zip(found, value, strict=True))[: len(expected)] == expected
        assert not value[len(expected) :].any()
    assert_same_bits(neurons.dense(), leaving[:S])
    assert_same_bits(hidden, expected_hidden)


def test_the_base_lm_has_no_sparse_layers():
    config = configured(n_nontopk=L)
    hidden, neurons, expected_hidden, _, _ = captured(config)
    assert_same_bits(hidden, expected_hidden)
    assert neurons.values.shape == (0, B, T, K)
    assert neurons.dense().shape == (0, B, T, 32)
    cache = ActivationCache(neurons, layers=())
    assert list(cache) == []
    with pytest.raises(KeyError, match="there are: none, for this model has no TopK layers"):
        cache["blocks.0.hook_topk"]


@pytest.mark.parametrize("layer_stack", ["scanned", "unrolled"])
def test_no_array_of_all_layers_is_ever_dense(layer_stack):
    config = configured(layer_stack=layer_stack)
    traced = jax.make_jaxpr(lambda params: capture(transformer.bind(config, params), TOKENS))(params())
    program = str(traced)
    assert f"[{S},{B},{T},{K}]" in program
    assert f"[{B},{T},32]" in program
    assert f"[{S},{B},{T},32]" not in program
    assert f"[{L},{B},{T},32]" not in program


def test_documents_of_a_packed_row_are_kept_apart():
    model, first, second = transformer.bind(configured(), params()), np.arange(4), np.arange(5)
    tokens = np.stack([TOKENS[0], np.concatenate([TOKENS[0, 4:], TOKENS[1, :4]])])
    segments = np.array([[1] * 4 + [2] * 5, [1] * 5 + [2] * 4])
    positions = np.stack([np.concatenate([first, second]), np.concatenate([second, first])])
    _, neurons = jax.jit(capture)(model, tokens, segments, positions)
    np.testing.assert_allclose(neurons.dense()[:, 0, 4:], neurons.dense()[:, 1, :5], atol=1e-4)


# SparseActivations.


def test_ties_are_won_by_the_lowest_neuron_and_sorted_by_it():
    dense = jnp.array([[0.0, 2.0, 1.0, 1.0, 2.0, 1.0, 0.0]])
    sparse = SparseActivations.from_dense(dense, 4)
    assert np.asarray(sparse.indices).tolist() == [[1, 4, 2, 3]]
    assert np.asarray(sparse.values).tolist() == [[2.0, 2.0, 1.0, 1.0]]


def test_negative_entries_are_kept_before_inactive_ones():
    sparse = SparseActivations.from_dense(jnp.array([[0.0, -3.0, 1.0, 0.0, -0.5]]), 4)
    assert np.asarray(sparse.indices).tolist() == [[1, 2, 4, 0]]
    assert np.asarray(sparse.values).tolist() == [[-3.0, 1.0, -0.5, 0.0]]
    assert np.asarray(sparse.active).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("n_active", [0, 3, 8])
def test_dense_and_sparse_are_the_same_with_fewer_than_k_active(n_active, dtype):
    random = np.random.default_rng(n_active)
    dense = np.zeros((3, 2, 5, 24), dtype)
    for row in dense.reshape(-1, 24):
        row[random.choice(24, n_active, replace=False)] = random.integers(1, 4, n_active)  # with ties
    sparse = SparseActivations.from_dense(jnp.asarray(dense), 8)
    assert_same_bits(sparse.dense(), dense)
    indices = np.asarray(sparse.indices)
    assert (np.sort(indices, axis=-1)[..., 1:] > np.sort(indices, axis=-1)[..., :-1]).all()  # distinct
    assert indices.min() >= 0
    assert indices.max() < 24
    assert (np.asarray(sparse.active).sum(-1) == n_active).all()


def test_a_token_with_nan_stays_nan_and_spoils_no_other():
    dense = jnp.array([[jnp.nan] * 6, [0.0, 1.0, 0.0, 2.0, 0.0, 0.0]])
    sparse = SparseActivations.from_dense(dense, 3)
    assert np.isnan(sparse.values[0]).all()
    assert np.asarray(sparse.values[1]).tolist() == [2.0, 1.0, 0.0]


def test_it_passes_through_jax_transformations():
    sparse = SparseActivations.from_dense(jnp.eye(4).reshape(2, 2, 4), 2)
    assert len(jax.tree.leaves(sparse)) == 2
    doubled = jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s))(sparse[0])
    assert doubled.d_model == 4
    assert doubled.values.shape == (2, 2)
    assert repr(sparse) == "SparseActivations(float32[2, 2, 2] of 4 neurons)"
    assert "?" in repr(jax.tree.map(lambda _: None, sparse))


@pytest.fixture
def three_layers():
    dense = np.random.default_rng(2).normal(size=(3, 2, 5, 8)).astype(np.float32)
    return SparseActivations.from_dense(jnp.asarray(dense), 4), dense


def test_it_is_a_sequence_of_its_layers(three_layers):
    sparse, _ = three_layers
    dense = np.asarray(sparse.dense())
    assert len(sparse) == 3
    for taken in (list(sparse), [*reversed(sparse)][::-1], [sparse[i] for i in range(-3, 0)]):
        assert len(taken) == 3
        for layer, one in enumerate(taken):
            assert_same_bits(one.dense(), dense[layer])
    assert [number for number, _ in zip(range(5), sparse, strict=False)] == [0, 1, 2]
    assert [len(row) for row in sparse[0]] == [5, 5]
    assert list(sparse[:0]) == []
    with pytest.raises(TypeError, match="len"):
        len(sparse[0, 0, 0][0])


@pytest.mark.parametrize(
    "index",
    [3, -4, np.int64(3), np.array(7), jnp.array(3), (0, 2), (0, -1, 5), (..., 5, 0), np.array([0, 3])],
    ids=repr,
)
def test_an_index_out_of_range_is_refused_as_by_numpy(three_layers, index):
    sparse, dense = three_layers
    with pytest.raises(IndexError):
        dense[..., :4][index]
    with pytest.raises(IndexError):
        sparse[index]


@pytest.mark.parametrize(
    "index",
    [0, -1, (1, 1), (2, 0, 4), slice(1, 9), (slice(None), 1), (..., slice(2), slice(None)), np.array([2, 0])],
    ids=repr,
)
def test_a_part_is_that_part_of_the_dense_layers(three_layers, index):
    sparse, _ = three_layers
    assert_same_bits(sparse[index].dense(), np.asarray(sparse.dense())[index])


def test_an_index_may_be_traced(three_layers):
    sparse, _ = three_layers
    found = jax.jit(lambda number: sparse[number].dense())(2)
    assert_same_bits(found, np.asarray(sparse.dense())[2])


def test_numpy_is_told_that_it_is_no_array(three_layers):
    with pytest.raises(TypeError, match=r"take \.indices and \.values, or \.dense\(\)"):
        np.asarray(three_layers[0])


# ActivationCache.


@pytest.fixture
def cache():
    return ActivationCache(SparseActivations.from_dense(jnp.eye(12).reshape(2, 2, 3, 12), 4), (0, 1))


def test_what_was_kept_is_found_by_all_names_of_the_array_and_by_no_other(cache):
    config = configured()  # of which the third layer has no TopK
    known = all_hook_names(config)
    kept = dataclasses.replace(cache, others={"blocks.2.hook_resid_post": jnp.ones(3)}, hook_names=known)
    same = {
        0: ["blocks.0.hook_topk", "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"],
        1: ["blocks.1.hook_topk", "blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"],
    }
    for layer, names in same.items():
        for name in names:
            assert_same_bits(kept[name], cache["topk", layer])
    found = {name for name in known if name in kept}
    assert found == {*same[0], *same[1], "blocks.2.hook_resid_post"}
    assert list(kept) == [same[0][0], same[1][0], "blocks.2.hook_resid_post"]


def test_layers_count_from_behind_among_those_that_have_the_hook(cache):
    last = jnp.ones(3)
    kept = dataclasses.replace(
        cache, others={"blocks.2.hook_resid_post": last}, hook_names=all_hook_names(configured())
    )
    assert_same_bits(kept["topk", -1], cache["topk", 1])
    assert_same_bits(kept["topk", np.int64(-2)], cache["topk", 0])
    assert_same_bits(kept["resid_post", -1], last)
    assert_same_bits(kept["resid_post", -2], cache["topk", 1])
    assert_same_bits(cache["topk", -1], cache["topk", 1])
    for wrong in [("topk", -3), ("topk", 2), ("resid_post", -4), ("mlp_out", -1), 0, -1]:
        with pytest.raises(KeyError, match="is not in the cache"):
            kept[wrong]
    for wrong in [("topk", 0, "attn"), ("topk",), ("topk", "0"), ("topk", 1.0), (0, None)]:
        with pytest.raises(KeyError, match="must be a name, or a hook and its layer"):
            kept[wrong]


def test_the_cache_gives_each_layer_by_its_name(cache):
    assert list(cache) == ["blocks.0.hook_topk", "blocks.1.hook_topk"]
    for layer, dense in enumerate(np.eye(12, dtype=np.float32).reshape(2, 2, 3, 12)):
        assert_same_bits(cache[f"blocks.{layer}.hook_topk"], dense)
    assert "blocks.1.hook_topk" in repr(cache)


@pytest.mark.parametrize("name", ["blocks.2.hook_topk", "blocks.-1.hook_topk", "hook_topk", ""])
def test_a_name_that_the_cache_lacks_is_refused_with_those_that_it_has(cache, name):
    with pytest.raises(KeyError, match=r"there are: blocks\.0\.hook_topk, blocks\.1\.hook_topk"):
        cache[name]
    assert name not in cache
