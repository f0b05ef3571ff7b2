"""Checks the TopK kernels on a GPU: every exact backend must give the bits of "lax", over many shapes.

python -m benchmarks.gpu_check

Speed is measured by `topklm bench topk --peer=torch`, which has the size of the goal on GPUs.
"""

from collections.abc import Iterator
import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.topk_and_norm import select_and_norm
from topklm import errors
from topklm.config import TOPK_ACTIVATIONS
from topklm.model.topk import topk

EPSILON = 1e-6
CHECKED_D = (1, 5, 128, 130, 1000, 2048, 4096, 5000, 16_384)
CHECKED_ROWS = (1, 37, 1000)
DTYPES = ("bfloat16", "float32", "float16")


def run() -> None:
    """Checks, and prints how much was compared.

    Raises:
        UserError: If JAX sees no GPU.
    """
    if jax.default_backend() != "gpu":
        raise errors.UserError(
            f"benchmarks.gpu_check: JAX runs on {jax.default_backend()} here; run it where there is a GPU, "
            'after pip install "topklm[cuda]"'
        )
    print(f"{check()} comparisons with lax.top_k, all bits the same")


def check() -> int:
    """Compares every backend with "lax", bit for bit; returns the number of comparisons.

    Raises:
        AssertionError: At the first one that differs.
    """
    n_checked = 0
    for dtype, d, n_rows in itertools.product(DTYPES, CHECKED_D, CHECKED_ROWS):
        x, residual = (jnp.asarray(_rows(n_rows, d, dtype, seed)) for seed in (0, 1))
        for k, activation in itertools.product(sorted({1, max(1, d // 16), max(1, d - 1)}), TOPK_ACTIVATIONS):
            for name, same in _comparisons(x, residual, k, activation):
                assert same, f"{name} differs: {dtype}[{n_rows}, {d}], k = {k}, {activation}"
                n_checked += 1
    return n_checked


def _rows(n_rows: int, d: int, dtype: str, seed: int) -> np.ndarray:
    """Draws normal rows, rows full of ties and of special values, in turns; a NaN in some."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n_rows, d))
    x[1::4] = rng.choice([0.0, -0.0, 0.5, 1.0, -1.0], x[1::4].shape)
    x[2::4] = rng.choice([0.0, -0.0, 1e-40, -1e-40, np.inf, -3.0], x[2::4].shape)
    x[3::8, d // 2] = np.nan
    return x.astype(jnp.dtype(dtype))


def _comparisons(
    x: jax.Array, residual: jax.Array, k: int, activation: str
) -> Iterator[tuple[str, jax.Array]]:
    want = _compiled_topk(x, k, activation, "lax")
    for backend in ("threshold", "pallas_gpu", "auto"):
        yield backend, _same_bits(_compiled_topk(x, k, activation, backend), want)
    # Sums of infinities aside: the NaN they give has other bits on other ways through the compiler.
    finite = jnp.nan_to_num(x, posinf=3.0), jnp.nan_to_num(residual, posinf=3.0)
    want = _compiled_topk(finite[0], k, activation, "lax", finite[1])
    got = _compiled_topk(finite[0], k, activation, "pallas_gpu", finite[1])
    yield "pallas_gpu with a residual", _same_bits(got, want)
    scale = jnp.ones(x.shape[-1], jnp.float32)
    got, normed, _, _ = _compiled_fused(finite[0], k, activation, scale, finite[1])
    yield "TopK with a norm", _same_bits(got, want)
    close = jnp.allclose(normed.astype(jnp.float32), _norm(want).astype(jnp.float32), rtol=1e-2, atol=1e-6)
    yield "the norm after TopK", close


_compiled_topk = jax.jit(topk, static_argnums=(1, 2, 3))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _compiled_fused(x: jax.Array, k: int, activation: str, scale_D: jax.Array, residual: jax.Array) -> tuple:
    return select_and_norm(x, k, activation, "gpu", scale_D, EPSILON, residual=residual)


@jax.jit
def _same_bits(got: jax.Array, want: jax.Array) -> jax.Array:
    integer = jnp.uint32 if want.dtype.itemsize == 4 else jnp.uint16
    bits = [jax.lax.bitcast_convert_type(y, integer) for y in (got, want)]
    return jnp.all((bits[0] == bits[1]) | (jnp.isnan(got) & jnp.isnan(want)))


def _norm(y: jax.Array) -> jax.Array:
    y32 = y.astype(jnp.float32)
    return (y32 * jax.lax.rsqrt(jnp.mean(y32 * y32, axis=-1, keepdims=True) + EPSILON)).astype(y.dtype)


if __name__ == "__main__":
    sys.exit(errors.guarded(run))
