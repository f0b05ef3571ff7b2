"""A store of activations as a cache of delphi (EleutherAI), which explains neurons by a language model.

    layers.L/0_{D - 1}.safetensors    locations [E, 3] (row, position, neuron), activations, tokens [rows, T]
    layers.L/config.json

The cache is one stream of rows; a row holds tokens of several documents where they are short.
"""

import json
from pathlib import Path

import numpy as np

from topklm.errors import UserError
from topklm.imports import optional_module
from topklm.neurons.store import Store

ROW = 64  # tokens; a neuron that is active in each of them has no counterexamples over there
_KIND = np.uint16


def write(store: Store, out: Path, model_name: str) -> None:
    """Writes the whole rows of a store; UserError if it holds none."""
    numpy = optional_module("safetensors.numpy", "export", "topklm export")
    rows, width = store.n_tokens // ROW, store.metadata.d_model
    if not rows:
        raise UserError(f"{store.folder}: holds {store.n_tokens} tokens, and a row takes {ROW}: harvest more")
    tokens = store.tokens(0, rows * ROW).reshape(rows, ROW).astype(np.int64)
    # Over there all three columns have one dtype.
    kind = _KIND if max(rows, width) <= np.iinfo(_KIND).max else np.uint32
    for layer in store.metadata.layers:
        block = store.block(layer, 0, width)
        neurons = np.repeat(np.arange(width), np.diff(block.offsets))
        locations = np.stack([block.tokens // ROW, block.tokens % ROW, neurons], axis=1)
        kept = block.tokens < rows * ROW
        arrays = {
            "locations": np.ascontiguousarray(locations[kept].astype(kind)),
            "activations": block.values[kept].astype(np.float16),
            "tokens": tokens,
        }
        folder = out / f"layers.{layer}"
        folder.mkdir()
        numpy.save_file(arrays, folder / f"0_{width - 1}.safetensors")
        about = {
            "model_name": model_name,
            "ctx_len": ROW,
            "dataset_repo": "",
            "dataset_split": "",
            "dataset_name": "",
            "batch_size": 8,
            "n_tokens": rows * ROW,
            "n_splits": 1,
        }
        (folder / "config.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
