"""The TopK kernels on a GPU: first that they are right, then how close they come to a copy of the same bytes.

python -m benchmarks.gpu_check

Every exact backend must give the bits of "lax" over many shapes, or nothing is timed. The sides of a
comparison take turns; `torch.topk` is among them where PyTorch sees the GPU too.
"""

from collections.abc import Callable, Iterator
import functools
import importlib.util
import itertools
import json
import os
from pathlib import Path
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topklm import errors
from topklm.bench import machine, timing
from topklm.config import TOPK_ACTIVATIONS
from topklm.model import topk_pallas
from topklm.model.topk import topk
from topklm.storage.files import write_atomically

RESULT = Path(__file__).parent / "results" / "gpu_topk.json"
REPEATS = 7
SECONDS_A_SAMPLE = 0.05
EPSILON = 1e-6
CHECKED_D = (1, 5, 128, 130, 1000, 2048, 4096, 5000, 16_384)
CHECKED_ROWS = (1, 37, 1000)
DTYPES = ("bfloat16", "float32", "float16")
# Rows, D, k, dtype: the size of the goal, then those of the table for CPUs.
TIMED = (
    (65_536, 2048, 128, "bfloat16"),
    (65_536, 2048, 128, "float32"),
    (4096, 256, 32, "float32"),
    (4096, 1024, 128, "float32"),
    (4096, 2048, 64, "float32"),
    (4096, 4096, 128, "float32"),
)
# Of the first size.
GOALS = {"share of copy": 0.7, "speedup over lax.top_k": 10, "speedup over torch.topk": 5}


def run() -> None:
    """Writes benchmarks/results/gpu_topk.json.

    Raises:
        UserError: If JAX sees no GPU.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory, too
    if jax.default_backend() != "gpu":
        raise errors.UserError(
            f"benchmarks.gpu_check: JAX runs on {jax.default_backend()} here; run it where there is a GPU, "
            'after pip install "topklm[cuda]"'
        )
    n_checked = check()
    print(f"{n_checked} comparisons with lax.top_k, all bits the same", flush=True)
    sizes = []
    for size in TIMED:
        sizes.append(measure(*size))
        print(json.dumps(sizes[-1]), flush=True)
    result = {"machine": machine.describe(), "comparisons": n_checked, "goals": GOALS, "sizes": sizes}
    write_atomically(RESULT, (json.dumps(result, indent=1) + "\n").encode())


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
    """Normal rows, rows full of ties and of special values, in turns; a NaN in some."""
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
    return topk_pallas.select_and_norm(x, k, activation, "gpu", scale_D, EPSILON, residual=residual)


@jax.jit
def _same_bits(got: jax.Array, want: jax.Array) -> jax.Array:
    integer = jnp.uint32 if want.dtype.itemsize == 4 else jnp.uint16
    bits = [jax.lax.bitcast_convert_type(y, integer) for y in (got, want)]
    return jnp.all((bits[0] == bits[1]) | (jnp.isnan(got) & jnp.isnan(want)))


def _norm(y: jax.Array) -> jax.Array:
    y32 = y.astype(jnp.float32)
    return (y32 * jax.lax.rsqrt(jnp.mean(y32 * y32, axis=-1, keepdims=True) + EPSILON)).astype(y.dtype)


def measure(n_rows: int, d: int, k: int, dtype: str) -> dict[str, Any]:
    """Times everything at one size: seconds of each side, and the kernel against a copy and the others."""
    rng = np.random.default_rng(0)
    # A sample of the rows, repeated: drawing all of them takes longer than the measurement.
    rows = rng.normal(size=(min(n_rows, 4096), d)).astype(jnp.dtype(dtype))
    x = jnp.asarray(np.tile(rows, (n_rows // len(rows), 1)))
    residual, scale = x[::-1] * 0.5, jnp.ones(d, jnp.float32)
    plain, fused = _forward_sides(x, residual, scale, k)
    sides = {
        name: _jax_side(function, *arguments) for name, (function, *arguments) in {**plain, **fused}.items()
    }
    if _torch_sees_the_gpu():
        sides["torch.topk and scatter"] = _torch_side(rows, n_rows // len(rows), k)
    samples = timing.alternate(sides, REPEATS, at_least=SECONDS_A_SAMPLE, label=f"{dtype} {n_rows} x {d}")
    copy, kernel = samples["copy"].median, samples["pallas_gpu"].median
    return {
        "rows": n_rows,
        "d": d,
        "k": k,
        "dtype": dtype,
        "copy_bytes_per_second": 2 * x.nbytes / copy,
        "kernel_share_of_copy": copy / kernel,
        "kernel_speedup_over": {name: each.median / kernel for name, each in samples.items()},
        "median_seconds": {name: each.median for name, each in samples.items()},
        "seconds": {name: each.seconds for name, each in samples.items()},
    }


def _forward_sides(x: jax.Array, residual: jax.Array, scale: jax.Array, k: int) -> tuple[dict, dict]:
    def of(backend: str) -> Callable[[jax.Array], jax.Array]:
        return lambda x: topk(x, k, "relu", backend)

    def backward(backend: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return lambda x, g: jax.vjp(of(backend), x)[1](g)[0]

    def unfused(x: jax.Array, residual: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = topk(x + residual, k, "relu", "pallas_gpu")
        return y, _norm(y)

    def one_kernel(x: jax.Array, residual: jax.Array) -> tuple[jax.Array, jax.Array]:
        return topk_pallas.select_and_norm(x, k, "relu", "gpu", scale, EPSILON, residual=residual)[:2]

    plain = {
        "copy": (jnp.negative, x),
        "pallas_gpu": (of("pallas_gpu"), x),
        "threshold": (of("threshold"), x),
        "lax.top_k and scatter": (of("lax"), x),
    }
    fused = {
        "pallas_gpu, forward and backward": (backward("pallas_gpu"), x, residual),
        "lax, forward and backward": (backward("lax"), x, residual),
        "residual, pallas_gpu, norm in one kernel": (one_kernel, x, residual),
        "residual, pallas_gpu, norm apart": (unfused, x, residual),
    }
    return plain, fused


def _jax_side(function: Callable, *arguments: jax.Array) -> timing.Side:
    compiled = jax.jit(function)

    def side(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):  # queued one behind the other: the launches hide behind the work
            out = compiled(*arguments)
        jax.block_until_ready(out)
        return time.perf_counter() - began

    return side


def _torch_sees_the_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch  # noqa: PLC0415 (optional)

    return torch.cuda.is_available()


def _torch_side(rows: np.ndarray, repeats: int, k: int) -> timing.Side:
    import torch  # noqa: PLC0415 (optional)

    dtype = getattr(torch, rows.dtype.name)
    x = torch.from_numpy(rows.astype(np.float32)).to("cuda", dtype).repeat(repeats, 1)

    def side(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            values, index = torch.topk(x, k, dim=-1, sorted=False)
            torch.zeros_like(x).scatter_(-1, index, values.relu())
        torch.cuda.synchronize()
        return time.perf_counter() - began

    return side


if __name__ == "__main__":
    sys.exit(errors.guarded(run))
