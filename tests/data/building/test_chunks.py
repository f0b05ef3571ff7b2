import itertools

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from topklm.data.building import chunks as chunks_module
from topklm.data.building.chunks import INDEX_DTYPE, Chunk, Storage

U2 = np.dtype("<u2")


@given(
    documents=st.lists(st.tuples(st.integers(1, 9), st.booleans(), st.booleans()), min_size=1, max_size=30),
    block=st.integers(1, 40),
)
def test_every_range_of_kept_tokens_of_a_split_is_read_back(tmp_path_factory, documents, block):
    chunk = Chunk(Storage(tmp_path_factory.mktemp("work")), 0)
    ids = iter(itertools.count(1))
    tokens = [[next(ids) for _ in range(n)] for n, _, _ in documents]
    rows = [((i, i), n, 1, heldout) for i, (n, heldout, _) in enumerate(documents)]
    with chunk.create(U2) as append:
        append(np.array(rows, INDEX_DTYPE), [np.array(t, np.int32) for t in tokens])
    chunk.drop(np.array([i for i, (_, _, dropped) in enumerate(documents) if dropped], np.int64))
    totals = chunk.totals()
    for heldout in (False, True):
        kept = [
            t for t, (_, h, dropped) in zip(tokens, documents, strict=True) if h == heldout and not dropped
        ]
        want = list(itertools.chain.from_iterable(kept))
        assert (totals.documents[heldout], totals.tokens[heldout]) == (len(kept), len(want))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunks_module, "_COPY_TOKENS", block)
            for start, stop in itertools.combinations(range(0, len(want) + 1, 3), 2):
                got = [int(t) for part in chunk.tokens(heldout, start, stop, U2) for t in part]
                assert got == want[start:stop]


def test_a_chunk_is_there_only_when_it_is_whole(tmp_path):
    chunk = Chunk(Storage(tmp_path), 3)
    with pytest.raises(KeyboardInterrupt), chunk.create(U2) as append:
        append(np.zeros(1, INDEX_DTYPE), [np.zeros(5, np.int32)])
        raise KeyboardInterrupt
    assert not chunk.is_written
    assert list(tmp_path.iterdir()) == []
