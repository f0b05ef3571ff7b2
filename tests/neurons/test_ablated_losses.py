"""Losses with neurons off, against the model steered by interventions, run window by window."""

import jax
import numpy as np
import pytest
from test_activation_counts import DOCUMENTS, model_of, text_model

from topklm.inference.interventions import Intervention
from topklm.neurons import documents
from topklm.neurons.ablate_set import AblatedLosses
from topklm.neurons.documents import windows_of

EVEN = np.concatenate([ids % 2 == 0 for ids in DOCUMENTS])


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def texts(model):
    """Makes documents of two batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_BATCH_TOKENS", 128)
        return AblatedLosses(text_model(model), DOCUMENTS, {"all": np.ones(136, bool), "even": EVEN})


def losses_by_hand(model, ids, neurons):
    """Nats, of each token of a document."""
    separator, length = model.tokenizer.separator_id, model.config.model.context_length
    steer = [Intervention(layer, neuron, mode="ablate") for layer, neuron in neurons]
    losses = []
    for window in windows_of(0, ids, separator, length):
        padded = np.full((1, length), separator)
        padded[0, : len(window.inputs)] = window.inputs
        logits = np.asarray(model(padded, steer=steer), np.float64)[0]
        log_z = np.log(np.exp(logits - logits.max(axis=-1, keepdims=True)).sum(axis=-1)) + logits.max(axis=-1)
        for at in range(window.n_known, len(window.inputs)):
            losses.append(log_z[at - 1] - logits[at - 1, padded[0, at]])
    return losses


@pytest.mark.parametrize("neurons", [(), ((0, 3), (0, 17), (1, 5), (1, 6)), tuple((0, n) for n in range(8))])
def test_losses_are_those_of_the_model_with_ablating_interventions(model, texts, neurons):
    done = []
    sums = texts.sums(neurons, done.append)
    assert sum(done) == texts.n_tokens["all"].sum() == 136
    by_hand = [losses_by_hand(model, ids, neurons) for ids in DOCUMENTS]
    np.testing.assert_allclose(texts.of_tokens(neurons), np.concatenate(by_hand), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sums["all"], [sum(losses) for losses in by_hand], rtol=1e-4)
    even = [
        sum(loss for loss, token in zip(losses, ids, strict=True) if token % 2 == 0)
        for losses, ids in zip(by_hand, DOCUMENTS, strict=True)
    ]
    np.testing.assert_allclose(sums["even"], even, rtol=1e-4)
    assert texts.n_tokens["even"].tolist() == [int((ids % 2 == 0).sum()) for ids in DOCUMENTS]
    if neurons:
        assert np.abs(sums["all"] - texts.sums()["all"]).max() > 0.01


def test_other_sets_of_any_size_compile_nothing(texts):
    texts.sums([(0, 1)])
    found = []

    def listen(event, _seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for neurons in ((), [(1, 2)], [(layer, n) for layer in (0, 1) for n in range(20)]):
            texts.sums(neurons)
        assert found == []
        jax.jit(lambda x: x * 3.25)(np.float32(2))
        assert found != []  # it does hear
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("neuron", [(2, 0), (0, 32), (-1, 0)])
def test_a_neuron_that_is_not_there_is_refused(texts, neuron):
    with pytest.raises(ValueError, match="the model has layers 0 to 1 of 32 neurons"):
        texts.sums([neuron])
