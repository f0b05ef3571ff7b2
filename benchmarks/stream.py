"""The token stream alone: tokens per second of one core, and the start from a dataset of 10,000 shards.

python -m benchmarks.stream

Its peer is what has to be fed: the training step of `configs/small.py`, the fastest config here, timed in
the same run on all cores. The stream is one process on one core, reading, cutting and packing batches as
training gets them.
"""

import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.cases.data import make_dataset
from benchmarks.harness import results, worker
from topklm.data.dataset import Mixture, load_dataset
from topklm.data.records import RECORD_TOKENS
from topklm.data.stream import train_stream

RESULT = results.FOLDER / "stream.json"
SHAPES = ((256, 8), (256, 64), (1024, 64), (2048, 32))  # context length, batch size
SECONDS = 5.0
TOKENS = 40_000_000
N_SHARDS = 10_000


def main() -> None:
    """Writes benchmarks/results/stream.json."""
    results.parser(__doc__).parse_args()
    training = [_training_tokens_per_second() for _ in range(3)]
    print(f"training: {training}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        dataset = make_dataset(Path(name) / "large", TOKENS, RECORD_TOKENS * 8192)
        rates = {
            f"T {t}, B {b}": worker.call("benchmarks.stream:rate", str(dataset.path), t, b) for t, b in SHAPES
        }
        many = make_dataset(Path(name) / "many", N_SHARDS * RECORD_TOKENS, RECORD_TOKENS)
        starts = [worker.call("benchmarks.stream:start", str(many.path)) for _ in range(5)]
    fastest = statistics.median(training)
    result = {
        "training_tokens_per_second": training,
        "stream_tokens_per_second_of_one_core": rates,
        "ratio": {shape: rate / fastest for shape, rate in rates.items()},
        "start_from_10000_shards": {
            "seconds": statistics.median(one["seconds"] for one in starts),
            "files_open_after_one_batch": starts[0]["open_shards"],
            "shards_of_one_batch": starts[0]["batch_size"],
        },
    }
    results.write(RESULT, result)


def _training_tokens_per_second() -> float:
    """Trains `configs/small.py`; returns its rate after the first steps."""
    with tempfile.TemporaryDirectory() as run:
        settings = ["--config.train.steps=80", "--config.eval.sample_tokens=1", "--config.log.every_steps=1"]
        command = [sys.executable, "-m", "topklm.main", "--config=configs/small.py", f"--workdir={run}"]
        subprocess.run([*command, *settings], check=True, stdout=subprocess.PIPE)
        lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["tokens_per_second"] for line in lines[20:] if "tokens_per_second" in line)


def rate(folder: str, context_length: int, batch_size: int) -> float:
    """Measures tokens per second on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    mixture = Mixture.single(load_dataset(folder))
    stream = train_stream(mixture, context_length=context_length, batch_size=batch_size, seed=0)
    next(stream)
    batches, began = 0, time.perf_counter()
    while time.perf_counter() < began + SECONDS:
        next(stream)
        batches += 1
    return batches * context_length * batch_size / (time.perf_counter() - began)


def start(folder: str) -> dict[str, Any]:
    """Measures the way from a path to the first batch."""
    began = time.perf_counter()
    batch_size = 4
    mixture = Mixture.single(load_dataset(folder))
    stream = train_stream(mixture, context_length=RECORD_TOKENS, batch_size=batch_size, seed=0, threads=0)
    next(stream)
    seconds = time.perf_counter() - began
    open_files = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return {
        "seconds": seconds,
        "open_shards": sum(path.endswith(".arrayrecord") for path in open_files),
        "batch_size": batch_size,
    }


if __name__ == "__main__":
    main()
