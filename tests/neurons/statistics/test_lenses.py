"""The lenses' tokens and effects, and similar neurons, against whole effect matrices in float64."""

import numpy as np
import plain_model
from plain_model import V, configured, params
import pytest

from topklm.neurons.statistics import activity, catalog, lenses

L, D = plain_model.MODEL.n_layers, plain_model.MODEL.d_model
JACOBIANS = np.random.default_rng(5).standard_normal((L, D, D)).astype(np.float32)


def effects(rows, vocabulary=V):
    """Returns [D, V] of these directions of the final state, [D, D], less each one's mean."""
    logits = rows.astype(np.float64) @ plain_model.unembedding()[:, :vocabulary]
    return logits - logits.mean(axis=1, keepdims=True)


def of_identity():
    return np.diag(np.asarray(params()["final_norm"]["scale"]))


@pytest.fixture(scope="module")
def made():
    return lenses.make(configured(), params(), JACOBIANS)


@pytest.mark.parametrize("at_once", [1 << 24, 3 * V])
@pytest.mark.parametrize(("layer", "begin", "end"), [(0, 0, D), (2, 5, 12)])
def test_the_tokens_at_the_ends_are_those_of_the_whole_matrix(made, monkeypatch, at_once, layer, begin, end):
    monkeypatch.setattr(lenses, "_MAX_EFFECTS", at_once)
    lenses._ends.clear_cache()
    found = lenses.columns(made, layer, begin, end)
    for name, rows in (("identity", of_identity()), ("jacobian", JACOBIANS[layer].T)):
        whole = effects(rows)[begin:end]
        order = np.argsort(whole, axis=1)
        for side, expected in (("top", order[:, : -lenses.N_TOKENS - 1 : -1]), ("bottom", order[:, :10])):
            assert found[f"{name}_{side}"] == expected.tolist()
            wanted = np.take_along_axis(whole, expected, axis=1)
            np.testing.assert_allclose(found[f"{name}_{side}_effects"], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("common", [np.arange(0, V, 3), np.array([5, 9]), np.array([], np.int64)])
def test_common_tokens_are_those_of_the_matrix_of_these_alone(made, common):
    found = lenses.columns(made, 1, 2, 9, common)
    whole = effects(JACOBIANS[1].T)[2:9][:, common]
    order = np.argsort(whole, axis=1)
    for side, places in (("top", order[:, ::-1][:, :10]), ("bottom", order[:, :10])):
        assert found[f"jacobian_common_{side}"] == common[places].tolist()
        wanted = np.take_along_axis(whole, places, axis=1)
        np.testing.assert_allclose(found[f"jacobian_common_{side}_effects"], wanted, rtol=1e-4, atol=1e-4)


def test_a_vocabulary_of_few_tokens_is_listed_whole():
    # After it stand columns of no token, which would be first by far.
    found = lenses.columns(lenses.make(configured(vocab_size=7), params_of_few(7), JACOBIANS), 1, 0, D)
    order = np.argsort(-effects(JACOBIANS[1].T, 7), axis=1)
    assert found["jacobian_top"] == order.tolist()
    assert found["jacobian_bottom"] == order[:, ::-1].tolist()


def params_of_few(n):
    """Returns the parameters, with a vocabulary of n tokens padded to 32."""
    kernel = np.array(params()["unembed"]["kernel"][:, :32])
    kernel[:, n:] = 1000
    return {
        **params(),
        "embed": {"embedding": params()["embed"]["embedding"][:32]},
        "unembed": {"kernel": kernel},
    }


def test_effects_are_per_unit_of_activation_and_do_not_see_a_constant(made):
    shifted = {**params(), "unembed": {"kernel": params()["unembed"]["kernel"] + 3}}
    doubled = lenses.make(configured(), shifted, 2 * JACOBIANS)
    once, twice = (lenses.columns(lens, 1, 4, 6) for lens in (made, doubled))
    assert once["jacobian_top"] == twice["jacobian_top"]
    doubled_effects = 2 * np.array(once["jacobian_top_effects"])
    np.testing.assert_allclose(twice["jacobian_top_effects"], doubled_effects, rtol=1e-3, atol=1e-3)


def test_tied_embeddings_are_the_unembedding():
    config = configured(tie_embeddings=True)
    tied = {name: part for name, part in params().items() if name != "unembed"}
    whole = of_identity() @ np.asarray(tied["embed"]["embedding"], np.float64)[:V].T
    found = lenses.columns(lenses.make(config, tied, JACOBIANS), 0, 0, D)
    assert [tops[0] for tops in found["identity_top"]] == whole.argmax(axis=1).tolist()


@pytest.mark.parametrize(("begin", "end"), [(0, D), (9, 11)])
def test_similar_neurons_are_those_of_the_largest_cosine(made, begin, end):
    found = lenses.similar_columns(made, 2, begin, end)
    whole = effects(JACOBIANS[2].T)
    unit = whole / np.linalg.norm(whole, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    expected = np.argsort(-cosines[begin:end], axis=1)[:, : activity.NEAREST]
    assert found["similar_effect"] == expected.tolist()
    wanted = np.take_along_axis(cosines[begin:end], expected, axis=1)
    np.testing.assert_allclose(found["similar_effect_similarity"], wanted, atol=1e-5)


def test_a_neuron_without_effect_is_similar_to_none_and_a_doubled_one_to_itself():
    changed = JACOBIANS.copy()
    changed[0, :, 3] = 0
    changed[0, :, 7] = 2 * changed[0, :, 1]
    changed[0, :, 8] = -changed[0, :, 1]
    found = lenses.similar_columns(lenses.make(configured(), params(), changed), 0, 0, D)
    assert found["similar_effect_similarity"][3] == [0.0] * 10
    assert found["similar_effect"][1][0] == 7
    assert found["similar_effect_similarity"][1][0] == pytest.approx(1.0, abs=1e-5)
    assert 8 not in found["similar_effect"][1]
    assert all(neuron not in nearest for neuron, nearest in enumerate(found["similar_effect"]))


def test_the_columns_are_those_of_the_table(made):
    found = lenses.columns(made, 0, 0, 4) | lenses.similar_columns(made, 0, 0, 4)
    found |= lenses.columns(made, 0, 0, 4, np.arange(3))
    prefixes = ("identity_", "jacobian_", "similar_effect")
    assert set(found) == {name for name in catalog.schema().names if name.startswith(prefixes)}
    for name, entries in found.items():
        assert len(entries) == 4, name


def test_the_neurons_of_a_dictionary_are_directions_and_not_coordinates():
    rng = np.random.default_rng(8)
    directions = rng.standard_normal((L, D, D)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    made = lenses.make(configured(), params(), JACOBIANS, directions)
    for layer in (0, 2):
        found = lenses.columns(made, layer, 3, 9)
        rows = {
            "identity": directions[layer] @ of_identity(),
            "jacobian": directions[layer] @ JACOBIANS[layer].T,
        }
        for name, of_neurons in rows.items():
            whole = effects(of_neurons)[3:9]
            order = np.argsort(whole, axis=1)
            assert found[f"{name}_top"] == order[:, : -lenses.N_TOKENS - 1 : -1].tolist()
            wanted = np.take_along_axis(whole, order[:, :10], axis=1)
            np.testing.assert_allclose(found[f"{name}_bottom_effects"], wanted, rtol=1e-4, atol=1e-4)
        nearest = lenses.similar_columns(made, layer, 3, 4)
        unit = effects(rows["jacobian"])
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        cosines = unit @ unit[3]
        cosines[3] = -2
        assert nearest["similar_effect"][0] == np.argsort(-cosines)[: activity.NEAREST].tolist()
