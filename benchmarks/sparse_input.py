"""From which D / k on it pays to read only k rows of a matrix after a TopK layer, instead of a plain product.

python -m benchmarks.sparse_input

Forward: `x @ w` of rows with k entries of D, beside `layers.sparse_matmul`, which gathers k rows of w for
each token. Gradient of w: `x.T @ g` beside a scatter of k rows for each token. The places of the entries are
given, which favours the sparse side: a step would have to find them first. In turns, on this platform.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import results, timing
from benchmarks.subjects import blocking
from topklm.model.layers import product, sparse_matmul, transposed
from topklm.runtime import process

RESULT = results.FOLDER / "sparse_input.json"
ROWS, COLUMNS = 4096, 1024
_SECONDS_PER_SAMPLE = 0.1


def main() -> None:
    """Writes benchmarks/results/sparse_input.json."""
    parser = results.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    repeats = parser.parse_args().repeats
    process.keep_freed_memory()
    cases = [_case(d, k, repeats) for d in (512, 1024, 2048, 4096) for k in (4, 8, 32) if k < d // 16]
    results.write(RESULT, {"rows": ROWS, "columns": COLUMNS, "dtype": "float32", "cases": cases})


def _case(d: int, k: int, repeats: int) -> dict[str, object]:
    """Measures [rows, D] with k entries a row by [D, columns]."""
    rng = np.random.default_rng(0)
    places = np.argsort(rng.random((ROWS, d)), axis=1)[:, :k].astype(np.int32)
    entries = rng.random((ROWS, k), np.float32)
    dense = np.zeros((ROWS, d), np.float32)
    np.put_along_axis(dense, places, entries, axis=1)
    x, w, g, entries_Nk, places_Nk = map(
        jnp.asarray,
        (
            dense,
            rng.standard_normal((d, COLUMNS), np.float32),
            rng.standard_normal((ROWS, COLUMNS), np.float32),
            entries,
            places,
        ),
    )
    np.testing.assert_allclose(sparse_matmul(entries_Nk, w, places_Nk), x @ w, atol=1e-3)
    np.testing.assert_allclose(_scattered(entries_Nk, places_Nk, g, d=d), x.T @ g, atol=1e-2)
    subjects = {
        "product": blocking(jax.jit(product), x, w),
        "gather": blocking(jax.jit(sparse_matmul), entries_Nk, w, places_Nk),
        "gradient": blocking(jax.jit(lambda x, g: product(transposed(x), g)), x, g),
        "scatter": blocking(jax.jit(functools.partial(_scattered, d=d)), entries_Nk, places_Nk, g),
    }
    timed = {name: timing.timed(subject) for name, subject in subjects.items()}
    found = timing.alternate(timed, repeats, at_least=_SECONDS_PER_SAMPLE, label=f"D {d}, k {k}")
    ratios = {
        "gather": found["gather"].speedup_over(found["product"]),
        "scatter": found["scatter"].speedup_over(found["gradient"]),
    }
    return {
        "d": d,
        "k": k,
        "seconds": {name: samples.median for name, samples in found.items()},
        "faster_than_product": {
            name: {"median": float(np.median(values)), "interval": timing.interval(values)}
            for name, values in ratios.items()
        },
    }


def _scattered(entries_Nk: jax.Array, places_Nk: jax.Array, g_NO: jax.Array, *, d: int) -> jax.Array:
    """Computes `x.T @ g`, [D, O], where row n of x has entries_Nk[n] at places_Nk[n]."""
    rows = entries_Nk[..., None] * g_NO[:, None]
    return (
        jnp.zeros((d, g_NO.shape[1]), g_NO.dtype)
        .at[places_Nk.reshape(-1)]
        .add(rows.reshape(-1, g_NO.shape[1]))
    )


if __name__ == "__main__":
    main()
