"""Neurons ranked by their effect on a pattern's tokens, against one neuron at a time in NumPy."""

import dataclasses

import numpy as np
import plain_model
from plain_model import SEPARATOR, params
import pytest
from test_survey import CONFIG, DOCUMENTS, PROGRESS, SETTINGS, effects, log_p

from topklm.errors import UserError
from topklm.neurons.search import Matches
from topklm.steering import survey

TOKENS = np.array([5, 9, 2], np.int32)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return plain_model.make_store(tmp_path_factory.mktemp("toward") / "store", CONFIG, DOCUMENTS)


def asked(store):
    return survey.neutral_prompts(store, SETTINGS.prompts, SETTINGS.prompt_tokens, SEPARATOR, 0)


def test_each_neuron_has_the_gain_for_its_cost_that_it_has_alone(store):
    settings = dataclasses.replace(SETTINGS, neurons=5)
    prompts = asked(store)
    found = survey.rank(store, CONFIG, params(), TOKENS, prompts, settings, PROGRESS)
    assert [one.gain_per_nat for one in found] == sorted((one.gain_per_nat for one in found), reverse=True)
    assert {one.layer for one in found} == set(store.metadata.layers)
    before = log_p(prompts.tokens)
    norms = {}
    for layer in store.metadata.layers:  # mean lengths of what layers hand on, separators left out
        seen = []

        def keep(at, h, layer=layer, seen=seen):
            if at == layer:
                seen.append(np.linalg.norm(h, axis=-1)[1:])
            return h

        log_p(prompts.tokens, keep)
        norms[layer] = np.mean(seen)
    for one in [*found[:3], *found[-3:]]:
        measured = []
        for strength in settings.strengths:

            def change(at, h, one=one, length=strength * norms[one.layer]):
                h = h.copy()
                h[:, one.neuron] += length if at == one.layer else 0.0
                return h

            after = log_p(prompts.tokens, change)
            (gain,), divergence, _ = effects(before, after, [TOKENS], prompts.following)
            measured.append((strength, gain, divergence))
        # The largest strength within the bound, whatever the gain.
        strength, gain, divergence = [m for m in measured if m[2] <= settings.bound][-1]
        assert one.strength == strength
        assert (one.gain, one.divergence) == pytest.approx((gain, divergence), rel=2e-3, abs=5e-5)
        assert one.gain_per_nat == pytest.approx(one.gain / one.divergence)
    # Random directions are those of the length: one figure for each layer and strength.
    assert len({(one.layer, one.strength): one.random for one in found}) == len(
        {(one.layer, one.strength, one.random) for one in found}
    )


def test_the_bound_leaves_neurons_out_and_a_layer_that_is_not_there_is_named(store):
    tight = dataclasses.replace(SETTINGS, bound=1e-7)
    assert survey.rank(store, CONFIG, params(), TOKENS, asked(store), tight, PROGRESS) == []
    with pytest.raises(UserError, match=r"layer 9: .* has activations of the layers"):
        wrong = dataclasses.replace(SETTINGS, layers=(9,))
        survey.rank(store, CONFIG, params(), TOKENS, asked(store), wrong, PROGRESS)


class Text:
    """A store of two documents that holds nothing but tokens."""

    folder = "a store"

    def __init__(self, *documents):
        self._ids = np.concatenate(documents)
        self._bounds = np.cumsum([0, *map(len, documents)])
        self.n_tokens = len(self._ids)

    def tokens(self, begin, end):
        return self._ids[begin:end]

    def document_bounds(self):
        return self._bounds


def test_a_patterns_tokens_begin_a_match_at_half_of_their_places():
    text = Text([7, 1, 2, 7, 1, 2, 3], [2, 5, 7, 1, 6])
    #       matches: 1 2 .  1 2 and, in the next document, 2, then 7 1 and 6 right after it
    touched = np.array([0, 1, 1, 0, 1, 1, 0, 1, 0, 1, 1, 1], bool)
    ends = np.array([0, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 1], bool)
    found = survey.pattern_tokens(text, Matches(5, touched, ends), 10)
    # 1 begins 2 of its 3; 6 its only one; 2 begins 1 of 3 and 7 begins 1 of 3: too few.
    assert found.tolist() == [1, 6]
    with pytest.raises(UserError, match="0 matches in the harvested text, and no token begins one"):
        survey.pattern_tokens(text, Matches(0, np.zeros(12, bool), np.zeros(12, bool)), 10)
