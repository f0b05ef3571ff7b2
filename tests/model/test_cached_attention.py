"""Tokens one by one, against the whole stack at once."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topklm.config import ModelConfig
from topklm.model import transformer
from topklm.model.attention import rotation_angles
from topklm.model.cached_attention import KeysAndValues, attend_to_past, decode_step, keys_and_values
from topklm.model.topk import topk

CONFIG = ModelConfig(
    d_model=24,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    d_mlp=32,
    vocab_size=50,
    topk_k=6,
    n_nontopk=1,
    init_residual_scale=3.0,
)
B, T = 2, 11


@pytest.mark.parametrize(
    ("dtype", "n_nontopk", "qk_norm"),
    [
        ("float32", 1, True),
        pytest.param("float32", 1, False, marks=pytest.mark.slow),
        pytest.param("bfloat16", 3, False, marks=pytest.mark.slow),
    ],
)
def test_a_step_is_what_the_stack_computes_at_that_token(dtype, n_nontopk, qk_norm):
    config = dataclasses.replace(CONFIG, dtype=dtype, n_nontopk=n_nontopk, qk_norm=qk_norm)
    params = jax.jit(transformer.create, static_argnums=(0, 1))(config, 0)
    tokens = jax.random.randint(jax.random.key(0), (B, T), 0, 50)
    places = jnp.asarray([[0, 3, 10], [7, 7, 1]])  # in any order, also twice

    @jax.jit
    def run(params):
        model = transformer.bind(config, params)
        _, (entering, leaving) = model.hidden(tokens, capture=lambda h, u, h_next: (h, h_next))
        block_def, stacked = nnx.split(model.blocks)

        def angles(positions):
            return rotation_angles(positions, config, jnp.dtype(dtype))

        found = []
        for layer in range(config.n_layers):
            block = nnx.merge(block_def, jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked))
            past = keys_and_values(block, entering[layer], angles(jnp.tile(jnp.arange(T), (B, 1))))
            # What stands at a token's own place, or behind it, must not matter.
            hidden = jnp.arange(T)[None, None, :, None] >= places.min(axis=1)[:, None, None, None]
            one = KeysAndValues(*(jnp.where(hidden, 1e3, x) for x in past))
            rows = jnp.arange(B)[:, None]
            h = entering[layer][rows, places]
            seen = jnp.arange(T) < places[..., None]
            a, written, own = decode_step(block, h, angles(places), attend_to_past(past, seen))
            lowest = jnp.argmin(places, axis=1)[:, None]
            _, of_lowest, _ = decode_step(block, h, angles(places), attend_to_past(one, seen))
            if 0 < layer <= config.n_topk_layers:  # its input is sparse
                few, of_few, _ = decode_step(
                    block,
                    h,
                    angles(places),
                    attend_to_past(past, seen),
                    n_active=config.topk_k,
                )
                found.append((few + of_few, a + written, jnp.zeros(1), own, own))
            sparse = layer < config.n_topk_layers
            u = topk(written, config.topk_k, residual=a) if sparse else a + written
            same = jnp.take_along_axis(of_lowest - written, lowest[..., None], axis=1)
            at_places = [jnp.swapaxes(x, 1, 2)[rows, places].swapaxes(1, 2) for x in past]
            found.append((u, leaving[layer][rows, places], same, own, at_places))
        return found

    tolerance = 1e-5 if dtype == "float32" else 0.1
    for got, want, same, own, past in run(params):
        np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=tolerance)
        np.testing.assert_array_equal(same, 0)
        for mine, kept in zip(own, past, strict=True):
            np.testing.assert_allclose(mine.astype(jnp.float32), kept.astype(jnp.float32), atol=tolerance)
