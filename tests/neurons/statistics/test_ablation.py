"""Ablation effects against a model in NumPy whose hidden state is changed by hand."""

import dataclasses

import numpy as np
import plain_model
from plain_model import SEPARATOR, configured, final_hidden, handed_on, params, random_documents
import pytest

from topklm.neurons.documents import windows_of
from topklm.neurons.statistics import ablation, catalog

T = 12
DOCUMENTS = random_documents((30, 6, 1, 2, 17, 50), seed=2)
KINDS = {
    "topk": {},
    "dense": {"n_nontopk": 3, "dtype": "bfloat16", "layer_stack": "unrolled"},
    "token-in-every-layer": {"token_input": "every"},
    "centred": {"topk_centred": True},
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def model(request, tmp_path_factory):
    config = configured(context_length=T, **request.param)
    folder = tmp_path_factory.mktemp("ablation")
    return config, plain_model.make_store(folder / "store", config, DOCUMENTS)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Makes several groups, and several chunks in each."""
    monkeypatch.setattr(ablation, "_GROUP_TOKENS", 3 * T)
    monkeypatch.setattr(ablation, "_ROWS", 5)
    monkeypatch.setattr(ablation, "_PER_ROW", 10)


def measured(model, **settings):
    """Returns mean, standard error and number of samples, [S, D] each."""
    config, store = model
    text = store.tokens(0, store.n_tokens), store.document_bounds()
    layers = store.metadata.layers
    found = ablation.measure(layers, *text, config, params(), separator_id=SEPARATOR, **settings)
    return tuple(found[name] for name in ablation.COLUMNS)


def by_hand(config, inputs, layer, neuron, place):
    """Returns the effect at a place of a window."""

    def change(at, h):
        h = h.copy()
        if at == layer:
            h[place, neuron] = min(h[place, neuron], 0) if config.n_topk_layers == 0 else 0
        return h

    hidden = final_hidden(config, inputs, change), final_hidden(config, inputs)
    without, with_neuron = (plain_model.loss(h[place], inputs[place + 1]) for h in hidden)
    return without - with_neuron


def test_with_all_samples_it_is_the_mean_of_effects_by_hand(model):
    config, store = model
    layers = store.metadata.layers
    mean, standard_error, n_samples = measured(model, samples=10_000)
    windows = [w for i, ids in enumerate(DOCUMENTS) for w in windows_of(i, ids, SEPARATOR, T)]
    for layer, neuron in ((0, 0), (0, 7), (1, 3), (1, 12), (layers[-1], 5)):
        effects = []
        for window in windows:
            states = handed_on(config, window.inputs)[layer]
            for place in range(window.n_known, len(window.inputs) - 1):
                if states[place, neuron] > 0 or (config.n_topk_layers and states[place, neuron] != 0):
                    effects.append(by_hand(config, window.inputs, layer, neuron, place))
        number = layers.index(layer)
        assert n_samples[number, neuron] == len(effects) > 3
        assert mean[number, neuron] == pytest.approx(np.mean(effects), abs=1e-5)
        error = np.std(effects, ddof=1) / len(effects) ** 0.5
        assert standard_error[number, neuron] == pytest.approx(error, abs=1e-5)


def test_every_sample_is_an_active_neuron_and_has_the_effect_by_hand(model):
    config, store = dataclasses.replace(model[0], dtype="float32"), model[1]
    inputs, usable = plain_windows()
    rng = np.random.default_rng(3)
    wanted = rng.integers(0, 4, (len(store.metadata.layers), config.d_model))
    parts = ablation.measure_group(config, params(), store.metadata.layers, inputs, usable, wanted, rng)
    n_found = np.zeros_like(wanted)
    for samples in parts:
        columns = samples.layers, samples.neurons, samples.rows, samples.places, samples.effects
        for n, (layer, neuron, row, place, effect) in enumerate(zip(*columns, strict=True)):
            assert usable[row, place]
            n_found[store.metadata.layers.index(layer), neuron] += 1
            if n % 5 == 0:
                assert effect == pytest.approx(by_hand(config, inputs[row], layer, neuron, place), abs=1e-5)
    assert (n_found <= wanted).all()
    assert (n_found == wanted).mean() > 0.5


def plain_windows():
    """Returns the first window of each of three documents."""
    inputs = np.full((3, T), SEPARATOR, np.int32)
    usable = np.zeros((3, T), bool)
    for row, document in enumerate((0, 1, 4)):
        ids = DOCUMENTS[document][: T - 1]
        inputs[row, 1 : len(ids) + 1] = ids
        usable[row, 1 : len(ids)] = True
    return inputs, usable


def test_each_sample_is_in_one_chunk_whose_rows_are_of_one_window_and_layers_rise():
    rng = np.random.default_rng(4)
    layers, rows = np.sort(rng.integers(0, 3, 400)), rng.integers(0, 4, 400)
    chunks = list(ablation._chunks(layers, rows))
    assert {chunk.shape for chunk in chunks} == {(5, 10)}
    assert sorted(np.concatenate(chunks).ravel()[np.concatenate(chunks).ravel() >= 0]) == list(range(400))
    for line in np.concatenate(chunks):
        held = line[line >= 0]
        assert len(np.unique(rows[held])) == len(np.unique(layers[held])) == min(len(held), 1)
        assert (line[: len(held)] >= 0).all()
    first = [layers[chunk[chunk >= 0]].min() for chunk in chunks]
    assert first == sorted(first)
    assert list(ablation._chunks(layers[:0], rows[:0])) == []


def test_samples_are_drawn_from_all_active_places_alike():
    states = np.zeros((40, 3), np.float32)
    states[:30, 0], states[5, 1] = 1.0, -2.0
    rng, times = np.random.default_rng(0), np.zeros(40)
    config = configured(topk_activation="abs")
    for _ in range(600):
        tokens, neurons = ablation._draw(states, np.array([10, 4, 4]), config, rng)
        assert sorted(neurons) == [0] * 10 + [1]
        assert tokens[neurons == 1] == [5]
        chosen = tokens[neurons == 0]
        assert len(set(chosen)) == 10
        times[chosen] += 1
    assert times[30:].sum() == 0
    assert times[:30].min() > 150 and times[:30].max() < 250  # 200 expected, deviation 12


def test_no_more_than_asked_for_are_taken_and_they_are_of_many_windows(model):
    mean, _, n_samples = measured(model, samples=4)
    assert n_samples.max() == 4
    np.testing.assert_array_equal(measured(model, samples=4)[0], mean)
    assert not np.array_equal(measured(model, samples=4, seed=1)[0], mean)


def test_the_windows_looked_at_are_limited(model):
    few, many = (measured(model, samples=10_000, **asked)[2].sum() for asked in ({"max_tokens": 2 * T}, {}))
    assert 0 < few < many / 3


def test_columns_fit_the_table_and_there_is_none_without_a_sample(model):
    mean, standard_error, n_samples = measured(model, samples=1)
    assert set(ablation.COLUMNS) <= set(catalog.schema().names)
    some_are_dead = model[0].n_topk_layers and model[0].token_input == "first"
    assert (n_samples == 0).any() or not some_are_dead
    np.testing.assert_array_equal(np.isnan(mean), n_samples == 0)
    assert np.isnan(standard_error).all()


def test_what_is_done_is_told(model):
    told = []
    measured(model, samples=3, report=told.append)
    assert told == sorted(told)
    assert told[-1] == 1
