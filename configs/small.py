"""The quickstart: a TopK language model on English Wikipedia leads, minutes on a laptop.

--config=configs/small.py        TopK
--config=configs/small.py:base   the same model and tokens without TopK, to compare with
--config=configs/small.py:hour   a larger TopK model that trains for about an hour
"""

import ml_collections

from topklm import config as config_lib
from topklm.errors import UserError

VARIANTS = ("topk", "base", "hour")


def get_config(variant: str = "topk") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise UserError(f"configs/small.py:{variant}: the variants are {', '.join(VARIANTS)}")
    config = config_lib.default()
    if variant == "base":
        config.model.n_nontopk = config.model.n_layers
    return config
