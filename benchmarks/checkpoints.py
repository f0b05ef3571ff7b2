"""The cost of checkpoints: saving every tenth step while training, and loading 400 million parameters.

python -m benchmarks.checkpoints

Steps with saves among them are compared with steps without, loading with a plain loop that reads the same
files into memory; both in turn in the same run, page cache warm. It needs 4 GB of disk and 6 GB of memory.
"""

import itertools
from pathlib import Path
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.cases import checkpoint
from benchmarks.harness import results, worker
from topklm import config as config_lib
from topklm.config import ModelConfig

RESULT = results.FOLDER / "checkpoints.json"
EVERY_STEPS = 10
PAIRS = 14  # of ten steps without a save and ten with one
LOADS = 9
MODEL = ModelConfig(
    d_model=1024, n_layers=24, n_heads=16, n_kv_heads=16, d_mlp=2816, vocab_size=50257, context_length=1024
)


def main() -> None:
    """Writes benchmarks/results/checkpoints.json."""
    results.parser(__doc__).parse_args()
    results.write(RESULT, {"saving": _saving(), "loading": _loading()})


def _saving() -> dict[str, Any]:
    """Measures a save of `configs/small.py:hour`: every other ten steps of one run have one among them.

    Neighbours are compared, because the machine's speed drifts by more than a save costs.
    """
    seconds = _seconds_of_ten_steps()
    without, with_saves = seconds[1::2], seconds[2::2]
    lost = [1 - a / b for a, b in zip(without, with_saves, strict=True)]
    quartiles = statistics.quantiles(lost, n=4)
    return {
        "every_steps": EVERY_STEPS,
        "seconds_of_ten_steps_without_save": without,
        "seconds_of_ten_steps_with_save": with_saves,
        "throughput_lost_quartiles": quartiles,
        "throughput_lost": statistics.median(lost),
    }


def _seconds_of_ten_steps() -> list[float]:
    """Times steps 1 to 10, 11 to 20, ... as the trainer prints them; it saves after steps 20, 40, ..."""
    steps = (2 * PAIRS + 1) * EVERY_STEPS
    settings = {"train.steps": steps, "checkpoint.every_steps": 2 * EVERY_STEPS, "eval.every_steps": 0}
    settings |= {"eval.sample_tokens": 1, "log.every_steps": EVERY_STEPS, "eval.batch_size": 1}
    times = []
    with tempfile.TemporaryDirectory() as run:
        flags = [f"--config.{name}={value}" for name, value in settings.items()]
        command = ["-m", "topklm.main", "--config=configs/small.py:hour", f"--workdir={run}", *flags]
        with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or []:
                if re.match(r"(step \d+/|compiled the train step)", line):
                    times.append(time.perf_counter())
                    print(line, end="", flush=True)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
    return [end - begin for begin, end in itertools.pairwise(times)]


def _loading() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as run:
        worker.call("benchmarks.checkpoints:write", run)
        seconds = worker.call("benchmarks.checkpoints:seconds_to_load", run)
        memory = [worker.call("benchmarks.cases.checkpoint:load_memory", run) for _ in range(3)]
    load_s, read_s = (statistics.median(seconds[what]) for what in ("load", "read_into_memory"))
    return {
        "parameters": memory[0]["parameters"],
        "seconds": seconds,
        "load_over_read_into_memory": load_s / read_s,
        "peak_host_bytes_over_parameter_bytes": max(m["peak_over_parameters"] for m in memory),
    }


def write(run: str) -> int:
    """Makes the run that is loaded; returns the bytes of its parameters."""
    return checkpoint.write_run(Path(run), config_lib.Config(model=MODEL))


def seconds_to_load(run: str) -> dict[str, list[float]]:
    """Times each way to get at the parameters, in turn."""
    ways = checkpoint.ways_to_load(Path(run), 1)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _, (way, action) in itertools.product(range(LOADS), ways.items()):
        began = time.perf_counter()
        held = action()
        seconds[way].append(time.perf_counter() - began)
        del held
    return {way: measured[1:] for way, measured in seconds.items()}  # the first time, files may not be cached


if __name__ == "__main__":
    main()
