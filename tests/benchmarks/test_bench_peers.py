"""The peer does the same work as ours: the same operation, the same loss, the same update."""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest

from benchmarks import peers
from benchmarks.cases import topk as our_topk
from benchmarks.harness.shapes import SHAPES, base, with_model
from benchmarks.subjects import train_step
from topklm.errors import UserError
from topklm.model import transformer
from topklm.model.topk import topk

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
llama = importlib.import_module("benchmarks.peers.llama")
torch_step = importlib.import_module("benchmarks.peers.torch_step")

SMALL = with_model(
    SHAPES["s1"],
    d_model=32,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    d_mlp=48,
    vocab_size=61,
    context_length=24,
    topk_k=8,
)
SMALL = dataclasses.replace(SMALL, train=dataclasses.replace(SMALL.train, batch_size=4))


def peer_training(config):
    params = transformer.create(config.model, config.train.seed)
    return torch_step.Training(config, llama.state_dict(config.model, params), compiled=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["topk", "base", "tied"],
)
def test_the_loss_of_the_first_step_and_the_one_after_its_update_are_ours(name):
    config = {
        "topk": SMALL,
        "base": base(SMALL),
        "tied": with_model(base(SMALL), tie_embeddings=True, init_embed_std=0.2),
    }[name]
    ours = train_step.prepare({"config": config.to_dict()})
    theirs = peer_training(config)
    assert sum(p.numel() for p in theirs.model.parameters()) < ours.facts["parameters"]  # ours has padding
    assert theirs.step() == pytest.approx(ours.facts["first_loss"], rel=1e-5)
    # The update hardly depends on which entries were active; a support that flips moves the loss a little.
    assert theirs.step() == pytest.approx(ours.subjects["step"](), rel=1e-4 if name != "topk" else 1e-3)


@pytest.mark.slow
def test_bfloat16_is_autocast_over_float32_weights():
    config = with_model(SMALL, dtype="bfloat16")
    theirs = peer_training(config)
    loss = theirs.step()
    assert {p.dtype for p in theirs.model.parameters()} == {torch.float32}
    assert loss == pytest.approx(
        train_step.prepare({"config": config.to_dict()}).facts["first_loss"], rel=2e-2
    )


@pytest.mark.parametrize("activation", ["relu", "identity", "abs"])
def test_the_operations_are_the_same(activation):
    x = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32)
    ours = np.asarray(topk(x, 7, activation, "lax"))
    np.testing.assert_array_equal(llama.topk(torch.tensor(x), 7, activation).numpy(), ours)
    if activation == "relu":
        np.testing.assert_array_equal(jax.jit(our_topk.top_k_and_scatter, static_argnums=1)(x, 7), ours)


def test_a_peer_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"--peer = torch: torch is not installed; pip install 'topklm\[peers\]'"
    ):
        peers.require("torch")
