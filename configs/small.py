"""The quickstart: a TopK language model on English Wikipedia leads, minutes on a laptop.

    --config=configs/small.py        TopK, some minutes on two cores
    --config=configs/small.py:base   the same model without TopK, to compare with
    --config=configs/small.py:hour   a larger TopK model, about an hour
"""

import ml_collections

from topklm import config as config_lib


def get_config(variant: str = "topk") -> ml_collections.ConfigDict:
    return config_lib.default()
