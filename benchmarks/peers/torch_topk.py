"""The peer's TopK operation: `torch.topk` and `scatter`, forward, and with its gradient."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import torch

from benchmarks.harness.shapes import random_rows, topk_side
from benchmarks.harness.worker import Prepared, threads
from benchmarks.peers import llama

NAME = "torch.topk + scatter"


def prepare(spec: Mapping[str, Any]) -> Prepared:
    """Prepares the subjects `topk_side` of `NAME` for every k.

    Args:
        spec: `rows`, `d`, `ks` and `dtype`.
    """
    torch.set_num_threads(threads())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[spec["dtype"]]
    x, g = (torch.from_numpy(values).to(device, dtype) for values in random_rows(spec["rows"], spec["d"]))
    subjects: dict[str, Callable[[], Any]] = {}
    for k in spec["ks"]:
        subjects[topk_side(k, NAME, backward=False)] = functools.partial(_forward, x, k)
        subjects[topk_side(k, NAME, backward=True)] = functools.partial(_both, x, g, k)
    return Prepared(subjects, {"platform": device.type})


def _forward(x: torch.Tensor, k: int) -> None:
    with torch.no_grad():
        llama.topk(x, k, "relu")
    _wait(x)


def _both(x: torch.Tensor, g: torch.Tensor, k: int) -> None:
    leaf = x.detach().requires_grad_()
    torch.autograd.grad(llama.topk(leaf, k, "relu"), leaf, g)
    _wait(x)


def _wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()
