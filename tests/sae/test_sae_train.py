"""Training of autoencoders: whether it finds what is there, on how many devices, and after a kill."""

import dataclasses
import os
import signal
import sys

import helpers
import jax.numpy as jnp
import made_states
from made_states import N_BATCHES, D, K, M, N, S, batch, config, states
import numpy as np
import optax
import pytest

from topklm.errors import UserError
from topklm.neurons.dictionary import Dictionary, ExplainedVariance
from topklm.sae import ensemble
from topklm.sae.train import Saving, fit, learning_rate


def assert_same(one, other):
    for name in ("centre", "encoder", "decoder", "bias", "threshold"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_array_equal(a, b, err_msg=name)


def explained(dictionary, x):
    """Explained variance by layer, codes by the formula in NumPy."""
    found = []
    for layer in range(S):
        c, e, d = (getattr(dictionary, name)[layer] for name in ("centre", "encoder", "decoder"))
        pre = (
            (x[layer] - c) @ e + dictionary.bias[layer] if dictionary.bias is not None else (x[layer] - c) @ e
        )
        codes = np.maximum(pre, 0)
        if dictionary.threshold is None:
            codes = np.where(codes >= np.sort(codes, axis=1)[:, -dictionary.keep, None], codes, 0)
        else:
            codes = np.where(pre > dictionary.threshold[layer], codes, 0)
        variance = ExplainedVariance(D)
        variance.add(x[layer], codes @ d + c)
        found.append((variance.value, (codes > 0).sum(axis=1).mean()))
    return found


@pytest.fixture(scope="module")
def trained():
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = fit(config(kind), states, N_BATCHES)
        return made[kind]

    return of


@pytest.mark.parametrize(
    ("kind", "least"),
    [
        ("topk", 0.8),
        ("batchtopk", 0.75),
        pytest.param("matryoshka", 0.75, marks=pytest.mark.slow),
        ("jumprelu", 0.6),
        pytest.param("gba", 0.5, marks=pytest.mark.slow),
    ],
)
def test_training_finds_sparse_directions_whatever_the_scale(trained, kind, least):
    fitted, x = trained(kind), batch(10**6)
    dictionary = fitted.dictionary
    np.testing.assert_allclose(np.linalg.norm(dictionary.decoder, axis=-1), 1, rtol=1e-5)
    for share, l0 in explained(dictionary, x):
        assert share > least
        assert 0.5 * K < l0 < 1.6 * K
    codes = np.asarray(dictionary.encode(x))
    back = np.asarray(dictionary.decode(codes))
    found = [
        1 - np.square(x[s] - back[s]).sum() / np.square(x[s] - x[s].mean(axis=0)).sum() for s in range(S)
    ]
    np.testing.assert_allclose([share for share, _ in explained(dictionary, x)], found, rtol=1e-3)
    assert fitted.history[-1]["tokens"] == N_BATCHES * N
    assert fitted.history[-1]["explained_variance"][0] > fitted.history[0]["explained_variance"][0]
    assert fitted.dead.shape == (S, M) and fitted.dead.mean() < 0.6


def test_the_same_seed_gives_the_same_bits_and_another_others(trained):
    one = trained("batchtopk").dictionary
    assert_same(one, fit(config("batchtopk"), states, N_BATCHES).dictionary)
    other = fit(config("batchtopk"), list(states()), N_BATCHES, seed=1).dictionary
    assert not np.array_equal(one.decoder, other.decoder)


def test_what_is_no_text_is_not_learned_from():
    is_text = np.random.default_rng(1).random(N) < 0.7

    def with_noise(size):
        for x in states(0, 8):
            yield np.where(is_text[:, None], x, x * np.float32(size)), is_text

    one, other = (fit(config(), with_noise(size), 8).dictionary for size in (1, 1e6))
    assert_same(one, other)


def test_a_code_that_is_never_the_strongest_is_dead():
    def line(first):
        for x in states(first):
            flat = np.zeros_like(x)
            flat[0, :, 0] = x[0, :, 0]
            flat[1] = x[1]
            yield flat

    fitted = fit(config(aux_coefficient=0.0, dead_tokens=N), line, N_BATCHES)
    # On a line, of the codes on either side the same two are always the strongest.
    assert M / 2 < fitted.dead[0].sum() < M
    assert fitted.dead[1].sum() < M / 2
    assert fitted.history[-1]["dead"][0] > M / 2


def started(folder, kind, n_batches, devices=1):
    folder.mkdir()
    command = [sys.executable, made_states.__file__, str(folder), str(devices), kind, str(n_batches)]
    environment = {**os.environ, "PYTHONPATH": str(helpers.ROOT), **helpers.devices(devices)}
    return helpers.Process(command, env=environment)


@pytest.mark.parametrize("kind", [pytest.param("topk", marks=pytest.mark.slow), "batchtopk"])
def test_a_killed_run_goes_on_with_the_same_bits(tmp_path, trained, kind):
    killed = started(tmp_path / "killed", kind, N_BATCHES)
    for _ in range(3):
        killed.wait_for_line("trained on")
    killed.kill()
    assert killed.exit_code == -signal.SIGKILL
    assert not (tmp_path / "killed/dictionary.npz").exists()
    saving = Saving(tmp_path / "killed/state.npz", {"of": "made"}, resume=True)
    began = []

    def source(first):
        began.append(first)
        return states(first)

    resumed = fit(config(kind), source, N_BATCHES, saving=saving)
    assert 8 <= began[0] < N_BATCHES
    assert_same(resumed.dictionary, trained(kind).dictionary)
    assert resumed.history == trained(kind).history


@pytest.mark.parametrize("kind", ["topk", pytest.param("batchtopk", marks=pytest.mark.slow)])
def test_four_devices_take_the_steps_that_one_takes(tmp_path, kind):
    four = started(tmp_path / "four", kind, 1, devices=4)
    assert four.finish() == 0, four.errors
    found, one = Dictionary.load(tmp_path / "four/dictionary.npz"), fit(config(kind), states, 1).dictionary
    for name in ("centre", "encoder", "decoder", "bias"):
        wanted = getattr(one, name)
        apart = np.abs(getattr(found, name) - wanted) / np.abs(wanted).max()
        # Adam's first step is the gradient's sign, which rounding decides where the gradient is about 0.
        assert np.quantile(apart, 0.98) < 1e-4, name


def test_thresholds_that_fall_stay_at_0():
    found = fit(config("jumprelu", k=M // 2, coefficient=30.0), states, 8).dictionary.threshold
    assert found.min() == 0


def test_the_learning_rate_rises_and_falls():
    rate, total = 0.02, 200
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(rate / 11, rate, 10),
            optax.constant_schedule(rate),
            optax.linear_schedule(rate, 0.0, 40),
        ],
        [10, 160],
    )
    for step in range(total):
        found = learning_rate(config(), jnp.asarray(step), jnp.asarray(total))
        assert float(found) == pytest.approx(float(schedule(step)), rel=1e-5)


def test_a_resume_never_starts_again_in_silence(tmp_path):
    path = tmp_path / "state.npz"
    with pytest.raises(UserError, match="nothing to go on from"):
        fit(config(), states, 8, saving=Saving(path, {}, resume=True))
    fit(config(), states, 8, saving=Saving(path, {"--layers": [0, 1]}, every_s=0))
    for other, options, facts, said in (
        (config(k=3), {}, {}, r"--k = 3: .* begun with 2"),
        (config("batchtopk"), {}, {}, r"--kind = batchtopk: .* begun with topk"),
        (config(), {"seed": 5}, {}, r"--seed = 5"),
        (config(), {}, {"--layers": [0]}, r"--layers = \[0\]: .* begun with \[0, 1\]"),
    ):
        saving = Saving(path, {"--layers": [0, 1], **facts}, resume=True)
        with pytest.raises(UserError, match=said):
            fit(other, states, 8, saving=saving, **options)
    content = path.read_bytes()
    for end in (0, 100, len(content) - 30):
        path.write_bytes(content[:end])
        with pytest.raises(UserError, match="damaged"):
            fit(config(), states, 8, saving=Saving(path, {"--layers": [0, 1]}, resume=True))


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        (lambda: [np.full((S, N, D), np.nan, np.float32)] * 8, {}, "autoencoder 0, 1 of 2, .* not finite"),
        (
            lambda: list(states(0, 8)),
            {"learning_rate": 1e30},
            "diverged; give a lower --learning-rate than 1e",
        ),
        (lambda: list(states(0, 5)), {}, "end after 5 of 8 batches"),
    ],
)
def test_training_that_cannot_go_on_ends_in_a_line(source, options, said):
    with pytest.raises(UserError, match=said) as refused:
        fit(config(**options), source(), 8)
    assert "\n" not in str(refused.value)


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("topk", "matryoshka", "jumprelu")]


