"""`train.only`: which parameters move, to the bit; draws by Fisher information; resuming; wrong input.

Run as a program, this file prints the parameters' sums after two steps on a mesh of four virtual devices.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import helpers
from helpers import ROOT
import jax
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats

from topklm.config import Config, MeshConfig, ModelConfig, OptimConfig, TrainConfig, resolve
from topklm.errors import UserError
from topklm.inference.interventions import Intervention, save_interventions
from topklm.layout import make_layout, one_device
from topklm.model import transformer
from topklm.training import only
from topklm.training.step import (
    TrainState,
    empty_window,
    make_loss_and_gradient,
    make_optimizer,
    make_train_step,
)

MODEL = ModelConfig(
    d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, d_mlp=24, vocab_size=61, context_length=16, topk_k=6
)
NEURONS = ((0, 3), (1, 5), (1, 12))
OPTIM = OptimConfig(learning_rate=3e-3, warmup_steps=1, weight_decay=0.3)


def config_of(names="", **more):
    train = TrainConfig(batch_size=4, steps=40, init="runs/small" if names else "", only=names, seed=7)
    return dataclasses.replace(Config(), model=MODEL, train=train, optim=OPTIM, **more)


def batch(seed=0):
    tokens = np.random.default_rng(seed).integers(1, 61, (4, 17)).astype(np.int32)
    ones = np.ones((4, 16), np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": ones,
        "positions": np.broadcast_to(np.arange(16, dtype=np.int32), (4, 16)),
        "loss_weights": ones.astype(np.float32),
    }


def start(optimizer, layout, chances=None):
    params = transformer.create(MODEL, 0)
    # A zero with its sign is a parameter too.
    params["embed"]["embedding"] = params["embed"]["embedding"].at[0].set(-0.0)
    opt_state = optimizer.init(params)
    if chances is not None:
        opt_state = opt_state._replace(chances=chances)
    state = TrainState(np.int32(0), params, opt_state, empty_window())
    return jax.device_put(state, layout.shardings(state), may_alias=False)


def trained(config, layout, n_steps, chances=None):
    """The states before and after each step, as NumPy arrays."""
    optimizer = only.selective(make_optimizer(config.optim, config.train.steps), config)
    state, step = start(optimizer, layout, chances), make_train_step(config, optimizer, layout)
    states = [jax.device_get(state)]
    for number in range(n_steps):
        state, _ = step(state, jax.device_put(batch(number), layout.batch))
        states.append(jax.device_get(state))
    return states


def updated(config, n_updates, chances=None):
    """The same of updates by random gradients, without a model."""
    optimizer = only.selective(make_optimizer(config.optim, config.train.steps), config)
    state = start(optimizer, one_device(), chances)

    @jax.jit
    def step(state, grads):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)

    states = [jax.device_get(state)]
    for number in range(n_updates):
        state = step(state, gradients(number))
        states.append(jax.device_get(state))
    return states


def gradients(number):
    rng = np.random.default_rng(number)
    return jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(np.float32), transformer.create(MODEL, 0)
    )


def adam_of(state):
    is_adam = lambda node: hasattr(node, "mu")  # noqa: E731
    return next(node for node in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(node))


def by_hand(neurons=NEURONS):
    """Which entries of each parameter may move, looked up one by one."""
    marked = jax.tree.map(lambda x: np.zeros(x.shape, bool), transformer.create(MODEL, 0))
    attention, mlp = (marked["blocks"][name] for name in ("attention", "mlp"))
    for layer, neuron in neurons:
        for kernel in (attention["out"], mlp["down"]):
            kernel["kernel"][layer, :, neuron] = True
        for kernel in (attention["query"], attention["key"], attention["value"], mlp["gate"], mlp["up"]):
            kernel["kernel"][layer + 1, neuron] = True
    return marked


def assert_moved(before, after, marked):
    """Entries that are marked have moved (most of them), all others have the same bits."""
    for a, b, m in zip(*map(jax.tree.leaves, (before, after, marked)), strict=True):
        assert a[~m].tobytes() == b[~m].tobytes()
        assert not m.any() or (a != b)[m].mean() > 0.9


def test_only_parameters_that_write_or_read_the_neurons_move():
    config = config_of(",".join(f"{layer}:{neuron}" for layer, neuron in NEURONS))
    states = trained(config, one_device(), 3)
    marked = by_hand()
    assert_moved(states[0].params, states[-1].params, marked)
    adam = adam_of(states[-1])
    zeros = jax.tree.map(np.zeros_like, adam.mu)
    for moments in (adam.mu, adam.nu):
        assert_moved(zeros, moments, marked)
    mask = only.neuron_mask(MODEL, NEURONS)
    assert only.n_marked(mask, states[0].params) == sum(m.sum() for m in jax.tree.leaves(marked))


def test_a_masked_step_is_the_plain_one_of_the_masked_gradient():
    """Adam and weight decay of the gradient alone that may move, in NumPy."""
    config = config_of("0:3,1:5,1:12")
    before, after = updated(config, 1)
    grads = jax.tree.map(lambda g, m: np.where(m, np.float64(g), 0), gradients(0), by_hand())
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    o = config.optim
    trees = before.params, after.params, grads, by_hand()
    for a, b, gradient, m in zip(*map(jax.tree.leaves, trees), strict=True):
        g = gradient * min(1, o.clip_norm / norm)
        # At the first step both averages are the gradient's, once their bias is taken out.
        want = a - o.learning_rate * (g / (np.abs(g) + o.epsilon) + o.weight_decay * a)
        np.testing.assert_allclose(b[m], want[m], rtol=2e-5, atol=1e-7)


def test_without_it_the_program_is_the_plain_one():
    optimizer = make_optimizer(OPTIM, 40)
    assert only.selective(optimizer, config_of()) is optimizer

    def text(config):
        made = only.selective(make_optimizer(config.optim, 40), config)
        abstract = jax.eval_shape(lambda: start(optimizer, one_device()))
        return make_train_step(config, made, one_device()).lower(abstract, batch()).as_text()

    named = config_of()
    named = dataclasses.replace(named, train=dataclasses.replace(named.train, init="runs/small"))
    plain = make_train_step(config_of(), optimizer, one_device())
    abstract = jax.eval_shape(lambda: start(optimizer, one_device()))
    assert text(named) == plain.lower(abstract, batch()).as_text()
    assert text(config_of("0:3")) != text(named)


def random_chances(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(rng.random(x.shape)), transformer.create(MODEL, 0))


def test_what_is_not_drawn_keeps_its_bits_and_its_averages():
    config, chances = config_of("fisher:0.5"), random_chances()
    states = updated(config, 3, chances)
    drawn = [jax.device_get(only.draw(chances, 7, number)) for number in range(3)]
    for before, after, mask in zip(states, states[1:], drawn, strict=False):
        for name in ("params", "mu", "nu"):
            old, new = (s.params if name == "params" else getattr(adam_of(s), name) for s in (before, after))
            for a, b, m in zip(*map(jax.tree.leaves, (old, new, mask)), strict=True):
                assert a[~m].tobytes() == b[~m].tobytes()
    kernels = [leaf for leaf in jax.tree.leaves(drawn[0]) if leaf.size > 500]
    wanted = [leaf for leaf in jax.tree.leaves(chances) if leaf.size > 500]
    for mask, p in zip(kernels, wanted, strict=True):
        assert abs(mask.mean() - p.mean()) < 5 * 0.5 / np.sqrt(mask.size)
        assert abs(np.corrcoef(mask.ravel(), p.ravel())[0, 1] - np.sqrt(1 / 3)) < 0.15
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, drawn[:2]), strict=True))
    assert only.draw(chances, 7, 1)["embed"]["embedding"].tolist() == drawn[1]["embed"]["embedding"].tolist()


def test_unbiased_gradients_are_divided_by_their_chance():
    """Seen where clipping does not hide it: in Adam's first average."""
    chances = random_chances()
    states = {}
    for name in ("fisher:0.5:10", "fisher:0.5:10:unbiased"):
        config = dataclasses.replace(config_of(name), optim=dataclasses.replace(OPTIM, clip_norm=0.0))
        states[name] = adam_of(updated(config, 1, chances)[-1]).mu
    drawn = jax.device_get(only.draw(chances, 7, 0))
    for a, b, p, m in zip(*map(jax.tree.leaves, (*states.values(), chances, drawn)), strict=True):
        np.testing.assert_allclose(b[m], (a / np.float64(p))[m], rtol=1e-5)


