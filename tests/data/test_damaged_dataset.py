"""Whatever happens to a file of a dataset, its readers give the same answer or one line."""

import itertools
import shutil

import damage
from making import make_dataset
import pytest

from topklm.data.dataset import SPLITS, load_dataset, verify
from topklm.data.records import RECORD_TOKENS
from topklm.data.tokenizer import train_bpe
from topklm.errors import UserError

TEXTS = [f"Crate {n} of {n % 11} went to shelf {n * n}. " * (1 + n % 6) for n in range(120)]


def copier(folder, place):
    """Makes copies of a folder, each in a folder of its own."""
    numbers = itertools.count()
    return lambda: shutil.copytree(folder, place / str(next(numbers)) / folder.name)


def read_all(folder):
    dataset = load_dataset(folder)
    streams = {name: dataset.tokens(split) for name, split in dataset.splits.items()}
    tokens = {name: stream.read(0, len(stream)) for name, stream in streams.items()}
    return dataset.fingerprint, dataset.tokenizer.sha256, str(dataset), tokens


def verified(folder):
    report = verify(folder)
    if report.problems:
        raise UserError(str(report.problems[0]))
    return report.splits


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """A dataset of several shards, and one of the same form with other text."""
    root = tmp_path_factory.mktemp("datasets")
    tokenizer = train_bpe(TEXTS, 270)
    for name, texts in (("a", TEXTS), ("b", [text.upper() for text in TEXTS])):
        make_dataset(root / name, texts[20:], texts[:20], tokenizer=tokenizer, shard_tokens=RECORD_TOKENS)
    assert len(load_dataset(root / "a").train.shards) > 2
    return root


@pytest.mark.parametrize("reader", [read_all, verified])
def test_a_damaged_dataset_is_noticed(datasets, tmp_path, reader):
    whole = datasets / "a"
    n = damage.check(copier(whole, tmp_path), reader, reader(whole), per_file=4, other=datasets / "b")
    assert n > 100


@pytest.mark.parametrize("reader", [read_all, verified])
def test_a_dataset_that_may_not_be_read_is_named_as_that(datasets, tmp_path, reader):
    whole = datasets / "a"
    assert damage.check_unreadable(copier(whole, tmp_path), reader, reader(whole)) > len(SPLITS)
