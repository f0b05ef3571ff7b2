"""Whose turn it is: exact proportions over any prefix, and what the text of a mixture may be."""

from fractions import Fraction
import itertools
import json
import shutil
from types import SimpleNamespace

from helpers import tries
from hypothesis import given
from hypothesis import strategies as st
from making import rewrite_description
import numpy as np
import pytest

from topklm.data.dataset import MAX_PERIOD, Dataset, Mixture, SplitInfo, open_mixture
from topklm.data.tokenizer import train_bpe
from topklm.errors import UserError

TOKENIZER = train_bpe(["abc"], 300)


def dataset(name="a", tokenizer=TOKENIZER, heldout=(0, 0, 0)):
    split = SplitInfo(*heldout, shards=())
    return Dataset(name, tokenizer, split, split, fingerprint="")


def mixture_of(weights):
    return Mixture(tuple(dataset(str(i)) for i in range(len(weights))), tuple(weights))


def check_turns(weights, n):
    """Counts the turns one by one, with exact arithmetic, and compares."""
    datasets, given_before = mixture_of(weights).picks(np.arange(n))
    assert datasets.dtype == given_before.dtype == np.int64
    counts, period = [0] * len(weights), sum(weights)
    for window, (i, before) in enumerate(zip(datasets.tolist(), given_before.tolist(), strict=True), start=1):
        assert before == counts[i]
        counts[i] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count * period - window * weight) < period, (weights, window)


@pytest.mark.parametrize("n_datasets", [1, 2, 3, 4])
def test_no_dataset_is_ever_a_whole_window_off_for_all_small_weights(n_datasets):
    for weights in itertools.combinations_with_replacement(range(1, 7), n_datasets):
        check_turns(weights, 2 * sum(weights) + 1)
        check_turns(weights[::-1], sum(weights))


@tries(60)
@given(st.lists(st.one_of(st.integers(1, 5), st.integers(1, 150)), min_size=2, max_size=12))
def test_no_dataset_is_ever_a_whole_window_off(weights):
    check_turns(weights, sum(weights))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 10**15), st.randoms())
def test_turns_are_found_in_any_order_and_far_into_a_run(weights, start, random):
    mixture, period = mixture_of(weights), sum(weights)
    windows = start + np.arange(period)
    datasets, before = mixture.picks(windows)
    first_datasets, first_before = mixture.picks(windows % period)
    assert datasets.tolist() == first_datasets.tolist()
    assert before.tolist() == [
        int(n) // period * weights[i] + k
        for n, i, k in zip(windows, datasets, first_before.tolist(), strict=True)
    ]
    places = random.sample(range(period), period)
    shuffled = mixture.picks(windows[places])
    assert shuffled[0].tolist() == datasets[places].tolist()
    assert shuffled[1].tolist() == before[places].tolist()


def test_the_longest_period_keeps_its_proportions():
    weights = np.array([499_999, 300_001, 200_000])
    assert weights.sum() == MAX_PERIOD
    windows = np.arange(MAX_PERIOD)
    datasets, _ = mixture_of(weights.tolist()).picks(windows)
    for i, weight in enumerate(weights):
        off = np.cumsum(datasets == i) * MAX_PERIOD - (windows + 1) * weight
        assert np.abs(off).max() < MAX_PERIOD


def test_the_held_out_text_is_that_of_all_datasets():
    mixture = Mixture((dataset("a", heldout=(2, 12, 50)), dataset("b", heldout=(1, 7, 30))), (1, 3))
    assert mixture.heldout_bytes == 80
    assert mixture.heldout_text_tokens == 16
    assert mixture.tokenizer is TOKENIZER


def test_one_dataset_alone_is_a_mixture_too():
    alone = Mixture.single(dataset())
    assert (len(alone.datasets), alone.weights, alone.period) == (1, (1,), 1)
    datasets, before = alone.picks(np.array([5, 0, 10**12]))
    assert datasets.tolist() == [0, 0, 0]
    assert before.tolist() == [5, 0, 10**12]


