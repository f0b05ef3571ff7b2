"""`topklm bench checkpoint`: time of saving and loading, beside writing and reading the same bytes plainly.

A save holds training up only while the arrays are copied; the rest goes on beside the steps. The page cache
is warm on both subjects, and a write counts until it is on the disk itself.
"""

import argparse
from collections.abc import Callable, Mapping
import dataclasses
import itertools
import os
from pathlib import Path
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness.report import Comparison, Report, Result
from benchmarks.harness.shapes import SHAPES
from benchmarks.harness.timing import Samples, Subject, alternate, timed
from benchmarks.harness.worker import peak_resident_bytes
from topklm import load
from topklm.checkpoint import run_folder
from topklm.checkpoint.manager import CheckpointManager
from topklm.compile_check.check import with_vocabulary
from topklm.config import CheckpointConfig, Config
from topklm.data.tokenizer import train_bpe
from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.layout import one_device
from topklm.model import transformer
from topklm.runtime import process
from topklm.training.step import TrainState, init_state, make_optimizer

DESCRIPTION = "Measures saving and loading the checkpoints of a config, in a temporary folder."
EXAMPLE = "topklm bench checkpoint --config=configs/small.py:hour"

SAVE_BLOCKS, SAVE, WRITE = "save, until training goes on", "save, to its end", "write plainly"
LOAD, READ = "load", "read plainly"
_BLOCK_BYTES = 16 * 2**20
_MEGABYTE = 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares flags of its own."""
    parser.add_argument(
        "--folder", metavar="DIR", help="measure on this disk; default the system's temporary"
    )


def run(arguments: argparse.Namespace, config: Config | None) -> Report:
    """Saves and loads a fresh train state again and again, and plain files of the same bytes in turn.

    Args:
        arguments: `peer`, `repeats`, `folder`.
        config: Its model and optimizer; a vocabulary of 0 stands for `data.vocab_size`. Default: shape s2.

    Raises:
        UserError: If a peer is asked for, or the folder is not there or cannot be written.
    """
    if arguments.peer:
        raise UserError(f"--peer = {arguments.peer}: checkpoints are compared with plain files; leave it out")
    if arguments.folder and not Path(arguments.folder).is_dir():
        raise UserError(f"--folder = {arguments.folder}: there is no such folder; make it, or leave it out")
    config = with_vocabulary(config or SHAPES["s2"])
    allocator_name = process.keep_freed_memory()
    with (
        disk_errors_are_user_errors("writing to --folder"),
        tempfile.TemporaryDirectory(dir=arguments.folder) as name,
    ):
        saved = _SavedRun(Path(name), config)
        samples = alternate(saved.subjects(), arguments.repeats, label="checkpoint")
    settings = {"allocator": allocator_name, "model": dataclasses.asdict(config.model)}
    return _report(samples, n_bytes((saved.state.params, saved.state.opt_state)), saved.n_loaded, settings)


def write_run(folder: Path, config: Config) -> int:
    """Makes a run folder with a checkpoint whose optimizer holds nothing, written as the trainer does.

    Args:
        folder: An empty one.
        config: Its model, with its vocabulary.

    Returns:
        Bytes of its parameters.
    """
    layout = one_device()
    shapes = jax.eval_shape(lambda: transformer.create(config.model, 0))
    shardings = layout.shardings(shapes)
    params = jax.jit(lambda: transformer.create(config.model, 0), out_shardings=shardings)()
    state = TrainState(jnp.int32(1), params, optax.EmptyState(), {})
    facts = _describe(folder, config)
    checkpoints = CheckpointManager(folder / run_folder.CHECKPOINTS_FOLDER, CheckpointConfig())
    checkpoints.save(state, {}, facts)
    checkpoints.wait()
    return n_bytes(params)


def ways_to_load(folder: Path, step: int) -> dict[str, Callable[[], Any]]:
    """Returns the ways to get at the parameters of a run: `load`, and plain loops over their files.

    Each returns what it then holds in memory.
    """
    place = folder / run_folder.CHECKPOINTS_FOLDER / str(step) / "params"
    files = [path for path in place.rglob("*") if path.is_file()]
    return {
        "read_into_memory": lambda: [path.read_bytes() for path in files],
        "read_and_forget": lambda: [_read_and_forget(path) for path in files],
        "load": lambda: jax.block_until_ready(load(folder).params),
    }


def load_memory(folder: str | Path) -> dict[str, float]:
    """Loads a run in this process, which must have done nothing big before.

    Returns:
        The number of its parameters, and by how much the peak memory grew, over their bytes.
    """
    jax.devices()
    before = peak_resident_bytes()
    params = jax.block_until_ready(load(folder).params)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {"parameters": count, "peak_over_parameters": (peak_resident_bytes() - before) / n_bytes(params)}


def n_bytes(tree: Any) -> int:
    """Sums the bytes of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


