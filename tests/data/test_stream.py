from collections import Counter
import itertools
import json

from hypothesis import assume, given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from topklm.data import stream as stream_module
from topklm.data.prepare import Dataset, SplitInfo
from topklm.data.records import StreamWriter
from topklm.data.stream import (
    WindowSource,
    heldout_batches,
    train_stream,
    window_ids,
    windows_to_batch,
)
from topklm.data.tokenizer import train_bpe
from topklm.errors import UserError

TOKENIZER = train_bpe(["abc"], 300)
SEP = TOKENIZER.separator_id
VOCAB = TOKENIZER.vocab_size


def make_dataset(folder, document_lengths, seed=0):
    """Documents of random tokens in both splits; returns the dataset and the documents."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(1, VOCAB, n).astype(np.int32) for n in document_lengths]
    splits = {}
    for name in ("train", "heldout"):
        with StreamWriter(folder, name, VOCAB) as writer:
            for document in documents:
                writer.append(np.array([SEP, *document]))
        n_tokens = sum(document_lengths) + len(documents)
        splits[name] = SplitInfo(len(documents), n_tokens, 0, writer.shards)
    return Dataset(folder, TOKENIZER, fingerprint="", **splits), documents


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), [30, 1, 500, 3, 3, 77])[0]


class ListStream:
    """The numbers 0 to n - 1 in the role of a TokenStream."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def read(self, start, stop):
        return np.arange(self.n, dtype=np.int32)[start:stop]


