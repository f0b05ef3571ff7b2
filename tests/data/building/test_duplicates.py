from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from topklm.data.building import chunks as chunks_lib
from topklm.data.building.chunks import INDEX_DTYPE, Chunk, Storage

DOCUMENTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 2), st.booleans()), max_size=60)


def brute_force(documents):
    """Which documents go: all but the first held-out one of each text, or else all but the first."""
    best = {}
    for number, (high, low, heldout) in enumerate(documents):
        place = (not heldout, number)
        best[high, low] = min(best.get((high, low), place), place)
    return [n for n, (high, low, _) in enumerate(documents) if best[high, low][1] != n]


def write_chunks(storage, documents, size):
    chunks = []
    for start in range(0, len(documents), size):
        chunk = Chunk(storage, len(chunks))
        rows = [((high, low), 2, 1, heldout) for high, low, heldout in documents[start : start + size]]
        with chunk.create(np.dtype("<u2")) as append:
            append(np.array(rows, INDEX_DTYPE), [np.zeros(2 * len(rows), np.int32)])
        chunks.append(chunk)
    return chunks


@given(documents=DOCUMENTS, size=st.integers(1, 9), bucket=st.integers(1, 20))
def test_one_copy_of_each_text_stays(tmp_path_factory, documents, size, bucket):
    folder = tmp_path_factory.mktemp("work")
    chunks = write_chunks(Storage(folder), documents, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks_lib, "_BUCKET_DOCUMENTS", bucket)
        chunks_lib.drop_duplicates(chunks, folder)
    dropped = np.concatenate([np.zeros(0, bool), *(~chunk.kept() for chunk in chunks)])
    assert np.flatnonzero(dropped).tolist() == brute_force(documents)


def test_what_an_earlier_attempt_dropped_is_taken_back(tmp_path):
    chunks = write_chunks(Storage(tmp_path), [(1, 1, False)] * 5, 2)
    chunks_lib.drop_duplicates(chunks, tmp_path)
    assert sum(chunk.kept().sum() for chunk in chunks) == 1
    chunks_lib.drop_duplicates(chunks[2:], tmp_path)  # now without the others
    assert chunks[2].kept().all()
    for chunk in chunks:
        chunk.drop(np.zeros(0, np.int64))
    assert all(chunk.kept().all() for chunk in chunks)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
