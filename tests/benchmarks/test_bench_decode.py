"""Generation is measured with the same tokens on both sides, against a floor that can be counted by hand."""

import argparse
import dataclasses
import importlib

import jax
import numpy as np
import pytest

from benchmarks.cases import decode
from benchmarks.harness import roofline
from benchmarks.harness.timing import Samples
from topklm.config import Config, ModelConfig
from topklm.errors import UserError
from topklm.model import transformer

MODEL = ModelConfig(
    d_model=32,
    n_layers=2,
    n_heads=2,
    n_kv_heads=2,
    d_mlp=48,
    vocab_size=61,
    vocab_multiple=1,
    context_length=32,
    topk_k=8,
    n_nontopk=1,
)
CONFIG = Config(model=MODEL)
RATES = roofline.Rates("float32", flops_per_second=1e11, bytes_per_second=1e10)


@pytest.fixture(scope="module")
def params():
    return transformer.create(MODEL, 0)


@pytest.mark.slow
def test_continuations_are_the_most_likely_tokens_of_a_plain_loop(params):
    prompts = decode.random_prompts(MODEL, 2)
    forward = jax.jit(transformer.bind(MODEL, params))
    want = []
    for prompt in prompts.tolist():
        for _ in range(3):
            prompt.append(int(np.argmax(forward(np.asarray([prompt]))[0, -1])))
        want.append(prompt[-3:])
    assert decode.continuations(MODEL, params, prompts, 3) == want


@pytest.mark.slow
def test_pytorch_continues_with_the_same_tokens_from_the_same_weights(params):
    torch = pytest.importorskip("torch")
    llama, torch_decode = (
        importlib.import_module(f"benchmarks.peers.{name}") for name in ("llama", "torch_decode")
    )
    prompts = decode.random_prompts(MODEL, 4)
    model = llama.build(MODEL)
    llama.load(model, llama.state_dict(MODEL, params))
    theirs = torch_decode.continuations(model.eval(), torch.from_numpy(prompts), 6)
    assert theirs == decode.continuations(MODEL, params, prompts, 6)


def test_the_floor_is_one_pass_over_the_parameters_or_the_products_of_the_new_tokens(params):
    n = sum(leaf.size for leaf in jax.tree.leaves(params)) - 61 * 32
    slow_memory = roofline.Rates("float32", flops_per_second=1e18, bytes_per_second=1e3)
    slow_products = roofline.Rates("float32", flops_per_second=1e3, bytes_per_second=1e18)
    assert decode.step_floor(CONFIG, 32, slow_memory) == pytest.approx(4 * n / 1e3)
    assert decode.step_floor(CONFIG, 32, slow_products) == pytest.approx(2 * n * 32 / 1e3)
    tied = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, tie_embeddings=True))
    assert decode.step_floor(tied, 1, slow_memory) == decode.step_floor(CONFIG, 1, slow_memory)


def test_the_report_has_tokens_per_second_of_all_sides_beside_the_floor_and_each_other():
    seconds = {
        "batch 1": 2.0,
        "batch 1, steered": 2.5,
        "batch 1, all rows": 3.0,
        "batch 32": 8.0,
        "batch 32, steered": 8.0,
        "torch, batch 1": 1.0,
        "torch, batch 32": 4.0,
    }
    samples = {name: Samples((s, s)) for name, s in seconds.items()}
    report = decode._report(samples, CONFIG, 4, RATES, {"allocator": "some"})
    assert {result.name: result.median for result in report.results} == {
        "batch 1": 2.0,
        "batch 1, steered": 1.6,
        "batch 1, all rows": pytest.approx(4 / 3),
        "torch, batch 1": 4.0,
        "batch 32": 16.0,
        "batch 32, steered": 16.0,
        "torch, batch 32": 32.0,
    }
    assert report.results[-1].floor == pytest.approx(32 / decode.step_floor(CONFIG, 32, RATES))
    assert {comparison.name: comparison.samples for comparison in report.comparisons} == {
        "batch 1 / torch, batch 1": (0.5, 0.5),
        "time of batch 1, steered / batch 1": (1.25, 1.25),
        "batch 32 / torch, batch 32": (0.5, 0.5),
        "time of batch 32, steered / batch 32": (1.0, 1.0),
        "batch 1 / batch 1, all rows": (1.5, 1.5),
    }
    assert report.settings["new_tokens"] == 4


@pytest.mark.slow
def test_everything_runs_in_processes_of_its_own_in_turns(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(roofline, "measure_rates", lambda dtype, repeats: RATES)
    report = decode.run(argparse.Namespace(peer="torch", repeats=2, new_tokens=2), CONFIG)
    assert [len(result.samples) for result in report.results] == [2] * 7
    assert len(report.comparisons) == 5


@pytest.mark.parametrize("new_tokens", [0, 17])
def test_what_does_not_fit_the_context_is_refused(new_tokens):
    with pytest.raises(
        UserError, match=f"--new-tokens = {new_tokens}: must be from 1 to 16, model.context_length"
    ):
        decode.run(argparse.Namespace(peer="", repeats=2, new_tokens=new_tokens), CONFIG)