@pytest.mark.parametrize("kind", ["batchtopk", *SLOW])
def test_training_goes_on_from_a_dictionary_also_with_more_codes(trained, kind):
    start = trained(kind).dictionary
    # At a rate of almost 0 nothing moves.
    settings = dataclasses.replace(config(kind), learning_rate=1e-12)
    same = fit(settings, states, 2, start=start).dictionary
    x = batch(3)
    if kind in ("topk", "jumprelu"):  # the others average their threshold on
        np.testing.assert_allclose(same.encode(x), start.encode(x), atol=2e-3)
    np.testing.assert_allclose(same.decoder, start.decoder, atol=1e-5)
    wider = fit(dataclasses.replace(settings, width=M + 8), states, 2, start=start).dictionary
    np.testing.assert_allclose(wider.decoder[:, :M], start.decoder, atol=1e-5)
    assert wider.width == M + 8
    with pytest.raises(UserError, match="training goes on from"):
        fit(dataclasses.replace(settings, width=8), states, 2, start=start)


@pytest.mark.parametrize("kind", [pytest.param("topk", marks=pytest.mark.slow), "batchtopk"])
def test_a_bag_is_the_mean_of_its_members(kind):
    how = ensemble.Ensemble("bag", 3)
    bag = ensemble.fit(config(kind), states, 16, how=how).dictionary
    tiled = fit(config(kind), (jnp.concatenate([jnp.asarray(x)] * 3) for x in states()), 16).dictionary
    x = batch(7)
    members = np.asarray(tiled.decode(tiled.encode(np.concatenate([x] * 3)))).reshape(3, S, N, D)
    np.testing.assert_allclose(bag.decode(bag.encode(x)), members.mean(axis=0), rtol=1e-4, atol=2e-3)
    assert (bag.width, bag.keep, bag.members, bag.sequential) == (3 * M, 3 * K, 3, False)
    assert not np.allclose(members[0], members[1])


