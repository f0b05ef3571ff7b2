"""The survey against one neuron at a time in NumPy; and neurons made to be steerable, idle and dead."""

import dataclasses
import json

import jax
import numpy as np
import plain_model
from plain_model import SEPARATOR, configured, final_hidden, params, random_documents, unembedding
import pytest
import saved_runs

from topklm.errors import UserError
from topklm.neurons import segment as segment_lib
from topklm.neurons.store import Store, StoreWriter
from topklm.progress import Progress
from topklm.steering import SurveySettings, survey
from topklm.steering.concepts import KINDS

DOCUMENTS = random_documents((30, 26, 11, 40, 17, 29), seed=4)
SETTINGS = SurveySettings(
    strengths=(0.5, 1.5), prompts=3, prompt_tokens=6, random_directions=5, neurons=6, bound=0.5, seed=2
)
PROGRESS = Progress(lambda line: None)
# Measured in float32 all the same; its last layer has no TopK.
CONFIG = configured(dtype="bfloat16", token_input="every", topk_centred=True)
STREAM = configured(dtype="bfloat16")  # carries the embedding


def surveyed(store, config, parameters, settings=SETTINGS):
    return survey.survey(
        store, config, parameters, separator_id=SEPARATOR, settings=settings, progress=PROGRESS
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    store = plain_model.make_store(tmp_path_factory.mktemp("survey") / "store", CONFIG, DOCUMENTS)
    asked = survey.neutral_prompts(store, SETTINGS.prompts, SETTINGS.prompt_tokens, SEPARATOR, SETTINGS.seed)
    return surveyed(store, CONFIG, params()), asked


def log_p(tokens, change=lambda layer, h: h):
    """Returns probabilities of the next token, float64[C, V], by the plain model."""
    logits = np.stack([final_hidden(CONFIG, row, change)[-1] for row in tokens]) @ unembedding()
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def of_concept(log_p_CV, ids):
    ids = ids[ids >= 0]
    return np.log(np.exp(log_p_CV[:, ids]).sum(axis=1)) if len(ids) else np.zeros(len(log_p_CV))


def effects(before, after, concept_KM, following):
    gains = [np.mean(of_concept(after, ids) - of_concept(before, ids)) for ids in concept_KM]
    divergence = np.mean((np.exp(after) * (after - before)).sum(axis=1))
    rows = np.arange(len(following))
    return gains, divergence, np.mean(before[rows, following] - after[rows, following])


def test_what_is_measured_together_is_what_one_neuron_at_a_time_gives(done):
    layers, asked = done
    before = log_p(asked.tokens)
    for number, layer in layers.items():
        for place, neuron in list(enumerate(layer.concepts.neurons))[:3]:
            for x, strength in enumerate(SETTINGS.strengths):

                def change(at, h, number=number, neuron=neuron, length=strength * layer.norm):
                    h = h.copy()
                    h[:, neuron] += length if at == number else 0.0
                    return h

                after = log_p(asked.tokens, change)
                gains, divergence, loss = effects(
                    before, after, layer.concepts.tokens[place], asked.following
                )
                np.testing.assert_allclose(layer.measured.own[x, place], gains, rtol=2e-4, atol=2e-5)
                assert layer.measured.divergences[x, place] == pytest.approx(divergence, rel=1e-3, abs=2e-5)
                assert layer.measured.losses[x, place] == pytest.approx(loss, rel=1e-3, abs=2e-5)
                np.testing.assert_array_equal(
                    layer.measured.own[x, place], layer.measured.others[x, place, place]
                )


def test_random_directions_have_the_same_length_at_the_same_place(done):
    layers, asked = done
    before = log_p(asked.tokens)
    # Of the first layer, in the order in which the survey draws.
    rng = np.random.default_rng(SETTINGS.seed)
    layer = layers[0]
    rng.permutation(layer.n_alive)
    vectors = rng.standard_normal((SETTINGS.random_directions, CONFIG.d_model))
    for x, strength in enumerate(SETTINGS.strengths):
        vector = vectors[3] * strength * layer.norm / np.sqrt((vectors[3] ** 2).sum())
        after = log_p(asked.tokens, lambda at, h, vector=vector: h + (vector if at == 0 else 0.0))
        for i in (0, 4):
            gains, divergence, _ = effects(before, after, layer.concepts.tokens[i], asked.following)
            np.testing.assert_allclose(layer.measured.random[x, 3, i], gains, rtol=2e-4, atol=2e-5)
            assert layer.measured.random_divergences[x, 3] == pytest.approx(divergence, rel=1e-3, abs=2e-5)


def test_prompting_puts_the_words_of_the_concept_before_the_prompt(done):
    layers, asked = done
    layer = layers[1]
    before = log_p(asked.tokens)
    for column, kind in enumerate(survey.PROMPTED):
        k = KINDS.index(kind)
        ids = layer.concepts.tokens[0, k]
        written = np.resize(ids[ids >= 0], len(ids))
        tokens = [[row[0], *written, *row[1:]] for row in asked.tokens.tolist()]
        gains, divergence, _ = effects(before, log_p(tokens), layer.concepts.tokens[0], asked.following)
        assert layer.prompting_gains[0, column] == pytest.approx(gains[k], rel=1e-3, abs=2e-5)
        assert layer.prompting_divergences[0, column] == pytest.approx(divergence, rel=1e-3, abs=2e-5)


def test_the_summary_counts_neurons_and_is_json(done):
    layers, _ = done
    found = json.loads(json.dumps(survey.summarise(layers, SETTINGS), allow_nan=False))
    *of_layers, together = found["layers"]
    assert [one["layer"] for one in of_layers] == [str(number) for number in layers]
    assert together["layer"] == "all"
    assert together["n_neurons"] == sum(one["n_neurons"] for one in of_layers) == 6 * len(layers)
    for kind in KINDS:
        k = KINDS.index(kind)
        passed = [layer.verdicts.steerable[:, k] for layer in layers.values()]
        share = together["concepts"][kind]["steerable"]
        assert share["share"] == pytest.approx(np.mean(np.concatenate(passed)))
        assert share["low"] - 1e-9 <= share["share"] <= share["high"] + 1e-9
    rows = survey.neuron_rows(layers, SETTINGS, saved_runs.tokenizer())
    json.dumps(rows, allow_nan=False)
    assert [(row["layer"], row["neuron"]) for row in rows] == [
        (number, neuron) for number, layer in layers.items() for neuron in layer.concepts.neurons.tolist()
    ]


PLANTED, IDLE, DEAD, LIVING = 3, 7, 9, (0, 2, 3, 5, 7, 12)
MEANT, OTHERS = np.array([11, 12, 13]), np.array([21, 22, 25])  # where the first two are active


def planted():
    """Blocks that write nothing, so that a neuron reaches the logits as it is."""
    made = jax.tree.map(np.array, params())
    for part, name in (("attention", "out"), ("mlp", "down")):
        made["blocks"][part][name]["kernel"][:] = 0
    rng = np.random.default_rng(0)
    embedding, kernel = made["embed"]["embedding"], made["unembed"]["kernel"]
    embedding[:] = -1.0
    embedding[:, LIVING] = rng.uniform(0.5, 1.0, (len(embedding), len(LIVING)))
    embedding[:, [PLANTED, IDLE]] = -1.0
    embedding[MEANT, PLANTED] = embedding[OTHERS, IDLE] = 5.0
    made["final_norm"]["scale"][:] = 1
    kernel[:] = 0.1 * rng.standard_normal(kernel.shape)
    kernel[[PLANTED, IDLE]] = 0
    kernel[PLANTED, MEANT] = 2.0
    return made


def test_a_planted_neuron_is_steerable_an_idle_one_is_not_and_a_dead_one_is_not_listed(tmp_path):
    documents = [np.concatenate([ids, MEANT, OTHERS]) for ids in DOCUMENTS]
    metadata = plain_model.make_store(tmp_path / "other", STREAM, DOCUMENTS).metadata
    writer, parameters = StoreWriter(tmp_path / "store", metadata), planted()
    for number, ids in enumerate(documents):
        h = np.maximum(parameters["embed"]["embedding"][ids], 0)
        numbers = np.full(len(ids), number)
        writer.append(segment_lib.from_dense(ids, numbers, np.zeros(len(ids)), [h, h]))
    settings = dataclasses.replace(SETTINGS, neurons=None, layers=(1,), random_directions=40, bound=2.0)
    layer = surveyed(Store(tmp_path / "store"), STREAM, parameters, settings)[1]
    assert tuple(layer.concepts.neurons) == LIVING
    assert DEAD not in LIVING
    k, at, idle = KINDS.index("input"), LIVING.index(PLANTED), LIVING.index(IDLE)
    assert set(layer.concepts.tokens[at, k].tolist()) == {*MEANT.tolist(), -1}
    assert layer.verdicts.steerable[at, k]
    assert layer.verdicts.specific[at, k]
    assert not layer.verdicts.steerable[idle, k]
    # The tokens whose logits it lifts grow more likely than a random direction makes them, by hand.
    before, after = (
        log_p_of(
            parameters, survey.neutral_prompts(Store(tmp_path / "store"), 3, 6, SEPARATOR, 2).tokens, length
        )
        for length in (0.0, settings.strengths[layer.verdicts.strength[at]] * layer.norm)
    )
    gain = np.mean(of_concept(after, MEANT) - of_concept(before, MEANT))
    assert layer.verdicts.gain[at, k] == pytest.approx(gain, rel=1e-3)


def log_p_of(parameters, tokens, length):
    """Returns those of the planted model, whose last token alone decides the next one."""
    h = np.asarray(parameters["embed"]["embedding"], np.float64)[tokens[:, -1]]
    h = np.maximum(h, 0)  # at most k are positive, and there is no TopK behind layer 1
    h[:, PLANTED] += length
    h /= np.sqrt((h**2).mean(axis=1, keepdims=True) + STREAM.norm_eps)
    logits = h @ np.asarray(parameters["unembed"]["kernel"], np.float64)[:, : STREAM.vocab_size]
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_a_layer_that_was_not_harvested_is_refused(tmp_path):
    store = plain_model.make_store(tmp_path / "store", STREAM, DOCUMENTS)
    with pytest.raises(UserError, match=r"layer 2: .* has activations of the layers 0, 1;"):
        surveyed(store, STREAM, params(), dataclasses.replace(SETTINGS, layers=(0, 2)))
