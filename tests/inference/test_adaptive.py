"""More neurons at uncertain tokens, against whole passes with a k of each token's own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from plain_loop import CONFIG, params_of
import pytest

from benchmarks.adaptive_losses import token_losses
from topklm.inference.adaptive import AdaptiveK, entropy, with_topk_k
from topklm.inference.scheduler import Generation
from topklm.inference.sequence import Sampling
from topklm.model import transformer
from topklm.model.block import LayerHooks
from topklm.model.topk import topk

T = 21  # more than a buffer
HIGH = 17
RULE = AdaptiveK(HIGH, 1.4)


@functools.partial(jax.jit, static_argnums=0)
def _logits_with(config, params, tokens_BT, is_high_BT):
    """Of whole texts, each token with one of two k."""

    def select(u, _):
        return jnp.where(is_high_BT[..., None], topk(u, HIGH), topk(u, CONFIG.topk_k))

    model = transformer.bind(config, params)
    return model.logits(model.hidden(tokens_BT, hooks=LayerHooks(topk=select))[0])


def logits_with(config, tokens_BT, is_high_BT):
    return _logits_with(config, params_of(config), tokens_BT, is_high_BT)


def decided(tokens_BT, begin=0):
    """Token by token from `begin`: which ones are uncertain, and the logits behind each."""
    is_high = np.zeros(tokens_BT.shape, bool)
    found = []
    for t in range(begin, tokens_BT.shape[1]):
        log_p = np.asarray(jax.nn.log_softmax(logits_with(CONFIG, tokens_BT, is_high)[:, t]), np.float64)
        is_high[:, t] = -(np.exp(log_p) * log_p).sum(axis=-1) > RULE.entropy
        found.append(np.asarray(logits_with(CONFIG, tokens_BT, is_high)[:, t]))
    return is_high, np.stack(found, axis=1)


@pytest.mark.parametrize("layer_stack", ["unrolled", pytest.param("scanned", marks=pytest.mark.slow)])
def test_losses_and_k_are_those_of_whole_passes(layer_stack):
    config = dataclasses.replace(CONFIG, layer_stack=layer_stack)
    tokens = np.random.default_rng(0).integers(0, 50, (3, T))
    is_high, logits = decided(tokens)
    assert 0.2 < is_high.mean() < 0.8
    found = token_losses(config, params_of(config), tokens, RULE)
    np.testing.assert_array_equal(found.k, np.where(is_high, HIGH, CONFIG.topk_k)[:, :-1])
    log_p = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    want = -np.take_along_axis(np.asarray(log_p), tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(found.losses, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("threshold", "k"), [(0.0, HIGH), (float("inf"), CONFIG.topk_k)])
@pytest.mark.slow
def test_at_its_ends_the_rule_is_a_k_for_all_tokens(threshold, k):
    tokens = np.random.default_rng(1).integers(0, 50, (3, T))
    found = token_losses(CONFIG, params_of(CONFIG), tokens, AdaptiveK(HIGH, threshold))
    assert (np.asarray(found.k) == k).all()
    logits = transformer.bind(with_topk_k(CONFIG, k), params_of(CONFIG))(tokens)
    log_p = np.asarray(jax.nn.log_softmax(logits, axis=-1))[:, :-1]
    want = -np.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(found.losses, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_text_is_made_by_the_same_rule_behind_a_prompt_with_the_models_k():
    prompts = [[3, 14, 15], [9, 2, 6]]
    generation = Generation(
        CONFIG,
        params_of(CONFIG),
        prompts,
        [Sampling(temperature=0)] * 2,
        max_new_tokens=[17, 17],
        stop_token=-1,
        adaptive=RULE,
    )
    while not generation.done:
        generation.advance(5)
    texts = np.array(generation.texts)
    is_high, logits = decided(texts, begin=3)
    assert 0 < is_high.sum() < is_high[:, 3:].size
    np.testing.assert_array_equal(logits.argmax(axis=-1)[:, :-1], texts[:, 4:])
    plain = np.asarray(logits_with(CONFIG, texts, np.zeros(texts.shape, bool)))
    np.testing.assert_array_equal(plain[:, 2].argmax(axis=-1), texts[:, 3])


def test_the_entropy_of_equal_logits_is_the_logarithm_of_their_number():
    np.testing.assert_allclose(entropy(jnp.zeros((2, 50))), np.log(50), rtol=1e-6)
    certain = jnp.where(jnp.arange(50) == 7, 0.0, -1e9)[None]
    np.testing.assert_allclose(entropy(certain), 0, atol=1e-6)


BASE = dataclasses.replace(CONFIG, n_nontopk=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_topk_k(CONFIG, 0), "topk_k = 0: must be an integer from 1 to 24, d_model"),
        (lambda: with_topk_k(CONFIG, 25), "topk_k = 25: must be"),
        (lambda: with_topk_k(CONFIG, 2.0), r"topk_k = 2\.0: must be"),
        (lambda: with_topk_k(BASE, 3), "topk_k = 3: the model has no layer with TopK"),
        (lambda: AdaptiveK(5, 1.0).check(CONFIG), "adaptive.high_k = 5: must be at least 6"),
        (lambda: AdaptiveK(99, 1.0).check(CONFIG), "adaptive.high_k = 99: must be an integer from 1 to 24"),
        (lambda: AdaptiveK(9, float("nan")).check(CONFIG), "adaptive.entropy = nan: must be a number"),
        (lambda: AdaptiveK(9, -1.0).check(CONFIG), r"adaptive.entropy = -1\.0: must be a number"),
        (lambda: token_losses(CONFIG, None, [[1]], RULE), r"tokens has shape \(1, 1\): must be \[B, T\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
