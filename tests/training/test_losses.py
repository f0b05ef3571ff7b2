"""Chunked cross-entropy against the plain one, and that it keeps its promise about memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topklm.training import losses
from topklm.training.losses import cross_entropy, cross_entropy_reference, token_losses


def make(batch, length, d, vocab, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    h = jax.random.normal(keys[0], (batch, length, d), dtype)
    w = jax.random.normal(keys[1], (d, vocab)) * 0.3
    targets = jax.random.randint(keys[2], (batch, length), 0, vocab)
    weights = jax.random.bernoulli(keys[3], 0.7, (batch, length)).astype(jnp.float32)
    return h, w, targets, weights / jnp.maximum(weights.sum(), 1)


SHAPES = {
    "several chunks": (3, 40, 8, 31),
    "prime length": (2, 37, 8, 31),
    "one token": (1, 1, 8, 31),
    "GPT-2's vocabulary": (2, 5, 4, 50_257),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_values_and_gradients_equal_the_plain_formula(monkeypatch, shape, z_loss):
    monkeypatch.setattr(losses, "_MIN_TOKENS_PER_CHUNK", 8)
    monkeypatch.setattr(losses, "_LOGITS_PER_CHUNK", 1)
    h, w, targets, weights = make(*shape)

    def run(function):
        return jax.value_and_grad(
            lambda h, w: function(h, w, targets, weights, z_loss), argnums=(0, 1), has_aux=True
        )(h, w)

    (loss, nll), grads = run(cross_entropy)
    (want_loss, want_nll), want_grads = run(cross_entropy_reference)
    np.testing.assert_allclose([loss, nll], [want_loss, want_nll], rtol=1e-6)
    np.testing.assert_allclose(cross_entropy(h, w, targets, weights, z_loss), [loss, nll], rtol=1e-6)
    for got, want in zip(grads, want_grads, strict=True):
        assert np.linalg.norm(got - want) < 1e-6 * np.linalg.norm(want) + 1e-12


def test_it_equals_torch():
    torch = pytest.importorskip("torch")
    h, w, targets, _ = make(2, 9, 8, 31)
    weights = jnp.full((2, 9), 1 / 18)
    logits = torch.tensor(np.asarray(h)) @ torch.tensor(np.asarray(w))
    want = torch.nn.functional.cross_entropy(
        logits.reshape(18, 31), torch.tensor(np.asarray(targets)).reshape(18).long()
    )
    assert float(cross_entropy(h, w, targets, weights, 0.0)[0]) == pytest.approx(want.item(), rel=1e-6)


def test_bfloat16_stays_near_float32():
    h, w, targets, weights = make(3, 40, 8, 31, jnp.bfloat16)

    def gradient(h):
        return jax.grad(lambda h: cross_entropy(h, w, targets, weights, 0.0)[0])(h)

    exact = gradient(h.astype(jnp.float32))
    assert gradient(h).dtype == jnp.bfloat16
    assert np.linalg.norm(gradient(h) - exact) < 0.02 * np.linalg.norm(exact)


def test_token_losses_are_the_terms_of_the_sum():
    h, w, targets, weights = make(3, 37, 8, 31)
    total = jnp.sum(token_losses(h, w, targets) * weights)
    assert float(total) == pytest.approx(float(cross_entropy(h, w, targets, weights, 0.0)[1]), rel=1e-6)


def largest_array(jaxpr):
    """Elements of the largest intermediate, inner programs included."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [var.aval.size for var in equation.outvars]
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                sizes.append(largest_array(value.jaxpr))
            elif hasattr(value, "eqns"):
                sizes.append(largest_array(value))
    return max(sizes)


def test_all_logits_are_never_held_at_once():
    h, w, targets, weights = make(4, 1024, 8, 997)
    all_logits = 4 * 1024 * 997

    def largest(function):
        gradient = jax.grad(lambda h, w: function(h, w, targets, weights, 1e-4)[0], argnums=(0, 1))
        return largest_array(jax.make_jaxpr(gradient)(h, w).jaxpr)

    assert largest(cross_entropy_reference) >= all_logits
    assert largest(cross_entropy) <= all_logits / 2
