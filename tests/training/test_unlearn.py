"""The losses of unlearning against PyTorch; masks, budget, ablation and relearning on a small model."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topklm.config import ModelConfig
from topklm.eval import tasks
from topklm.layout import one_device
from topklm.model import transformer
from topklm.neurons.ablate_set import AblatedLosses
from topklm.neurons.contrast import more_activated
from topklm.neurons.documents import TextModel
from topklm.neurons.harvest import count
from topklm.training import only, unlearn
from topklm.training.unlearn import ASCENT, SSPU, Method, Settings

CONFIG = ModelConfig(
    d_model=32, n_layers=3, n_heads=4, n_kv_heads=4, d_mlp=48, vocab_size=61, context_length=24, topk_k=8
)
ALPHA, LAYER = 0.7, 1
NEURONS = ((0, 3), (1, 5), (1, 12))
SETTINGS = Settings(
    layer=LAYER,
    steps=12,
    relearn_steps=6,
    learning_rate=1e-2,
    relearning_rate=1e-2,
    batch_size=2,
    coefficient=1.0,
    alpha=ALPHA,
    budget=0.05,
    seed=0,
)


def params_of(seed):
    return jax.tree.map(
        lambda x: x + 0.05 * np.random.default_rng(seed).standard_normal(x.shape).astype(np.float32),
        transformer.create(CONFIG, 0),
    )


def rows_of(seed):
    tokens = np.random.default_rng(seed).integers(0, 61, (2, 24)).astype(np.int32)
    is_read = np.ones((2, 24), bool)
    is_read[:, 0] = is_read[1, 17:] = False
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), (2, 24))
    return tokens, np.ones((2, 24), np.int32), positions, is_read


def active(params, *texts):
    tokens = np.concatenate([rows[0] for rows in texts])
    return states_of(params, tokens) != 0


@jax.jit
def _states(params, *rows):
    return transformer.bind(CONFIG, params).hidden(*rows, capture=lambda h, u, h_next: h_next)[1]


def states_of(params, *rows):
    """What every layer hands on, float32[L, B, T, D]."""
    return np.asarray(_states(params, *map(jnp.asarray, rows)))


def torch_objective(loss, params, original, target, forget, retain):
    """The loss and its gradient by PyTorch, with the active sets held fixed."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    llama = importlib.import_module("benchmarks.peers.llama")

    def run(weights, *texts):
        model = llama.build(CONFIG, "eager", active(weights, *texts))
        llama.load(model, llama.state_dict(CONFIG, weights))
        seen = []
        model.model.layers[LAYER].register_forward_hook(
            lambda module, given, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        tokens = torch.tensor(np.concatenate([rows[0] for rows in texts])).long()
        return model.eval(), model(tokens).logits, seen[0]

    def mean(values, is_read):
        return values[torch.tensor(is_read)].mean()

    def cross_entropy(logits, rows):
        tokens, is_read = torch.tensor(rows[0]).long(), rows[3]
        nll = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, 61), tokens[:, 1:].reshape(-1), reduction="none"
        )
        return mean(nll.reshape(2, 23), is_read[:, 1:])

    model, logits, states = run(params, forget, retain)
    if loss == SSPU:
        with torch.no_grad():
            _, _, before = run(original, retain)
        away = ((states[:2] - torch.tensor(target)) ** 2).sum(dim=-1)
        drift = ((states[2:] - before) ** 2).sum(dim=-1)
        value = mean(away, forget[3]) + ALPHA * mean(drift, retain[3])
    else:
        value = cross_entropy(logits[2:], retain) - cross_entropy(logits[:2], forget)
    value.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    return value.item(), grads, llama.state_dict


