"""Attention between syntactic neighbours in the loss: value, gradient, effect; which sentences a step reads.

Run as a program with a folder, this file prints the figures of two steps on a mesh of four virtual devices.
"""

import dataclasses
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

import helpers
from helpers import ROOT
import jax
import jax.numpy as jnp
from making import conllu
import numpy as np
import optax
import pytest
from references import attention_in_float64

from topklm.config import Config, MeshConfig, ModelConfig, OptimConfig, TrainConfig, resolve
from topklm.data.tokenizer import train_bpe
from topklm.errors import UserError
from topklm.layout import make_layout, one_device
from topklm.model import transformer
from topklm.neurons import labelled_texts
from topklm.training import syntax
from topklm.training.step import TrainState, empty_window, make_optimizer, make_train_step
from topklm.training.syntax import SentenceBatches

MODEL = ModelConfig(
    d_model=16,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    d_mlp=24,
    vocab_size=257,
    context_length=32,
    topk_k=6,
    init_embed_std=0.5,
)
TRAIN = TrainConfig(batch_size=4, steps=40)
SENTENCES = conllu(
    [("The", 2, "det"), ("sea", 3, "nsubj"), ("has", 0, "root"), ("salt", 3, "obj"), (".", 3, "punct")],
    [("We", 2, "nsubj"), ("saw", 0, "root"), ("old", 4, "amod"), ("mills", 2, "obj")],
    [("Mills", 2, "nsubj"), ("turn", 0, "root")],
    [("So", 2, "advmod"), ("slow", 0, "root")],
    [("In", 2, "case"), ("Rome", 0, "root")],
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("trees") / "some.conllu"
    path.write_text(SENTENCES)
    return labelled_texts.read_trees(path, train_bpe([], 257), MODEL.context_length)


def config_of(weight, steps=0, **more):
    optim = OptimConfig(learning_rate=3e-3, warmup_steps=1, syntax_weight=weight, syntax_steps=steps)
    return dataclasses.replace(Config(), model=MODEL, train=TRAIN, optim=optim, **more)


def batches(found, layout=None, seed=0):
    config = config_of(1.0)
    config = dataclasses.replace(config, train=dataclasses.replace(TRAIN, seed=seed))
    return SentenceBatches(found, config, layout or one_device())


def expected(params, sentences, config=MODEL):
    """The same by loops in float64, of float64 parameters."""
    tokens, segments, words, arcs = (
        np.asarray(sentences[name]) for name in ("tokens", "segment_ids", "words", "arcs")
    )
    weights = attention_in_float64(config, params, tokens, segments)
    largest = []
    for row in range(len(tokens)):
        for later, earlier in arcs[row]:
            if later >= 0:
                own, other = (np.flatnonzero(words[row] == word) for word in (later, earlier))
                pair = weights[:, row][:, :, own][:, :, :, other]
                largest.append(pair.sum(axis=3).mean(axis=2).max())
    return np.mean(largest)


def test_the_gradient_is_that_of_finite_differences_in_float64(found):
    params = jax.tree.map(np.asarray, transformer.create(MODEL, 0))
    sentences = batches(found).batch(1)[0]
    program = jax.jit(jax.value_and_grad(lambda p: syntax.attention_of_neighbours(MODEL, p, sentences)))
    value, gradient = program(params)
    assert float(value) == pytest.approx(expected(params, sentences), rel=1e-5)
    exact = jax.tree.map(lambda x: x.astype(np.float64), params)
    assert any(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(gradient))
    for seed in range(4):
        rng = np.random.default_rng(seed)
        way = jax.tree.map(lambda x, rng=rng: rng.standard_normal(x.shape), exact)
        sides = [
            expected(jax.tree.map(lambda x, w, e=e: x + e * w, exact, way), sentences) for e in (1e-7, -1e-7)
        ]
        along = sum((g * w).sum() for g, w in zip(*map(jax.tree.leaves, (gradient, way)), strict=True))
        assert float(along) == pytest.approx((sides[0] - sides[1]) / 2e-7, rel=2e-3, abs=2e-6)


def test_it_is_a_mean_over_arcs_whatever_the_sentences():
    attention = np.random.default_rng(0).random((3, 2, 4, 6, 6)).astype(np.float32)
    arcs = np.array([[[2, 0], [3, 1]], [[4, 2], [-1, -1]]])
    largest = [attention[:, b, :, i, j].max() for b, i, j in ((0, 2, 0), (0, 3, 1), (1, 4, 2))]
    of_layers = jnp.stack([syntax.largest_of_heads(of_layer, arcs) for of_layer in attention])
    assert float(syntax.mean_over_arcs(of_layers, arcs)) == pytest.approx(np.mean(largest))
    twice, both = np.concatenate([arcs, arcs]), jnp.concatenate([of_layers, of_layers], axis=1)
    assert float(syntax.mean_over_arcs(both, twice)) == pytest.approx(np.mean(largest))


def text_batch(seed=0):
    tokens = np.random.default_rng(seed).integers(1, 257, (4, 33)).astype(np.int32)
    whole = np.ones((4, 32), np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": whole,
        "positions": np.broadcast_to(np.arange(32, dtype=np.int32), (4, 32)),
        "loss_weights": whole.astype(np.float32),
    }


def state_of(optimizer, layout):
    params = transformer.create(MODEL, 0)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), empty_window())
    return jax.device_put(state, layout.shardings(state), may_alias=False)


