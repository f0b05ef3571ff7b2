"""Padding of the vocabulary: wherever it lies and whatever it holds, no result depends on it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import cross_entropy_reference

from topklm.config import (
    Config,
    ModelConfig,
    OptimConfig,
    differences_that_matter,
    from_saved,
    resolve,
)
from topklm.errors import UserError
from topklm.inference.scheduler import generate_tokens
from topklm.layout import one_device
from topklm.model import transformer
from topklm.model.losses import cross_entropy, token_losses
from topklm.training.evaluation import make_eval_step
from topklm.training.step import abstract_state, init_state, make_optimizer, make_train_step

CONFIG = ModelConfig(
    d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, d_mlp=32, vocab_size=41, context_length=8, topk_k=4
)
TOKENS = np.random.default_rng(0).integers(0, 41, (2, 8))
BATCH = {
    "inputs": TOKENS,
    "targets": np.roll(TOKENS, -1, axis=1),
    "segment_ids": np.ones((2, 8), np.int32),
    "positions": np.broadcast_to(np.arange(8), (2, 8)),
    "loss_weights": np.ones((2, 8), np.float32),
}


def with_loud_padding(params, config):
    """Padding that would win every softmax, were it looked at."""
    params = jax.tree.map(jnp.asarray, params)
    params["embed"]["embedding"] = params["embed"]["embedding"].at[config.vocab_size :].set(1e3)
    if not config.tie_embeddings:
        params["unembed"]["kernel"] = params["unembed"]["kernel"].at[:, config.vocab_size :].set(1e3)
    return params


@pytest.mark.parametrize("tied", [False, True])
def test_padding_has_rows_of_its_own_and_no_logit(tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    params = transformer.create(config, seed=0)
    assert config.padded_vocab_size == 128
    assert params["embed"]["embedding"].shape == (128, 16)
    assert not params["embed"]["embedding"][41:].any()
    logits = transformer.bind(config, params)(TOKENS)
    assert logits.shape == (2, 8, 41)
    loud = transformer.bind(config, with_loud_padding(params, config))(TOKENS)
    np.testing.assert_array_equal(loud, logits)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_training_with_padding_is_training_without(tied):
    def trained(vocab_multiple):
        model = dataclasses.replace(CONFIG, n_layers=1, tie_embeddings=tied, vocab_multiple=vocab_multiple)
        config = Config(model=model, optim=OptimConfig(z_loss=1e-3, warmup_steps=1))
        layout = one_device()
        optimizer = make_optimizer(config.optim, config.train.steps)
        state, train_step = init_state(config, optimizer, layout), make_train_step(config, optimizer, layout)
        losses = []
        for _ in range(3):
            state, metrics = train_step(state, BATCH)
            losses.append(float(metrics["loss"]))
        return losses, jax.device_get(state.params)

    losses, params = trained(128)
    want_losses, want = trained(1)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    # From zero, with gradient zero, even Adam leaves it at exactly zero.
    assert not params["embed"]["embedding"][41:].any()
    np.testing.assert_allclose(
        params["embed"]["embedding"][:41], want["embed"]["embedding"], rtol=1e-3, atol=1e-4
    )
    assert tied or not params["unembed"]["kernel"][:, 41:].any()


def test_evaluation_does_not_see_padding():
    layout = one_device()
    params = transformer.create(CONFIG, seed=0)
    eval_step = make_eval_step(Config(model=CONFIG), layout)
    want = eval_step(params, BATCH)["nll_nats"]
    np.testing.assert_array_equal(eval_step(with_loud_padding(params, CONFIG), BATCH)["nll_nats"], want)


def test_padding_changes_no_initial_value_of_a_token():
    padded = transformer.create(CONFIG, seed=0)
    bare = transformer.create(dataclasses.replace(CONFIG, vocab_multiple=1), seed=0)
    np.testing.assert_array_equal(padded["embed"]["embedding"][:41], bare["embed"]["embedding"])
    np.testing.assert_array_equal(padded["unembed"]["kernel"][:, :41], bare["unembed"]["kernel"])


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_padding_is_never_drawn(temperature):
    params = with_loud_padding(transformer.create(CONFIG, seed=0), CONFIG)
    drawn = generate_tokens(
        CONFIG, params, [1], max_new_tokens=150, temperature=temperature, seed=0, stop_token=-1
    )
    assert len(drawn) == 150
    assert max(drawn) < 41


@pytest.mark.parametrize("chunk_tokens", [512, 4])  # 4: in several chunks
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_the_loss_and_its_gradients_do_not_see_padding(z_loss, chunk_tokens, monkeypatch):
    monkeypatch.setattr("topklm.model.losses._MIN_TOKENS_PER_CHUNK", chunk_tokens)
    monkeypatch.setattr("topklm.model.losses._LOGITS_PER_CHUNK", chunk_tokens)
    rng = np.random.default_rng(1)
    h = rng.normal(size=(2, 9, 16)).astype(np.float32)
    w = np.concatenate([rng.normal(size=(16, 41)), np.full((16, 87), 1e3)], axis=1).astype(np.float32)
    targets, weights = rng.integers(0, 41, (2, 9)), rng.random((2, 9)).astype(np.float32)

    logits = h.astype(np.float64) @ w[:, :41].astype(np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    for function in (cross_entropy, cross_entropy_reference):
        loss, plain = function(h, w, targets, weights, z_loss, 41)
        np.testing.assert_allclose(loss, (weights * (nll + z_loss * log_z**2)).sum(), rtol=1e-5)
        np.testing.assert_allclose(plain, (weights * nll).sum(), rtol=1e-5)
    np.testing.assert_allclose(token_losses(h, w, targets, 41), nll, rtol=1e-4)

    def total(h, w, n_vocab):
        return cross_entropy(h, w, targets, weights, z_loss, n_vocab)[0]

    dh, dw = jax.grad(total, argnums=(0, 1))(h, w, 41)
    want_dh, want_dw = jax.grad(total, argnums=(0, 1))(h, w[:, :41], None)
    assert not np.asarray(dw[:, 41:]).any()
    np.testing.assert_allclose(dw[:, :41], want_dw, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(dh, want_dh, rtol=1e-4, atol=1e-6)


def test_a_vocabulary_without_padding_costs_nothing():
    def program(n_vocab):
        args = (jnp.zeros((2, 8, 16)), jnp.zeros((16, 128)), jnp.zeros((2, 8), jnp.int32), jnp.ones((2, 8)))
        return jax.jit(cross_entropy, static_argnums=(4, 5)).lower(*args, 0.0, n_vocab).as_text()

    assert program(128) == program(None)
    assert program(100) != program(None)


def test_a_training_step_without_padding_is_the_same_program_whatever_the_multiple():
    def program(vocab_multiple):
        config = Config(model=dataclasses.replace(CONFIG, vocab_size=128, vocab_multiple=vocab_multiple))
        layout = one_device()
        optimizer = make_optimizer(config.optim, config.train.steps)
        state = abstract_state(config, optimizer)
        return make_train_step(config, optimizer, layout).lower(state, BATCH).as_text()

    assert program(128) == program(1)
    assert program(100) != program(1)


def test_a_run_from_before_padding_keeps_its_shapes():
    saved = {"model": {"vocab_size": 41, "d_model": 256}}
    assert from_saved(saved).model.padded_vocab_size == 41
    saved["model"]["vocab_multiple"] = 128
    assert from_saved(saved).model.padded_vocab_size == 128


def test_a_run_from_before_padding_whose_shapes_need_none_goes_on_under_the_default():
    asked = resolve({"model": {"vocab_size": 4096}})
    saved = asked.to_dict()
    del saved["model"]["vocab_multiple"]
    assert differences_that_matter(from_saved(saved), asked) == {}


def test_another_multiple_is_another_run():
    one, other = (resolve({"model": {"vocab_size": 41, "vocab_multiple": n}}) for n in (1, 128))
    assert differences_that_matter(one, other) == {"model.vocab_multiple": (1, 128)}


def test_a_multiple_below_one_is_refused():
    with pytest.raises(UserError, match=r"model\.vocab_multiple = 0: must be 1 or more"):
        resolve({"model": {"vocab_multiple": 0}})