@pytest.mark.parametrize("loss", [SSPU, pytest.param(ASCENT, marks=pytest.mark.slow)])
def test_losses_and_gradients_are_those_of_torch(loss):
    params, original, forget, retain = params_of(1), params_of(2), rows_of(3), rows_of(4)
    target = np.random.default_rng(5).random(32).astype(np.float32)
    keep = np.ones((3, 32), np.float32)
    program = jax.jit(
        jax.value_and_grad(
            lambda p: unlearn.objective(CONFIG, loss, LAYER, p, original, keep, target, ALPHA, forget, retain)
        )
    )
    value, grads = program(params)
    want, torch_grads, state_dict = torch_objective(loss, params, original, target, forget, retain)
    assert float(value) == pytest.approx(want, rel=1e-4)
    for name, gradient in state_dict(CONFIG, jax.device_get(grads)).items():
        other = torch_grads[name]
        other = np.zeros(gradient.shape) if other is None else other.numpy()
        np.testing.assert_allclose(gradient, other, atol=2e-4 * max(1e-3, np.abs(other).max()), rtol=1e-3)


def text_model():
    return TextModel(CONFIG, jax.tree.map(jnp.asarray, params_of(1)), one_device(), 0, batch_rows=4)


def documents(seed, first, last):
    rng = np.random.default_rng(seed)
    return [rng.integers(first, last, rng.integers(5, 20)).astype(np.int32) for _ in range(6)]


@pytest.fixture(scope="module")
def work():
    """Forget text is of low ids, retain text of high ones."""
    train = {"forget": documents(0, 1, 20), "retain": documents(1, 20, 61)}
    test = {"forget": documents(2, 1, 20), "retain": documents(3, 20, 61)}
    model = text_model()
    requests = [
        unlearn.scoring.Request(np.array([0], np.int32), ids) for ids in (*test["forget"], *test["retain"])
    ]
    text = tasks.TokenizedTask(tasks.of_text("heldout", ["a text"] * 12, "here"), requests, np.arange(12))
    pair = tasks.Item("", (" a", " b"), 0, "one", "part")
    pairs = tasks.Task("blimp", "minimal pairs", ("acc", "bits_per_byte"), "here", "", (pair,) * 6)
    blimp = tasks.TokenizedTask(pairs, requests, np.repeat(np.arange(6), 2))
    return unlearn.Unlearning(model, SETTINGS, train, test, {"heldout": text, "blimp": blimp})


@pytest.fixture(scope="module")
def before(work):
    return work.run(unlearn.AS_IT_WAS)


def test_masked_fine_tuning_moves_the_neurons_parameters_alone(work, before):
    done = []
    result = work.run(Method("chosen", SSPU, NEURONS, is_masked=True), done.append)
    assert sum(done) == SETTINGS.steps + SETTINGS.relearn_steps
    mask, start = only.neuron_mask(CONFIG, NEURONS), text_model().params
    for m, a, b in zip(*map(jax.tree.leaves, (mask, start, result.params)), strict=True):
        moved = np.asarray(a) != np.asarray(b)
        assert not moved[~np.broadcast_to(m, a.shape)].any()
    assert result.n_parameters == only.n_marked(mask, start) < 10_000
    assert 0 < result.steps <= SETTINGS.steps
    assert any(
        (np.asarray(a) != np.asarray(b)).any()
        for a, b in zip(*map(jax.tree.leaves, (start, result.params)), strict=True)
    )
    assert before.steps == before.n_parameters == 0


def test_figures_are_those_of_the_model_that_is_given_back(work, before):
    result = work.run(Method("ascent", ASCENT))
    for name, seed, bounds in (("forget", 2, (1, 20)), ("retain", 3, (20, 61))):
        texts = documents(seed, *bounds)
        model = dataclasses.replace(text_model(), params=result.params)
        n = sum(map(len, texts))
        losses = AblatedLosses(model, texts, {"all": np.ones(n, bool)}).sums()["all"]
        np.testing.assert_allclose(result.figures[name].sums, losses, rtol=1e-6)
        change = unlearn.change(result, before, name, 0)
        want = (losses - before.figures[name].sums).sum() / n
        assert change.value == pytest.approx(want) and change.low <= change.value <= change.high
    forget, retain = (unlearn.change(result, before, name, 0).value for name in ("forget", "retain"))
    assert forget > retain


