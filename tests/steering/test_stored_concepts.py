"""Concepts, and neutral prompts, against loops over every activation of a small store."""

import math

import numpy as np
import plain_model
from plain_model import SEPARATOR, V, configured, handed_on, random_documents
import pytest

from topklm.errors import UserError
from topklm.steering import concepts, survey

DOCUMENTS = random_documents((30, 6, 11, 40, 17, 9), seed=4)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return plain_model.make_store(tmp_path_factory.mktemp("concepts") / "store", configured(), DOCUMENTS)


def by_hand(store, layer, neuron):
    """Computes the three scores of every token, and whether the neuron lives, in documents of even number."""
    events = store.neuron(layer, neuron)
    strength = dict(zip(events.tokens.tolist(), events.values.tolist(), strict=True))
    here, behind, text = np.zeros(V), np.zeros(V), np.zeros(V)
    at = 0
    for number, ids in enumerate(DOCUMENTS):
        for place, token in enumerate(ids):
            if number % 2 == 0:
                text[token] += 1
                here[token] += strength.get(at, 0.0)
                if place + 1 < len(ids):
                    behind[ids[place + 1]] += strength.get(at, 0.0)
            at += 1
    q = text / text.sum()

    def distinctness(weights):
        p = weights / max(weights.sum(), 1e-300)
        return [p_v * math.log(p_v / q_v) if p_v and q_v else 0.0 for p_v, q_v in zip(p, q, strict=True)]

    return (here, np.array(distinctness(here)), np.array(distinctness(behind))), here.sum() > 0


@pytest.mark.parametrize("cells", [1 << 22, 3 * V])
def test_concepts_are_the_tokens_with_the_largest_scores(store, monkeypatch, cells):
    monkeypatch.setattr(concepts, "_CELLS", cells)
    found = concepts.ConceptReader(store, V).read(1)
    alive = [neuron for neuron in range(16) if by_hand(store, 1, neuron)[1]]
    assert found.neurons.tolist() == alive
    for row, neuron in enumerate(alive):
        for kind, scores in zip(concepts.KINDS, by_hand(store, 1, neuron)[0], strict=True):
            ids = concepts.token_sets(found, kind)[row]
            best = np.sort(scores)[::-1][: concepts.SIZE]
            np.testing.assert_allclose(scores[ids], best[best > 0], rtol=1e-6)
            assert len(set(ids.tolist())) == len(ids)


def test_one_neuron_can_be_read_alone(store):
    reader = concepts.ConceptReader(store, V)
    whole = reader.read(1)
    alone = reader.read(1, [int(whole.neurons[2])])
    np.testing.assert_array_equal(alone.tokens[0], whole.tokens[2])
    assert alone.neurons.tolist() == [whole.neurons[2]]


def test_activations_in_documents_of_odd_number_change_no_concept(store, tmp_path):
    others = [ids if n % 2 == 0 else ids[::-1] for n, ids in enumerate(DOCUMENTS)]
    changed = plain_model.make_store(tmp_path / "store", configured(), others)
    one, other = (concepts.ConceptReader(s, V).read(0) for s in (store, changed))
    np.testing.assert_array_equal(one.tokens, other.tokens)


def test_a_store_of_one_document_is_refused(tmp_path):
    store = plain_model.make_store(tmp_path / "store", configured(), DOCUMENTS[:1])
    with pytest.raises(UserError, match="there is only one: harvest more text"):
        concepts.ConceptReader(store, V)


def test_neutral_prompts_are_pieces_of_one_odd_document_each(store):
    found = survey.neutral_prompts(store, 6, 8, SEPARATOR, seed=3)
    assert found.tokens.shape == (6, 8)
    for row, following in zip(found.tokens.tolist(), found.following.tolist(), strict=True):
        assert row[0] == SEPARATOR
        piece = [*row[1:], following]
        assert any(
            piece == ids[first : first + 8].tolist() for ids in DOCUMENTS[1::2] for first in range(len(ids))
        )
    with_prefix = found.with_prefix(np.array([41, 42]))
    assert with_prefix[2].tolist() == [SEPARATOR, 41, 42, *found.tokens[2, 1:].tolist()]
    with pytest.raises(UserError, match="harvest more text"):
        survey.neutral_prompts(store, 6, 60, SEPARATOR, seed=3)


def test_the_plain_model_and_its_store_agree(store):
    dense = handed_on(configured(), [SEPARATOR, *DOCUMENTS[0]])[1, 1:]
    assert (store.neuron(1, 3).values > 0).sum() >= (dense[:, 3] > 0).sum()