@pytest.mark.parametrize("kind", ["topk", pytest.param("jumprelu", marks=pytest.mark.slow)])
def test_a_boosted_ensemble_sums_members_that_read_what_is_left(kind):
    how = ensemble.Ensemble("boost", 3)
    boost = ensemble.fit(config(kind), states, 16, how=how)
    x, left = batch(7), [jnp.asarray(batch(7))]
    members = list[Dictionary]()
    for seed in range(3):

        def residual(first, members=tuple(members)):
            for h in states(first):
                rest = jnp.asarray(h)
                for member in members:
                    rest = rest - member.decode(member.encode(rest))
                yield rest

        members.append(fit(config(kind), residual, 16, seed=seed).dictionary)
        left.append(left[-1] - members[-1].decode(members[-1].encode(left[-1])))
    made = boost.dictionary
    codes = made.encode(x)
    np.testing.assert_allclose(x - made.decode(codes), left[-1], rtol=1e-3, atol=2e-2)
    errors = [float(jnp.square(one).mean(axis=(1, 2))[0]) for one in left]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert made.sequential and codes.shape == (S, N, 3 * M) and boost.dead.shape == (S, 3 * M)


def test_ensembles_are_kept_in_a_file(tmp_path):
    how = ensemble.Ensemble("boost", 2)
    made = ensemble.fit(config("batchtopk"), states, 8, how=how).dictionary
    made.save(tmp_path / "d.npz")
    read = Dictionary.load(tmp_path / "d.npz")
    assert_same(read, made)
    assert (read.members, read.sequential, read.keep) == (2, True, 2 * K)
    np.testing.assert_array_equal(read.encode(batch(2)), made.encode(batch(2)))


def test_a_boosted_ensemble_that_was_stopped_goes_on(tmp_path):
    how, saving = ensemble.Ensemble("boost", 2), Saving(tmp_path / "state.npz", {}, every_s=0)
    whole = ensemble.fit(config(), states, 16, how=how).dictionary
    calls = []

    def stops(first):
        calls.append(first)
        yield from states(first, 8)
        if len(calls) == 2:
            raise InterruptedError
        yield from states(8)

    with pytest.raises(InterruptedError):
        ensemble.fit(config(), stops, 16, how=how, saving=saving)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-0.npz", "state-1.npz"]
    again = ensemble.fit(config(), states, 16, how=how, saving=dataclasses.replace(saving, resume=True))
    assert_same(again.dictionary, whole)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ensemble.Ensemble("stack", 2), "--ensemble = stack: must be one of bag, boost"),
        (lambda: ensemble.Ensemble("bag", 0), "--members = 0"),
        (
            lambda: ensemble.fit(config(), iter([]), 1, how=ensemble.Ensemble("boost", 2)),
            "once for each member",
        ),
    ],
)
def test_ensembles_that_cannot_be_are_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()
