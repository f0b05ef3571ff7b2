"""Hidden states that are sums of a few directions; as a script, training: `FOLDER DEVICES KIND BATCHES`."""

from pathlib import Path
import sys
import time

import numpy as np

from topklm.config import MeshConfig
from topklm.layout import make_layout
from topklm.sae.kinds import SaeConfig
from topklm.sae.train import Saving, fit

S, D, M, K, N = 2, 8, 24, 2, 128
N_BATCHES = 40
DIRECTIONS = 12


def directions() -> np.ndarray:
    found = np.random.default_rng(0).normal(size=(S, DIRECTIONS, D))
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


def batch(number: int) -> np.ndarray:
    """Hidden states float32[S, N, D], sums of two of twelve directions, at two scales."""
    rng = np.random.default_rng(1000 + number)
    codes = np.zeros((S, N, DIRECTIONS))
    for layer in range(S):
        which = np.argsort(rng.random((N, DIRECTIONS)), axis=1)[:, :K]
        np.put_along_axis(codes[layer], which, rng.uniform(1, 2, which.shape), axis=1)
    scales = np.array([1.0, 50.0])[:, None, None]
    return (scales * (codes @ directions() + 3)).astype(np.float32)


def states(first: int = 0, stop: int = N_BATCHES):
    return (batch(number) for number in range(first, stop))


def config(kind: str = "topk", width: int = M, k: int = K, **options) -> SaeConfig:
    return SaeConfig(kind, width, k, **{"minibatch": 64, "learning_rate": 0.02, **options})


def tell(tokens: int) -> None:
    print("trained on", tokens, flush=True)
    time.sleep(0.1)


if __name__ == "__main__":
    folder, devices, kind, n_batches = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    layout = make_layout(MeshConfig())
    assert layout.size == devices
    saving = Saving(folder / "state.npz", {"of": "made"}, every_s=0)
    fitted = fit(config(kind), states, n_batches, layout=layout, saving=saving, report=tell)
    fitted.dictionary.save(folder / "dictionary.npz")
