"""Chunked cross-entropy against the plain one, and that it keeps its promise about memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import cross_entropy_reference

from topklm.model import losses
from topklm.model.losses import bag_cross_entropy, cross_entropy, token_losses


def make(batch, length, d, vocab, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    h = jnp.asarray(rng.normal(size=(batch, length, d)), dtype)
    w = jnp.asarray(rng.normal(size=(d, vocab), scale=0.3), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (batch, length)), jnp.int32)
    weights = (rng.random((batch, length)) < 0.7).astype(np.float32)
    return h, w, targets, jnp.asarray(weights / max(weights.sum(), 1))


def value_and_gradients(function, h, w, targets, weights, z_loss):
    """((loss, nll), (dh, dw)), compiled as one program."""
    gradient = jax.value_and_grad(
        lambda h, w: function(h, w, targets, weights, z_loss), argnums=(0, 1), has_aux=True
    )
    return jax.jit(gradient)(h, w)


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
    made = make(*shape)
    (loss, nll), grads = value_and_gradients(cross_entropy, *made, z_loss)
    (want_loss, want_nll), want_grads = value_and_gradients(cross_entropy_reference, *made, z_loss)
    np.testing.assert_allclose([loss, nll], [want_loss, want_nll], rtol=1e-6)
    without_gradient = jax.jit(cross_entropy, static_argnums=4)(*made, z_loss)
    np.testing.assert_allclose(without_gradient, [loss, nll], rtol=1e-6)
    for got, want in zip(grads, want_grads, strict=True):
        assert np.linalg.norm(got - want) < 1e-6 * np.linalg.norm(want) + 1e-12


def test_the_loss_of_a_bag_equals_numpy_and_its_gradient_that_of_the_plain_formula(monkeypatch):
    monkeypatch.setattr(losses, "_MIN_TOKENS_PER_CHUNK", 8)
    monkeypatch.setattr(losses, "_LOGITS_PER_CHUNK", 1)
    h, w, _, weights = make(3, 37, 8, 31)
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 9, 31)
    counts[:3] = 0, 5, 1
    bags = rng.choice(np.flatnonzero(counts), (3, 37, 6))  # with tokens that come twice
    bags[0, 0] = bags[0, 0, 0]
    inside = rng.random(bags.shape) < 0.6
    inside[0, 0] = True
    shares = inside / np.maximum(inside.sum(-1, keepdims=True), 1)
    log_counts = np.where(counts > 0, np.log(np.maximum(counts, 1)), -1e9)

    logits = np.asarray(h, np.float64) @ np.asarray(w, np.float64) + log_counts
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = 0.0
    for row, at in np.ndindex(3, 37):
        for token, share in zip(bags[row, at], shares[row, at], strict=True):
            want -= float(weights[row, at]) * share * log_p[row, at, token]
    weights = jnp.where(inside.any(-1), weights, 0.0)  # a position without a bag adds nothing

    def plain(h, w):
        log_p = jax.nn.log_softmax(h @ w + log_counts.astype(np.float32))
        return -jnp.sum(weights[..., None] * shares * jnp.take_along_axis(log_p, jnp.asarray(bags), -1))

    def ours(h, w):
        given = jnp.asarray(bags, jnp.int32), jnp.asarray(shares, jnp.float32), weights
        return bag_cross_entropy(h, w, *given, jnp.asarray(log_counts, jnp.float32))

    loss, grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(h, w)
    assert float(loss) == pytest.approx(want, rel=1e-5)
    for got, of_plain in zip(grads, jax.grad(plain, argnums=(0, 1))(h, w), strict=True):
        assert np.linalg.norm(got - of_plain) < 2e-6 * np.linalg.norm(of_plain)


def test_it_equals_torch():
    torch = pytest.importorskip("torch")
    h, w, targets, _ = make(2, 9, 8, 31)
    (loss, _), grads = value_and_gradients(cross_entropy, h, w, targets, jnp.full((2, 9), 1 / 18), 0.0)
    in_torch = [torch.tensor(np.asarray(x), requires_grad=True) for x in (h, w)]
    want = torch.nn.functional.cross_entropy(
        (in_torch[0] @ in_torch[1]).reshape(18, 31), torch.tensor(np.asarray(targets)).reshape(18).long()
    )
    want.backward()
    assert float(loss) == pytest.approx(want.item(), rel=1e-6)
    for got, tensor in zip(grads, in_torch, strict=True):
        np.testing.assert_allclose(got, tensor.grad.numpy(), atol=1e-7)


def test_bfloat16_stays_near_float32():
    h, w, targets, weights = make(3, 40, 8, 31, jnp.bfloat16)
    exact_h, exact_w = h.astype(jnp.float32), w.astype(jnp.bfloat16).astype(jnp.float32)
    _, (dh, dw) = value_and_gradients(cross_entropy, h, w, targets, weights, 0.0)
    _, exact = value_and_gradients(cross_entropy_reference, exact_h, exact_w, targets, weights, 0.0)
    assert (dh.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
    for got, want in zip((dh, dw), exact, strict=True):
        assert np.linalg.norm(np.asarray(got, np.float32) - want) < 0.02 * np.linalg.norm(want)


def test_only_the_first_sum_carries_gradient_and_it_scales_with_what_comes_back():
    h, w, targets, weights = make(2, 9, 8, 31)
    _, pull = jax.vjp(lambda h, w: cross_entropy(h, w, targets, weights, 1e-2), h, w)
    back = [(1, 0), (3, 0), (0, 1)]
    once, thrice, from_nll = [pull((jnp.float32(loss), jnp.float32(nll))) for loss, nll in back]
    for a, b, c in zip(once, thrice, from_nll, strict=True):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(b, 3 * a, rtol=1e-6)
        np.testing.assert_array_equal(c, 0 * a)


def test_tokens_of_weight_zero_leave_no_trace():
    h, w, targets, weights = make(2, 9, 8, 31)
    weights = weights.at[1].set(0.0)
    (loss, _), (dh, dw) = value_and_gradients(cross_entropy, h, w, targets, weights, 0.0)
    only_first = value_and_gradients(cross_entropy, h[:1], w, targets[:1], weights[:1], 0.0)
    assert float(loss) == pytest.approx(float(only_first[0][0]), rel=1e-6)
    assert (np.asarray(dh[1]) == 0).all()
    np.testing.assert_allclose(dw, only_first[1][1], atol=1e-7)


def test_token_losses_are_the_terms_of_the_sum():
    h, w, targets, weights = make(3, 37, 8, 31)
    each = jax.jit(token_losses)(h, w, targets)
    _, nll = jax.jit(cross_entropy, static_argnums=4)(h, w, targets, weights, 0.0)
    assert np.sum(np.asarray(each) * weights) == pytest.approx(float(nll), rel=1e-6)


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
