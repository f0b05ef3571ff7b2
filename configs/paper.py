"""Models of the sizes that papers report, each with a TPU slice that it is shown to fit (docs/scaling.md).

--config=paper:130m        TopK; also 400m, 1.4b, 7b
--config=paper:130m-base   the same model and tokens without TopK, to compare with
--config=paper:130m-gpu    the same training run on one GPU; also 130m-gpu-base

Prepare the text first (README, "Your own data"), with --tokenizer=train:32768, into datasets/web or anywhere:
--config.data.source. The learning rates are starting points, not tuned.
"""

from typing import Any

import ml_collections

from topklm import config as config_lib
from topklm.errors import UserError

VOCABULARY = 32_768
TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022, table 3

# Llama-like shapes with heads of 128, which fill a TPU's matrix unit; TopK keeps one entry in 16.
_MODELS: dict[str, dict[str, Any]] = {
    "130m": {"d_model": 768, "n_layers": 12, "n_heads": 6, "n_kv_heads": 6, "d_mlp": 2048},
    "400m": {"d_model": 1024, "n_layers": 24, "n_heads": 8, "n_kv_heads": 8, "d_mlp": 3072},
    "1.4b": {"d_model": 2048, "n_layers": 24, "n_heads": 16, "n_kv_heads": 8, "d_mlp": 6144},
    "7b": {"d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "d_mlp": 14_336},
}
_CONTEXT = {"130m": 2048, "400m": 2048, "1.4b": 2048, "7b": 4096}
_SEQUENCES = {"130m": 256, "400m": 512, "1.4b": 1024, "7b": 1024}  # a step: 0.5, 1, 2 and 4 million tokens

# One dim of the slice's torus for fsdp, the others for data: see docs/scaling.md.
TOPOLOGIES = {"130m": "v5e:4x4", "400m": "v5e:8x8", "1.4b": "v5e:16x16", "7b": "v5p:4x4x8"}
_FSDP = {"130m": 1, "400m": 8, "1.4b": 16, "7b": 8}
VARIANTS = (*(f"{size}{twin}" for size in _MODELS for twin in ("", "-base")), "130m-gpu", "130m-gpu-base")


def get_config(variant: str = "130m") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise UserError(f"--config = paper:{variant}: the variants are {', '.join(VARIANTS)}")
    size, *options = variant.split("-")
    config = config_lib.default()
    config.data.update(source="datasets/web", vocab_size=VOCABULARY)
    config.model.update(_MODELS[size], context_length=_CONTEXT[size], topk_k=_MODELS[size]["d_model"] // 16)
    config.model.update(dtype="bfloat16", remat="full")
    tokens = _SEQUENCES[size] * _CONTEXT[size]
    steps = round(TOKENS_PER_PARAMETER * parameter_count(config.model) / tokens)
    config.train.update(batch_size=_SEQUENCES[size], steps=steps)
    # From what is best for configs/small.py, down with the width (Yang et al. 2022, table 3).
    config.optim.update(learning_rate=1.5 / config.model.d_model, warmup_steps=steps // 50, z_loss=1e-4)
    config.optim.update(final_learning_rate_fraction=0.1)
    config.mesh.update(data=-1, fsdp=_FSDP[size])
    config.checkpoint.update(every_steps=500, keep=3)
    config.eval.update(every_steps=1000, batch_size=_SEQUENCES[size])
    if "gpu" in options:
        config.train.grad_accumulation = 8
    if "base" in options:
        config.model.n_nontopk = config.model.n_layers
    return config


def parameter_count(model: ml_collections.ConfigDict) -> int:
    """Counts the parameters of a model whose vocabulary is `VOCABULARY`."""
    d, head = model.d_model, model.d_model // model.n_heads
    attention = 2 * d * model.n_heads * head + 2 * d * model.n_kv_heads * head
    return 2 * VOCABULARY * d + model.n_layers * (attention + 3 * d * model.d_mlp + 2 * d) + d
