"""Where numbers go: metrics.jsonl and TensorBoard files, and how much arithmetic a token costs."""

from collections.abc import Mapping
import json
import math
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from topklm import run_folder
from topklm.config import ModelConfig
from topklm.errors import disk_errors_are_user_errors
from topklm.files import write_atomically

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


class MetricsWriter:
    """Appends one JSON line a call, and the same numbers to TensorBoard files in the run folder."""

    def __init__(self, folder: pathlib.Path, resume_step: int):
        """Opens the files; lines of steps after `resume_step`, which will be done again, are dropped."""
        path = folder / run_folder.METRICS_FILE
        self._path = path
        with disk_errors_are_user_errors(f"writing {path}"):
            write_atomically(path, "".join(_lines_up_to(path, resume_step)).encode())
            self._file = path.open("a", encoding="utf-8")
            self._board = _Board(folder / "tensorboard", first_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line; numbers, lists of numbers (one per layer) and text are understood."""
        with disk_errors_are_user_errors(f"writing {self._path}"):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                if isinstance(value, str):
                    self._board.add(step, summary.text(name, value))
                elif isinstance(value, list):
                    for layer, x in enumerate(value):
                        self._board.add(step, summary.scalar(f"{name}/{layer}", x))
                else:
                    self._board.add(step, summary.scalar(name, value))

    def sync(self) -> None:
        """Returns when the lines are on the disk itself; called before a checkpoint refers to them."""
        with disk_errors_are_user_errors(f"writing {self._path}"):
            os.fsync(self._file.fileno())
            self._board.flush()

    def close(self) -> None:
        """Closes both files."""
        with disk_errors_are_user_errors(f"writing {self._path}"):
            self._file.close()
            self._board.close()


class _Board:
    """A TensorBoard file, written by the caller's own thread.

    tensorboardX would write from a thread behind a short queue: on a full disk that thread dies, and
    the run waits for it for ever.
    """

    def __init__(self, folder: pathlib.Path, first_step: int):
        folder.mkdir(exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        # Tells TensorBoard to forget what an earlier process wrote of this step and later ones.
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: Any) -> None:
        self._write(Event(step=step, summary=values))

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)


def is_evaluated(folder: pathlib.Path, step: int) -> bool:
    """Whether the metrics of a run hold the evaluation of a step."""
    return any(line["step"] == step and "eval/loss" in line for line in read(folder))


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics; none where there is no such file yet."""
    return [json.loads(line) for line in _lines_up_to(folder / run_folder.METRICS_FILE, math.inf)]


def _lines_up_to(path: pathlib.Path, step: float) -> list[str]:
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        # A killed process can leave half a line, which only ever is the last one.
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    return kept


def parameter_count(params: Any) -> int:
    """Number of scalars in a parameter tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def flops_per_token(config: ModelConfig) -> float:
    """Training arithmetic per token: 6 N + 12 L H Q T (PaLM, Chowdhery et al. 2022, appendix B).

    N counts the parameters used in matrix products (the unembedding, not the embedding look-up), H Q is
    the width of all heads together. TopK and recomputation count as nothing, so MFU is never flattered.
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
