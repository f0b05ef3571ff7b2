"""PyTorch's way to training windows: a `DataLoader` over a `numpy.memmap` of one flat file of tokens.

Each window is cut from the file and widened to int64 inputs and targets, in this process or by as many
workers as there are cores; the windows and their order are given.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch.utils.data

from benchmarks.cases.data import STARTS_FILE, TOKENS_FILE
from benchmarks.harness.worker import Prepared, threads


def prepare(spec: Mapping[str, Any]) -> Prepared:
    """Prepares its subjects; `spec` has `folder`, `dtype`, `context_length` and `batch_size`."""
    subjects = {}
    for workers in (0, threads()):
        name = f"torch DataLoader, {workers} workers" if workers else "torch DataLoader"
        loader = make_loader(spec, workers)

        def read_all(loader: Any = loader) -> None:
            for _ in loader:
                pass

        subjects[name] = read_all
    return Prepared(subjects, {})


def make_loader(spec: Mapping[str, Any], workers: int) -> torch.utils.data.DataLoader:
    """Makes a `DataLoader` of (inputs, targets), int64 [B, T] each, for the windows of one turn."""
    folder = Path(spec["folder"])
    return torch.utils.data.DataLoader(
        _Windows(folder / TOKENS_FILE, spec["dtype"], spec["context_length"]),
        batch_size=spec["batch_size"],
        sampler=np.load(folder / STARTS_FILE).tolist(),
        num_workers=workers,
        persistent_workers=workers > 0,
    )


class _Windows(torch.utils.data.Dataset):
    """The window that begins at a token."""

    def __init__(self, path: Path, dtype: str, context_length: int):
        self._tokens = np.memmap(path, dtype, mode="r")
        self._context_length = context_length

    def __getitem__(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        window = self._tokens[start : start + self._context_length + 1].astype(np.int64)
        return window[:-1], window[1:]
