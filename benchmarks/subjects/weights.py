"""Writes the parameters that a config starts from to a file, under the peer's names, so both start alike."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.harness.worker import Prepared
from benchmarks.peers.llama import state_dict
from topklm import config as config_lib
from topklm.model import transformer


def prepare(spec: Mapping[str, Any]) -> Prepared:
    """Writes the file; has no subjects.

    Args:
        spec: `config`, with its vocabulary, and `file`, an .npz to be written.
    """
    config = config_lib.resolve(spec["config"])
    weights: dict[str, Any] = state_dict(config.model, transformer.create(config.model, config.train.seed))
    np.savez(spec["file"], **weights)
    return Prepared({}, {})
