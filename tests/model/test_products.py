"""Products of bfloat16 are rounded once, whatever their shape and however their operands lie in memory."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from topklm.model.layers import product, transposed

SHAPES = [((5, 7), (7, 3)), ((1, 1), (1, 1)), ((2, 3, 33, 64), (2, 3, 64, 17)), ((300, 256), (256, 129))]


def random(shape, dtype, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("a_shape", "b_shape"), SHAPES)
def test_a_product_is_the_float64_one_rounded(a_shape, b_shape, dtype):
    a, b = random(a_shape, dtype, 0), random(b_shape, dtype, 1)
    got = jax.jit(product)(a, b)
    want = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    assert got.dtype == a.dtype
    ulp = 2.0**-8 if dtype == "bfloat16" else 2.0**-22
    scale = np.abs(np.asarray(a, np.float64)) @ np.abs(np.asarray(b, np.float64))
    assert np.max(np.abs(np.asarray(got, np.float64) - want) - ulp * np.abs(want) - 1e-5 * scale) <= 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (2, 3, 33, 64)])
def test_a_transpose_for_a_product_has_the_values_of_any_other(shape, dtype):
    x = random(shape, dtype, 2)
    np.testing.assert_array_equal(jax.jit(transposed)(x), np.swapaxes(np.asarray(x), -1, -2))


def test_other_platforms_are_given_the_plain_product():
    def program(a, b):
        return product(transposed(a), b)

    shapes = [jax.ShapeDtypeStruct((8, 4), jnp.bfloat16), jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)]
    for platform in ("tpu", "cuda"):
        text = jax.export.export(jax.jit(program), platforms=[platform])(*shapes).mlir_module()
        assert "xf32>" not in text
        assert "LayoutConstraint" not in text
