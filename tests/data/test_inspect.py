from making import make_dataset, stream_of
import numpy as np
import pytest

from topklm.data.dataset import sample_windows
from topklm.data.tokenizer import train_bpe
from topklm.errors import UserError

TEXTS = [f"Letter {n} came by boat. " * (1 + n % 9) + "Señor Þór ☂" for n in range(150)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "letters"
    return make_dataset(folder, TEXTS, tokenizer=train_bpe(TEXTS, 300), shard_tokens=2048)


def windows(dataset, n=10**6, context_length=64, seed=0):
    return list(sample_windows(dataset, "train", n, context_length, seed))


def test_all_windows_together_are_the_stream_in_order(dataset):
    found = windows(dataset)
    tokens = stream_of(TEXTS, dataset.tokenizer)
    assert [w.start for w in found[:-1]] == list(range(0, 64 * (len(found) - 1), 64))
    assert found[-1].stop == len(tokens)
    assert all(w.stop - w.start == 64 for w in found)
    for w in found:
        part = tokens[w.start : w.stop]
        separators = np.flatnonzero(part == dataset.tokenizer.separator_id)
        assert sum(piece.begins for piece in w.pieces) == len(separators)
        assert w.documents == len(separators) + (0 not in separators)
        assert "".join(piece.text for piece in w.pieces) == "".join(
            dataset.tokenizer.decode(p) for p in np.split(part, separators)
        )


def test_a_window_as_long_as_the_split_holds_every_document_whole(dataset):
    (window,) = windows(dataset, context_length=10**6)
    assert [piece.text for piece in window.pieces] == TEXTS
    assert all(piece.begins for piece in window.pieces)
    assert (window.start, window.stop, window.documents) == (0, dataset.train.tokens, 150)


def test_a_piece_of_a_document_that_began_earlier_is_not_marked_as_a_beginning(dataset):
    found = windows(dataset)
    tokens = stream_of(TEXTS, dataset.tokenizer)
    for w in found:
        assert w.pieces[0].begins == (tokens[w.start] == dataset.tokenizer.separator_id)
        assert all(piece.begins for piece in w.pieces[1:])


def test_the_seed_decides_which_windows_are_shown(dataset):
    chosen = windows(dataset, n=5, seed=1)
    assert chosen == windows(dataset, n=5, seed=1)
    assert chosen != windows(dataset, n=5, seed=2)
    starts = [w.start for w in chosen]
    assert starts == sorted(set(starts))
    assert len(starts) == 5


def test_only_the_shards_of_the_windows_are_opened(dataset):
    (window,) = windows(dataset, n=1, seed=3)
    number, shards = window.start // 2048, dataset.train.shards
    assert len(shards) >= 3
    hidden = [dataset.path / shard.name for i, shard in enumerate(shards) if i != number]
    for path in hidden:
        path.rename(path.with_suffix(".hidden"))
    try:
        assert windows(dataset, n=1, seed=3) == [window]
    finally:
        for path in hidden:
            path.with_suffix(".hidden").rename(path)


def test_a_split_without_documents_is_refused(dataset):
    with pytest.raises(UserError, match=r"split = heldout: .* has no documents"):
        next(sample_windows(dataset, "heldout", 3, 64, 0))
