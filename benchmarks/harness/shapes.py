"""The shapes, the random data and the names that all subjects of a benchmark have in common."""

import dataclasses
from typing import Any

import numpy as np

from topklm.config import Config, ModelConfig, TrainConfig
from topklm.errors import UserError


def _shape(batch_size: int, heads: int, **model: Any) -> Config:
    model |= {"n_heads": heads, "n_kv_heads": heads}
    return Config(model=ModelConfig(**model), train=TrainConfig(batch_size=batch_size))


_S1 = {"d_model": 256, "n_layers": 6, "d_mlp": 688, "topk_k": 32, "n_nontopk": 1}
_S2 = {"d_model": 512, "n_layers": 8, "d_mlp": 1376, "topk_k": 64, "n_nontopk": 2}
SHAPES = {
    "s1": _shape(16, 4, vocab_size=4096, context_length=256, **_S1),
    "s2": _shape(8, 8, vocab_size=8192, context_length=512, **_S2),
}


def with_model(config: Config, **fields: object) -> Config:
    """Returns the config with other fields of its model."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))  # type: ignore[arg-type]


def base(config: Config) -> Config:
    """Returns the same without TopK: the Base LM."""
    return with_model(config, n_nontopk=config.model.n_layers)


def named(names: str) -> dict[str, Config]:
    """Parses a comma-separated list of shapes.

    Raises:
        UserError: For a name that is none.
    """
    wanted = [name.strip().lower() for name in names.split(",")]
    for name in wanted:
        if name not in SHAPES:
            raise UserError(f"--shape = {name}: must be among {', '.join(SHAPES)}; or give a --config")
    return {name: SHAPES[name] for name in wanted}


def random_tokens(config: Config) -> np.ndarray:
    """Draws tokens uniformly, int32[B, T + 1]; the same for every subject."""
    shape = (config.train.batch_size, config.model.context_length + 1)
    return np.random.default_rng(0).integers(0, config.model.vocab_size, shape, dtype=np.int32)


def random_rows(rows: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws activations and a gradient of them, normal, float32[rows, d]; the same for every subject."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((rows, d), np.float32), rng.standard_normal((rows, d), np.float32)


def topk_side(k: int, operation: str, *, backward: bool) -> str:
    """Names a subject that runs TopK."""
    return f"k {k}, {operation}, {'forward and backward' if backward else 'forward'}"
