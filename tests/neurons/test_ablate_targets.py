"""Groups, the half that neurons are chosen on, and densities, against loops over dense activations."""

import numpy as np
import pytest
from test_search import LAYERS, METADATA, D, by_loops, random_dense

from topklm.errors import UserError
from topklm.neurons import ablate_targets, search
from topklm.neurons import segment as segment_lib
from topklm.neurons.ablate_set import halves
from topklm.neurons.search import Matches
from topklm.neurons.store import Store, StoreWriter

SIZES = (30, 1, 50, 9, 60, 41, 22)  # of documents


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A store of some documents in two segments, and its activations [S, N, D]."""
    n = sum(SIZES)
    dense, ids = random_dense(n, 5), np.arange(n) % 200
    numbers = np.repeat(np.arange(len(SIZES)), SIZES)
    folder = tmp_path_factory.mktemp("targets") / "store"
    writer = StoreWriter(folder, METADATA)
    for part in (slice(0, 70), slice(70, n)):
        zeros = np.zeros(len(ids[part]))
        writer.append(segment_lib.from_dense(ids[part], numbers[part], zeros, dense[:, part]))
    return Store(folder), dense


def matches(n, share, seed):
    touched = np.random.default_rng(seed).random(n) < share
    return Matches(int(touched.sum()), touched, touched)


def test_every_token_is_a_target_or_after_one_or_elsewhere():
    rng = np.random.default_rng(0)
    is_target, follows = rng.random(200) < 0.4, rng.random(200) < 0.8
    follows[0] = False
    groups = ablate_targets.groups_of(is_target, follows)
    for at in range(200):
        after = bool(follows[at] and is_target[at - 1])
        named = {name for name, of in groups.items() if of[at]}
        if is_target[at]:
            assert named == ({"targets", "targets after targets"} if after else {"targets"})
        else:
            assert named == ({"others after targets"} if after else {"elsewhere"})


def test_neurons_are_chosen_on_one_half_and_measured_on_the_other(filled):
    store, dense = filled
    n, begins = store.n_tokens, np.cumsum([0, *SIZES])
    matched, targets = np.random.default_rng(1).random(n) < 0.2, matches(n, 0.3, 2)
    plan = ablate_targets.chosen(store, matched, targets, counts=(1, 5), tokens=10_000, seed=4)
    choose, measure = halves(len(SIZES), 4)
    among = np.isin(np.repeat(np.arange(len(SIZES)), SIZES), choose)
    # The store that holds nothing but this half.
    expected = by_loops(dense[:, among], matched[among])[:5]
    assert plan.sets == [
        tuple(one[:2] for one in expected[:1]),
        tuple(one[:2] for one in expected),
    ]
    assert [plan.ranked[neuron].f1 for neuron in plan.sets[1]] == pytest.approx(
        [float(one[8]) for one in expected]
    )
    np.testing.assert_allclose(plan.density, (dense[:, among] != 0).mean(axis=1))
    assert plan.n_chosen_on == len(choose)
    at = np.concatenate([np.arange(begins[number], begins[number + 1]) for number in measure])
    assert np.concatenate(plan.documents).tolist() == (at % 200).tolist()
    assert not among[at].any()
    np.testing.assert_array_equal(plan.groups["targets"], targets.touched[at])
    # The first token of a document follows nothing.
    first = np.isin(at, begins)
    assert not (plan.groups["others after targets"] | plan.groups["targets after targets"])[first].any()
    again = ablate_targets.chosen(
        store, np.where(among, matched, ~matched), targets, counts=(1, 5), tokens=10_000, seed=4
    )
    assert again.sets == plan.sets  # other matches in the half that is measured choose nothing else


def test_given_neurons_are_measured_on_the_first_documents(filled):
    store, dense = filled
    targets = matches(store.n_tokens, 0.5, 2)
    alive = int(np.flatnonzero((dense[1] != 0).any(axis=0))[0])
    plan = ablate_targets.given(store, [[(4, alive), (4, alive)]], targets, tokens=60)
    assert plan.sets == [((4, alive),)] and plan.n_chosen_on == 0
    assert [len(ids) for ids in plan.documents] == [30, 1, 29]
    np.testing.assert_allclose(plan.density, (dense != 0).mean(axis=1))
    assert plan.n_tokens(3) == 60 * (1 + 1 + 3)


def test_impossible_questions_are_refused(filled):
    store, dense = filled
    n = store.n_tokens
    targets, none = matches(n, 0.5, 2), matches(n, 0.0, 2)
    dead = int(np.flatnonzero(~(dense[0] != 0).any(axis=0))[0])
    for neuron, said in [
        ((LAYERS[0], dead), "is active at none of the 213 tokens harvested"),
        ((2, 3), "must be a neuron from 0 to 19 of layer 1 or 4"),
        ((1, D), "must be a neuron from 0 to 19"),
    ]:
        with pytest.raises(UserError, match=f"^neurons = {neuron[0]}:{neuron[1]}: {said}"):
            ablate_targets.given(store, [[neuron]], targets, tokens=100)
    with pytest.raises(UserError, match=r"^targets: none of the 100 tokens that are measured match"):
        ablate_targets.given(store, [[(1, 3)]], none, tokens=100)
    with pytest.raises(UserError, match=r"^count = 41: must be at most \d+, the neurons that are active at"):
        ablate_targets.chosen(store, targets.touched, targets, counts=(41,), tokens=100)


def test_ranking_among_some_tokens_is_ranking_in_a_store_of_these(filled):
    store, dense = filled
    rng = np.random.default_rng(9)
    among, matched = rng.random(store.n_tokens) < 0.5, rng.random(store.n_tokens) < 0.3
    found = search.rank(store, matched, 1000, among=among)
    expected = by_loops(dense[:, among], matched[among])
    assert [(one.layer, one.neuron, one.n_firing, one.n_hits) for one in found] == [
        (*one[:2], *one[4:6]) for one in expected
    ]
