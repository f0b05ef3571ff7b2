"""The train step of a config: the real one, with the real optimizer, on random tokens."""

from collections.abc import Mapping
import time
from typing import Any

import jax
import numpy as np

from benchmarks.harness.shapes import random_tokens
from benchmarks.harness.worker import Prepared
from topklm import config as config_lib
from topklm.layout import make_layout
from topklm.training import throughput
from topklm.training.step import (
    Batch,
    TrainState,
    abstract_batch,
    compile_step,
    init_state,
    make_optimizer,
    make_train_step,
    release_seconds,
)


def prepare(spec: Mapping[str, Any]) -> Prepared:
    """Prepares the subject "step"; facts are its size, seconds to compile, and the loss of the first step.

    Args:
        spec: `config`, with its vocabulary.
    """
    config = config_lib.resolve(spec["config"])
    layout = make_layout(config.mesh)
    layout.check(config)
    optimizer = make_optimizer(config.optim, config.train.steps)
    state = init_state(config, optimizer, layout)
    n_parameters = throughput.parameter_count(state.params)
    # Not by the trainer's feed, which would bring all of data loading into this process.
    batch = jax.device_put(random_batch(config), layout.batch)
    began = time.perf_counter()
    lowered = make_train_step(config, optimizer, layout).lower(state, abstract_batch(config, layout))
    training = _Training(compile_step(lowered), state, batch)
    compile_seconds = time.perf_counter() - began
    del state  # the first step takes its memory
    facts = {
        "compile_seconds": compile_seconds,
        "first_loss": training.step(),
        "parameters": n_parameters,
        "platform": jax.default_backend(),
        "devices": layout.size,
        "peak_flops_per_second": throughput.peak_flops_per_second(jax.devices(), config.model.dtype),
    }
    return Prepared({"step": training.step}, facts, device_peak_bytes)


def random_batch(config: config_lib.Config) -> dict[str, np.ndarray]:
    """Makes a training batch of random tokens, one document a row."""
    tokens = random_tokens(config)
    shape = tokens[:, :-1].shape
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "loss_weights": np.ones(shape, np.float32),
    }


def device_peak_bytes() -> int | None:
    """Returns the most memory taken of the first device; None where it does not say, as on CPUs."""
    statistics = jax.devices()[0].memory_stats()
    return statistics["peak_bytes_in_use"] if statistics else None


class _Training:
    """A state that each step replaces."""

    def __init__(self, compiled: jax.stages.Compiled, state: TrainState, batch: Batch):
        self._compiled, self._state, self._batch = compiled, state, batch
        self._release_seconds = release_seconds(compiled)

    def step(self) -> float:
        """Does one step; returns the loss in nats per token."""
        self._state, metrics = self._compiled(self._state, self._batch)
        jax.block_until_ready(self._state)
        time.sleep(self._release_seconds)  # as the trainer does
        return float(metrics["loss"])
