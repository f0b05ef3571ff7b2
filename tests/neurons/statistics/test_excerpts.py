"""Excerpts of text against loops over documents."""

import functools

from hypothesis import given
import hypothesis.strategies as st
import numpy as np
from plain_model import SEPARATOR, random_documents

from topklm.neurons.statistics import lenses

LENGTHS = (1, 3, 40, 7, 1, 1, 12)
TOTAL = sum(LENGTHS)
DOCUMENTS = random_documents(LENGTHS)


TOKENS, BOUNDS = np.concatenate(DOCUMENTS).astype(np.uint16), np.cumsum([0, *LENGTHS])


@functools.cache
def places():
    """Returns the document of each token of the store, and its place there."""
    return [(ids, place) for ids in DOCUMENTS for place in range(len(ids))]


@given(st.integers(1, 45), st.lists(st.integers(0, TOTAL - 1), max_size=30))
def test_an_excerpt_is_the_end_of_separator_and_document(length, ends):
    found = lenses.excerpts(TOKENS, BOUNDS, np.array(ends, np.int64), length, SEPARATOR)
    assert found.tokens.shape == found.segments.shape == found.positions.shape == (len(ends), length)
    for row, end in enumerate(ends):
        document, place = places()[end]
        expected = [SEPARATOR, *document[: place + 1].tolist()][-length:]
        stands = found.segments[row] == 1
        assert stands.tolist() == [False] * (length - len(expected)) + [True] * len(expected)
        assert found.tokens[row][stands].tolist() == expected
        assert found.positions[row][stands].tolist() == list(range(len(expected)))
        assert (found.positions[row][~stands] == 0).all()


@given(st.integers(1, 300), st.integers(0, 80), st.integers(0, 9))
def test_tokens_are_drawn_one_from_each_part_of_the_store(n_tokens, n, seed):
    ends = lenses.spread_ends(n_tokens, n, seed)
    assert len(ends) == min(n, n_tokens)
    share = n_tokens / max(len(ends), 1)
    for part, end in enumerate(ends):
        assert int(part * share) <= end <= min((part + 1) * share, n_tokens - 1)
    np.testing.assert_array_equal(ends, lenses.spread_ends(n_tokens, n, seed))