def test_steps_beyond_the_budget_are_taken_back(work, monkeypatch):
    """Ascent at a rate that ruins the model ends within the budget; without one it goes through."""
    for budget, ends_within in ((0.05, True), (1e9, False)):
        settings = dataclasses.replace(SETTINGS, budget=budget, learning_rate=1.0, relearn_steps=1, steps=40)
        monkeypatch.setattr(work, "_settings", settings)
        result = work.run(Method("ascent", ASCENT))
        rows = text_model().put(work._first_rows("watched"))
        keep = np.ones((3, 32), np.float32)
        rise = [
            float(unlearn._cross_entropy(CONFIG, params, keep, rows))
            for params in (result.params, text_model().params)
        ]
        assert (rise[0] - rise[1] <= 0.05) == ends_within
        assert (result.steps == 40) != ends_within


def test_ablation_trains_nothing_and_is_measured_with_the_neurons_off(work):
    result = work.run(Method("set to 0", None, NEURONS))
    assert result.n_parameters == 0
    for a, b in zip(*map(jax.tree.leaves, (text_model().params, result.params)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    texts = documents(2, 1, 20)
    losses = AblatedLosses(text_model(), texts, {"all": np.ones(sum(map(len, texts)), bool)})
    np.testing.assert_allclose(result.figures["forget"].sums, losses.sums(NEURONS)["all"], rtol=1e-6)
    # Relearning keeps them off, and does not change what is given back.
    assert not np.allclose(result.figures["relearned"].sums, result.figures["forget"].sums)


def test_the_target_is_0_at_the_neurons_of_its_layer_and_as_long_as_states_are(work):
    target = work.target(NEURONS)
    assert (np.flatnonzero(target == 0) == [5, 12]).all() and (target >= 0).all()
    model, rows = text_model(), work._first_rows("forget")
    states = states_of(model.params, *rows[:3])[LAYER]
    lengths = np.linalg.norm(np.asarray(states, np.float64), axis=-1)[rows[3]]
    assert np.linalg.norm(target) == pytest.approx(lengths.mean(), rel=1e-5)


def test_neurons_are_those_whose_mean_activation_rises_most():
    texts = documents(0, 1, 20), documents(1, 20, 61)
    counts = [count(text_model(), one) for one in texts]
    activation = np.stack([one.activation for one in counts])
    frequency = np.stack([one.active.sum(axis=0) / one.n_tokens.sum() for one in counts])
    by_hand = np.zeros((2, 2, 32))
    for number, one in enumerate(texts):
        for ids in one:
            # Padding after a document changes nothing before it.
            padded = np.resize(np.concatenate([[0], ids]), (1, 24)).astype(np.int32)
            read = states_of(text_model().params, padded)[:2, 0, 1 : 1 + len(ids)]
            by_hand[number] += read.astype(np.float64).sum(axis=1)
        by_hand[number] /= sum(map(len, one))
    np.testing.assert_allclose(activation, by_hand, rtol=1e-2, atol=1e-3)  # stored as bfloat16
    chosen = more_activated(activation, frequency, (0, 1), 3, 0.5)
    for layer in (0, 1):
        rises = {
            n: activation[0, layer, n] - activation[1, layer, n]
            for n in range(32)
            if frequency[1, layer, n] <= 0.5
        }
        best = sorted(rises, key=lambda n, r=rises: -r[n])[:3]
        assert [n for of, n in chosen if of == layer] == sorted(best)
    with pytest.raises(ValueError, match=r"count = 3: layer 0 has 0 neurons"):
        more_activated(activation, frequency, (0, 1), 3, -1.0)
