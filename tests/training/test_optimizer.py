"""AdamW against NumPy and torch, and the schedules at the steps where something happens."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from topklm.config import OptimConfig
from topklm.training.step import change_of_schedule, decay_mask, learning_rate_schedule, make_optimizer

STEPS = 20
CONFIG = OptimConfig(
    learning_rate=0.5,
    warmup_steps=4,
    decay_fraction=0.25,
    final_learning_rate_fraction=0.1,
    weight_decay=0.1,
    clip_norm=2.0,
)
KEYS = (("mlp", "kernel"), ("mlp_norm", "scale"))


def variant(**changes):
    return dataclasses.replace(CONFIG, **changes)


def rates(config, steps=STEPS):
    schedule = learning_rate_schedule(config, steps)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


@pytest.mark.parametrize(
    ("schedule", "before", "steps", "done", "said"),
    [
        ("cosine", 20, 40, 20, "train.steps was 20 and is 40: the learning rate goes from 0.0543 to 0.314,"),
        ("cosine", 40, 21, 20, "train.steps was 40 and is 21: the learning rate goes from 0.3"),
        ("cosine", 20, 20, 10, None),
        ("cosine", 20, 40, 3, None),  # inside the warm-up
        ("wsd", 20, 40, 10, None),  # on the plateau
        ("wsd", 20, 40, 20, "the learning rate goes from 0.14 to 0.5, where wsd over 40 steps is"),
    ],
)
def test_a_run_of_another_length_says_how_the_learning_rate_jumps(schedule, before, steps, done, said):
    got = change_of_schedule(variant(schedule=schedule), before, steps, done)
    assert got is None if said is None else said in got


def make_gradients(n):
    """Norms around 3, so that a clip at 2 acts on some steps and not on others."""
    rng = np.random.default_rng(0)
    sizes = [0.1, 1.0, 5.0, 0.3, 2.0, 1.0][:n]
    return [[size * rng.normal(size=s).astype(np.float32) for s in [(2, 3), (3,)]] for size in sizes]


def run(config, start, gradients):
    """Returns the parameters after each step."""

    def nest(leaves):
        return {module: {name: leaf} for (module, name), leaf in zip(KEYS, leaves, strict=True)}

    optimizer = make_optimizer(config, STEPS)
    update = jax.jit(optimizer.update)
    params = nest(start)
    state, visited = optimizer.init(params), []
    for gradient in gradients:
        updates, state = update(nest(gradient), state, params)
        params = optax.apply_updates(params, updates)
        visited.append([np.asarray(params[module][name]) for module, name in KEYS])
    return visited


def numpy_adamw(config, start, gradients):
    params = [np.asarray(p, np.float64) for p in start]
    first, second = ([np.zeros_like(p) for p in params] for _ in range(2))
    for t, (gradient, rate) in enumerate(zip(gradients, rates(config), strict=False), start=1):
        norm = np.sqrt(sum((np.float64(g) ** 2).sum() for g in gradient))
        factor = min(1.0, config.clip_norm / norm) if config.clip_norm else 1.0
        for i, decay in enumerate([config.weight_decay, 0.0]):  # matrix, norm scale
            g = factor * np.float64(gradient[i])
            first[i] = config.beta1 * first[i] + (1 - config.beta1) * g
            second[i] = config.beta2 * second[i] + (1 - config.beta2) * g**2
            m, v = first[i] / (1 - config.beta1**t), second[i] / (1 - config.beta2**t)
            params[i] = params[i] - rate * (m / (np.sqrt(v) + config.epsilon) + decay * params[i])
        yield [p.copy() for p in params]


@pytest.mark.parametrize("clip_norm", [2.0, 0.0])
def test_it_is_adamw_with_clipping_a_decay_mask_and_a_schedule(clip_norm):
    config, gradients = variant(clip_norm=clip_norm), make_gradients(6)
    start = [np.ones((2, 3), np.float32), np.full(3, 2.0, np.float32)]
    got = run(config, start, gradients)
    for ours, want in zip(got, numpy_adamw(config, start, gradients), strict=True):
        for a, b in zip(ours, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_it_equals_torch():
    torch = pytest.importorskip("torch")
    config, gradients = variant(clip_norm=2.0), make_gradients(6)
    start = [np.ones((2, 3), np.float32), np.full(3, 2.0, np.float32)]
    matrix, scale = (torch.nn.Parameter(torch.tensor(p)) for p in start)
    theirs = torch.optim.AdamW(
        [{"params": [matrix], "weight_decay": config.weight_decay}, {"params": [scale], "weight_decay": 0.0}],
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
    )
    for gradient, rate, ours in zip(gradients, rates(config), run(config, start, gradients), strict=False):
        for parameter, g in zip((matrix, scale), gradient, strict=True):
            parameter.grad = torch.tensor(g)
        torch.nn.utils.clip_grad_norm_([matrix, scale], config.clip_norm)
        for group in theirs.param_groups:
            group["lr"] = rate
        theirs.step()
        for a, parameter in zip(ours, (matrix, scale), strict=True):
            np.testing.assert_allclose(a, parameter.detach().numpy(), rtol=1e-4, atol=1e-6)


def test_only_norm_scales_are_spared_from_decay():
    params = {"blocks": {"mlp": {"up": {"kernel": 0}}, "mlp_norm": {"scale": 0}}, "embed": {"embedding": 0}}
    assert decay_mask(params) == {
        "blocks": {"mlp": {"up": {"kernel": True}}, "mlp_norm": {"scale": False}},
        "embed": {"embedding": True},
    }


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_warm_up_rises_in_equal_parts_and_its_first_step_already_moves(schedule):
    got = rates(variant(schedule=schedule))
    np.testing.assert_allclose(got[:4], [0.125, 0.25, 0.375, 0.5], rtol=1e-6)
    assert rates(variant(schedule=schedule, warmup_steps=0))[0] == pytest.approx(0.5)
    assert rates(variant(schedule=schedule, warmup_steps=1))[0] == pytest.approx(0.5)


def test_cosine_falls_from_the_peak_to_the_final_rate():
    got = rates(variant(schedule="cosine"))
    progress = np.arange(17) / 16
    want = 0.5 * (0.1 + 0.9 * (1 + np.cos(np.pi * progress)) / 2)
    np.testing.assert_allclose(got[4:], want, rtol=1e-5)
    assert got[4 + 8] == pytest.approx(0.5 * 0.55)
    assert got[20] == pytest.approx(0.05)


def test_wsd_stays_at_the_peak_and_ends_on_a_line():
    got = rates(variant(schedule="wsd"))
    np.testing.assert_allclose(got[4:16], 0.5, rtol=1e-6)
    np.testing.assert_allclose(got[16:], 0.5 * np.array([0.82, 0.64, 0.46, 0.28, 0.1]), rtol=1e-5)


def test_wsd_whose_warm_up_and_decay_overlap_decays_right_after_the_warm_up():
    got = rates(variant(schedule="wsd", warmup_steps=15, decay_fraction=0.5))
    np.testing.assert_allclose(got[14:], 0.5 * np.array([1, 1, 0.82, 0.64, 0.46, 0.28, 0.1]), rtol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_run_shorter_than_the_warm_up_reaches_the_peak_at_its_last_step(schedule):
    np.testing.assert_allclose(rates(variant(schedule=schedule), steps=2)[:2], [0.25, 0.5], rtol=1e-6)


def test_wsd_without_decay_never_falls():
    np.testing.assert_allclose(rates(variant(schedule="wsd", decay_fraction=0.0))[4:20], 0.5, rtol=1e-6)
