"""What checkpoints cost: saving every tenth step while training, and loading 400 million parameters.

python -m benchmarks.checkpoints

Training with saves is compared with training without, loading with a plain loop that reads the same files
into memory; both in turn in the same run, page cache warm. It needs 4 GB of disk and 6 GB of memory.
"""

import argparse
from collections.abc import Callable
import itertools
import json
from pathlib import Path
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import machine
from topklm import config as config_lib
from topklm import load, run_folder, sharding
from topklm.config import CheckpointConfig, MeshConfig, ModelConfig
from topklm.data.tokenizer import train_bpe
from topklm.files import write_atomically
from topklm.model import transformer
from topklm.training.checkpoints import Checkpoints
from topklm.training.step import TrainState

RESULT = Path(__file__).parent / "results" / "checkpoints.json"
EVERY_STEPS = 10
STEPS = 61  # of which 50 are timed, with a save after every tenth
TIMED = (10, 60)
RUNS = 5
LOADS = 9
MODEL = ModelConfig(
    d_model=1024, n_layers=24, n_heads=16, n_kv_heads=16, d_mlp=2816, vocab_size=50257, context_length=1024
)
BLOCK_BYTES = 16 * 2**20


def main() -> None:
    """Writes benchmarks/results/checkpoints.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    # One measurement, in a process of its own.
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    child = parser.parse_args().child
    if child:
        print(json.dumps(CHILDREN[child[0]](Path(child[1]))))
        return
    result = {"machine": machine.describe(), "saving": _saving(), "loading": _loading()}
    write_atomically(RESULT, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1))


def _saving() -> dict[str, Any]:
    """Seconds for the timed steps of `configs/small.py:hour`, with and without saves among them."""
    seconds: dict[int, list[float]] = {0: [], EVERY_STEPS: []}
    for run, every in itertools.product(range(RUNS), seconds):
        seconds[every].append(_seconds_of_timed_steps(every))
        print(f"saving, run {run}, every {every} steps: {seconds[every][-1]:.2f} s", flush=True)
    without, with_saves = (statistics.median(seconds[every]) for every in (0, EVERY_STEPS))
    first, last = TIMED
    return {
        "every_steps": EVERY_STEPS,
        "seconds_per_step": without / (last - first),
        "seconds_without_saves": seconds[0],
        "seconds_with_saves": seconds[EVERY_STEPS],
        "throughput_lost": 1 - without / with_saves,
    }


def _seconds_of_timed_steps(every: int) -> float:
    """From the line about the first of them to that about the last, as the trainer prints them."""
    settings = {"train.steps": STEPS, "checkpoint.every_steps": every, "eval.every_steps": 0}
    settings |= {"eval.sample_tokens": 1, "log.every_steps": 10, "eval.batch_size": 1}
    times = {}
    with tempfile.TemporaryDirectory() as run:
        flags = [f"--config.{name}={value}" for name, value in settings.items()]
        command = ["-m", "topklm.main", "--config=configs/small.py:hour", f"--workdir={run}", *flags]
        with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or []:
                if found := re.match(r"step (\d+)/", line):
                    times[int(found[1])] = time.perf_counter()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
    return times[TIMED[1]] - times[TIMED[0]]


def _loading() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        run = Path(name)
        _in_a_process("write", run)
        seconds = _in_a_process("seconds", run)
        memory = [_in_a_process("memory", run) for _ in range(3)]
    load_s, read_s = (statistics.median(seconds[what]) for what in ("load", "read_into_memory"))
    return {
        "parameters": memory[0]["parameters"],
        "seconds": seconds,
        "load_over_read_into_memory": load_s / read_s,
        "peak_host_bytes_over_parameter_bytes": max(m["peak_over_parameters"] for m in memory),
    }


def _in_a_process(what: str, run: Path) -> Any:
    command = [sys.executable, "-m", "benchmarks.checkpoints", "--child", what, str(run)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def _write(run: Path) -> int:
    """A run folder with a checkpoint whose optimizer holds nothing, written as the trainer does."""
    config = config_lib.Config(model=MODEL)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    shapes = jax.eval_shape(lambda: transformer.create(MODEL, 0))
    shardings = sharding.parameter_shardings(shapes, mesh)
    params = jax.jit(lambda: transformer.create(MODEL, 0), out_shardings=shardings)()
    state = TrainState(jnp.int32(1), params, optax.EmptyState(), {})
    tokenizer = train_bpe(["abc"], 300)
    tokenizer.save(run / run_folder.TOKENIZER_FILE)
    facts = {"config": config.to_dict(), "tokenizer_sha256": tokenizer.sha256}
    checkpoints = Checkpoints(run / run_folder.CHECKPOINTS_FOLDER, CheckpointConfig())
    checkpoints.save(state, {}, facts)
    checkpoints.wait()
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def _seconds(run: Path) -> dict[str, list[float]]:
    """Of each way to get at the parameters, in turn."""
    folder = run / run_folder.CHECKPOINTS_FOLDER / "1" / "params"
    files = [path for path in folder.rglob("*") if path.is_file()]
    ways: dict[str, Callable[[], Any]] = {
        "read_into_memory": lambda: [path.read_bytes() for path in files],
        "read_and_forget": lambda: [_read_and_forget(path) for path in files],
        "load": lambda: jax.block_until_ready(load(run).params),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _, (way, action) in itertools.product(range(LOADS), ways.items()):
        began = time.perf_counter()
        held = action()
        seconds[way].append(time.perf_counter() - began)
        del held
    return {way: measured[1:] for way, measured in seconds.items()}  # the first time, files may not be cached


def _read_and_forget(path: Path) -> int:
    with path.open("rb") as file:
        return sum(len(block) for block in iter(lambda: file.read(BLOCK_BYTES), b""))


def _memory(run: Path) -> dict[str, float]:
    jax.devices()
    before = _peak_bytes()
    params = jax.block_until_ready(load(run).params)
    n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {"parameters": count, "peak_over_parameters": (_peak_bytes() - before) / n_bytes}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


CHILDREN: dict[str, Callable[[Path], Any]] = {"write": _write, "seconds": _seconds, "memory": _memory}

if __name__ == "__main__":
    main()
