"""The quickstart: a TopK language model on English Wikipedia leads, minutes on a laptop.

--config=small                 TopK
--config=small:base            the same model and tokens without TopK, to compare with
--config=small:hour            a larger TopK model, about an hour on a laptop
--config=small:readable        neurons that tell uses of a token apart (docs/readability.md)
--config=small:readable-base   the same model and tokens without TopK
--config=small:topics          as readable, and 64 neurons of each layer tell what a text is about
"""

import ml_collections

from topklm import config as config_lib
from topklm.errors import UserError

VARIANTS = ("topk", "base", "hour", "readable", "readable-base", "topics")


def get_config(variant: str = "topk") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise UserError(f"--config = small:{variant}: the variants are {', '.join(VARIANTS)}")
    config = config_lib.default()
    config.checkpoint.trace = "log"  # 17 entries of 10 MB each
    if variant.startswith("readable") or variant == "topics":
        # Twice the neurons, half of them active, and blocks that are half as wide.
        config.model.update(d_model=512, head_dim=64, d_mlp=344, topk_k=16)
        config.model.update(token_input="every", topk_groups="16:4,112:6,384:6", topk_centred=True)
        config.train.steps = 1200
        config.optim.learning_rate = 3e-3
    if variant == "topics":
        config.model.topk_groups = "64:4,448:12"
        config.optim.topic_weight = 5.0
    if variant.endswith("base"):
        config.model.n_nontopk = config.model.n_layers
    if variant == "hour":
        config.model.update(d_model=384, n_layers=6, n_heads=6, n_kv_heads=6, d_mlp=1024, topk_k=48)
        config.train.update(steps=1000, batch_size=16)
        # Three passes over a small corpus: a smaller step and more decay keep it from learning it by heart.
        config.optim.update(learning_rate=4e-3, weight_decay=0.3)
    return config
