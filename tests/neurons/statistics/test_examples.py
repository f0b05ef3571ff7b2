"""Examples of neurons: the strongest, some of every part of the range, and never two that overlap."""

import itertools

from activity_stores import block_of, random_dense
from helpers import tries
from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from topklm.neurons.statistics import activity


def chosen(values, bounds, seed=0):
    """Returns (token, value, part) of every example of one neuron, [N]."""
    found = activity.example_columns(block_of(values[:, None]), bounds, layer=0, begin=0, seed=seed)
    rows = (found["examples"][0], found["example_activations"][0], found["example_parts"][0])
    return list(zip(*rows, strict=True))


def document_of(token, bounds):
    return next(d for d in range(len(bounds) - 1) if bounds[d] <= token < bounds[d + 1])


def test_the_strongest_are_each_documents_strongest_tokens():
    rng = np.random.default_rng(0)
    bounds = np.concatenate([[0], np.cumsum(rng.integers(1, 40, 100))])
    values = random_dense(1, 1, bounds[-1], 2)[0, :, 0]
    best = []
    for a, b in itertools.pairwise(bounds):
        place = a + int(np.argmax(values[a:b]))
        if values[place] > 0:
            best.append((-values[place], place))
    wanted = [place for _, place in sorted(best)[:20]]
    assert [token for token, _, part in chosen(values, bounds) if part == 0] == wanted


def test_with_documents_enough_there_are_20_and_25_all_in_different_documents():
    rng = np.random.default_rng(1)
    bounds = np.arange(0, 300 * 20 + 1, 20)
    values = (rng.random(6000) * (rng.random(6000) < 0.3)).astype(np.float32)
    found = chosen(values, bounds)
    assert [part for _, _, part in found] == [0] * 20 + sorted([1, 2, 3, 4, 5] * 5)
    assert len({document_of(token, bounds) for token, _, _ in found}) == 45


def check(values, bounds, found):
    """Checks everything that must hold of any neuron's examples."""
    largest = np.abs(values).max()
    for token, value, part in found:
        assert value == values[token] != 0
        if part:
            share = abs(float(value)) / float(largest) * 5
            assert part - 1 - 1e-6 < share <= part + 1e-6
    for group in range(6):
        strengths = [abs(value) for _, value, part in found if part == group]
        assert strengths == sorted(strengths, reverse=True)
        assert len(strengths) <= (5 if group else 20)
    places = [(document_of(token, bounds), token) for token, _, _ in found]
    for number, (document, token) in enumerate(places):
        for other_document, other in places[:number]:
            assert document != other_document or abs(token - other) >= 128


@tries(60)
@given(
    st.lists(st.sampled_from([1, 5, 127, 128, 129, 600, 2500]), min_size=1, max_size=60),
    st.sampled_from([0.002, 0.05, 0.5]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_no_two_examples_of_a_neuron_overlap(lengths, share, signed, seed):
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    values = random_dense(seed, 1, int(bounds[-1]), 2, share=share, signed=signed)[0, :, 0]
    values[seed % len(values)] = 0.5  # not dead
    found = chosen(values, bounds)
    check(values, bounds, found)
    active = {document_of(token, bounds) for token in np.flatnonzero(values)}
    strongest = [document_of(token, bounds) for token, _, part in found if part == 0]
    assert len(set(strongest)) == min(20, len(active))  # a document twice only when none is left
    # Fewer than 20 only where no further place is far enough from the strongest.
    if len(strongest) < 20:
        there = [token for token, _, part in found if part == 0]
        for token in np.flatnonzero(values):
            document = document_of(token, bounds)
            assert any(document_of(t, bounds) == document and abs(t - token) < 128 for t in there)


def test_one_long_document_gives_as_many_as_many_short_ones():
    rng = np.random.default_rng(2)
    values = (rng.random(40_000) * (rng.random(40_000) < 0.3)).astype(np.float32)
    bounds = np.array([0, 40_000])
    found = chosen(values, bounds)
    assert [part for _, _, part in found] == [0] * 20 + sorted([1, 2, 3, 4, 5] * 5)
    check(values, bounds, found)
    # The strongest first, then the strongest that is far enough, and so on.
    wanted, left = [], values.copy()
    for _ in range(20):
        wanted.append(int(np.argmax(left)))
        left[max(wanted[-1] - 127, 0) : wanted[-1] + 128] = 0
    assert [token for token, _, part in found if part == 0] == wanted


def test_a_short_document_alone_gives_one_example():
    values = np.linspace(0, 1, 100).astype(np.float32)
    assert chosen(values, np.array([0, 100])) == [(99, 1.0, 0)]


def test_parts_use_documents_without_an_example_first():
    bounds = np.arange(0, 26 * 300 + 1, 300)  # 26 documents: 20 for the strongest, 6 for the parts
    values = np.zeros(7800, np.float32)
    values[10::300] = 1.0  # in every document
    values[150::300] = 0.1
    found = chosen(values, bounds)
    first_part = [document_of(token, bounds) for token, _, part in found if part == 1]
    assert set(first_part) <= {20, 21, 22, 23, 24, 25}
    assert len(set(first_part)) == 5


def test_equally_strong_tokens_come_in_the_order_of_the_text():
    values = np.ones(400, np.float32)
    tokens = [token for token, _, part in chosen(values, np.arange(0, 401, 10)) if part == 0]
    assert tokens == list(range(0, 200, 10))


def test_what_is_drawn_depends_on_seed_layer_and_neuron_and_not_on_the_block():
    dense = random_dense(3, 1, 3000, 6, share=0.4)[0]
    dense[:, 4] = dense[:, 1]
    bounds = np.arange(0, 3001, 12)
    whole = activity.example_columns(block_of(dense), bounds, layer=1, begin=0)
    part = activity.example_columns(block_of(dense[:, 2:6]), bounds, layer=1, begin=2)
    assert {name: column[2:] for name, column in whole.items()} == part
    others = [
        activity.example_columns(block_of(dense), bounds, layer=1, begin=0, seed=1)["examples"][1],
        activity.example_columns(block_of(dense), bounds, layer=2, begin=0)["examples"][1],
        whole["examples"][4],
    ]
    for other in others:
        assert other[:20] == whole["examples"][1][:20]
        assert other != whole["examples"][1]


def test_every_event_of_a_part_is_drawn_about_equally_often():
    bounds = np.arange(0, 61)  # a document for every token
    values = np.where(np.arange(60) < 40, 0.5, 1).astype(np.float32)  # part 3; the strongest
    counts = np.zeros(60)
    for seed in range(400):
        drawn = [token for token, _, part in chosen(values, bounds, seed) if part == 3]
        assert len(drawn) == 5
        counts[drawn] += 1
    assert counts[:40].min() > 20  # 50 are expected, with a deviation of 7
    assert counts[:40].max() < 85


@pytest.mark.parametrize("n_dead", [1, 3])
def test_a_dead_neuron_has_none(n_dead):
    found = activity.example_columns(block_of(np.zeros((30, n_dead), np.float32)), np.array([0, 30]), 0, 0)
    assert all(column == [None] * n_dead for column in found.values())
