"""The machine's rates as JAX gets at them: large matrix products, and an array changed in place."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness.worker import Prepared

_PRODUCTS = {"cpu": (1024, 2048), "accelerator": (4096, 8192)}  # widths; which one is best differs
_COPIED_BYTES = {"cpu": 2**28, "accelerator": 2**31}  # far larger than caches


def prepare(spec: Mapping[str, Any]) -> Prepared:
    """Prepares "matmul N" and "copy"; `facts["work"]` is the FLOPs or bytes of a call.

    Args:
        spec: `dtype`.
    """
    kind = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    dtype = jnp.dtype(spec["dtype"])
    subjects: dict[str, Callable[[], Any]] = {}
    work: dict[str, float] = {}
    for n in _PRODUCTS[kind]:
        a = jax.random.normal(jax.random.key(0), (n, n), dtype)
        subjects[f"matmul {n}"] = functools.partial(_product, a)
        work[f"matmul {n}"] = 2.0 * n**3
    subjects["copy"] = _in_place(jnp.ones(_COPIED_BYTES[kind] // dtype.itemsize, dtype))
    work["copy"] = 2.0 * _COPIED_BYTES[kind]
    return Prepared(subjects, {"work": work, "platform": jax.default_backend()})


def _product(a: jax.Array) -> None:
    _matmul(a, a).block_until_ready()


_matmul = jax.jit(jnp.matmul)


def _in_place(x: jax.Array) -> Callable[[], None]:
    """Makes a subject that works in place, so that no new memory is mapped."""
    negative = jax.jit(jnp.negative, donate_argnums=0)
    held = [x]

    def subject() -> None:
        held[0] = negative(held[0]).block_until_ready()

    return subject
