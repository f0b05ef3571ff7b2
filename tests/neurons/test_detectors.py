"""Rules that say where a neuron is active: planted ones, and all sets of tokens by brute force."""

import itertools

import numpy as np
import pytest

from topklm.neurons import probing
from topklm.neurons.probing import DetectorSearch

WORDS = [b" the", b" sea", b" rose", b" ing", b"ing", b" 1984", b" Paris", b".", b" go", b"es"]


def text(seed=0, n_documents=40, length=60):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, len(WORDS), n_documents * length)
    documents = np.repeat(np.arange(n_documents), length)
    previous = np.where(np.arange(len(ids)) % length == 0, -1, np.roll(ids, 1))
    return ids, documents, previous, [WORDS[i] for i in ids]


def test_grown_sets_have_the_highest_f1_of_all_sets_of_keys():
    rng = np.random.default_rng(1)
    for _ in range(20):
        keys = rng.integers(0, 6, 200)
        is_active = rng.random(200) < rng.random(6)[keys] * rng.random()
        found = probing.grow(keys, is_active, 7)
        every = (
            probing.f1(np.isin(keys, chosen), is_active)
            for n in range(1, 7)
            for chosen in itertools.combinations(range(6), n)
        )
        assert probing.f1(found[keys], is_active) == pytest.approx(max(every))
        assert not found[6]  # which never comes


def test_f1_is_that_of_precision_and_recall():
    says = np.array([1, 1, 1, 0, 0], bool)
    active = np.array([1, 1, 0, 1, 0], bool)
    assert probing.f1(says, active) == pytest.approx(2 / 3)
    assert np.isnan(probing.f1(says, np.zeros(5, bool)))
    assert probing.grow(np.zeros(5, int), np.zeros(5, bool), 1).tolist() == [False]


@pytest.mark.parametrize("kind", ["tokens", "pairs of tokens", "year", "noise"])
def test_a_planted_rule_is_found_on_the_other_half(kind):
    ids, documents, previous, pieces = text()
    planted = {
        "tokens": np.isin(ids, [1, 6, 8]),
        "pairs of tokens": (ids == 2) & np.isin(previous, [0, 7]),
        "year": ids == 5,
        "noise": np.random.default_rng(3).random(len(ids)) < 0.1,
    }[kind]
    found = DetectorSearch(ids, documents, previous, pieces).best(planted)
    if kind == "noise":
        assert found.f1 < 0.3  # the share of all tokens gives 0.18
        return
    assert found.f1 == 1
    assert found.rule in (("tokens", "year") if kind == "year" else (kind,))


def test_what_is_only_learned_by_heart_does_not_count():
    ids, documents, previous, pieces = text(n_documents=4, length=400)
    ids = np.arange(len(ids))  # every token comes once
    search = DetectorSearch(ids, documents, np.where(previous < 0, -1, ids - 1), pieces)
    is_active = np.random.default_rng(0).random(len(ids)) < 0.2
    assert search.best(is_active).f1 < 0.5


def test_a_neuron_that_is_silent_in_the_scored_half_has_no_score():
    ids, documents, previous, pieces = text()
    found = DetectorSearch(ids, documents, previous, pieces).best((ids == 3) & (documents % 2 == 0))
    assert np.isnan(found.f1)


def test_patterns_mark_tokens_and_the_last_of_a_match():
    pieces = [b"In ", b"19", b"84", b" she", b" sa", b"ng", b", go", b"ing", b"19", b" on"]
    documents = np.array([0] * 8 + [1] * 2)
    found = probing.marked(pieces, documents)
    assert np.flatnonzero(found["year"]).tolist() == [1, 2]
    assert np.flatnonzero(found["year, last token"]).tolist() == [2]
    assert np.flatnonzero(found["-ing"]).tolist() == [6, 7]
    assert np.flatnonzero(found["number"]).tolist() == [1, 2, 8]
    assert np.flatnonzero(found["start of a sentence"]).tolist() == [0]
    assert np.flatnonzero(found["comma"]).tolist() == [6]
