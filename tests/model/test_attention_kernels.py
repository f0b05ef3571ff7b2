"""The kernels of accelerators, interpreted on the CPU, against the plain formula; and which one is chosen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import attention_reference

from topklm.config import ModelConfig
from topklm.errors import UserError
from topklm.model import attention, backends

KERNELS = {
    "splash": functools.partial(attention.splash, interpret=True),
    "triton": functools.partial(attention.triton, interpret=True),
    "cudnn": functools.partial(attention.cudnn, implementation="xla"),
}


def documents(length):
    """Ids with gaps, as of empty documents, the longest across the edges of blocks; 0 for padding behind."""
    ends = sorted([1, 3, 4, length * 3 // 4, length - 2])
    return np.digitize(np.arange(length), ends).astype(np.int32) * 2 % 10


def make(length, *, heads, kv_heads, batch, dtype=jnp.float32, width=16):
    """Arrays [B, T, H, d], and the documents of each row; those of a second row are of one token each."""
    rng = np.random.default_rng(length)
    q, g = rng.normal(size=(2, batch, length, heads, width))
    k, v = rng.normal(size=(2, batch, length, kv_heads, width))
    segments = np.stack([documents(length), np.arange(length, dtype=np.int32)][:batch])
    return [jnp.asarray(x, dtype) for x in (q, k, v, g)], jnp.asarray(segments)


def value_and_gradients(attend, arrays, segments):
    """[out, dq, dk, dv], compiled as one program."""

    def run(q, k, v, g):
        out, pull = jax.vjp(lambda *x: attend(*x, segments), q, k, v)
        return [out, *pull(g)]

    return jax.jit(run)(*arrays)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("length", "heads", "kv_heads", "batch"), [(1, 1, 1, 1), (300, 4, 2, 2)])
def test_values_and_gradients_equal_the_plain_formula(name, length, heads, kv_heads, batch):
    arrays, segments = make(length, heads=heads, kv_heads=kv_heads, batch=batch)
    got = value_and_gradients(KERNELS[name], arrays, segments)
    want = value_and_gradients(attention_reference, arrays, segments)
    for ours, plain in zip(got, want, strict=True):
        assert ours.dtype == plain.dtype
        np.testing.assert_allclose(ours, plain, atol=5e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_bfloat16_stays_near_float32(name):
    arrays, segments = make(140, heads=2, kv_heads=1, batch=1, dtype=jnp.bfloat16)
    got = value_and_gradients(KERNELS[name], arrays, segments)
    want = value_and_gradients(attention_reference, [x.astype(jnp.float32) for x in arrays], segments)
    for ours, plain in zip(got, want, strict=True):
        assert ours.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(ours, np.float32) - plain)
        assert error < 0.02 * np.linalg.norm(plain)


@pytest.mark.parametrize(("name", "platform"), [("splash", "tpu"), ("triton", "cuda")])
def test_it_can_be_lowered_for_its_platform(name, platform):
    attend = getattr(attention, name)
    arrays, segments = make(640, heads=4, kv_heads=2, batch=1, dtype=jnp.bfloat16, width=128)

    def run(q, k, v, g):
        return jax.vjp(lambda *x: attend(*x, segments), q, k, v)[1](g)

    text = jax.jit(run).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
    kernel = {"tpu": "@tpu_custom_call", "cuda": "@__gpu$xla.gpu.triton"}[platform]
    assert text.count(kernel) == 3  # forward; backward in two parts
    assert "640x640" not in text


def choose(config, platform):
    return backends.ATTENTION.choose(config.attention, platform, config.dtype, config).name


@pytest.mark.parametrize(
    ("platform", "dtype", "name"),
    [
        ("cpu", "float32", "blocked"),
        ("cpu", "bfloat16", "blocked"),
        ("tpu", "float32", "splash"),
        ("tpu", "bfloat16", "splash"),
        ("gpu", "float32", "blocked"),
        ("gpu", "bfloat16", "triton"),
    ],
)
def test_the_devices_decide(platform, dtype, name):
    assert choose(ModelConfig(dtype=dtype), platform) == name


def test_what_is_asked_for_is_used():
    config = ModelConfig(dtype="bfloat16", attention="cudnn")
    assert choose(config, "gpu") == "cudnn"
    assert choose(dataclasses.replace(config, attention="blocked"), "tpu") == "blocked"


@pytest.mark.parametrize(
    ("changes", "platform", "message"),
    [
        ({"attention": "splash"}, "cpu", "'splash': runs on TPUs only, and these devices are CPUs: use auto"),
        ({"attention": "triton"}, "tpu", "'triton': runs on GPUs only"),
        ({"attention": "cudnn"}, "gpu", r"needs model\.dtype bfloat16 \(now float32\)"),
        ({"attention": "cudnn", "dtype": "bfloat16", "context_length": 255}, "gpu", r"\(now 255\)"),
        ({"attention": "cudnn", "dtype": "bfloat16", "n_heads": 1}, "gpu", r"at most 128 \(now 256\)"),
    ],
)
def test_what_cannot_run_is_refused(changes, platform, message):
    with pytest.raises(UserError, match=message):
        choose(ModelConfig(**changes), platform)
