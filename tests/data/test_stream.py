from collections import Counter
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

from helpers import tries
from hypothesis import assume, given
from hypothesis import strategies as st
import numpy as np
import pytest

from topklm.data import stream as stream_module
from topklm.data.dataset import Dataset, Mixture, SplitInfo
from topklm.data.records import shard_bounds, shard_name, write_shard
from topklm.data.stream import (
    WindowSource,
    heldout_batches,
    heldout_part,
    train_stream,
    window_ids,
    windows_to_batch,
)
from topklm.data.tokenizer import train_bpe
from topklm.errors import UserError

TOKENIZER = train_bpe(["abc"], 300)
SEP = TOKENIZER.separator_id
VOCAB = TOKENIZER.vocab_size


def write_split(folder, name, documents, vocab):
    """Documents as they are prepared: a separator, then the tokens."""
    tokens = np.concatenate([np.array([SEP, *document]) for document in documents])
    bounds = shard_bounds(tokens.size)
    shards = tuple(
        write_shard(folder / shard_name(name, i, len(bounds)), [tokens[start:stop]], vocab)
        for i, (start, stop) in enumerate(bounds)
    )
    return SplitInfo(len(documents), tokens.size, 0, shards)


def make_dataset(folder, document_lengths, seed=0):
    """Documents of random tokens in both splits; returns the dataset and the documents."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(1, VOCAB, n).astype(np.int32) for n in document_lengths]
    splits = {name: write_split(folder, name, documents, VOCAB) for name in ("train", "heldout")}
    return Dataset(folder, TOKENIZER, fingerprint="", **splits), documents


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), [30, 1, 500, 3, 3, 77])[0]


@pytest.fixture(scope="module")
def single(dataset):
    return Mixture.single(dataset)


@pytest.fixture(scope="module")
def three(dataset, tmp_path_factory):
    """A mixture of 78, 26 and 9 windows of 8 tokens."""
    others = [
        make_dataset(tmp_path_factory.mktemp("other"), lengths, seed)[0]
        for seed, lengths in enumerate([[100, 100, 5], [60, 9]], start=1)
    ]
    return Mixture((dataset, *others), (5, 3, 2))


class Numbers:
    """A dataset whose training split is the tokens 0 to n - 1."""

    path = Path("books")
    tokenizer = TOKENIZER
    train = None

    def __init__(self, n):
        self.n = n

    def tokens(self, split):
        return self

    def __len__(self):
        return self.n

    def read_many(self, spans):
        return [np.arange(self.n, dtype=np.int32)[start:stop] for start, stop in spans]


def with_windows(*n_windows):
    """Equal parts of datasets of so many windows of one token."""
    datasets = tuple(Numbers(n + 1) for n in n_windows)
    return Mixture(datasets, (1,) * len(datasets))


@given(st.integers(1, 20), st.integers(2, 200))
def test_every_token_but_the_first_is_a_target(context_length, n):
    assume(n > context_length)
    source = WindowSource(Numbers(n), context_length)
    windows = [source[i] for i in range(len(source))]
    assert all(window.size == context_length + 1 for window in windows)
    assert {int(t) for window in windows for t in window[1:]} == set(range(1, n))
    for left, right in itertools.pairwise(windows[:-1]):
        assert left[-1] == right[0]
    assert len(source) == -(-(n - 1) // context_length)


def test_a_split_shorter_than_a_window_names_its_folder_and_the_context_length():
    with pytest.raises(UserError, match=r"model\.context_length = 10: .* of books has only 10 tokens"):
        WindowSource(Numbers(10), 10)
    assert len(WindowSource(Numbers(11), 10)) == 1


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


def test_training_batches_are_plain_dicts_of_arrays(single):
    batch = next(train_stream(single, context_length=8, batch_size=4, seed=0))
    assert type(batch) is dict
    assert_shapes_and_types(batch, (4, 8))


def windows_in_order(mixture, n_batches, *, context_length=1, batch_size=4, seed=0):
    """The first windows of a run, (dataset, window) each."""
    sizes = {"context_length": context_length, "batch_size": batch_size}
    batches = window_ids(mixture, **sizes, seed=seed)
    return [tuple(pair) for b in range(n_batches) for pair in batches[b].tolist()]


@pytest.mark.parametrize(
    ("n", "batch_size", "seed", "expected"),
    [
        (13, 5, 3, {0: [4, 6, 9, 7, 5], 1: [3, 1, 12, 10, 0], 2: [2, 8, 11, 8, 1], 5000: [6, 11, 0, 10, 5]}),
        (1000, 4, 0, {0: [297, 371, 706, 141], 3: [23, 854, 343, 203], 5000: [759, 334, 433, 539]}),
        (7, 4, 2**32 + 1, {0: [2, 3, 0, 4], 1: [5, 1, 6, 2], 3: [6, 3, 4, 5], 5000: [5, 4, 6, 1]}),
        (50_000, 3, 123456789, {0: [11089, 25651, 30629], 5000: [17803, 7912, 12912]}),
    ],
)
def test_the_order_of_one_dataset_stays_that_of_published_runs(n, batch_size, seed, expected):
    batches = window_ids(with_windows(n), context_length=1, batch_size=batch_size, seed=seed)
    for batch, windows in expected.items():
        assert batches[batch].tolist() == [[0, window] for window in windows]


@pytest.mark.parametrize(("n", "batch_size"), [(13, 4), (3, 8), (1, 2), (64, 64)])
def test_every_epoch_is_a_permutation_and_no_window_is_lost_between(n, batch_size):
    pairs = windows_in_order(with_windows(n), -(-5 * n // batch_size), batch_size=batch_size, seed=3)
    epochs = np.array([window for _, window in pairs])[: 5 * n].reshape(5, n)
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    if n > 10:
        assert len({tuple(epoch) for epoch in epochs}) == 5
        assert all(tuple(epoch) != tuple(range(n)) for epoch in epochs)


def test_every_dataset_of_a_mixture_has_epochs_of_its_own():
    mixture = with_windows(13, 7, 29)
    pairs = windows_in_order(mixture, 75)
    for i, n in enumerate([13, 7, 29]):
        windows = [window for dataset, window in pairs if dataset == i]
        epochs = [windows[start : start + n] for start in range(0, len(windows) - n + 1, n)]
        assert len(epochs) == 100 // n
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_proportions_are_exact_over_any_prefix(three):
    counts = np.zeros(3)
    for n, (dataset, _) in enumerate(windows_in_order(three, 50, context_length=8), start=1):
        counts[dataset] += 1
        assert (np.abs(counts - n * np.array([0.5, 0.3, 0.2])) < 1).all()


def test_one_more_dataset_changes_nothing_about_the_order_of_the_others():
    def order_of(dataset, mixture):
        return [window for i, window in windows_in_order(mixture, 60, seed=5) if i == dataset][:50]

    one, two, three = with_windows(23), with_windows(23, 23), with_windows(23, 23, 23)
    assert order_of(0, one) == order_of(0, two) == order_of(0, three)
    assert order_of(1, two) == order_of(1, three)
    assert len({tuple(order_of(i, three)) for i in range(3)}) == 3


def test_the_seed_decides_the_order_and_neighbouring_seeds_share_no_epoch():
    def epochs(seed):
        batches = window_ids(with_windows(50, 50), context_length=1, batch_size=100, seed=seed)
        both = [batches[i] for i in range(4)]
        return [tuple(ids[ids[:, 0] == dataset, 1]) for ids in both for dataset in (0, 1)]

    assert epochs(0) == epochs(0)
    assert not set(epochs(0)) & set(epochs(1))
    assert epochs(2**32 + 1) != epochs(1)


@pytest.mark.parametrize("mixture", ["single", "three"])
def test_batches_hold_the_windows_that_the_ids_name(mixture, request):
    mixture = request.getfixturevalue(mixture)
    settings_ = {"context_length": 8, "batch_size": 7, "seed": 4}
    sources = [WindowSource(each, 8) for each in mixture.datasets]
    ids = window_ids(mixture, **settings_)
    for b, batch in enumerate(take(train_stream(mixture, **settings_), 40)):
        windows = np.stack([sources[dataset][window] for dataset, window in ids[b]])
        expected = windows_to_batch(windows, SEP)
        assert_shapes_and_types(batch, (7, 8))
        assert_batches_equal([batch], [expected])


def test_the_dataset_of_a_mixture_that_is_too_short_is_named(three):
    short = three.datasets[2].path
    with pytest.raises(UserError, match=f"context_length = 100: the training split of {short} has only 71"):
        train_stream(three, context_length=100, batch_size=4, seed=0)


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def assert_batches_equal(left, right):
    for a, b in zip(left, right, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("mixture", ["single", "three"])
def test_a_saved_state_resumes_exactly_also_with_other_threads(mixture, threads, request):
    mixture = request.getfixturevalue(mixture)
    settings_ = {"context_length": 8, "batch_size": 5, "seed": 1}
    iterator = train_stream(mixture, **settings_, threads=threads)
    take(iterator, 37)  # into the third epoch of 78 windows
    state = json.dumps(iterator.get_state())
    assert json.loads(state) == {"next_index": 37}
    expected = take(iterator, 20)
    for other_threads in (0, 3):
        resumed = train_stream(mixture, **settings_, threads=other_threads)
        resumed.set_state(json.loads(state))
        assert_batches_equal(take(resumed, 20), expected)


@pytest.mark.parametrize("mixture", ["single", "three"])
def test_hosts_read_their_rows_of_the_same_batches(mixture, request):
    mixture = request.getfixturevalue(mixture)
    settings_ = {"context_length": 8, "batch_size": 6, "seed": 1}
    whole = take(train_stream(mixture, **settings_), 20)
    for rows in (slice(0, 2), slice(2, 6), np.array([1, 2, 5]), np.array([3])):
        mine = take(train_stream(mixture, **settings_, rows=rows), 20)
        assert_batches_equal(mine, [{name: array[rows] for name, array in b.items()} for b in whole])
        ids = window_ids(mixture, **settings_, rows=rows)[3]
        np.testing.assert_array_equal(ids, window_ids(mixture, **settings_)[3][rows])


@tries(60)
@given(
    lengths=st.lists(st.one_of(st.integers(1, 9), st.integers(1, 40), st.just(300)), min_size=1, max_size=30),
    context_length=st.integers(1, 12),
    batch_size=st.integers(1, 5),
    open_rows=st.integers(1, 4),
    scan=st.sampled_from([3, 17, 10_000]),
    first_dataset=st.integers(0, 30),
)
def test_every_text_token_of_every_document_is_scored_exactly_once(
    tmp_path_factory, *, lengths, context_length, batch_size, open_rows, scan, first_dataset
):
    # Token (document, index) gets a value of its own, so a scored target says where it is from.
    tokens = iter(range(1, sum(lengths) + 1))
    documents = [[next(tokens) for _ in range(n)] for n in lengths]
    tokenizer = SimpleNamespace(separator_id=SEP, vocab_size=sum(lengths) + 1, sha256="")
    datasets = []
    for part in filter(None, (documents[:first_dataset], documents[first_dataset:])):
        folder = tmp_path_factory.mktemp("heldout")
        info = write_split(folder, "heldout", part, tokenizer.vocab_size)
        datasets.append(Dataset(folder, tokenizer, info, info, ""))
    mixture = Mixture(tuple(datasets), (1,) * len(datasets))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_module, "_SCAN_TOKENS", scan)
        patch.setattr(stream_module, "_OPEN_ROWS", open_rows)
        batches = list(heldout_batches(mixture, context_length=context_length, batch_size=batch_size))

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
    (batch,) = heldout_batches(Mixture.single(dataset), context_length=8, batch_size=2)
    assert batch["inputs"][0].tolist() == [SEP, *document[:-1].tolist(), SEP, SEP, SEP]
    assert batch["targets"][0].tolist() == [*document.tolist(), SEP, SEP, SEP]
    assert batch["segment_ids"].tolist() == [[1] * 5 + [0] * 3, [0] * 8]
    assert batch["loss_weights"].tolist() == [[1] * 5 + [0] * 3, [0] * 8]


def test_short_documents_share_rows(tmp_path):
    dataset, _ = make_dataset(tmp_path, [5, 6, 3, 2])
    (batch,) = heldout_batches(Mixture.single(dataset), context_length=8, batch_size=2)
    assert batch["segment_ids"].tolist() == [[1] * 5 + [2] * 3, [1] * 6 + [2] * 2]


def test_the_number_of_scored_tokens_is_the_mixtures(three):
    batches = list(heldout_batches(three, context_length=16, batch_size=4))
    assert sum(batch["loss_weights"].sum() for batch in batches) == three.heldout_text_tokens


def test_the_number_of_scored_tokens_is_the_splits(single):
    batches = list(heldout_batches(single, context_length=16, batch_size=4))
    assert sum(batch["loss_weights"].sum() for batch in batches) == single.datasets[0].heldout.text_tokens


@pytest.fixture(scope="module")
def two_datasets(tmp_path_factory):
    """Held-out documents of two datasets; one document is longer than what is read of a stream at once."""
    made = [
        make_dataset(tmp_path_factory.mktemp("part"), lengths, seed)
        for seed, lengths in enumerate([[40, 3, 500, 1, 7], [9, 9, 200]])
    ]
    return Mixture(tuple(dataset for dataset, _ in made), (1, 1)), [documents for _, documents in made]


@pytest.mark.parametrize("max_tokens", [1, 2, 7, 100, 500, 768])
def test_a_part_is_the_first_tokens_of_each_dataset_and_has_their_bytes(
    two_datasets, max_tokens, monkeypatch
):
    monkeypatch.setattr(stream_module, "_SCAN_TOKENS", 64)
    mixture, documents = two_datasets
    texts = [np.concatenate(of) for of in documents]
    total = sum(text.size for text in texts)
    assert total == mixture.heldout_text_tokens == 769
    want = [text[: -(-max_tokens * text.size // total)] for text in texts]  # its share, rounded up
    part = heldout_part(mixture, max_tokens)
    scored = Counter()
    for batch in heldout_batches(mixture, context_length=16, batch_size=4, part=part):
        scored.update(batch["targets"][batch["loss_weights"] == 1].tolist())
    assert scored == Counter(np.concatenate(want).tolist())
    assert max_tokens <= scored.total() <= max_tokens + 1
    assert part.utf8_bytes == sum(len(b"".join(TOKENIZER.token_bytes(tokens))) for tokens in want)


@pytest.mark.parametrize("max_tokens", [0, 769, 10**12])
def test_a_part_that_leaves_nothing_out_is_all_of_it(two_datasets, max_tokens):
    mixture, _ = two_datasets
    part = heldout_part(mixture, max_tokens)
    assert part.stops == tuple(dataset.heldout.tokens for dataset in mixture.datasets)
    assert part.utf8_bytes == mixture.heldout_bytes


def test_where_tokens_have_no_bytes_of_their_own_those_of_the_decoded_text_count(two_datasets, monkeypatch):
    mixture, _ = two_datasets
    by_token = heldout_part(mixture, 30)
    monkeypatch.setattr(type(TOKENIZER), "token_bytes_lengths", lambda self: None)
    monkeypatch.setattr(type(TOKENIZER), "decode", lambda self, ids: "ä" * len(ids))
    assert heldout_part(mixture, 30).stops == by_token.stops
    assert heldout_part(mixture, 30).utf8_bytes == 2 * (22 + 9)
