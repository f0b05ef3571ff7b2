import dataclasses

from helpers import assert_same_bits
import jax
import numpy as np
import pytest

import topklm
from topklm.inference.sequence import bucket
from topklm.model import transformer

TEXT = "The old baker lost a kettle."


@pytest.fixture(scope="module")
def model(finished_run):
    return topklm.load(finished_run)


def tapped(model, tokens):
    """(h, u, h') of every layer, [L, B, T, D] each, of rows that are filled up as the model fills them."""
    filled = np.pad(tokens, ((0, 0), (0, bucket(tokens.shape[1], 32) - tokens.shape[1])))

    def run(params):
        return transformer.bind(model.config.model, params).hidden(filled, capture=lambda *seen: seen)

    return [np.asarray(x)[:, :, : tokens.shape[1]] for x in jax.jit(run)(model.params)[1]]


def dense_layers(model, tokens):
    """What every layer hands on, [L, B, T, D]."""
    return tapped(model, tokens)[2]


def test_running_with_a_cache_gives_the_logits_and_the_activations(model):
    logits, cache = model.run_with_cache(TEXT)
    assert_same_bits(logits, model(TEXT))
    expected = dense_layers(model, model.to_tokens(TEXT))
    assert list(cache) == ["blocks.0.hook_topk"]
    assert_same_bits(cache["blocks.0.hook_topk"], expected[0])
    assert_same_bits(cache.neurons.dense(), expected[:1])
    assert (np.asarray(cache.neurons.active).sum(-1) == (expected[:1] != 0).sum(-1)).all()


ALL_NAMES = [
    "blocks.0.hook_resid_pre",
    "blocks.0.hook_topk_pre",
    "blocks.0.hook_topk",
    "blocks.0.hook_resid_post",
    "blocks.1.hook_resid_pre",
    "blocks.1.hook_resid_post",
]


def test_everything_that_has_a_name_can_be_captured(model):
    entering, summed, leaving = tapped(model, model.to_tokens(TEXT))
    expected = dict(
        zip(
            ALL_NAMES,
            [entering[0], summed[0], leaving[0], leaving[0], entering[1], leaving[1]],
            strict=True,
        )
    )
    logits, cache = model.run_with_cache(TEXT, names_filter=lambda name: True)
    assert_same_bits(logits, model(TEXT))
    assert sorted(cache) == sorted(ALL_NAMES)
    assert len(cache) == len(ALL_NAMES)
    for name, array in expected.items():
        assert_same_bits(cache[name], array)
    assert_same_bits(cache["resid_pre", 1], entering[1])


@pytest.mark.parametrize("names_filter", ["blocks.1.hook_resid_post", ["blocks.1.hook_resid_post"]])
def test_only_what_is_asked_for_is_captured(model, names_filter):
    _, cache = model.run_with_cache(TEXT, names_filter)
    assert list(cache) == ["blocks.1.hook_resid_post"]
    assert cache.neurons.values.shape == (0, *model.to_tokens(TEXT).shape, model.config.model.topk_k)
    with pytest.raises(KeyError, match=r"there are: blocks\.1\.hook_resid_post"):
        cache["blocks.0.hook_topk"]


def test_a_name_that_there_is_not_is_refused(model):
    with pytest.raises(ValueError, match=r"'blocks\.1\.hook_topk' is none of this model's names"):
        model.run_with_cache(TEXT, names_filter="blocks.1.hook_topk")


def test_tokens_are_as_good_as_text_and_may_be_a_batch(model):
    tokens = np.random.default_rng(0).integers(0, 320, (3, 7))
    logits, cache = model.run_with_cache(tokens.tolist())
    assert logits.shape == (3, 7, 320)
    assert cache["blocks.0.hook_topk"].shape == (3, 7, 32)
    assert_same_bits(cache["blocks.0.hook_topk"], dense_layers(model, tokens)[0])


@pytest.mark.parametrize("tokens", [[[[1]]], [[320]], [[-1]]])
def test_tokens_that_make_no_sense_are_refused_here_too(model, tokens):
    with pytest.raises(ValueError, match="tokens"):
        model.run_with_cache(tokens)


def test_the_active_neurons_of_a_text_are_those_of_its_tokens(model):
    found = model.active_neurons(TEXT)
    assert list(found.tokens) == model.to_str_tokens(TEXT)
    expected = dense_layers(model, model.to_tokens(TEXT))[0, 0]
    for row, active in zip(expected, found, strict=True):
        by_value = sorted(np.flatnonzero(row), key=lambda neuron: -row[neuron])
        assert active == [(0, neuron, row[neuron]) for neuron in by_value]
    strongest = found[3][0]
    np.testing.assert_array_equal(found.neuron(0, strongest.neuron).values, expected[:, strongest.neuron])


def test_the_base_lm_runs_with_an_empty_cache(model):
    config = dataclasses.replace(
        model.config, model=dataclasses.replace(model.config.model, n_nontopk=model.config.model.n_layers)
    )
    base = dataclasses.replace(model, config=config)
    logits, cache = base.run_with_cache(TEXT)
    assert_same_bits(logits, base(TEXT))
    assert len(cache) == 0
    assert all(active == [] for active in base.active_neurons(TEXT))
    assert "none: a Base LM" in base._repr_html_()


def test_a_notebook_shows_the_model_as_a_table_of_facts(model, finished_run):
    page = model._repr_html_()
    n_parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    for fact in (
        f"{finished_run}, step 24",
        f"{n_parameters:,} on {jax.devices()[0]}",
        "2 of width 32; 2 heads, MLP 64 wide",
        "keeps 8 of 32 neurons in the first 1 layers (relu)",
        "vocabulary of 320; trained on windows of 32",
    ):
        assert fact in page


def test_the_name_of_a_run_is_shown_and_never_executed(model):
    page = dataclasses.replace(model, run="<script>alert(1)</script>")._repr_html_()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_what_is_captured_of_a_steered_run_is_what_layers_hand_on_then(model):
    steer, name = {(0, 5): 7.5}, "blocks.0.hook_topk"
    logits, cache = model.run_with_cache("The sea", ["blocks.1.hook_resid_pre", name], steer=steer)
    np.testing.assert_allclose(logits, model("The sea", steer=steer), atol=1e-5)
    assert (np.asarray(cache[name])[..., 5] == 7.5).all()
    # Of a layer that hands on more than k entries, none is lost.
    np.testing.assert_array_equal(cache["blocks.1.hook_resid_pre"], cache[name])


def test_another_k_keeps_as_many(model):
    k = model.config.model.topk_k // 2
    logits, cache = model.run_with_cache("The sea", topk_k=k)
    assert cache.neurons.values.shape[-1] == k
    assert ((np.asarray(cache["blocks.0.hook_topk"]) != 0).sum(axis=-1) <= k).all()
    np.testing.assert_array_equal(logits, model("The sea", topk_k=k))
    assert np.abs(np.asarray(logits - model("The sea"))).max() > 1e-3
