"""The best that a machine could do: its measured rates, and the work of a train step from first principles.

A part cannot be faster than its matrix products at the measured rate of large ones, nor than reading what it
takes and writing what it gives at the measured rate of a copy.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness import timing
from benchmarks.harness.worker import Prepared, Worker
from topklm.config import Config

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_FLOAT32_BYTES = 4
_MASK_BYTES = 1
_INPUT_ARRAYS = 5  # inputs, targets, segments, positions, weights; 4 bytes an entry
_FORWARD_AND_BACKWARD = 3  # a product's gradient is two products of its size
_SECONDS_PER_SAMPLE = 0.2
_PRODUCTS = {"cpu": (1024, 2048), "accelerator": (4096, 8192)}  # widths; which one is best differs
_COPIED_BYTES = {"cpu": 2**28, "accelerator": 2**31}  # far larger than caches


@dataclasses.dataclass(frozen=True)
class Rates:
    """The best that was measured on this machine."""

    dtype: str
    flops_per_second: float  # of a large matrix product in that dtype
    bytes_per_second: float  # read plus written, of a large array changed in place


@dataclasses.dataclass(frozen=True)
class Part:
    """Unavoidable work of a part of one train step, forward and backward, in all layers."""

    name: str
    flops: float = 0.0  # of matrix products
    bytes: float = 0.0  # read and written in memory

    def seconds(self, rates: Rates) -> float:
        """Computes the floor."""
        return max(self.flops / rates.flops_per_second, self.bytes / rates.bytes_per_second)


def measure_rates(dtype: str, repeats: int) -> Rates:
    """Times large matrix products and a large copy in JAX, in a process of their own; the best counts."""
    with Worker(__name__, {"dtype": dtype}) as worker:
        found = timing.alternate(
            worker.subjects(), repeats, at_least=_SECONDS_PER_SAMPLE, label=f"{dtype} rates of this machine"
        )
        work = worker.facts["work"]
    rates = {name: work[name] / samples.minimum for name, samples in found.items()}
    copy = rates.pop("copy")
    return Rates(dtype, max(rates.values()), copy)


def prepare(spec: Mapping[str, Any]) -> Prepared:
    """Prepares "matmul N" and "copy"; `facts["work"]` is the FLOPs or bytes of a call.

    Args:
        spec: `dtype`.
    """
    kind = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    dtype = jnp.dtype(spec["dtype"])
    product = jax.jit(jnp.matmul)
    negative = jax.jit(jnp.negative, donate_argnums=0)  # in place, so that no new memory is mapped
    held = [jnp.ones(_COPIED_BYTES[kind] // dtype.itemsize, dtype)]

    def copy() -> None:
        held[0] = negative(held[0]).block_until_ready()

    subjects: dict[str, Callable[[], Any]] = {"copy": copy}
    work = {"copy": 2.0 * _COPIED_BYTES[kind]}
    for n in _PRODUCTS[kind]:
        a = jax.random.normal(jax.random.key(0), (n, n), dtype)
        subjects[f"matmul {n}"] = lambda a=a: product(a, a).block_until_ready()  # type: ignore[misc]
        work[f"matmul {n}"] = 2.0 * n**3
    return Prepared(subjects, {"work": work, "platform": jax.default_backend()})


def parts_of_step(config: Config) -> tuple[Part, ...]:
    """Counts the work of the parts of one train step.

    Attention counts the lower triangle of its scores. The bytes are those of parameters, gradients and the
    residual stream between parts; arrays inside of a part could stay in a cache.
    """
    model = config.model
    tokens = config.train.batch_size * model.context_length
    item = ITEM_BYTES[model.dtype]
    stream = tokens * model.d_model * item
    heads, kv_heads = model.n_heads * model.head_width, model.n_kv_heads * model.head_width
    attention_weights = model.d_model * (2 * heads + 2 * kv_heads)
    mlp_weights = 3 * model.d_model * model.d_mlp
    pairs = config.train.batch_size * model.context_length * (model.context_length + 1) / 2
    embedding_weights = model.vocab_size * model.d_model
    weights = model.n_layers * (attention_weights + mlp_weights + 2 * model.d_model) + model.d_model
    weights += embedding_weights * (1 if model.tie_embeddings else 2)

    def product(n_weights: int, *, extra_flops: float = 0.0, count: int = 1, arrays: int = 4) -> dict:
        """Counts a product: weights are read for both directions and their gradient is written."""
        flops = _FORWARD_AND_BACKWARD * (2.0 * tokens * n_weights + extra_flops)
        moved = 3 * _FLOAT32_BYTES * n_weights + arrays * stream
        return {"flops": count * flops, "bytes": count * moved}

    return (
        Part("input", bytes=2 * _INPUT_ARRAYS * 4 * tokens),
        Part("embedding", bytes=2 * stream + _FLOAT32_BYTES * (tokens * model.d_model + embedding_weights)),
        Part(
            "attention", **product(attention_weights, extra_flops=4.0 * pairs * heads, count=model.n_layers)
        ),
        Part("MLP", **product(mlp_weights, count=model.n_layers)),
        Part("TopK", bytes=model.n_topk_layers * tokens * model.d_model * (4 * item + 2 * _MASK_BYTES)),
        Part("head and loss", **product(embedding_weights, arrays=2)),
        # Gradients are read for their norm; then parameter, gradient and two moments, all but the gradient
        # written again.
        Part("optimizer", bytes=8 * _FLOAT32_BYTES * weights),
        Part("host"),
    )


def step_seconds(parts: Sequence[Part], rates: Rates) -> float:
    """Computes the floor of a whole step: its parts one after another."""
    return sum(part.seconds(rates) for part in parts)
