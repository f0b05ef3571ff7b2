"""The speed of a run: time spent training, tokens per second, and their share of the machine's peak."""

import collections
import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from topklm.config import Config, ModelConfig

# Dense bfloat16 peak of one chip, FLOP/s, by JAX's name of it, which must match as a whole: an L40 is no L4.
# TPUs: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e. NVIDIA: the data sheets of A100, H100 (SXM, PCIe and
# NVL), H200 (SXM and NVL), L4, L40 and L40S, half of what they give for sparse matrices; of T4 that for
# float16, as it has no bfloat16.
_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5( lite|e)": 197e12,
    "TPU v5p?": 459e12,
    "TPU v6( lite|e)": 918e12,
    "NVIDIA A100(-SXM4|-PCIE)-[48]0GB|NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100( SXM5)?( 80GB HBM3)?": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 836e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "(NVIDIA|Tesla) T4": 65e12,
}
_LEAST_SECONDS = (
    1.0  # that a rate is taken over: a step's own end is seen only when the next one is under way
)


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
        """Returns the seconds so far."""
        return self.total if self.since is None else self.total + time.perf_counter() - self.since

    def goodput(self) -> float:
        """Returns the share of the time since the run was begun, pauses included, that went into its steps.

        At most 1, also where the machine's date has been set back in between.
        """
        productive = self.now()
        return productive / max(time.time() - self.began_at, productive, 1e-9)


class Rate:
    """Throughput of the last second or more of training, and its share of the machine's peak."""

    def __init__(self, config: Config, tokens_per_step: int, step: int, seconds: float):
        self._marks = collections.deque([(step, seconds)])
        self._tokens_per_step, self._flops = tokens_per_step, flops_per_token(config.model)
        self._devices, self._dtype = jax.devices(), config.model.dtype
        self._is_measured = data_sheet_peak(self._devices[0].device_kind) is None
        self._peak = peak_flops_per_second(self._devices, self._dtype)

    def at(self, step: int, seconds: float) -> tuple[float, float]:
        """Returns tokens per second, and the model FLOPs utilisation of that.

        The utilisation is NaN where it would be above 1: then the peak is not that of this machine.
        """
        self._marks.append((step, seconds))
        while len(self._marks) > 2 and seconds - self._marks[1][1] >= _LEAST_SECONDS:
            self._marks.popleft()
        first_step, began = self._marks[0]
        rate = (step - first_step) * self._tokens_per_step / max(seconds - began, 1e-9)
        if rate * self._flops > self._peak:
            self.measure_again()
        mfu = rate * self._flops / self._peak
        return rate, mfu if mfu <= 1 else math.nan

    def measure_again(self) -> None:
        """Raises a peak that was measured while others used the machine; that of a data sheet stays."""
        if self._is_measured:
            self._peak = max(self._peak, peak_flops_per_second(self._devices, self._dtype))


def parameter_count(params: Any) -> int:
    """Counts the scalars in a parameter tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def flops_per_token(config: ModelConfig) -> float:
    """Computes the training arithmetic per token: 6 N + 12 L H Q T (PaLM, Chowdhery et al. 2022, appendix B).

    N counts the parameters used in matrix products (the unembedding, not the embedding look-up), H Q is
    the width of all heads together. TopK, padding of the vocabulary and recomputation count as nothing, so
    MFU is never flattered.
    """
    d, heads = config.d_model, config.n_heads * config.head_dim
    attention = d * heads * 2 + d * config.n_kv_heads * config.head_dim * 2
    n = config.n_layers * (attention + 3 * d * config.d_mlp) + d * config.vocab_size
    return 6.0 * n + 12.0 * config.n_layers * heads * config.context_length


def data_sheet_peak(kind: str) -> float | None:
    """Looks up the dense bfloat16 peak of one chip, FLOP/s, by its `device_kind`; None if not known."""
    return next((peak for name, peak in _PEAK_FLOPS.items() if re.fullmatch(name, kind)), None)


def peak_flops_per_second(devices: list[jax.Device], dtype: str) -> float:
    """Returns the peak of all devices together, FLOP/s: the data sheet's for accelerators, measured on CPUs.

    A CPU's peak depends on clock and cores granted, so it is the best of a few timed matrix products.
    An accelerator that is not in the table is measured the same way.
    """
    known = data_sheet_peak(devices[0].device_kind)
    if known is not None:
        return known * len(devices)
    n = 1024 if devices[0].platform == "cpu" else 8192
    a = jax.device_put(jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype)), devices[0])
    _product(a, a).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        _product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    # Virtual CPU devices share the cores, so one device's rate is the machine's.
    copies = 1 if devices[0].platform == "cpu" else len(devices)
    return 2.0 * n**3 / min(seconds) * copies


_product = jax.jit(jnp.matmul)
