"""A model of books: some 40 million tokens, prepared first (README, "Your own data").

--config=books          TopK, for one GPU
--config=books:base     the same model and tokens without TopK, to compare with
--config=books:laptop   a TopK model small enough for a CPU
"""

import ml_collections

from topklm import config as config_lib
from topklm.errors import UserError

VARIANTS = ("topk", "base", "laptop")


def get_config(variant: str = "topk") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise UserError(f"--config = books:{variant}: the variants are {', '.join(VARIANTS)}")
    config = config_lib.default()
    config.data.source = "datasets/books"
    if variant == "laptop":
        config.train.update(steps=800, batch_size=8)
        config.eval.update(every_steps=0)  # 1.2 million held-out tokens take longer than a hundred steps
        return config
    config.model.update(d_model=512, n_layers=8, n_heads=8, n_kv_heads=8, d_mlp=1408, context_length=1024)
    config.model.update(topk_k=64, dtype="bfloat16")
    # Four passes: more repeat what the model knows by heart.
    config.train.update(steps=2400, batch_size=64)
    config.optim.update(learning_rate=2e-3, warmup_steps=200)
    config.eval.update(every_steps=400, batch_size=64)
    if variant == "base":
        config.model.n_nontopk = config.model.n_layers
    return config
