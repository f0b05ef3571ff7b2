"""The choice, the random sets beside it, and what is made of the losses."""

import dataclasses

import numpy as np
import pytest

from topklm.neurons import ablate_set
from topklm.neurons.ablate_set import Change, Estimate, Outcome, Spread
from topklm.neurons.contrast import ContrastedNeuron

LAYERS = (0, 2)


class Losses:
    """Documents of two groups, whose loss rises by what each ablated neuron is worth there."""

    def __init__(self, n_tokens, worth):
        self.n_tokens, self._worth = {name: np.array(n) for name, n in n_tokens.items()}, worth

    def sums(self, ablated=(), report=lambda tokens: None):
        report(int(sum(n.sum() for n in self.n_tokens.values())))
        return {
            name: n * (3.0 + sum(self._worth[name].get(neuron, 0.0) for neuron in ablated))
            for name, n in self.n_tokens.items()
        }


def candidate(layer, neuron, difference, score=1.0):
    return ContrastedNeuron(layer, neuron, 0.5, 0.5 - difference, difference, score, 0.1, 0.1, 0.1)


@pytest.mark.parametrize("n", [2, 3, 11])
def test_no_document_is_in_both_halves_and_each_is_in_one(n):
    one, other = ablate_set.halves(n, seed=3)
    assert sorted([*one, *other]) == list(range(n))
    assert len(one) - len(other) in (0, 1)
    np.testing.assert_array_equal(one, np.sort(one))
    assert [list(part) for part in ablate_set.halves(n, seed=3)] == [list(one), list(other)]
    drawn = {tuple(ablate_set.halves(11, seed)[0]) for seed in range(5)}
    assert len(drawn) == 5


def test_one_document_cannot_be_halved():
    with pytest.raises(ValueError, match="n_documents = 1: must be 2 or more"):
        ablate_set.halves(1)


def test_the_strongest_of_all_layers_are_chosen():
    found = [candidate(0, 5, 0.1, 9), candidate(0, 3, 0.3), candidate(2, 1, 0.3, 2), candidate(2, 8, -0.9)]
    assert ablate_set.strongest(found, 3) == ((0, 3), (2, 1), (0, 5))
    assert ablate_set.strongest(found, 2, "score") == ((0, 5), (2, 1))
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"count = {n}: must be from 1 to 3, those that are more frequ"):
            ablate_set.strongest(found, n)


def test_random_sets_are_of_the_same_layers_of_near_densities_and_of_other_neurons():
    rng = np.random.default_rng(0)
    density = np.sort(10 ** rng.uniform(-4, -0.5, (2, 100)), axis=1)
    density[:, :10] = 0
    chosen = [(0, 30), (0, 31), (0, 99), (2, 50)]
    sets = [ablate_set.matched_set(chosen, density, LAYERS, np.random.default_rng(n)) for n in range(50)]
    for one in sets:
        assert len(set(one)) == 4 and not set(one) & set(chosen)
        assert [layer for layer, _ in one] == [0, 0, 0, 2]
        # Sorted by density, the ten nearest are near in number; chosen and drawn ones are passed over.
        assert all(any(abs(n - m) <= 13 for of, m in chosen if of == layer) for layer, n in one)
        assert all(density[LAYERS.index(layer), n] > 0 for layer, n in one)
    assert len(set(sets)) > 40
    picked = {n for one in sets for layer, n in one if layer == 2}
    nearest = np.argsort(np.abs(np.log(density[1, 10:]) - np.log(density[1, 50])))[1:11] + 10
    assert picked == set(nearest.tolist())


def test_a_layer_without_as_many_others_is_named():
    density = np.array([[0.1, 0.2, 0.3, 0.0], [0.1] * 4])
    chosen = [(0, 0), (0, 1)]
    with pytest.raises(ValueError, match="count: layer 0 has no 2 others besides the 2 chosen"):
        ablate_set.matched_set(chosen, density, LAYERS, np.random.default_rng(0))


def test_changes_are_means_over_tokens_and_chance_is_counted():
    worth = {"forget": {(0, 1): 0.5, (0, 2): 0.25, (2, 7): -0.125}, "retain": {(0, 1): 0.125}, "none": {}}
    # The documents of one group have no token of the other; a group may have no token at all.
    n_tokens = {"none": [0] * 5, "forget": [10, 30, 20, 0, 0], "retain": [0, 0, 0, 5, 5]}
    losses = [
        Losses({name: n_tokens[name] for name in names}, worth) for names in (["forget", "none"], ["retain"])
    ]
    density = np.full((2, 12), 0.1)
    density[0, 1:3], density[1, 7] = 0.2, 0.05
    done = []
    chosen = [[(0, 1)], [(0, 1), (0, 2), (2, 7)]]
    before, (one, three) = ablate_set.measure(losses, chosen, density, LAYERS, n_random=6, report=done.append)
    assert sum(done) == (1 + 2 * 7) * 70
    assert (before["forget"], before["retain"]) == (3.0, 3.0) and np.isnan(before["none"])
    # Every document changes as much.
    assert one.chosen.groups["forget"] == Estimate(0.5, 0.5, 0.5)
    assert one.chosen.groups["retain"] == Estimate(0.125, 0.125, 0.125)
    assert np.isnan(one.chosen.groups["none"].value) and np.isnan(one.chosen.groups["none"].low)
    assert one.chosen.gap == 0.375
    assert [three.chosen.groups[name].value for name in ("forget", "retain")] == [0.625, 0.125]
    assert one.chosen.density == 0.2 and three.chosen.density == pytest.approx(0.15)
    assert len(one.random) == 6 and all(len(other.neurons) == 3 for other in three.random)
    gaps = [0.25 if (0, 2) in other.neurons else 0.0 for other in one.random]
    assert [other.gap for other in one.random] == gaps
    assert one.p_value == 1 / 7
    assert one.spread("forget").mean == pytest.approx(np.mean(gaps))
    assert one.random_density == pytest.approx(np.mean([0.2 if gap else 0.1 for gap in gaps]))
    equal = Outcome(one.chosen, (one.chosen, *one.random))
    assert equal.p_value == 2 / 8


def test_an_interval_is_that_of_a_mean_over_documents():
    rng = np.random.default_rng(1)
    n_tokens = np.full(400, 7)
    sums = 7 * rng.normal(2.0, 3.0, 400)
    low, high = ablate_set.bootstrap_interval(sums, n_tokens, np.random.default_rng(2))
    error = 1.96 * np.std(sums / 7) / 20
    assert (low, high) == pytest.approx((np.mean(sums) / 7 - error, np.mean(sums) / 7 + error), abs=0.05)
    # Longer documents weigh more.
    weighed = ablate_set.bootstrap_interval(np.array([1.0, 200.0]), np.array([1, 100]), rng)
    assert weighed == (1.0, 2.0)


def test_a_spread_is_of_sets():
    assert dataclasses.astuple(Spread.of([2.0])) == (2.0, 2.0, 2.0)
    spread = Spread.of(list(range(41)))
    assert dataclasses.astuple(spread) == (20.0, 1.0, 39.0)
    groups = {name: Estimate(change, 0, 0) for name, change in (("a", 0.5), ("b", 3.0), ("c", 0.125))}
    assert Change((), 0, groups).gap == 0.375
