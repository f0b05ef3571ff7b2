"""The TopK operation in JAX: every backend that this platform has, `lax.top_k` with a scatter, and a copy."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness.shapes import random_rows, topk_side
from benchmarks.harness.worker import Prepared
from benchmarks.subjects import blocking
from topklm.errors import UserError
from topklm.model import backends
from topklm.model.topk import topk

SCATTER = "lax.top_k + scatter"
COPY = "copy"


def prepare(spec: Mapping[str, Any]) -> Prepared:
    """Prepares the subjects `topk_side` of every operation and k, and `COPY`; facts are their names.

    Args:
        spec: `rows`, `d`, `ks` and `dtype`; `only_auto`: of our backends only the one that training uses.
    """
    x, g = (jnp.asarray(values, spec["dtype"]) for values in random_rows(spec["rows"], spec["d"]))
    backends = ("auto",) if spec["only_auto"] else _backends()
    subjects: dict[str, Callable[[], Any]] = {COPY: blocking(jax.jit(jnp.negative), x)}
    for k in spec["ks"]:
        operations = {name: functools.partial(topk, k=k, backend=name) for name in backends}
        operations[SCATTER] = functools.partial(top_k_and_scatter, k=k)
        for name, operation in operations.items():
            subjects[topk_side(k, name, backward=False)] = blocking(jax.jit(operation), x)
            subjects[topk_side(k, name, backward=True)] = blocking(_with_gradient(operation), x, g)
    return Prepared(subjects, {"platform": jax.default_backend(), "operations": [*backends, SCATTER]})


def top_k_and_scatter(x_ND: jax.Array, k: int) -> jax.Array:
    """Computes TopK as one writes it in JAX: [N, D] -> [N, D], clipped at 0."""
    values, index = jax.lax.top_k(x_ND, k)
    rows = jnp.arange(x_ND.shape[0])[:, None]
    return jnp.zeros_like(x_ND).at[rows, index].set(jax.nn.relu(values))


def _backends() -> list[str]:
    return [name for name in backends.TOPK.names if _runs_here(name)]


def _runs_here(backend: str) -> bool:
    try:
        backends.TOPK.check_platform(backend, jax.default_backend())
    except UserError:
        return False
    return True


def _with_gradient(operation: Callable[[jax.Array], jax.Array]) -> Callable:
    @jax.jit
    def both(x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, gradient = jax.vjp(operation, x)
        return y, gradient(g)[0]

    return both
