"""Held-out figures: known answers, and the same ones however the text is cut into batches."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topklm.config import Config, ModelConfig
from topklm.layout import one_device
from topklm.model import transformer
from topklm.training.evaluation import evaluate, make_eval_step

MODEL = ModelConfig(
    d_model=16, n_layers=3, n_heads=2, n_kv_heads=2, d_mlp=16, vocab_size=30, topk_k=4, context_length=8
)
ROWS = 6
FIGURES = {"loss", "perplexity", "bits_per_byte", "tokens", "dead_neurons", "norm_kept", "overlap_below"}


def fake_step(nll_per_token):
    """Makes an eval step that charges every weighted token the same."""

    def step(params, batch):
        weights = np.asarray(batch["loss_weights"])
        health = {"active_tokens": np.ones((1, 4)), "kept_square_share": weights.sum(keepdims=True)[0]}
        health |= {"active": np.ones(1), "also_active_below": np.ones(1)}
        sums = {"nll_nats": nll_per_token * weights.sum(axis=-1), "tokens": (weights > 0).sum(axis=-1)}
        return {**sums, "topk_health": health}

    return step


def weights(*rows):
    return {"loss_weights": np.array(rows, np.float32)}


def test_two_bits_a_token_are_that_many_bits_per_byte():
    batches = [weights([1, 1, 0], [1, 1, 1]), weights([0, 1, 0], [0, 0, 0])]
    got = evaluate(fake_step(2 * math.log(2)), None, batches, n_bytes=24, n_topk_layers=1)
    assert set(got) == FIGURES
    assert got["tokens"] == 6
    assert got["loss"] == pytest.approx(2 * math.log(2))
    assert got["perplexity"] == pytest.approx(4.0)
    assert got["bits_per_byte"] == pytest.approx(2 * 6 / 24)
    assert got["norm_kept"] == [1.0]


def test_a_diverged_model_gives_a_large_perplexity_instead_of_an_overflow():
    got = evaluate(fake_step(1e4), None, [weights([1.0, 1.0])], n_bytes=2, n_topk_layers=1)
    assert got["loss"] == pytest.approx(1e4)
    assert math.isfinite(got["perplexity"])


def test_a_nan_is_not_hidden():
    got = evaluate(fake_step(math.nan), None, [weights([1.0, 1.0])], n_bytes=2, n_topk_layers=1)
    assert math.isnan(got["loss"]) and math.isnan(got["bits_per_byte"])


@pytest.fixture(scope="module")
def params():
    return jax.jit(transformer.create, static_argnums=(0, 1))(MODEL, 0)


@pytest.fixture(scope="module")
def eval_step():
    return make_eval_step(Config(model=MODEL), one_device())


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, MODEL.vocab_size, (ROWS, MODEL.context_length + 1)).astype(np.int32)
    segment_ids = np.sort(rng.integers(1, 3, (ROWS, MODEL.context_length)), axis=1).astype(np.int32)
    counted = (rng.random((ROWS, MODEL.context_length)) < 0.7).astype(np.float32)
    positions = np.broadcast_to(np.arange(MODEL.context_length, dtype=np.int32), segment_ids.shape)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segment_ids,
        "positions": positions,
        "loss_weights": counted,
    }


def in_batches(rows, size):
    """Fills the last batch with rows of weight 0, as the data pipeline does."""
    padded = {
        name: np.concatenate([x, np.zeros((-ROWS % size, *x.shape[1:]), x.dtype)]) for name, x in rows.items()
    }
    for start in range(0, ROWS, size):
        yield {name: x[start : start + size] for name, x in padded.items()}


def test_figures_do_not_depend_on_the_batch_size(params, eval_step, rows):
    results = [
        evaluate(eval_step, params, in_batches(rows, size), n_bytes=100, n_topk_layers=2) for size in (6, 4)
    ]
    assert results[0]["tokens"] == results[1]["tokens"] == rows["loss_weights"].sum()
    for name in FIGURES:
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-5), name


def test_figures_are_those_computed_from_the_logits_and_the_layers(params, eval_step, rows):
    got = evaluate(eval_step, params, in_batches(rows, 6), n_bytes=100, n_topk_layers=2)

    @jax.jit
    def run(params, inputs, segment_ids):
        model = transformer.bind(MODEL, params)
        h, states = model.hidden(inputs, segment_ids, capture=lambda h, u, h_next: (u, h_next))
        return jax.nn.log_softmax(jnp.matmul(h, model.unembedding()[:, : MODEL.vocab_size])), states

    logprobs, (u, h_next) = jax.device_get(run(params, rows["inputs"], rows["segment_ids"]))
    counted = rows["loss_weights"] > 0
    nll = -np.take_along_axis(logprobs, rows["targets"][..., None], axis=-1)[..., 0][counted]
    assert got["loss"] == pytest.approx(nll.mean(dtype=np.float64), rel=1e-5)
    assert got["bits_per_byte"] == pytest.approx(nll.sum(dtype=np.float64) / np.log(2) / 100, rel=1e-5)
    active = h_next[:2, counted] != 0
    assert got["dead_neurons"] == pytest.approx((~active.any(axis=1)).mean(axis=-1).tolist())
    kept = (h_next[:2, counted] ** 2).sum(axis=-1) / (u[:2, counted] ** 2).sum(axis=-1)
    assert got["norm_kept"] == pytest.approx(kept.mean(axis=-1).tolist(), rel=1e-5)
    overlap = (active[1] & active[0]).sum() / active[1].sum()
    assert got["overlap_below"] == pytest.approx([overlap])
