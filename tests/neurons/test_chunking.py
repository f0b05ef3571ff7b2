"""Every token is read once, with what stands before it in its document."""

from helpers import tries
from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from topklm.neurons.documents import batches, pack, windows_of

SEPARATOR = 0
DOCUMENTS = st.lists(st.integers(0, 70), max_size=8)


def documents_of(sizes):
    rng = np.random.default_rng(0)
    return [rng.integers(1, 100, n) for n in sizes]


def all_windows(documents, length):
    return [
        window
        for number, ids in enumerate(documents)
        for window in windows_of(number, ids, SEPARATOR, length)
    ]


@given(DOCUMENTS, st.integers(2, 20))
@tries(60)
def test_windows_read_every_token_once_and_in_order(sizes, length):
    documents = documents_of(sizes)
    windows = all_windows(documents, length)
    for number, ids in enumerate(documents):
        read = [window.inputs[window.n_known :] for window in windows if window.document == number]
        np.testing.assert_array_equal(np.concatenate([*read, np.zeros(0, int)]), ids)
    assert all(1 <= window.n_known < len(window.inputs) <= length for window in windows)


@pytest.mark.parametrize("length", [2, 8, 33])
def test_a_new_token_can_look_back_a_quarter_of_a_window(length):
    first, *others = windows_of(0, np.arange(1, 200), SEPARATOR, length)
    assert (first.inputs[0], first.n_known) == (SEPARATOR, 1)
    assert {window.n_known for window in others} == {max(1, length // 4)}
    for window in others:  # what stands before it in the document, nothing else
        np.testing.assert_array_equal(np.diff(window.inputs), 1)


@given(DOCUMENTS, st.integers(2, 20), st.integers(1, 5))
@tries(60)
def test_rows_hold_every_window_as_it_is(sizes, length, multiple):
    windows = all_windows(documents_of(sizes), length)
    if not windows:
        return
    packed = pack(windows, length, multiple, SEPARATOR)
    assert packed.inputs.shape[1] == length and len(packed.inputs) % multiple == 0
    found = {}
    for row in range(len(packed.inputs)):
        for segment in range(1, packed.segment_ids[row].max() + 1):
            inside = np.flatnonzero(packed.segment_ids[row] == segment)
            np.testing.assert_array_equal(np.diff(inside), 1)
            np.testing.assert_array_equal(packed.positions[row, inside], np.arange(len(inside)))
            places = packed.places[row, inside]
            found[int(places[-1])] = (packed.inputs[row, inside], places)
    done = 0
    for window in windows:
        inputs, places = found[done + window.n_new - 1]
        np.testing.assert_array_equal(inputs, window.inputs)
        np.testing.assert_array_equal(places[: window.n_known], -1)
        np.testing.assert_array_equal(places[window.n_known :], np.arange(done, done + window.n_new))
        np.testing.assert_array_equal(packed.tokens[done : done + window.n_new], inputs[window.n_known :])
        assert set(packed.documents[done : done + window.n_new]) == {window.document}
        done += window.n_new
    assert done == len(packed.tokens) == (packed.places >= 0).sum()
    assert (packed.inputs[packed.segment_ids == 0] == SEPARATOR).all()


def test_short_documents_waste_little_room():
    windows = all_windows(documents_of(np.random.default_rng(1).integers(5, 60, 300)), 64)
    packed = pack(windows, 64, 1, SEPARATOR)
    assert (packed.segment_ids > 0).mean() > 0.95


def test_stretches_are_cut_where_they_have_enough():
    windows = all_windows(documents_of([30, 1, 12, 40]), 16)
    cut = list(batches(windows, 20))
    assert [window for stretch in cut for window in stretch] == windows
    sizes = [sum(window.n_new for window in stretch) for stretch in cut]
    assert all(size >= 20 for size in sizes[:-1])
    assert all(size - stretch[-1].n_new < 20 for size, stretch in zip(sizes, cut, strict=True))
