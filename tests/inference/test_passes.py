"""One pass over texts: lengths, documents in a row, losses, and what JAX makes of it."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
from plain_loop import byte_model, compilations, whole
import pytest

from topklm.errors import UserError
from topklm.inference.intervention_batch import InterventionBatch
from topklm.inference.interventions import Intervention

TOKENS = np.random.default_rng(0).integers(1, 257, (2, 16), dtype=np.int32)


@pytest.fixture(scope="module")
def model():
    return byte_model()


def of_float64(logits, ids):
    """Losses of tokens 1, 2, ... of one row."""
    logits = np.asarray(logits, np.float64)[:-1]
    log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return log_z - logits[np.arange(len(ids) - 1), ids[1:]]


# Lengths.


def test_texts_of_all_lengths_of_a_size_are_run_by_one_program_and_give_the_same(model):
    model(TOKENS), model.loss(TOKENS, per_token=True), model.run_with_cache(TOKENS, lambda name: True)
    with compilations() as compiled:
        for n in (2, 5, 11, 15):
            rows = TOKENS[:, :n]
            logits = model(rows)
            losses, mean = model.loss(rows, per_token=True), model.loss(rows)
            with_cache, cache = model.run_with_cache(rows, lambda name: True)
            assert logits.shape == with_cache.shape == (2, n, 257)
            assert (losses.shape, mean.shape) == ((2, n - 1), ())
            assert cache.neurons.values.shape == cache.neurons.indices.shape == (1, 2, n, 6)
            assert {array.shape for array in cache.values()} == {(2, n, 24)}
            np.testing.assert_array_equal(logits, np.asarray(model(TOKENS))[:, :n])
            np.testing.assert_allclose(logits, with_cache, rtol=1e-4, atol=1e-4)
            if n == 2:
                del compiled[:]  # the dense form of a length
    assert len(compiled) <= 3  # of the others
    np.testing.assert_allclose(model(TOKENS[:, :5]), whole(model, TOKENS[:, :5]), rtol=1e-4, atol=1e-4)


# Documents that share a row.

FIRST, SECOND = TOKENS[0, :7], TOKENS[1, :9]
PACKED = np.concatenate([FIRST, SECOND])
SEGMENTS = np.repeat([4, 9], [7, 9])
STEER = [Intervention(0, 3, 3.0, "add", (1, 4)), Intervention(1, 2, mode="ablate", positions=(0, 2))]


def parts(array):
    return np.asarray(array)[0, :7], np.asarray(array)[0, 7:]


def test_documents_of_a_row_are_what_they_are_alone(model):
    found = parts(model(PACKED, segment_ids=jnp.array(SEGMENTS)))
    for of_document, document in zip(found, (FIRST, SECOND), strict=True):
        np.testing.assert_allclose(of_document, model(document)[0], rtol=1e-4, atol=1e-4)
    # The second one did see the first one without segments.
    assert np.abs(parts(model(PACKED))[1] - found[1]).max() > 0.1


@pytest.mark.slow
def test_documents_of_a_row_are_captured_and_steered_as_they_are_alone(model):
    logits, cache = model.run_with_cache(PACKED, lambda name: True, STEER, segment_ids=SEGMENTS)
    for number, document in enumerate([FIRST, SECOND]):
        alone, alone_cache = model.run_with_cache(document, lambda name: True, STEER)
        np.testing.assert_allclose(parts(logits)[number], alone[0], rtol=1e-4, atol=1e-4)
        for name in model.hook_names:
            np.testing.assert_allclose(parts(cache[name])[number], alone_cache[name][0], rtol=1e-4, atol=1e-4)


def test_segments_may_be_traced(model):
    found = jax.jit(lambda ids, segments: model(ids, segment_ids=segments))(PACKED, SEGMENTS)
    np.testing.assert_allclose(found, model(PACKED, segment_ids=SEGMENTS), rtol=1e-5, atol=1e-5)


# Losses.


def test_losses_are_those_of_logits_in_float64_and_not_a_number_where_there_is_none(model):
    texts = ["A king", "x"]
    losses, lengths = np.asarray(model.loss(texts, per_token=True)), model.lengths(texts)
    logits, ids = model(texts), np.asarray(model.to_tokens(texts))
    expected = [of_float64(logits[row, :n], ids[row, :n]) for row, n in enumerate(lengths)]
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(losses[row, : n - 1], expected[row], rtol=1e-5, atol=1e-5)
        assert np.isnan(losses[row, n - 1 :]).all()
    np.testing.assert_allclose(model.loss(texts), np.concatenate(expected).mean(), rtol=1e-5)
    assert model.loss(texts).dtype == np.float32


@pytest.mark.slow
def test_the_first_token_of_a_document_is_not_scored(model):
    losses = np.asarray(model.loss(PACKED, per_token=True, segment_ids=SEGMENTS))[0]
    alone = [np.asarray(model.loss(part, per_token=True))[0] for part in (FIRST, SECOND)]
    np.testing.assert_allclose(losses, [*alone[0], np.nan, *alone[1]], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        model.loss(PACKED, segment_ids=SEGMENTS), np.concatenate(alone).mean(), rtol=1e-5
    )


@pytest.mark.slow
def test_losses_of_a_steered_model_are_those_of_its_logits(model):
    steer = {"steer": {(0, 3): 2.0}, "steer_mode": "add"}
    found = model.loss(FIRST, per_token=True, **steer)[0]
    np.testing.assert_allclose(found, of_float64(model(FIRST, **steer)[0], FIRST), rtol=1e-5, atol=1e-5)
    assert np.abs(found - model.loss(FIRST, per_token=True)[0]).max() > 0.01


def test_a_loss_needs_two_tokens(model):
    for tokens in ("", ["", ""], [[5], [6]]):
        with pytest.raises(ValueError, match="no row has two tokens"):
            model.loss(tokens)


# What JAX makes of it.


def test_a_model_is_a_function_for_jit_and_vmap(model):
    expected = whole(model, TOKENS)
    np.testing.assert_allclose(jax.jit(model)(TOKENS), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.vmap(model)(TOKENS)[:, 0], expected, rtol=1e-4, atol=1e-4)
    known = jnp.array(TOKENS)
    added = jax.jit(lambda x: model(known)[0, 0, 0] + x)(1.0)
    np.testing.assert_allclose(added, expected[0, 0, 0] + 1, rtol=1e-4)


def test_a_cache_passes_through_jit_and_vmap(model):
    _, expected = model.run_with_cache(TOKENS, lambda name: True)
    _, cache = jax.jit(lambda ids: model.run_with_cache(ids, lambda name: True))(TOKENS)
    _, rows = jax.vmap(lambda ids: model.run_with_cache(ids, lambda name: True))(TOKENS)
    assert sorted(cache) == sorted(rows) == sorted(model.hook_names)
    for name in model.hook_names:
        np.testing.assert_allclose(cache[name], expected[name], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(rows[name][:, 0], expected[name], rtol=1e-4, atol=1e-4)


ACTIVE = 16  # a neuron at the last token of the text below


@pytest.mark.parametrize("mode", ["clamp", "add", "scale", "force"])
def test_the_gradient_of_a_value_is_that_of_finite_differences_compiled_or_not(model, mode):
    def logit(value):
        return model("The sea", steer={(0, ACTIVE): value}, steer_mode=mode)[0, -1, 5]

    quotient = (logit(2.02) - logit(1.98)) / 0.04
    assert abs(quotient) > 1e-3
    np.testing.assert_allclose(jax.grad(logit)(2.0), quotient, rtol=0.02, atol=1e-3)
    if mode == "force":
        np.testing.assert_allclose(jax.jit(jax.grad(logit))(2.0), quotient, rtol=0.02, atol=1e-3)


@pytest.mark.slow
def test_values_that_are_mapped_are_what_each_is_alone(model):
    values = jnp.array([0.5, 4.0, 9.0])

    def of_value(value):
        return model("The sea", steer=[Intervention(0, 17, value), Intervention(1, 2, 1.0, "add")])

    together = jax.vmap(of_value)(values)
    for value, found in zip(values, together, strict=True):
        np.testing.assert_allclose(found, of_value(float(value)), rtol=1e-4, atol=1e-4)


def test_only_one_number_may_be_traced_and_no_neuron():
    config = byte_model().cfg
    for steer in (
        lambda x: {(0, 3): x},
        lambda x: [Intervention(0, x[0].astype(int), 1.0)],
        lambda x: [Intervention(x[0].astype(int), 3, 1.0)],
    ):
        with pytest.raises(ValueError, match=r"(value|layer|neuron) = .*must be"):
            jax.eval_shape(lambda x, steer=steer: InterventionBatch.of(config, steer(x)), jnp.ones(2))


@pytest.mark.slow
def test_parameters_may_be_traced_in_a_copy_of_the_model(model):
    def loss(params):
        return dataclasses.replace(model, params=params).loss(TOKENS)

    scale = model.params["final_norm"]["scale"]
    gradient = jax.jit(jax.grad(loss))(model.params)["final_norm"]["scale"]
    direction = np.random.default_rng(1).normal(size=scale.shape).astype(np.float32)

    def moved(step):
        return loss({**model.params, "final_norm": {"scale": scale + step * direction}})

    np.testing.assert_allclose((gradient * direction).sum(), (moved(0.01) - moved(-0.01)) / 0.02, rtol=0.01)


# The model itself.


def test_weights_have_the_names_and_shapes_of_transformerlens(model):
    assert model.cfg is model.config.model
    assert (model.W_E.shape, model.W_U.shape) == ((257, 24), (24, 257))
    _, cache = model.run_with_cache(TOKENS, lambda name: True)
    np.testing.assert_array_equal(cache["resid_pre", 0], np.asarray(model.W_E)[TOKENS])
    h = np.asarray(cache["resid_post", -1], np.float64)
    normed = h / np.sqrt((h**2).mean(-1, keepdims=True) + model.cfg.norm_eps)
    logits = normed * np.asarray(model.params["final_norm"]["scale"]) @ np.asarray(model.W_U)
    np.testing.assert_allclose(logits, model(TOKENS), rtol=1e-4, atol=1e-3)


def bfloat16(model):
    return dataclasses.replace(model.config, model=dataclasses.replace(model.cfg, dtype="bfloat16"))


@pytest.mark.slow
def test_a_model_in_another_dtype_computes_as_its_config_says(model):
    expected = dataclasses.replace(model, config=bfloat16(model))
    np.testing.assert_array_equal(model.astype("bfloat16")(TOKENS), expected(TOKENS))


def test_matrices_of_another_dtype_take_half_the_memory(model):
    config = bfloat16(model)
    for dtype in ("bfloat16", jnp.bfloat16, jnp.dtype("bfloat16")):
        found = model.astype(dtype)
        assert found.config == config
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found.params) if leaf.ndim == 3} == {"bfloat16"}
    assert found.params["final_norm"]["scale"].dtype == np.float32
    assert found.astype("float32").cfg == model.cfg
    for dtype in ("float16", float, "x", None):
        with pytest.raises(UserError, match=r"dtype = .*: must be one of float32, bfloat16"):
            model.astype(dtype)


def test_what_is_made_of_the_parameters_is_not_pickled(model):
    fresh = dataclasses.replace(model)
    size = len(pickle.dumps(fresh))
    fresh.generate("a", 0)
    assert len(vars(fresh)) > len(dataclasses.fields(fresh))
    assert len(pickle.dumps(fresh)) == size
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fresh))(TOKENS), model(TOKENS))