def test_chances_are_those_of_numpy_in_float64():
    rng = np.random.default_rng(3)
    squares = {"a": np.float32(rng.random((7, 11))), "b": {"c": np.float32(rng.random(40)) ** 3}}
    squares["b"]["c"][:9] = 0  # of tokens that no batch has
    alpha, beta = 0.7, 4.0
    got = jax.device_get(only.chances_of(squares, alpha, beta))
    flat = np.concatenate([squares["a"].ravel(), squares["b"]["c"]]).astype(np.float64)
    rank = (scipy.stats.rankdata(flat, method="min") - 1) / (len(flat) - 1)
    want = scipy.special.expit(2 * beta * (rank - alpha))
    np.testing.assert_allclose(np.concatenate([got["a"].ravel(), got["b"]["c"]]), want, rtol=1e-5)
    assert len(set(got["b"]["c"][:9].tolist())) == 1


def test_squares_are_the_mean_over_batches_of_squared_gradients(monkeypatch):
    monkeypatch.setattr(only, "N_BATCHES", 3)
    config, params = config_of("fisher:0.5"), transformer.create(MODEL, 0)
    batches = [batch(seed) for seed in range(3)]
    got = jax.device_get(only.mean_squares(config, one_device(), params, iter(batches)))
    gradient = jax.jit(make_loss_and_gradient(config, one_device()))
    grads = [jax.device_get(gradient(params, one)[1]) for one in batches]
    want = jax.tree.map(lambda *g: np.mean(np.square(np.float64(g)), axis=0), *grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-12), got, want)


SHARDED = ("0:3,1:5", "fisher:0.6:4")


