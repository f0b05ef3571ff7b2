"""Run folders made without training: a config, a tokenizer, and checkpoints of random numbers.

For tests of what reads a run; what training leaves behind is that of `conftest.finished_run`.
"""

from collections.abc import Sequence
import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np

from topklm.checkpoint import run_folder
from topklm.checkpoint.manager import CheckpointManager
from topklm.config import CheckpointConfig, Config, ModelConfig
from topklm.data.tokenizer import Tokenizer, train_bpe
from topklm.layout import Layout, one_device
from topklm.storage.files import AnyPath, write_atomically
from topklm.training.step import TrainState, abstract_state, make_optimizer

MODEL = ModelConfig(
    d_model=32,
    n_layers=2,
    n_heads=2,
    n_kv_heads=2,
    d_mlp=64,
    vocab_size=257,
    context_length=32,
    topk_k=8,
)
CONFIG = dataclasses.replace(Config(), model=MODEL, checkpoint=CheckpointConfig(keep=10))


@functools.cache
def tokenizer() -> Tokenizer:
    """Of 257 tokens, as in CONFIG."""
    return train_bpe(["some text"] * 10, 257)


def state(step: int, config: Config = CONFIG, layout: Layout | None = None) -> TrainState:
    """A training state of random numbers, other ones for each step, without compiling anything."""
    layout = layout or one_device()
    abstract = abstract_state(config, make_optimizer(config.optim, 100))
    random = np.random.default_rng(step)

    def draw(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.NamedSharding) -> jax.Array:
        is_float = np.issubdtype(leaf.dtype, np.floating)
        content = random.standard_normal(leaf.shape) if is_float else np.full(leaf.shape, step)
        content = content.astype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: content[index])

    return jax.tree.map(draw, abstract, layout.shardings(abstract))


def facts(step: int, config: Config = CONFIG) -> dict[str, Any]:
    return {"config": config.to_dict(), "tokenizer_sha256": tokenizer().sha256, "step": step}


def describe(folder: AnyPath, config: Config = CONFIG) -> None:
    """Writes what stands beside the checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / run_folder.CONFIG_FILE, json.dumps(config.to_dict()).encode())
    write_atomically(folder / run_folder.TOKENIZER_FILE, tokenizer().to_bytes())


def save(folder: AnyPath, steps: Sequence[int], config: Config = CONFIG) -> dict[int, Any]:
    """Makes a run folder; returns the parameters of each step as NumPy arrays."""
    describe(folder, config)
    checkpoints = CheckpointManager(folder / run_folder.CHECKPOINTS_FOLDER, config.checkpoint)
    saved = {}
    for step in steps:
        now = state(step, config)
        saved[step] = jax.tree.map(np.array, now.params)
        checkpoints.save(now, {"position": step}, facts(step, config))
        checkpoints.wait()
    checkpoints.close()
    return saved


def make_earlier_version(checkpoint: pathlib.Path) -> None:
    """Takes from a checkpoint what versions without a record of checksums did not write."""
    (checkpoint / "facts" / "checksums.json").unlink(missing_ok=True)
    facts = checkpoint / "facts" / "metadata"
    facts.write_text(json.dumps({k: v for k, v in json.loads(facts.read_text()).items() if k != "format"}))