@given(st.integers(1, 20), st.integers(2, 200))
def test_every_token_but_the_first_is_a_target(context_length, n):
    assume(n > context_length)
    source = WindowSource(ListStream(n), context_length)
    windows = [source[i] for i in range(len(source))]
    assert all(window.size == context_length + 1 for window in windows)
    assert {int(t) for window in windows for t in window[1:]} == set(range(1, n))
    for left, right in itertools.pairwise(windows[:-1]):
        assert left[-1] == right[0]
    assert len(source) == -(-(n - 1) // context_length)


def test_a_stream_shorter_than_a_window_names_the_context_length():
    with pytest.raises(UserError, match=r"model\.context_length = 10: .* only 10 tokens"):
        WindowSource(ListStream(10), 10)
    assert len(WindowSource(ListStream(11), 10)) == 1


def test_segments_begin_at_separators_and_positions_restart():
    windows = np.array([[5, 6, SEP, 7, SEP, SEP, 8, 9], [SEP, 1, 2, 3, 4, 5, 6, SEP]], np.int32)
    batch = windows_to_batch(windows, SEP)
    np.testing.assert_array_equal(batch["inputs"], windows[:, :-1])
    np.testing.assert_array_equal(batch["targets"], windows[:, 1:])
    assert batch["segment_ids"].tolist() == [[1, 1, 2, 2, 3, 4, 4], [1] * 7]
    assert batch["positions"].tolist() == [[0, 1, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6]]
    assert batch["loss_weights"].tolist() == [[1.0] * 7] * 2


def assert_shapes_and_types(batch, shape):
    for name, array in batch.items():
        assert array.shape == shape, name
        assert array.dtype == (np.float32 if name == "loss_weights" else np.int32), name
        assert array.flags.c_contiguous, name
    assert list(batch) == ["inputs", "targets", "segment_ids", "positions", "loss_weights"]


def test_training_batches_are_plain_dicts_of_arrays(dataset):
    batch = next(train_stream(dataset, context_length=8, batch_size=4, seed=0))
    assert type(batch) is dict
    assert_shapes_and_types(batch, (4, 8))


@pytest.mark.parametrize(("n", "batch_size"), [(13, 4), (3, 8), (1, 2), (64, 64)])
def test_every_epoch_is_a_permutation_and_no_window_is_lost_between(n, batch_size):
    batches = window_ids(n, batch_size=batch_size, seed=3)
    order = np.concatenate([batches[i] for i in range(-(-5 * n // batch_size))])
    epochs = order[: 5 * n].reshape(5, n)
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    if n > 10:
        assert len({tuple(epoch) for epoch in epochs}) == 5
        assert all(tuple(epoch) != tuple(range(n)) for epoch in epochs)


def test_the_seed_decides_the_order_and_neighbouring_seeds_share_no_epoch():
    def epochs(seed):
        batches = window_ids(50, batch_size=50, seed=seed)
        return [tuple(batches[i]) for i in range(4)]

    assert epochs(0) == epochs(0)
    assert not set(epochs(0)) & set(epochs(1))
    assert epochs(2**32 + 1) != epochs(1)


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def assert_batches_equal(left, right):
    for a, b in zip(left, right, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("threads", [0, 2])
def test_a_saved_state_resumes_exactly_also_with_other_threads(dataset, threads):
    settings_ = {"context_length": 8, "batch_size": 5, "seed": 1}
    iterator = train_stream(dataset, **settings_, threads=threads)
    take(iterator, 37)  # into the third epoch of 78 windows
    state = json.dumps(iterator.get_state())
    assert json.loads(state) == {"next_index": 37}
    expected = take(iterator, 20)
    for other_threads in (0, 3):
        resumed = train_stream(dataset, **settings_, threads=other_threads)
        resumed.set_state(json.loads(state))
        assert_batches_equal(take(resumed, 20), expected)


def test_hosts_read_their_rows_of_the_same_batches(dataset):
    settings_ = {"context_length": 8, "batch_size": 6, "seed": 1}
    whole = take(train_stream(dataset, **settings_), 20)
    first = take(train_stream(dataset, **settings_, rows=slice(0, 2)), 20)
    second = take(train_stream(dataset, **settings_, rows=slice(2, 6)), 20)
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(first, second, strict=True)]
    assert_batches_equal(joined, whole)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(1, 9), st.integers(1, 40), st.just(300)), min_size=1, max_size=30),
    context_length=st.integers(1, 12),
    batch_size=st.integers(1, 5),
    open_rows=st.integers(1, 4),
    scan=st.sampled_from([3, 17, 10_000]),
)
def test_every_text_token_of_every_document_is_scored_exactly_once(
    tmp_path_factory, *, lengths, context_length, batch_size, open_rows, scan
):
    # Token (document, index) gets a value of its own, so a scored target says where it is from.
    folder = tmp_path_factory.mktemp("heldout")
    vocab = sum(lengths) + 1
    with StreamWriter(folder, "heldout", vocab) as writer:
        next_token = 1
        for n in lengths:
            writer.append(np.array([0, *range(next_token, next_token + n)]))
            next_token += n
    stream = stream_module.TokenStream(folder, writer.shards, vocab)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_module, "_SCAN_TOKENS", scan)
        patch.setattr(stream_module, "_OPEN_ROWS", open_rows)
        patch.setattr(Dataset, "tokens", lambda *_: stream)
        info = SplitInfo(len(lengths), len(stream), 0, writer.shards)
        dataset = Dataset(folder, TOKENIZER, info, info, "")
        batches = list(heldout_batches(dataset, context_length=context_length, batch_size=batch_size))

    first_tokens = set(np.cumsum([1, *lengths])[:-1].tolist())
    scored = Counter()
    for batch in batches:
        assert_shapes_and_types(batch, (batch_size, context_length))
        assert set(np.unique(batch["loss_weights"])) <= {0.0, 1.0}
        for b in range(batch_size):
            check_row({name: array[b] for name, array in batch.items()}, first_tokens)
        scored.update(batch["targets"][batch["loss_weights"] == 1].tolist())
    assert scored == Counter(range(1, sum(lengths) + 1))
    assert all((batch["segment_ids"][0] > 0).any() for batch in batches)


def check_row(row, first_tokens):
    """Segments are runs of one document each, padding is inert, context is at least half."""
    length = row["inputs"].size
    padding = row["segment_ids"] == 0
    assert (row["loss_weights"][padding] == 0).all()
    assert (row["inputs"][padding] == 0).all()
    assert (row["targets"][padding] == 0).all()
    for segment in range(1, row["segment_ids"].max() + 1):
        where = np.flatnonzero(row["segment_ids"] == segment)
        assert (np.diff(where) == 1).all()
        assert row["positions"][where].tolist() == list(range(where.size))
        inputs, targets = row["inputs"][where], row["targets"][where]
        assert inputs[1:].tolist() == targets[:-1].tolist()
        assert 0 not in targets
        assert (inputs[0] == 0) == (targets[0] in first_tokens)
        scored = np.flatnonzero(row["loss_weights"][where])
        assert scored.tolist() == list(range(scored[0], where.size))
        if inputs[0] != 0:
            assert scored[0] + 1 >= length / 2
        else:
            assert scored[0] == 0


def test_a_short_document_is_predicted_whole_from_the_separator(tmp_path):
    dataset, (document,) = make_dataset(tmp_path, [5])
    (batch,) = heldout_batches(dataset, context_length=8, batch_size=2)
    assert batch["inputs"][0].tolist() == [SEP, *document[:-1].tolist(), SEP, SEP, SEP]
    assert batch["targets"][0].tolist() == [*document.tolist(), SEP, SEP, SEP]
    assert batch["segment_ids"].tolist() == [[1] * 5 + [0] * 3, [0] * 8]
    assert batch["loss_weights"].tolist() == [[1] * 5 + [0] * 3, [0] * 8]


def test_short_documents_share_rows(tmp_path):
    dataset, _ = make_dataset(tmp_path, [5, 6, 3, 2])
    (batch,) = heldout_batches(dataset, context_length=8, batch_size=2)
    assert batch["segment_ids"].tolist() == [[1] * 5 + [2] * 3, [1] * 6 + [2] * 2]


def test_the_number_of_scored_tokens_is_the_splits(dataset):
    batches = list(heldout_batches(dataset, context_length=16, batch_size=4))
    assert sum(batch["loss_weights"].sum() for batch in batches) == dataset.heldout.text_tokens
