"""Measures of autoencoders with known answers."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import made_states
import numpy as np
import pytest
import saved_runs

from topklm.errors import UserError
from topklm.layout import one_device
from topklm.model import transformer
from topklm.model.block import LayerHooks
from topklm.neurons.dictionary import Dictionary
from topklm.neurons.documents import TextModel
from topklm.progress import Progress
from topklm.sae import measure

D = saved_runs.MODEL.d_model
BASE = dataclasses.replace(saved_runs.MODEL, n_nontopk=2, topk_k=4)
LAYERS = (0, 1)


def model(config=BASE, seed=0, rows=4):
    # Parameters of some size, so that layers matter.
    shapes = jax.eval_shape(lambda: transformer.create(config, 0))
    draw = np.random.default_rng(seed).standard_normal
    params = jax.tree.map(lambda leaf: 0.3 * draw(leaf.shape, dtype=np.float32), shapes)
    return TextModel(config, params, one_device(), 256, batch_rows=rows)


def documents():
    return [np.random.default_rng(n).integers(0, 256, 10 + 3 * n) for n in range(20)]


def dictionary(decoder, centre=None):
    """Codes are the coordinates' two signs: decodes to the state itself if `decoder` is the encoder's."""
    both = np.concatenate([np.eye(D), -np.eye(D)]).astype(np.float32)
    encoder = np.broadcast_to(both.T, (2, D, 2 * D)).copy()
    centre = np.zeros((2, D), np.float32) if centre is None else centre
    return Dictionary("sae", 2 * D, centre, encoder, np.broadcast_to(decoder * both, (2, 2 * D, D)).copy())


def tables(made, rows=4, n_tokens=400):
    text_model = model(rows=rows)
    given = [("made", made, LAYERS)]
    return measure.of_folders(given, text_model, documents(), n_tokens, Progress(lambda line: None))


def layers_of(found):
    return found["autoencoders"][0]["layers"]


def test_a_perfect_dictionary_recovers_all_loss_and_explains_all():
    for row in layers_of(tables(dictionary(1.0))):
        assert row["explained_variance"] == pytest.approx(1, abs=1e-6)
        assert row["recovered_zero"] == pytest.approx(1, abs=1e-3)
        assert row["recovered_mean"] == pytest.approx(1, abs=1e-3)
        assert row["loss_reconstructed"] == pytest.approx(row["loss"], abs=1e-3)
        assert (row["l0"], row["dead"]) == (pytest.approx(D), 0)


def test_a_dictionary_of_nothing_recovers_nothing_of_zero_ablation_and_one_of_the_mean_explains_nothing():
    for row in layers_of(tables(dictionary(0.0))):
        assert row["recovered_zero"] == pytest.approx(0, abs=1e-6)
        assert row["explained_variance"] < 0
    text_model = model()
    read = list(measure._batches(text_model, documents(), 400))
    means = measure.reconstruction(dictionary(0.0), LAYERS, text_model, read)[1].astype(np.float32)
    for row in layers_of(tables(dictionary(0.0, means))):
        assert row["explained_variance"] == pytest.approx(0, abs=1e-5)
        assert row["recovered_mean"] == pytest.approx(0, abs=1e-3)


def test_all_layers_but_the_last_are_replaced_together():
    text_model, n_layers = model(dataclasses.replace(BASE, n_layers=3, n_nontopk=3)), 3
    read = list(measure._batches(text_model, documents(), 400))
    made, means = dictionary(0.5), np.zeros((2, D))

    def together(*layers):
        of_layers = dataclasses.replace(
            made, **{name: getattr(made, name)[: len(layers)] for name in ("centre", "encoder", "decoder")}
        )
        rows, found = measure.recovered(of_layers, layers, means[: len(layers)], text_model, read)
        return [row["loss_reconstructed"] for row in rows], found["loss_reconstructed"], found["loss"]

    (first,), of_first, clean = together(0)
    assert of_first == first != clean
    (_, of_last, _), (both, of_both, _) = together(n_layers - 1), together(0, n_layers - 1)
    assert of_last == clean
    assert of_both == both[0] == first

    # Two layers, one after the other, by hand.
    wanted, n = 0.0, 0
    for inputs, inside in read:
        is_read = np.zeros(inputs[0].size, bool)
        is_read[inside] = True

        def halved(h, at, is_read=is_read):
            # Half of what is there, as `dictionary` says.
            return jnp.where(at & is_read.reshape(h.shape[:2])[..., None], h / 2, h)

        bound = transformer.bind(text_model.config, text_model.params)
        at = jnp.arange(n_layers) < 2
        h, _ = bound.hidden(*inputs, hooks=LayerHooks(output=halved), hook_inputs=at)
        logits = np.asarray(h.astype(jnp.float32) @ bound.unembedding(), np.float64).reshape(is_read.size, -1)
        logits = logits[:, : text_model.config.vocab_size]
        targets = np.roll(np.asarray(inputs[0]), -1, axis=1).reshape(-1)
        losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(targets)), targets]
        wanted, n = wanted + losses[inside - 1].sum(), n + len(inside)
    assert together(0, 1)[1] == pytest.approx(wanted / n, rel=1e-4)


def test_the_mean_is_over_tokens_of_text_alone():
    text_model = model()
    read = list(measure._batches(text_model, documents(), 10**6))
    _, means = measure.reconstruction(dictionary(1.0), LAYERS, text_model, read)
    total, n = np.zeros((2, D)), 0
    for inputs, inside in read:
        bound = transformer.bind(text_model.config, text_model.params)
        _, states = bound.hidden(*inputs, capture=lambda h, u, after: after)
        total += np.asarray(states, np.float64).reshape(2, -1, D)[:, inside].sum(axis=1)
        n += len(inside)
    assert n == sum(map(len, documents()))
    np.testing.assert_allclose(means, total / n, rtol=1e-4, atol=1e-5)


def test_figures_do_not_depend_on_the_size_of_a_batch():
    half = dictionary(0.7)
    few, many = (layers_of(tables(half, rows, 10**6)) for rows in (2, 16))
    for a, b in zip(few, many, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-5), name


def test_mean_cosine_of_rows_is_that_of_all_pairs(monkeypatch):
    rows = np.random.default_rng(0).normal(size=(2, 30, 7))
    monkeypatch.setattr(measure, "_BLOCK", 8)
    found = measure.decoder_cosine(rows)
    for layer in range(2):
        pairs = [
            abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b)
            for i, a in enumerate(rows[layer])
            for j, b in enumerate(rows[layer])
            if i != j
        ]
        assert found[layer] == pytest.approx(np.mean(pairs))
    assert measure.decoder_cosine(np.eye(5)[None])[0] == 0
    assert np.isnan(measure.decoder_cosine(np.ones((1, 1, 4)))[0])


def test_rows_in_another_order_are_found_again_and_each_only_once():
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(20, 50))
    again = measure.stability(rows, 3 * rows[rng.permutation(20)])
    assert again == {"stability": pytest.approx(1), "stable_share": 1, "matched": pytest.approx(1)}
    half = rows.copy()
    half[10:] = rows[0]
    found = measure.stability(half, np.concatenate([rows[:10], rng.normal(size=(10, 50))]))
    assert found["stability"] == pytest.approx(1) and found["matched"] < 0.8
    assert found["stable_share"] == 1


def test_hedging_is_zero_where_nothing_moved_and_one_where_all_moves_are_along_new_rows():
    rng = np.random.default_rng(2)
    control = rng.normal(size=(30, 40))
    control /= np.linalg.norm(control, axis=1, keepdims=True)
    new = rng.normal(size=(3, 40))
    assert measure.hedging_rate(control, np.concatenate([control, new])) == 0
    basis = np.linalg.qr(new.T)[0]
    along = (rng.normal(size=(30, 3)) @ basis.T) * 0.2
    rate = measure.hedging_rate(control, np.concatenate([control + along, new]), seed=4)
    # By the formula, with an orthonormal basis from QR and other random subspaces.
    share = np.linalg.norm(along, axis=1).mean()
    others = [np.linalg.qr(rng.normal(size=(40, 3)))[0] for _ in range(300)]
    baseline = np.mean([np.linalg.norm(along @ q, axis=1).mean() for q in others])
    assert rate == pytest.approx((share - baseline) / (1 - baseline), rel=0.05)
    across = (rng.normal(size=(30, 40)) * 0.2) @ (np.eye(40) - basis @ basis.T)
    assert measure.hedging_rate(control, np.concatenate([control + across, new])) == 0
    twice = np.concatenate([control + along, new, new])  # new rows that span no more
    assert measure.hedging_rate(control, twice) > 0.5 * rate
    assert np.isnan(measure.hedging_rate(control, np.concatenate([control, rng.normal(size=(40, 40))])))


def test_neurons_hedge_as_far_as_their_reading_rows_move_along_those_of_new_ones():
    config = dataclasses.replace(saved_runs.MODEL, n_nontopk=0, topk_k=4)
    wide = dataclasses.replace(config, d_model=D + 2, head_dim=config.head_width)
    narrow = model(config).params
    rng = np.random.default_rng(6)
    moved = jax.tree.map(np.array, transformer.widened(wide, 0, narrow))
    scale = moved["blocks"]["mlp_norm"]["scale"]
    np.testing.assert_allclose(scale[:, :D], narrow["blocks"]["mlp_norm"]["scale"] * (D / (D + 2)) ** 0.5)
    names = [("attention", name) for name in ("query", "key", "value")] + [("mlp", "gate"), ("mlp", "up")]
    mix = rng.normal(size=(D, 2))
    for part, name in names:
        kernel = moved["blocks"][part][name]["kernel"]
        norm = moved["blocks"][f"{part}_norm"]["scale"][:, :, None]
        # As much of the new rows, as the norm lets them through.
        kernel[1, :D] += (0.3 * mix @ (norm * kernel)[1, D:]) / norm[1, :D]
    found = measure.hedging_of_topk_lm(lm(config, narrow, "a"), lm(wide, moved, "a"))
    wanted = []
    for layer in (1, 2):  # what reads layers 0 and 1
        of = {}
        for key, params, d in (("control", narrow, D), ("wide", moved, D + 2)):
            if layer == config.n_layers:
                rows = params["final_norm"]["scale"][:, None] * params["unembed"]["kernel"]
            else:
                block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
                rows = np.hstack(
                    [
                        block[f"{part}_norm"]["scale"][:, None] * block[part][name]["kernel"]
                        for part, name in names
                    ]
                )
            of[key] = rows * d**0.5
        wanted.append(measure.hedging_rate(of["control"], of["wide"]))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert found[0] > 0.3 and found[1] < 1e-6
    for other, said in (
        (lm(wide, moved, "b"), "train.init was 'a', now 'b'"),
        (lm(wide, moved, "a", step=3), "step was 2, now 3"),
        (lm(dataclasses.replace(wide, topk_k=3), moved, "a"), "model.topk_k was 4, now 3"),
        (lm(config, narrow, "a"), "with a larger model.d_model"),
    ):
        with pytest.raises(UserError, match=said):
            measure.hedging_of_topk_lm(lm(config, narrow, "a"), other)


def lm(config, params, init, step=2):
    """As much of a loaded model as hedging reads."""
    train = dataclasses.replace(saved_runs.CONFIG.train, init=init)
    whole = dataclasses.replace(saved_runs.CONFIG, model=config, train=train)
    return SimpleNamespace(cfg=config, params=params, step=step, run="r", config=whole)


@pytest.mark.slow
def test_hedging_of_trained_autoencoders_is_between_0_and_1():
    narrow = made_states.config(width=6)
    found = measure.hedging(narrow, made_states.states, 16, 3)
    assert len(found) == made_states.S and all(0 <= rate < 1 for rate in found)


class Loaded:
    """As much of a loaded model as the measures read."""

    def __init__(self, text_model, run):
        self.cfg, self.params, self.run, self.tokenizer = text_model.config, text_model.params, run, self
        self.sha256 = "of the tokenizer"


def test_neurons_of_a_topk_lm_are_found_in_themselves_and_hardly_in_others():
    config = dataclasses.replace(BASE, n_nontopk=0)
    one, other = (model(config, seed) for seed in (0, 1))
    found = measure.of_topk_lm(
        Loaded(one, "one"),
        [Loaded(one, "one again"), Loaded(other, "other")],
        one,
        documents(),
        10**6,
        Progress(lambda line: None),
    )
    read = list(measure._batches(one, documents(), 10**6))
    states = [
        np.concatenate(
            [np.asarray(measure.hidden_states(m.config, m.params, *x))[:, r] for x, r in read], axis=1
        )
        for m in (one, other)
    ]
    for layer, row in enumerate(layers_of(found)):
        active = states[0][layer] != 0
        assert row["l0"] == pytest.approx(active.sum(axis=1).mean())
        assert row["dead"] == (~active.any(axis=0)).sum()
        with np.errstate(invalid="ignore", divide="ignore"):
            both = np.corrcoef(np.concatenate([states[0][layer], states[1][layer]], axis=1).T)
        of_other = np.nan_to_num(both)[:D, D:].max(axis=1).mean()
        alive = np.nan_to_num(both).diagonal()[:D].mean()
        assert row["stability"] == pytest.approx((alive + of_other) / 2, abs=1e-6)
    assert "by construction" in found["notes"][0]
