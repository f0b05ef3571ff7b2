"""Data from a store that takes 50 ms for each answer: the stream alone, and a training's share of waiting.

python -m benchmarks.bucket

The store is the fake one of the tests, a process of its own on the same machine, with a dataset of 40 million
tokens. Each measurement begins with an empty cache; its peer reads the same dataset from the disk.
"""

import argparse
import contextlib
import importlib
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

RESULT = results.FOLDER / "bucket.json"
DELAY_SECONDS = 0.05
SHAPES = ((256, 16), (2048, 16))  # context length, batch size
TOKENS, SHARD_TOKENS = 40_000_000, 512 * RECORD_TOKENS
SECONDS = 4.0
STEPS = 60


def main() -> None:
    """Writes benchmarks/results/bucket.json."""
    parser = results.parser(__doc__)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    if folder := parser.parse_args().serve:
        serve(Path(folder))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "dataset")
        make_dataset(folder, TOKENS, SHARD_TOKENS, heldout_tokens=10_000)
        found: dict[str, Any] = {
            "delay_seconds": DELAY_SECONDS,
            "tokens": TOKENS,
            "stream": {},
            "training": {},
        }
        with served(folder) as environment:
            for where in (str(folder), "gs://bucket/data"):
                key = "bucket" if where.startswith("gs:") else "disk"
                for length, batch in SHAPES:
                    os.environ |= environment | {"TMPDIR": tempfile.mkdtemp(dir=name)}
                    measured = worker.call("benchmarks.bucket:rate", where, length, batch)
                    found["stream"].setdefault(f"T {length}, B {batch}", {})[key] = measured
                os.environ |= environment | {"TMPDIR": tempfile.mkdtemp(dir=name)}
                found["training"][key] = train(where, Path(name, key))
                print(json.dumps(found, indent=1), flush=True)
    results.write(RESULT, found)


def serve(folder: Path) -> None:
    """Serves a folder as gs://bucket/data until standard input ends; prints the URL."""
    gcs = importlib.import_module("tests.gcs")  # of the clone
    bucket = gcs.Bucket(objects={f"data/{file.name}": file.read_bytes() for file in folder.iterdir()})
    bucket.delay = DELAY_SECONDS
    with bucket.served() as url:
        print(url, flush=True)
        sys.stdin.read()


@contextlib.contextmanager
def served(folder: Path) -> Any:
    """Yields the variables that send TensorStore to a store with the dataset."""
    command = [sys.executable, "-m", "benchmarks.bucket", "--serve", str(folder)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    try:
        url = server.stdout.readline().strip()
        yield {"TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody"}
    finally:
        server.communicate("")


def rate(source: str, context_length: int, batch_size: int) -> dict[str, float]:
    """Measures a stream without a consumer from its beginning, and the memory of its process."""
    began = time.perf_counter()
    mixture = Mixture.single(load_dataset(source))
    stream = train_stream(mixture, context_length=context_length, batch_size=batch_size, seed=0)
    next(stream)
    first, batches = time.perf_counter(), 0
    while time.perf_counter() < first + SECONDS:
        next(stream)
        batches += 1
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {
        "seconds_to_first_batch": first - began,
        "tokens_per_second": batches * context_length * batch_size / (time.perf_counter() - first),
        "peak_resident_mib": peak / 1024,
    }


def train(source: str, run: Path) -> dict[str, float]:
    """Trains the quickstart's model; returns the share of the time in which it waited for data."""
    settings = {"data.source": source, "train.steps": STEPS, "log.every_steps": 1, "eval.every_steps": 0}
    settings |= {"model.vocab_size": 0, "eval.sample_tokens": 1, "checkpoint.trace": ""}
    command = [sys.executable, "-m", "topklm.main", "--config=configs/small.py", f"--workdir={run}"]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "input_wait" in line]
    seconds = [line["seconds_trained"] for line in steps]
    # The wait of a line is the share of the time since the line before.
    parts = [after - before for before, after in zip([0.0, *seconds], seconds, strict=False)]
    waited = [line["input_wait"] * part for line, part in zip(steps, parts, strict=True)]
    return {
        "input_wait": sum(waited) / seconds[-1],
        "input_wait_after_step_1": sum(waited[1:]) / sum(parts[1:]),
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in steps[20:]),
        "seconds_per_step": statistics.median(parts[20:]),
        "peak_resident_mib": usage.ru_maxrss / 1024,
    }


if __name__ == "__main__":
    main()
