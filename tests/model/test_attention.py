"""Blocked attention against the plain formula and against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import attention_reference

from topklm.config import ModelConfig
from topklm.model import attention
from topklm.model.attention import (
    causal_attention,
    chunks_of_device,
    rotate,
    rotation_angles,
    zigzag_attention,
)
from topklm.parallel import Parallel, all_gather


def make(length, *, heads=4, kv_heads=2, batch=2, width=6, dtype=jnp.float32):
    rng = np.random.default_rng(length)
    q = rng.normal(size=(batch, length, heads, width))
    k, v = rng.normal(size=(2, batch, length, kv_heads, width))
    segments = np.sort(rng.integers(1, 4, (batch, length)), axis=1)
    return [jnp.asarray(x, dtype) for x in (q, k, v)], jnp.asarray(segments, jnp.int32)


def numpy_attention(q, k, v, segments):
    """One query at a time, float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(*q.shape[:3]):
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        scores = k[b, seen, h // group] @ q[b, t, h] / np.sqrt(q.shape[3])
        p = np.exp(scores - scores.max())
        out[b, t, h] = p / p.sum() @ v[b, seen, h // group]
    return out


def test_it_equals_a_loop_in_float64(monkeypatch):
    monkeypatch.setattr(attention, "_QUERY_BLOCK", 4)
    qkv, segments = make(11)
    got = jax.jit(causal_attention)(*qkv, segments)
    np.testing.assert_allclose(got, numpy_attention(*qkv, np.asarray(segments)), atol=2e-6)


def value_and_gradients(function, qkv, segments, g):
    """[out, dq, dk, dv], compiled as one program."""

    def run(q, k, v, g):
        out, pull = jax.vjp(lambda *x: function(*x, segments), q, k, v)
        return [out, *pull(g)]

    return jax.jit(run)(*qkv, g)


def assert_equals_the_plain_formula(length, **shape):
    qkv, segments = make(length, **shape)
    g = np.random.default_rng(1).normal(size=qkv[0].shape).astype(np.float32)
    got = value_and_gradients(causal_attention, qkv, segments, g)
    want = value_and_gradients(attention_reference, qkv, segments, g)
    for ours, plain in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, plain, atol=5e-6)


@pytest.mark.parametrize("length", [1, 5, 8, 19])
@pytest.mark.parametrize(("heads", "kv_heads", "batch"), [(4, 4, 2), (4, 1, 1)])
def test_values_and_gradients_equal_the_plain_formula(monkeypatch, length, heads, kv_heads, batch):
    monkeypatch.setattr(attention, "_QUERY_BLOCK", 8)
    assert_equals_the_plain_formula(length, heads=heads, kv_heads=kv_heads, batch=batch)


def test_the_real_block_size_with_a_rest_too():
    assert_equals_the_plain_formula(attention._QUERY_BLOCK * 2 + 3, batch=1)


def in_zigzag(x, n):
    """The tokens in the order in which n devices hold them: of 2 n chunks, device i has i and 2 n - 1 - i."""
    chunks = np.split(np.asarray(x), 2 * n, axis=1)
    return np.concatenate([chunks[m] for i in range(n) for m in (i, 2 * n - 1 - i)], axis=1)


@pytest.mark.parametrize(("n", "block"), [(2, 5), (3, 128), (4, 128), (8, 2)])
def test_devices_that_share_a_sequence_compute_what_one_does(monkeypatch, n, block):
    monkeypatch.setattr(attention, "_ZIGZAG_BLOCK", block)
    qkv, segments = make(48)
    g = np.random.default_rng(1).normal(size=qkv[0].shape).astype(np.float32)

    def of_device(*parts):
        names = ("q", "k", "v", "segments", "g")
        own = Parallel(context="context").balanced(dict(zip(names, parts, strict=True)))

        def attend(q, k, v):
            keys, values, key_segments = (all_gather(x, "context", dim=1) for x in (k, v, own["segments"]))
            chunks = chunks_of_device("context")
            return zigzag_attention(q, keys, values, own["segments"], key_segments, chunks)

        out, pull = jax.vjp(attend, *(own[name] for name in names[:3]))
        return own["segments"], out, *pull(own["g"])

    # As many "devices" as the mapped axis has places.
    parts = (jnp.stack(jnp.split(jnp.asarray(x), n, axis=1)) for x in (*qkv, segments, g))
    order, *got = jax.jit(jax.vmap(of_device, axis_name="context"))(*parts)
    np.testing.assert_array_equal(np.concatenate([*order], axis=1), in_zigzag(segments, n))
    want = value_and_gradients(attention_reference, qkv, segments, g)
    for ours, plain in zip(got, want, strict=True):
        np.testing.assert_allclose(np.concatenate([*ours], axis=1), in_zigzag(plain, n), atol=5e-6)
    np.testing.assert_allclose(
        np.concatenate([*got[0]], axis=1),
        in_zigzag(numpy_attention(*qkv, np.asarray(segments)), n),
        atol=5e-6,
    )


def test_bfloat16_stays_near_float32():
    qkv, segments = make(20, dtype=jnp.bfloat16)
    g = jnp.asarray(np.random.default_rng(1).normal(size=qkv[0].shape), jnp.bfloat16)
    exact = [x.astype(jnp.float32) for x in qkv]
    got = value_and_gradients(causal_attention, qkv, segments, g)
    want = value_and_gradients(attention_reference, exact, segments, g.astype(jnp.float32))
    for ours, plain in zip(got, want, strict=True):
        assert ours.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(ours, np.float32) - plain)
        assert error < 0.02 * np.linalg.norm(plain)


def test_rotation_is_the_formula_of_the_paper_in_halves():
    positions, width, theta = np.array([[0, 1, 7, 300]]), 6, 10_000.0
    x = np.random.default_rng(0).normal(size=(1, 4, 2, width))
    config = ModelConfig(n_heads=2, head_dim=width, rope_theta=theta)
    got = rotate(jnp.float32(x), rotation_angles(jnp.asarray(positions), config, jnp.float32))
    want = np.zeros_like(x)
    for t, h, i in np.ndindex(4, 2, width // 2):
        angle = positions[0, t] * theta ** (-2 * i / width)
        first, second = x[0, t, h, i], x[0, t, h, i + width // 2]
        want[0, t, h, i] = first * np.cos(angle) - second * np.sin(angle)
        want[0, t, h, i + width // 2] = second * np.cos(angle) + first * np.sin(angle)
    np.testing.assert_allclose(got, want, atol=5e-5)


def test_scores_depend_on_relative_positions_only():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
    config = ModelConfig(head_dim=8, rope_theta=100.0)

    @jax.jit
    def score(query_at, key_at):
        angles = [rotation_angles(jnp.full((1, 1), at), config, jnp.float32) for at in (query_at, key_at)]
        return jnp.sum(rotate(q, angles[0]) * rotate(k, angles[1]))

    assert abs(score(9, 4) - score(105, 100)) < 1e-4
    assert abs(score(9, 4) - score(9, 5)) > 1e-2
