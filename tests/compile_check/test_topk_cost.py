"""The cost that TopK adds to a train step on a TPU: the same step compiled with TopK and without."""

import dataclasses
import importlib.util

import pytest

from topklm.compile_check import check
from topklm.config import resolve

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]

# As the recipes of configs/paper.py, with shorter windows and fewer layers, all but one of them sparse.
SHAPE = {
    "d_model": 768,
    "n_layers": 4,
    "n_heads": 6,
    "n_kv_heads": 6,
    "d_mlp": 2048,
    "vocab_size": 32_768,
    "context_length": 1024,
    "topk_k": 48,
    "dtype": "bfloat16",
    "layer_stack": "scanned",
    "remat": "full",
}


def compiled(**model):
    config = resolve({"model": {**SHAPE, **model}, "train": {"batch_size": 16}})
    return check.compile_check(config, check.find("v5e:2x2"), "made")


@pytest.fixture(scope="module")
def sparse():
    return compiled()


@pytest.fixture(scope="module")
def base():
    return compiled(n_nontopk=SHAPE["n_layers"])


def test_topk_adds_no_collective(sparse, base):
    def rows(report):
        return [dataclasses.replace(row, seconds=0.0) for row in report.traffic]

    assert rows(sparse) == rows(base)


def test_topk_adds_little_memory_traffic(sparse, base):
    """Allows little: so few tokens stay on the chip between two operations; the 130M recipe adds 1.4 %."""
    assert sparse.hbm_traffic < 1.005 * base.hbm_traffic


def test_topk_adds_little_memory(sparse, base):
    assert sparse.memory.temporaries < 1.005 * base.memory.temporaries


def test_topk_adds_no_matrix_product(sparse, base):
    assert sparse.compiled_flops == pytest.approx(base.compiled_flops, rel=1e-9)


def test_the_products_are_those_of_the_model_and_of_what_is_computed_again(sparse):
    """Counts forward, backward and the forward pass again: at most 4 / 3, less what attention leaves out."""
    assert 1.1 < sparse.compiled_flops / sparse.model_flops < 1.45
