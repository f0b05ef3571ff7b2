"""The stack: what is sparse, what sees what, and how parameters are laid out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topklm.config import ModelConfig
from topklm.model import transformer

CONFIG = ModelConfig(
    d_model=24, n_layers=4, n_heads=4, n_kv_heads=2, d_mlp=32, vocab_size=50, topk_k=6, n_nontopk=1
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 12)), jnp.int32)


def variant(**changes):
    return dataclasses.replace(CONFIG, **changes)


def hidden_states(config, params):
    """(h, u, h') of every layer, each [L, B, T, D]."""
    return transformer.bind(config, params).hidden(TOKENS, tap=lambda *seen: seen)[1]


@pytest.fixture(scope="module")
def params():
    return transformer.create(CONFIG, seed=0)


def test_block_parameters_are_stacked_on_a_leading_layer_axis(params):
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes["embed"]["embedding"] == (50, 24)
    assert shapes["blocks"]["attention"]["key"]["kernel"] == (4, 24, 12)
    assert shapes["blocks"]["mlp"]["down"]["kernel"] == (4, 32, 24)
    assert shapes["blocks"]["mlp_norm"]["scale"] == (4, 24)
    assert shapes["unembed"]["kernel"] == (24, 50)
    assert "unembed" not in transformer.create(variant(tie_embeddings=True), seed=0)


def test_layers_are_initialised_differently_and_seeds_matter(params):
    kernel = params["blocks"]["mlp"]["up"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])
    assert not np.allclose(kernel, transformer.create(CONFIG, seed=1)["blocks"]["mlp"]["up"]["kernel"])


def test_scanned_and_unrolled_layers_are_the_same_model(params):
    for config in (CONFIG, variant(n_nontopk=4), variant(n_nontopk=2)):
        unrolled = transformer.bind(config, params)(TOKENS)
        scanned = dataclasses.replace(config, scan_layers=True)
        np.testing.assert_allclose(transformer.bind(scanned, params)(TOKENS), unrolled, atol=1e-5)
        for a, b in zip(hidden_states(scanned, params), hidden_states(config, params), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("activation", "exactly"), [("relu", False), ("identity", True), ("abs", True)])
def test_every_topk_layer_leaves_k_entries_and_the_last_is_dense(params, activation, exactly):
    _, u, h_next = hidden_states(variant(topk_activation=activation), params)
    active = (h_next != 0).sum(axis=-1)
    assert active[:3].max() == CONFIG.topk_k
    if exactly:
        assert active[:3].min() == CONFIG.topk_k
    np.testing.assert_array_equal(h_next[3], u[3])
    assert (active[3] == CONFIG.d_model).all()


def test_the_sparse_vector_is_all_that_enters_the_next_layer(params):
    h, _, h_next = hidden_states(CONFIG, params)
    np.testing.assert_array_equal(h[1:], h_next[:-1])


def test_the_base_model_equals_keeping_everything(params):
    base = transformer.bind(variant(n_nontopk=4), params)(TOKENS)
    everything = variant(topk_k=24, topk_activation="identity")
    np.testing.assert_allclose(transformer.bind(everything, params)(TOKENS), base, atol=1e-6)


def test_tokens_do_not_see_the_future_or_other_segments(params):
    model = transformer.bind(CONFIG, params)
    segments = jnp.asarray([[1] * 5 + [2] * 7] * 2, jnp.int32)
    before = model(TOKENS, segments)
    after = model(TOKENS.at[:, 3].set((TOKENS[:, 3] + 1) % 50), segments)
    changed = np.abs(np.asarray(after - before)).max(axis=(0, 2)) > 0
    np.testing.assert_array_equal(changed, [False] * 3 + [True] * 2 + [False] * 7)


def test_both_backends_give_the_same_logits(params):
    logits = [transformer.bind(variant(topk_backend=b), params)(TOKENS) for b in ("lax", "threshold")]
    np.testing.assert_array_equal(*logits)


def test_bfloat16_activations_give_float32_logits(params):
    model = transformer.bind(variant(dtype="bfloat16"), params)
    assert model(TOKENS).dtype == jnp.float32
    assert model.hidden(TOKENS)[0].dtype == jnp.bfloat16


def test_a_model_without_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size = 0"):
        transformer.create(variant(vocab_size=0), seed=0)