def trained(config, layout, found, n_steps):
    """The last state, and the metrics of every step."""
    optimizer = make_optimizer(config.optim, config.train.steps)
    state, step = state_of(optimizer, layout), make_train_step(config, optimizer, layout)
    of_steps, text = batches(found, layout), jax.device_put(text_batch(), layout.batch)
    lines = []
    for number in range(1, n_steps + 1):
        state, metrics = step(state, text, *of_steps.batch(number))
        lines.append({name: float(value) for name, value in metrics.items()})
    return state, lines


@pytest.mark.parametrize("weight", [1.0, pytest.param(-1.0, marks=pytest.mark.slow)])
def test_a_weight_above_0_suppresses_and_one_below_0_promotes(found, weight):
    lines = trained(config_of(weight), one_device(), found, 12)[1]
    begin, end = (lines[n]["syntax_attention"] for n in (0, -1))
    assert (begin - end) * weight > 0.1


def test_a_step_adds_the_weight_times_the_gradient_until_it_is_released(found):
    optimizer, sentences = optax.sgd(1.0), batches(found).batch(1)[0]
    with_sentences, plain = (
        make_train_step(config_of(weight, steps=3), optimizer, one_device()) for weight in (0.7, 0.0)
    )
    params = jax.tree.map(np.asarray, transformer.create(MODEL, 0))
    gradient = jax.jit(jax.grad(lambda p: syntax.attention_of_neighbours(MODEL, p, sentences)))(params)

    def after(step, number, *more):
        state = state_of(optimizer, one_device())._replace(step=jnp.int32(number))
        done, metrics = step(state, text_batch(), *more)
        return jax.tree.leaves(jax.device_get(done.params)), float(metrics["loss"])

    (base, loss), (in_time, same_loss), (late, _) = (
        after(plain, 0),
        after(with_sentences, 2, sentences),
        after(with_sentences, 3, sentences),
    )
    assert same_loss == loss
    for a, b, c, g in zip(base, in_time, late, jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(b - a, -0.7 * g, rtol=1e-3, atol=2e-6)
        np.testing.assert_allclose(c, a, rtol=1e-5, atol=1e-6)


def test_without_sentences_the_program_is_the_plain_one(found):
    def text(config):
        optimizer = make_optimizer(config.optim, config.train.steps)
        abstract = jax.eval_shape(lambda: state_of(optimizer, one_device()))
        return make_train_step(config, optimizer, one_device()).lower(abstract, text_batch()).as_text()

    plain = dataclasses.replace(config_of(0.0), data=Config().data)
    named = dataclasses.replace(plain, data=dataclasses.replace(plain.data, syntax="some.conllu"))
    assert text(named) == text(plain)


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["data=2,fsdp=2", "fsdp=2,tensor=2", "fsdp=2,context=2"])
def test_devices_together_learn_the_same(found, tmp_path, axes):
    (tmp_path / "some.conllu").write_text(SENTENCES)
    command = [sys.executable, __file__, str(tmp_path / "some.conllu"), axes]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = {**os.environ, **helpers.devices(4), "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    _, alone = trained(config_of(-0.5), one_device(), found, 2)
    for a, b in zip(alone, json.loads(done.stdout), strict=True):
        assert a["syntax_attention"] == pytest.approx(b["syntax_attention"], rel=1e-4)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4)


