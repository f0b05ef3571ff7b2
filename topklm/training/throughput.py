"""The speed of a run: time spent training, tokens per second, their share of the peak; traces of steps."""

import collections
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import math
from pathlib import Path
import re
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topklm import distributed
from topklm.config import Config, ModelConfig
from topklm.errors import UserError
from topklm.storage.files import AnyPath, storage_errors_are_user_errors, write_atomically

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
# That a rate is taken over: a step's own end is seen only when the next one is under way.
_LEAST_SECONDS = 1.0
_PROFILE_FOLDER = "profile"  # of a run


@dataclasses.dataclass
class Clock:
    """Seconds of training steps, from a checkpoint's total on; stopped while the run evaluates or saves."""

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
        """Returns tokens per second, and model FLOPs utilisation; NaN above 1, of another peak."""
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


class Profiler:
    """Traces some steps of a run (`--config.profile=10:13`), once, for XProf to show where their time goes.

    The run's first process traces its own devices and its own host. The trace is written beside and copied
    into the run folder, local or in a bucket, when it is whole.
    """

    def __init__(self, steps: range, folder: AnyPath, first: int, say: Callable[[str], None]):
        """Traces `steps` by number, none if empty, of a run that has done `first` steps already."""
        self._steps, self._folder, self._say = steps, folder / _PROFILE_FOLDER, say
        self._traced: list[int] = []
        self._session = contextlib.ExitStack()
        if steps and first >= steps[-1]:
            say(f"profile: nothing to trace, step {steps[-1]:,} is done already")

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Surrounds the dispatch of a step."""
        if number not in self._steps or not distributed.is_primary():
            yield
            return
        if not self._traced:
            folder = self._session.enter_context(tempfile.TemporaryDirectory(prefix="topklm-profile-"))
            self._local = Path(folder)
            options = jax.profiler.ProfileOptions()
            # Not every call of every function, which slows the host and hides the rest.
            options.python_tracer_level = 0
            jax.profiler.start_trace(self._local, profiler_options=options)
        self._traced.append(number)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def ends_with(self, step: int) -> bool:
        """Tells whether this step is the last to be traced, for all processes alike."""
        return bool(self._steps) and step == self._steps[-1]

    def close(self) -> None:
        """Writes what was traced: when the devices are done with it, or when the run ends before."""
        traced, self._traced, self._steps = self._traced, [], range(0)
        if not traced:
            return
        try:
            with self._session, storage_errors_are_user_errors("writing the profile", self._folder):
                jax.profiler.stop_trace()
                for file in sorted(path for path in self._local.rglob("*") if path.is_file()):
                    target = self._folder / file.relative_to(self._local).as_posix()
                    target.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(target, file.read_bytes())
        except UserError as e:
            self._say(f"no profile was written: {e}")
            return
        self._say(
            f"profile of steps {traced[0]:,} to {traced[-1]:,} in {self._folder}; to open it: pip install "
            f"xprof, then: xprof --logdir={self._folder}"
        )


def parameter_count(params: Any) -> int:
    """Counts the scalars in a parameter tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def flops_per_token(config: ModelConfig) -> float:
    """Computes the training arithmetic per token: 6 N + 12 L H Q T (PaLM, Chowdhery et al. 2022, appendix B).

    N counts the parameters used in matrix products (the unembedding, not the embedding look-up), H Q is
    the width of all heads together. TopK, the loss of following tokens, padding of the vocabulary and
    recomputation count as nothing, so MFU is never flattered.
    """
    d, heads = config.d_model, config.n_heads * config.head_width
    attention = d * heads * 2 + d * config.n_kv_heads * config.head_width * 2
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
    numbers = np.random.default_rng(0).standard_normal(2**16, np.float32)  # no program to compile
    a = jax.device_put(np.resize(numbers, (n, n)).astype(jnp.dtype(dtype)), devices[0])
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
