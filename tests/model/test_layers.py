"""The parts of a block, values and hand-written gradients."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topklm.model import layers
from topklm.model.layers import RMSNorm, SwiGLU, gated_silu, matmul, swiglu


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def value_and_gradients(function, arguments, g):
    def run(*arguments):
        out, pull = jax.vjp(function, *arguments)
        return [out, *pull(g)]

    return jax.jit(run)(*arguments)


@pytest.mark.parametrize(
    ("ours", "plain", "arguments"),
    [
        (matmul, jnp.matmul, (normal(5, 7), normal(7, 3, seed=1))),
        (gated_silu, lambda g, u: jax.nn.silu(g) * u, (3 * normal(5, 7), normal(5, 7, seed=1))),
    ],
    ids=["matmul", "gated_silu"],
)
def test_values_and_gradients_equal_automatic_differentiation(ours, plain, arguments):
    g = normal(*jax.eval_shape(plain, *arguments).shape, seed=2)
    got = value_and_gradients(ours, arguments, g)
    want = value_and_gradients(plain, arguments, g)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_tokens", [1, 7, 8, 30])  # one chunk, one of a prime number, two, six
def test_gradients_of_an_mlp_do_not_depend_on_chunks(monkeypatch, n_tokens):
    monkeypatch.setattr(layers, "_TOKENS_PER_CHUNK", 4)
    jax.clear_caches()  # the backward pass is compiled for itself
    weights = normal(5, 6, seed=1), normal(5, 6, seed=2), normal(6, 5, seed=3)
    arguments, g = (normal(n_tokens, 5), *weights), normal(n_tokens, 5, seed=4)

    def plain(x, gate, up, down):
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down

    with jax.enable_x64(True):
        want = value_and_gradients(plain, [np.float64(x) for x in arguments], np.float64(g))
    for a, b in zip(value_and_gradients(swiglu, arguments, g), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_rms_norm_is_the_formula():
    norm = RMSNorm(6, epsilon=1e-3)
    norm.scale[...] = jnp.arange(1.0, 7.0)
    x = np.random.default_rng(0).normal(size=(4, 6))
    want = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-3) * np.arange(1, 7)
    np.testing.assert_allclose(norm(jnp.float32(x)), want, rtol=1e-5)


def test_rms_norm_leaves_zeros_zero_and_keeps_the_dtype():
    x = jnp.array([[0.0, 3.0, 0.0, -1.0], [0.0] * 4], jnp.bfloat16)
    y = RMSNorm(4, epsilon=1e-5)(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y == 0, x == 0)


def test_swiglu_is_the_formula():
    layer = SwiGLU(4, 6, down_std=0.5, rngs=nnx.Rngs(params=0))
    x = np.asarray(normal(3, 4), np.float64)
    gate, up, down = (np.asarray(m.kernel[...], np.float64) for m in (layer.gate, layer.up, layer.down))
    want = (x @ gate / (1 + np.exp(-x @ gate)) * (x @ up)) @ down
    np.testing.assert_allclose(layer(jnp.float32(x)), want, rtol=1e-4, atol=1e-6)
