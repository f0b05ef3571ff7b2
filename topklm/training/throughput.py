"""How fast a run is: time spent training, tokens per second, and the share of the machine's peak that is."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from topklm.config import Config, ModelConfig

# Dense bfloat16 peak of one chip, FLOP/s, from the makers' data sheets.
_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA T4": 65e12,
}


@dataclasses.dataclass
class Clock:
    """Seconds spent on training steps; stopped while the run evaluates or saves.

    Goes on from the total of a checkpoint, so steps that a dying process had done after it never count.
    """

    total: float
    began_at: float  # when the run was begun for the first time, in seconds since 1970
    since: float | None = None  # None: stopped

    def start(self) -> None:
        """Goes on counting."""
        self.since = time.perf_counter()

    def stop(self) -> None:
        """Adds what has passed since `start`."""
        self.total, self.since = self.now(), None

    def now(self) -> float:
        """Seconds so far."""
        return self.total if self.since is None else self.total + time.perf_counter() - self.since

    def goodput(self) -> float:
        """Share of the time since the run was begun that went into its steps, pauses between processes too.

        At most 1, also where the machine's date has been set back in between.
        """
        productive = self.now()
        return productive / max(time.time() - self.began_at, productive, 1e-9)


class Rate:
    """Throughput since the last time it was asked for."""

    def __init__(self, config: Config, tokens_per_step: int, step: int, seconds: float):
        self._last = (step, seconds)
        self._tokens_per_step = tokens_per_step
        peak = peak_flops_per_second(jax.devices(), config.model.dtype)
        self._mfu_of_rate = flops_per_token(config.model) / peak

    def at(self, step: int, seconds: float) -> tuple[float, float]:
        """Tokens per second, and the model FLOPs utilisation that is."""
        steps, elapsed = step - self._last[0], seconds - self._last[1]
        self._last = (step, seconds)
        rate = steps * self._tokens_per_step / max(elapsed, 1e-9)
        return rate, rate * self._mfu_of_rate


def parameter_count(params: Any) -> int:
    """Number of scalars in a parameter tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def flops_per_token(config: ModelConfig) -> float:
    """Training arithmetic per token: 6 N + 12 L H Q T (PaLM, Chowdhery et al. 2022, appendix B).

    N counts the parameters used in matrix products (the unembedding, not the embedding look-up), H Q is
    the width of all heads together. TopK, padding of the vocabulary and recomputation count as nothing, so
    MFU is never flattered.
    """
    d, heads = config.d_model, config.n_heads * config.head_dim
    attention = d * heads * 2 + d * config.n_kv_heads * config.head_dim * 2
    n = config.n_layers * (attention + 3 * d * config.d_mlp) + d * config.vocab_size
    return 6.0 * n + 12.0 * config.n_layers * heads * config.context_length


def peak_flops_per_second(devices: list[jax.Device], dtype: str) -> float:
    """Peak of all devices together, FLOP/s: the data sheet's for accelerators, measured on CPUs.

    A CPU's peak depends on clock and cores granted, so it is the best of a few timed matrix products.
    An accelerator that is not in the table is measured the same way.
    """
    kind = devices[0].device_kind
    for name in sorted(_PEAK_FLOPS, key=len, reverse=True):
        if kind.startswith(name):
            return _PEAK_FLOPS[name] * len(devices)
    n = 1024 if devices[0].platform == "cpu" else 8192
    a = jax.device_put(jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype)), devices[0])
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    # Virtual CPU devices share the cores, so one device's rate is the machine's.
    copies = 1 if devices[0].platform == "cpu" else len(devices)
    return 2.0 * n**3 / min(seconds) * copies