def test_every_epoch_has_each_sentence_once_by_the_step_alone(found):
    given = batches(found)
    in_turn = np.concatenate([given.numbers(step) for step in range(1, 11)])
    for epoch in range(8):
        assert sorted(in_turn[5 * epoch : 5 * epoch + 5].tolist()) == [0, 1, 2, 3, 4]
    assert len({tuple(in_turn[5 * e : 5 * e + 5].tolist()) for e in range(8)}) > 1
    np.testing.assert_array_equal(batches(found).numbers(7), in_turn[24:28])
    assert not np.array_equal(
        np.concatenate([batches(found, seed=1).numbers(step) for step in range(1, 11)]), in_turn
    )


@pytest.mark.slow
def test_a_run_goes_on_with_the_sentences_of_its_step(trainer, tmp_path):
    path = tmp_path / "some.conllu"
    path.write_text(SENTENCES)
    settings = {
        "optim.syntax_weight": -1.0,
        "data.syntax": path,
        "data.dir": tmp_path / "datasets",
        "train.steps": 6,
        "checkpoint.every_steps": 3,
    }
    run = tmp_path / "run"
    ended = trainer.train(run, settings)
    assert ended.exit_code == 0, ended.errors
    assert "some.conllu: 5 sentences" in ended.output
    assert all("train/syntax_attention" in line for line in helpers.metrics(run) if "train/loss" in line)
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "6")
    ended = trainer.train(again, settings)
    assert ended.exit_code == 0, ended.errors
    helpers.assert_same_bits(helpers.final_arrays(run), helpers.final_arrays(again))
    shutil.rmtree(again / "checkpoints" / "6")
    path.write_text(SENTENCES.replace("sea", "lake"))
    ended = trainer.train(again, settings)
    assert ended.exit_code == 2
    assert "not the sentences that this run was trained with" in helpers.assert_one_line_error(ended.errors)


def test_other_sentences_than_those_of_a_checkpoint_are_refused(found, tmp_path):
    given = batches(found)
    given.check_facts(given.facts())
    (tmp_path / "some.conllu").write_text(SENTENCES.replace("sea", "lake"))
    other = labelled_texts.read_trees(tmp_path / "some.conllu", train_bpe([], 257), MODEL.context_length)
    for facts in (batches(other).facts(), {}):
        with pytest.raises(UserError, match="not the sentences that this run was trained with"):
            given.check_facts(facts)


def test_a_treebank_without_heads_ends_the_run_in_a_line(trainer, tmp_path):
    path = tmp_path / "some.conllu"
    path.write_text(SENTENCES.replace("\t3\tobj", "\t_\tobj"))
    settings = {"optim.syntax_weight": 1.0, "data.syntax": path}
    ended = trainer.train(tmp_path / "new", settings)
    assert ended.exit_code == 2
    assert "data.syntax = " in (line := helpers.assert_one_line_error(ended.errors))
    assert "has no heads" in line


def test_a_treebank_that_is_not_there_is_told_before_the_data_are_prepared(trainer, tmp_path):
    datasets = tmp_path / "datasets"
    settings = {"optim.syntax_weight": 1.0, "data.syntax": tmp_path / "nowhere.conllu", "data.dir": datasets}
    ended = trainer.train(tmp_path / "run", settings)
    assert ended.exit_code == 2
    said = helpers.assert_one_line_error(ended.errors)
    assert f"data.syntax = {tmp_path / 'nowhere.conllu'}: there is no such file" in said
    assert not datasets.exists()


def test_a_weight_without_sentences_is_refused():
    with pytest.raises(UserError, match=r"optim.syntax_weight = 1.0: must be 0 without data.syntax"):
        resolve({"optim": {"syntax_weight": 1.0}})


if __name__ == "__main__":
    axes = {name: int(size) for name, size in (pair.split("=") for pair in sys.argv[2].split(","))}
    read = labelled_texts.read_trees(Path(sys.argv[1]), train_bpe([], 257), MODEL.context_length)
    print(json.dumps(trained(config_of(-0.5), make_layout(MeshConfig(**{"data": 1, **axes})), read, 2)[1]))