def sums(layout):
    """Figures of runs on a mesh, of which no rounding changes a draw."""
    found = {}
    for names in SHARDED:
        chances = random_chances() if names.startswith("fisher") else None
        params = trained(config_of(names), layout, 2, chances)[-1].params
        found[names] = [float(np.abs(np.float64(x)).sum()) for x in jax.tree.leaves(params)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["data=2,fsdp=2", "fsdp=2,tensor=2"])
def test_devices_together_move_the_same(axes):
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = {**os.environ, **helpers.devices(4), "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, axes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for names, want in sums(one_device()).items():
        np.testing.assert_allclose(json.loads(done.stdout)[names], want, rtol=1e-6)


@pytest.mark.parametrize("names", [pytest.param("neurons=FILE", marks=pytest.mark.slow), "fisher:0.8"])
def test_a_run_goes_on_with_the_same_bits(trainer, finished_run, tmp_path, names):
    """Also without the file and the run that it began with, which are no longer needed."""
    file, other = tmp_path / "set.json", tmp_path / "other"
    save_interventions(file, [Intervention(0, 17, mode="ablate"), Intervention(0, 4, mode="ablate")])
    shutil.copytree(finished_run, other)
    settings = {
        "train.init": other,
        "train.only": names.replace("FILE", str(file)),
        "train.steps": 4,
        "checkpoint.every_steps": 2,
    }
    run, again = tmp_path / "run", tmp_path / "again"
    ended = trainer.train(run, settings)
    assert ended.exit_code == 0, ended.errors
    assert ("parameters move in a step" in ended.output) == names.startswith("fisher")
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "4")
    shutil.rmtree(other)
    if names.startswith("neurons"):
        file.unlink()
        settings["train.only"] = "0:4,0:17"
    ended = trainer.train(again, settings)
    assert ended.exit_code == 0, ended.errors
    helpers.assert_same_bits(helpers.final_arrays(run), helpers.final_arrays(again))
    saved, now = (helpers.arrays(folder, step)["params"] for folder, step in ((finished_run, 24), (run, 4)))
    moved = [(a != b).any() for a, b in zip(*map(jax.tree.leaves, (saved, now)), strict=True)]
    assert any(moved) and all(moved) == names.startswith("fisher")


WRONG = {
    "2:3": "there is no neuron 2:3 to train; layers are from 0 to 1, neurons from 0 to 15",
    "0:16": "there is no neuron 0:16 to train",
    "fisher:1.5": "ALPHA must be from 0 to 1",
    "fisher:-0.1": "ALPHA must be from 0 to 1",
    "fisher:0.5:0": "BETA must be above 0",
    "fisher:0.5:1:biased": "must be fisher:ALPHA[:BETA[:unbiased]]",
    "fisher:x": "must be fisher:ALPHA[:BETA[:unbiased]]",
    "0-3": "must be 2:117,2:200",
    "neurons=": "must be 2:117,2:200",
}


@pytest.mark.parametrize("value", WRONG)
def test_other_forms_are_refused(value):
    raw = {"model": dataclasses.asdict(MODEL), "train": {"init": "runs/small", "only": value}}
    with pytest.raises(UserError) as error:
        resolve(raw)
    assert str(error.value).startswith(f"train.only = '{value}': ") and WRONG[value] in str(error.value)


def test_it_needs_a_run_to_begin_with():
    with pytest.raises(UserError, match=r"train.only = '0:3': must be empty without train.init"):
        resolve({"model": dataclasses.asdict(MODEL), "train": {"only": "0:3"}})


def test_coordinates_of_a_base_lm_have_a_layer_after_them():
    base = dataclasses.replace(MODEL, n_nontopk=3)
    values = {"model": dataclasses.asdict(base), "train": {"init": "runs/base", "only": "1:3"}}
    assert resolve(values).trained_neurons == [(1, 3)]
    with pytest.raises(UserError, match="layers are from 0 to 1"):
        resolve({**values, "train": {**values["train"], "only": "2:3"}})


def test_files_without_neurons_or_of_another_model_are_refused(tmp_path):
    file = tmp_path / "set.json"
    save_interventions(file, [])
    with pytest.raises(UserError, match="the file names no neuron: nothing would train"):
        only.resolved(config_of(f"neurons={file}"))
    save_interventions(file, [Intervention(0, 16, mode="ablate")])
    with pytest.raises(UserError, match="there is no neuron 0:16 to train"):
        only.resolved(config_of(f"neurons={file}"))
    with pytest.raises(UserError, match="there is no such file of interventions"):
        only.resolved(config_of(f"neurons={tmp_path / 'none.json'}"))


def test_draws_that_would_move_nothing_are_refused(trainer, finished_run, tmp_path):
    settings = {"train.init": finished_run, "train.only": "fisher:1:1000000", "train.steps": 1}
    ended = trainer.train(tmp_path / "run", settings)
    assert ended.exit_code == 2
    assert "nothing would train" in helpers.assert_one_line_error(ended.errors)


if __name__ == "__main__":
    sizes = {name: int(size) for name, size in (pair.split("=") for pair in sys.argv[1].split(","))}
    print(json.dumps(sums(make_layout(MeshConfig(**{"data": 1, **sizes})))))