class _SavedRun:
    """A run that saves one checkpoint after another, and can be loaded."""

    def __init__(self, folder: Path, config: Config):
        layout = one_device()
        optimizer = make_optimizer(config.optim, config.train.steps)
        self.state = jax.block_until_ready(init_state(config, optimizer, layout))
        self.n_loaded = n_bytes(self.state.params)
        self._folder, self._facts = folder, _describe(folder, config)
        keep_one = dataclasses.replace(config.checkpoint, keep=1)
        self._checkpoints = CheckpointManager(folder / run_folder.CHECKPOINTS_FOLDER, keep_one)
        self._steps = itertools.count(1)

    def subjects(self) -> dict[str, Subject]:
        """Returns the subjects that take turns."""
        return {
            SAVE_BLOCKS: self._seconds_blocked,
            SAVE: timed(self._save),
            WRITE: timed(self._write_plainly),
            LOAD: timed(lambda: jax.block_until_ready(load(self._folder).params)),
            READ: timed(self._read_plainly),
        }

    def _seconds_blocked(self, calls: int) -> float:
        seconds = 0.0
        for _ in range(calls):
            began = time.perf_counter()
            self._begin_to_save()
            seconds += time.perf_counter() - began
            self._checkpoints.wait()
        return seconds

    def _save(self) -> None:
        self._begin_to_save()
        self._checkpoints.wait()

    def _begin_to_save(self) -> None:
        self._checkpoints.save(self.state._replace(step=jnp.int32(next(self._steps))), {}, self._facts)

    def _write_plainly(self) -> None:
        """Writes one array after another into one file."""
        with (self._folder / "plain").open("wb") as file:
            for leaf in jax.tree.leaves(self.state):
                np.asarray(leaf).tofile(file)
            file.flush()
            os.fsync(file.fileno())

    def _read_plainly(self) -> None:
        assert self._checkpoints.latest_step is not None
        ways_to_load(self._folder, self._checkpoints.latest_step)["read_into_memory"]()


def _report(
    samples: Mapping[str, Samples], saved_bytes: int, loaded_bytes: int, settings: Mapping[str, Any]
) -> Report:
    floors = {SAVE: WRITE, LOAD: READ}
    results = []
    for name in (SAVE_BLOCKS, SAVE, LOAD):
        floor = samples[floors[name]].median if name in floors else None
        results.append(Result(name, "s", samples[name].seconds, floor))
    sizes = {SAVE: saved_bytes, WRITE: saved_bytes, LOAD: loaded_bytes, READ: loaded_bytes}
    for name, size in sizes.items():
        floor = size / samples[floors[name]].median / _MEGABYTE if name in floors else None
        results.append(Result(f"{name}, rate", "MB/s", samples[name].rates(size / _MEGABYTE), floor))
    comparisons = [
        Comparison(f"seconds: {ours} / {plain}", samples[plain].speedup_over(samples[ours]))
        for ours, plain in floors.items()
    ]
    facts = {**settings, "saved_bytes": saved_bytes, "loaded_bytes": loaded_bytes}
    return Report("checkpoint", facts, results, comparisons)


def _describe(folder: Path, config: Config) -> dict[str, Any]:
    """Writes what stands beside checkpoints; returns the facts that each of them needs to be loaded."""
    tokenizer = train_bpe(["abc"], 300)
    tokenizer.save(folder / run_folder.TOKENIZER_FILE)
    return {"config": config.to_dict(), "tokenizer_sha256": tokenizer.sha256}


def _read_and_forget(path: Path) -> int:
    with path.open("rb") as file:
        return sum(len(block) for block in iter(lambda: file.read(_BLOCK_BYTES), b""))