def test_datasets_of_different_tokenizers_do_not_mix():
    other = SimpleNamespace(sha256="f" * 64)
    with pytest.raises(UserError) as caught:
        Mixture((dataset("books"), dataset("wiki", tokenizer=other)), (1, 1))
    for fact in ("data.mixture", "books", "wiki", "f" * 12, TOKENIZER.sha256[:12]):
        assert fact in str(caught.value)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with the prepared datasets a, b and c; they hold no tokens."""
    root = tmp_path_factory.mktemp("prepared")
    split = {"documents": 0, "tokens": 0, "utf8_bytes": 0, "shards": []}
    for name in "abc":
        folder = root / name
        folder.mkdir()
        TOKENIZER.save(folder / "tokenizer.json")
        content = {"format_version": 2, "fingerprint": name, "tokenizer": {"sha256": TOKENIZER.sha256}}
        content["splits"] = {"train": split, "heldout": split}
        (folder / "dataset.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (("0.7", "0.3"), (7, 3)),
        (("0.5", "0.3", "0.2"), (5, 3, 2)),
        (("0.1", "0.2"), (1, 2)),  # binary fractions would not be exact
        (("2", "4", "6"), (1, 2, 3)),
        ((".25", "1."), (1, 4)),
        (("0.333333", "0.666667"), (333_333, 666_667)),
        (("3",), (1,)),
    ],
)
def test_weights_are_read_exactly_and_reduced(prepared, weights, expected):
    folders = [prepared / name for name in "abc"]
    text = " , ".join(f"{folder}:{weight}" for folder, weight in zip(folders, weights, strict=False))
    mixture = open_mixture(text)
    assert mixture.weights == expected
    assert [each.path for each in mixture.datasets] == folders[: len(weights)]
    total = sum(map(Fraction, weights))
    assert [Fraction(w, mixture.period) for w in mixture.weights] == [Fraction(w) / total for w in weights]


NOT_MIXTURES = ["", "A", "A:", ":1", "A:0", "A:0.0", "A:-1", "A:x", "A:1/3", "A:nan", "A:1e3", "A:.", "A:1,"]
NOT_MIXTURES += ["A:1 B:x", "A:1,,B:2", "A:1_0", "A:\u0663", "A:" + "9" * 5000]


@pytest.mark.parametrize("text", NOT_MIXTURES, ids=lambda text: text[:9])
def test_a_text_of_another_form_is_refused(prepared, text):
    text = text.replace("A", str(prepared / "a")).replace("B", str(prepared / "b"))
    with pytest.raises(UserError) as caught:
        open_mixture(text)
    assert str(caught.value).startswith(f"data.mixture = {text[:200]!r}"[:-1])
    assert "DIR:WEIGHT" in str(caught.value)


@pytest.mark.parametrize("again", ["{0}/a", "{0}/./a", "{0}/b/../a/"])
def test_a_folder_given_twice_is_refused(prepared, again):
    text = f"{prepared}/a:1,{again.format(prepared)}:2"
    with pytest.raises(UserError, match="twice") as caught:
        open_mixture(text)
    assert str(caught.value).startswith(f"data.mixture = {text!r}: ")


def test_weights_whose_turns_hardly_repeat_are_refused(prepared):
    text = f"{prepared}/a:0.333333332,{prepared}/b:0.666666668"
    with pytest.raises(UserError, match=r"83333333 : 166666667.*250,000,000 .*1,000,000: .*fewer") as caught:
        open_mixture(text)
    assert str(caught.value).startswith(f"data.mixture = {text!r}: ")


def test_a_folder_without_a_dataset_is_named(prepared):
    text = f"{prepared}/a:1,{prepared}/missing:2"
    with pytest.raises(UserError, match="missing: there is no such folder: check the path") as caught:
        open_mixture(text)
    assert str(caught.value).startswith(f"data.mixture = {text!r}: ")


def test_prepared_folders_of_different_tokenizers_are_refused_with_the_text(prepared, tmp_path):
    (tmp_path / "other").mkdir()
    other = train_bpe(["completely different text, different merges"], 310)
    other.save(tmp_path / "other" / "tokenizer.json")
    shutil.copy(prepared / "a" / "dataset.json", tmp_path / "other")
    rewrite_description(tmp_path / "other", lambda c: c["tokenizer"].update(sha256=other.sha256))
    text = f"{prepared}/a:1,{tmp_path}/other:2"
    with pytest.raises(UserError, match="another tokenizer") as caught:
        open_mixture(text)
    assert str(caught.value).startswith(f"data.mixture = {text!r}: {tmp_path}/other was prepared")
    assert str(caught.value).count("data.mixture") == 1
