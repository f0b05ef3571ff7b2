"""Which steps are bad, against float64 arithmetic on plain lists, and what a run says and does about them."""

import math
import statistics

import jax
import numpy as np
import pytest

from topklm.errors import UserError
from topklm.training.step import (
    LEAST_STEPS,
    MOST_SKIPPED_IN_A_ROW,
    WINDOW_STEPS,
    AnomalyPolicy,
    empty_window,
    is_bad,
    push_step,
)

SIGMAS = 4.0


def judge_with_jax(losses, norms, sigmas):
    @jax.jit
    def step(recent, loss, norm):
        bad = is_bad(recent, loss, norm, sigmas)
        return push_step(recent, loss, norm, bad), bad

    recent, judged = empty_window(), []
    for loss, norm in zip(losses, norms, strict=True):
        recent, bad = step(recent, np.float32(loss), np.float32(norm))
        judged.append(bool(bad))
    return judged, recent


def judge_with_lists(losses, norms, sigmas):
    good, judged = [], []
    for step in zip(losses.tolist(), norms.tolist(), strict=True):
        bad = not all(map(math.isfinite, step))
        if sigmas and len(good) >= LEAST_STEPS and not bad:
            for values, value in zip(zip(*good[-WINDOW_STEPS:], strict=True), step, strict=True):
                bad = bad or value > statistics.fmean(values) + sigmas * statistics.stdev(values)
        judged.append(bad)
        good += [] if bad else [step]
    return judged, good


def a_run_with_spikes(n_steps=400):
    chance = np.random.default_rng(0)
    losses = 9 * np.exp(-np.arange(n_steps) / 60) + 3 + 0.1 * chance.standard_normal(n_steps)
    norms = chance.lognormal(0, 0.2, n_steps)
    spikes = chance.choice(n_steps, 40, replace=False)
    losses[spikes[:20]] *= 3
    norms[spikes[15:30]] *= 30
    losses[spikes[30:35]] = np.nan
    norms[spikes[33:40]] = np.inf
    return losses.astype(np.float32), norms.astype(np.float32)


@pytest.mark.parametrize("sigmas", [0.0, 2.0, SIGMAS])
def test_the_same_steps_are_bad_as_by_the_definition(sigmas):
    losses, norms = a_run_with_spikes()
    judged, recent = judge_with_jax(losses, norms, sigmas)
    expected, good = judge_with_lists(losses, norms, sigmas)
    assert judged == expected
    assert 10 <= sum(judged) < len(judged) / 2
    assert recent["count"] == len(good)
    window = {
        tuple(pair) for pair in zip(*(np.asarray(recent[k]) for k in ("loss", "gradient_norm")), strict=True)
    }
    assert window == set(good[-WINDOW_STEPS:])


def test_without_sigmas_only_what_is_not_finite_is_bad():
    losses, norms = a_run_with_spikes()
    judged, _ = judge_with_jax(losses, norms, 0.0)
    assert judged == (~(np.isfinite(losses) & np.isfinite(norms))).tolist()


def test_before_enough_steps_nothing_is_a_spike():
    losses = 3 + np.arange(LEAST_STEPS + 1) % 2 * 0.1
    losses[LEAST_STEPS - 1] = 1000.0
    judged, _ = judge_with_jax(losses, np.ones_like(losses), SIGMAS)
    assert not any(judged)
    losses[[LEAST_STEPS - 1, LEAST_STEPS]] = 3, 1000.0
    judged, _ = judge_with_jax(losses, np.ones_like(losses), SIGMAS)
    assert judged == [False] * LEAST_STEPS + [True]


def test_a_fall_of_the_loss_is_no_spike():
    losses = np.append(3 + np.arange(60) % 2 * 0.1, 0.5)
    judged, _ = judge_with_jax(losses, np.ones_like(losses), SIGMAS)
    assert not any(judged)


def stopping(good=400, sigmas=0.0):
    return AnomalyPolicy("stop", sigmas, "Lower the learning rate.", lambda: good)


def skipping(good=400):
    return AnomalyPolicy("skip", SIGMAS, "Lower the learning rate.", lambda: good)


def test_a_step_that_is_not_finite_stops_the_run_with_the_steps_to_look_at():
    policy = stopping()
    assert policy.observe(411, 2.5, 1.0, False) is None
    with pytest.raises(UserError) as error:
        policy.observe(412, math.nan, math.inf, True)
    assert str(error.value) == (
        "step 412: loss nan, gradient norm inf: no longer finite; the last good checkpoint is step 400; look "
        "at the data of steps 401 to 412. Lower the learning rate."
    )


def test_a_spike_stops_the_run_and_says_that_it_is_one():
    with pytest.raises(
        UserError, match=r"step 7: loss 11\.5, .*: a spike, over 4 standard .*; there is no check"
    ):
        stopping(good=None, sigmas=4.0).observe(7, 11.5, 2.0, True)


def test_skipped_steps_are_reported_once_when_they_are_over():
    policy = skipping()
    steps = [(9, 3.0, 1.0), (10, 11.2, 2.0), (11, math.nan, 1.0), (12, 4.0, math.inf), (13, 8.0, 70.0)]
    assert [policy.observe(*step, bad=step[0] > 9) for step in steps] == [None] * 5
    assert policy.observe(14, 3.0, 1.0, False) == (
        "skipped steps 10 to 13 (4): loss up to 11.2, gradient norm up to 70, not finite in 2"
    )
    assert policy.observe(15, 3.0, 1.0, False) is None
    assert policy.finish() is None


def test_a_single_skipped_step_at_the_end_is_reported_too():
    policy = skipping()
    assert policy.observe(24, math.nan, math.nan, True) is None
    assert policy.finish() == "skipped step 24 (1): not finite in 1"
    assert policy.finish() is None


def test_too_many_skipped_in_a_row_stop_the_run_with_their_range():
    policy = skipping(good=None)
    for step in range(1, 3 * MOST_SKIPPED_IN_A_ROW):
        policy.observe(step, 9.0, 1.0, step % MOST_SKIPPED_IN_A_ROW != 0)
    policy.observe(30, 3.0, 1.0, False)
    for step in range(31, 30 + MOST_SKIPPED_IN_A_ROW):
        assert policy.observe(step, 9.0, 1.0, True) is None
    with pytest.raises(
        UserError, match=r"skipped steps 31 to 40 \(10\): .*would not help; there is no checkpoint"
    ):
        policy.observe(40, 9.0, 1.0, True)
