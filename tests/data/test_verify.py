import contextlib
import dataclasses
import json
import shutil
import tracemalloc

from making import make_dataset, rewrite_description
import numpy as np
import pytest

from topklm.data import dataset as dataset_lib
from topklm.data.dataset import DatasetProblem, load_dataset, verify
from topklm.data.records import RECORD_TOKENS, write_shard
from topklm.data.tokenizer import train_bpe
from topklm.errors import UserError
from topklm.progress import Progress

TRAIN = [f"Letter {n} came by boat. " * (1 + n % 9) + "Señor Þór ☂ \U0001f6f6\n" for n in range(400)]
HELDOUT = [f"Parcel {n} came by train." * 20 for n in range(30)]
TOKENIZER = train_bpe(TRAIN, 270)
OTHER_BYTES = "holds other bytes than were written"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "letters"
    make_dataset(folder, TRAIN, HELDOUT, tokenizer=TOKENIZER, shard_tokens=3 * RECORD_TOKENS)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(pristine, tmp_path / "copy")


def shards(folder, split="train"):
    return sorted(folder.glob(f"{split}-*"))


def problems(folder):
    return list(verify(folder).problems)


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def rewrite(folder, number, edit):
    """Changes the tokens of a training shard, and its size and hash in dataset.json with it."""
    dataset = load_dataset(folder)
    starts = np.cumsum([0, *(shard.tokens for shard in dataset.train.shards)])
    tokens = dataset.tokens(dataset.train).read(int(starts[number]), int(starts[number + 1]))
    edit(tokens)
    shard = write_shard(folder / dataset.train.shards[number].name, [tokens], 60_000)
    described = dataclasses.asdict(shard)
    rewrite_description(folder, lambda c: c["splits"]["train"]["shards"].__setitem__(number, described))
    return shard.name


def test_a_whole_dataset_has_no_problems_and_its_counts_are_those_of_the_text(pristine):
    report = verify(pristine)
    assert report.problems == report.other_files == ()
    assert report.splits["train"].shards == len(shards(pristine)) >= 4
    for split, documents in (("train", TRAIN), ("heldout", HELDOUT)):
        found = report.splits[split]
        assert found.documents == len(documents)
        assert found.utf8_bytes == sum(len(text.encode()) for text in documents)
        assert found.tokens == sum(1 + TOKENIZER.encode(text).size for text in documents)


def test_a_split_may_be_empty(tmp_path):
    make_dataset(tmp_path / "one", ["Only this."])
    assert problems(tmp_path / "one") == []


def test_progress_counts_every_byte_document_and_token_once(pristine):
    told = []

    class Recorder(Progress):
        @contextlib.contextmanager
        def phase(self, what, total):
            told.append(total)
            yield lambda *figures: told.append(figures)

    report = verify(pristine, Recorder(print))
    size = sum(path.stat().st_size for path in pristine.glob("*.arrayrecord"))
    assert told[0] == size
    n_tokens = sum(counts.tokens for counts in report.splits.values())
    assert [sum(figures) for figures in zip(*told[1:], strict=True)] == [
        size,
        len(TRAIN) + len(HELDOUT),
        n_tokens,
    ]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_flipped_bit_is_found_and_the_record_named(folder, split):
    shard = shards(folder, split)[0]
    flip(shard, 150)
    first, second = problems(folder)
    assert first == DatasetProblem(shard.name, OTHER_BYTES)
    assert second.file == shard.name
    assert "record 0 cannot be read" in second.what


def test_a_bit_flipped_where_no_record_lies_is_found(folder):
    shard = shards(folder)[1]
    flip(shard, shard.stat().st_size - 2000)
    assert problems(folder) == [DatasetProblem(shard.name, OTHER_BYTES)]


def test_a_missing_shard_is_named(folder):
    shard = shards(folder)[2]
    shard.unlink()
    assert problems(folder) == [DatasetProblem(shard.name, "is missing")]
    assert verify(folder).splits["train"].shards == len(shards(folder))


def test_a_shard_that_is_cut_short_is_named(folder):
    shard = shards(folder)[0]
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-1])
    assert problems(folder) == [DatasetProblem(shard.name, f"has {size - 1} bytes, not {size}")]


def test_a_folder_in_the_place_of_a_shard_is_named(folder):
    shard = shards(folder)[0]
    shard.unlink()
    shard.mkdir()
    (problem,) = problems(folder)
    assert problem.file == shard.name


def test_shards_that_changed_places_are_both_named(folder):
    one, two = shards(folder)[1:3]
    assert one.stat().st_size == two.stat().st_size
    one.rename(folder / "aside")
    two.rename(one)
    (folder / "aside").rename(two)
    assert problems(folder) == [DatasetProblem(one.name, OTHER_BYTES), DatasetProblem(two.name, OTHER_BYTES)]
    dataset = load_dataset(folder)
    with pytest.raises(UserError, match=rf"{one.name} is another shard than was written"):
        dataset.tokens(dataset.train).read(0, dataset.train.tokens)


def test_a_shard_of_another_dataset_is_named(folder, tmp_path):
    make_dataset(tmp_path / "other", TRAIN[::-1], tokenizer=TOKENIZER, shard_tokens=3 * RECORD_TOKENS)
    shard = shards(folder)[1]
    assert (tmp_path / "other" / shard.name).stat().st_size == shard.stat().st_size
    shutil.copy(tmp_path / "other" / shard.name, shard)
    assert problems(folder)[0] == DatasetProblem(shard.name, OTHER_BYTES)


def test_another_tokenizer_is_named_and_text_is_not_counted_with_it(folder):
    train_bpe(TRAIN, 271).save(folder / "tokenizer.json")
    report = verify(folder)
    (problem,) = report.problems
    assert problem.file == "tokenizer.json"
    assert TOKENIZER.sha256[:12] in problem.what
    assert report.splits["train"].utf8_bytes is None
    assert report.splits["train"].documents == len(TRAIN)


def test_a_flipped_bit_in_the_tokenizer_is_found(folder):
    flip(folder / "tokenizer.json", 500)
    assert [problem.file for problem in problems(folder)] == ["tokenizer.json"]


def test_a_missing_tokenizer_is_named(folder):
    (folder / "tokenizer.json").unlink()
    (problem,) = problems(folder)
    assert problem == DatasetProblem("tokenizer.json", "cannot be read (No such file or directory)")


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("field", ["documents", "tokens", "text_tokens", "utf8_bytes"])
def test_a_changed_count_of_a_split_is_found(folder, split, field):
    rewrite_description(
        folder, lambda c: c["splits"][split].__setitem__(field, c["splits"][split][field] + 1)
    )
    found = problems(folder)
    assert {problem.file for problem in found} == {"dataset.json"}
    assert any(problem.what.startswith(f"{split}: {field} = ") for problem in found)


@pytest.mark.parametrize("field", ["documents", "duplicates"])
def test_a_changed_count_of_the_text_is_found(folder, field):
    rewrite_description(folder, lambda c: c["text"].__setitem__(field, c["text"][field] + 1))
    found = problems(folder)
    assert {problem.file for problem in found} == {"dataset.json"}
    assert any(problem.what.startswith(f"text: {field} = ") for problem in found)


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c["settings"].update(min_chars=3),
        lambda c: c.update(problem_examples=["a line"]),
        lambda c: c["sources"][0].update(url="elsewhere.txt"),
        lambda c: c["text"].update(too_short=7),
        lambda c: c.update(fingerprint="1" * 64),
        lambda c: c.update(note="mine"),
    ],
)
def test_an_edit_of_what_nothing_else_tells_is_found_by_the_digest(folder, edit):
    content = json.loads((folder / "dataset.json").read_text())
    edit(content)
    (folder / "dataset.json").write_text(json.dumps(content))
    assert problems(folder) == [
        DatasetProblem("dataset.json", "is not as it was written: its digest differs")
    ]
    with pytest.raises(UserError, match=r"dataset\.json: damaged \(its digest differs\)"):
        load_dataset(folder)


@pytest.mark.parametrize("version", [2, 3])
def test_a_description_that_lost_its_digest_is_read_only_where_it_never_had_one(folder, version):
    content = json.loads((folder / "dataset.json").read_text())
    del content["sha256"]
    (folder / "dataset.json").write_text(json.dumps({**content, "format_version": version}))
    if version == 2:
        assert problems(folder) == []
        assert load_dataset(folder).train.documents == len(TRAIN)
    else:
        assert "its digest is missing" in problems(folder)[0].what
        with pytest.raises(UserError, match="its digest is missing"):
            load_dataset(folder)


@pytest.mark.parametrize(("field", "value"), [("tokens", 1), ("size", 1), ("sha256", "0" * 64)])
def test_a_changed_figure_of_a_shard_is_found(folder, field, value):
    rewrite_description(folder, lambda c: c["splits"]["train"]["shards"][1].__setitem__(field, value))
    assert shards(folder)[1].name in [problem.file for problem in problems(folder)]


@pytest.mark.parametrize(
    ("field", "value"), [("sha256", "0" * 64), ("kind", "other"), ("vocab_size", 300), ("separator_id", 1)]
)
def test_a_changed_figure_of_the_tokenizer_is_found(folder, field, value):
    rewrite_description(folder, lambda c: c["tokenizer"].__setitem__(field, value))
    (problem,) = problems(folder)
    assert problem.file == ("tokenizer.json" if field == "sha256" else "dataset.json")
    assert field in problem.what


def test_a_token_outside_the_vocabulary_is_named_with_its_record(folder):
    name = rewrite(folder, 1, lambda tokens: tokens.__setitem__(RECORD_TOKENS + 5, 50_000))
    found = [problem for problem in problems(folder) if problem.file == name]
    assert found == [DatasetProblem(name, "holds token id 50000 in record 1, outside the vocabulary of 270")]


def test_a_stream_that_does_not_begin_with_a_separator_is_named(folder):
    name = rewrite(folder, 0, lambda tokens: tokens.__setitem__(0, 7))
    assert DatasetProblem(name, "begins with token 7, not with a separator") in problems(folder)


def test_text_that_became_longer_or_shorter_is_found_by_its_bytes(folder):
    lengths = TOKENIZER.token_bytes_lengths()
    long, short = int(np.argmax(lengths)), int(np.argmin(lengths + 100 * (lengths == 0)))
    assert lengths[long] > lengths[short] == 1

    def replace_one(tokens):
        tokens[np.flatnonzero(tokens == long)[0]] = short

    rewrite(folder, 1, replace_one)
    n_bytes = sum(len(text.encode()) for text in TRAIN)
    hold = n_bytes - int(lengths[long]) + 1
    assert problems(folder) == [
        DatasetProblem("dataset.json", f"train: utf8_bytes = {n_bytes:,}, its shards hold {hold:,}")
    ]


def test_all_problems_are_listed(folder):
    one, two, three = shards(folder)[:3]
    one.unlink()
    two.write_bytes(b"")
    flip(three, three.stat().st_size - 2000)
    flip(folder / "tokenizer.json", 500)
    rewrite_description(folder, lambda c: c["text"].__setitem__("documents", 1))
    files = [problem.file for problem in problems(folder)]
    assert set(files) == {one.name, two.name, three.name, "tokenizer.json", "dataset.json"}


def test_files_that_do_not_belong_to_the_dataset_are_named_and_are_no_problem(folder):
    (folder / ".train-00000.tmp").touch()
    (folder / "notes").mkdir()
    report = verify(folder)
    assert report.problems == ()
    assert report.other_files == (".train-00000.tmp", "notes")


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c.pop("splits"),
        lambda c: c["splits"].pop("heldout"),
        lambda c: c["splits"]["train"].pop("tokens"),
        lambda c: c["splits"]["train"]["shards"][0].pop("size"),
        lambda c: c["splits"]["train"]["shards"][0].update(size="big"),
        lambda c: c["splits"]["train"].update(documents=None),
        lambda c: c["text"].update(documents="many"),
        lambda c: c.update(tokenizer=[]),
        lambda c: c["tokenizer"].update(vocab_size="many"),
    ],
)
def test_a_description_that_lacks_something_is_named(folder, edit):
    rewrite_description(folder, edit)
    with pytest.raises(UserError, match=r"dataset\.json: damaged"):
        verify(folder)


def test_a_description_that_is_no_json_is_named(folder):
    flip(folder / "dataset.json", 0)
    with pytest.raises(UserError, match=r"dataset\.json: damaged"):
        verify(folder)


def test_a_folder_without_a_description_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no prepared dataset, it has no dataset\.json: check"):
        verify(tmp_path)


def test_memory_does_not_grow_with_the_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_lib, "_BLOCK_TOKENS", RECORD_TOKENS)

    def peak(n_documents):
        make_dataset(tmp_path / str(n_documents), ["x" * 2000] * n_documents)
        verify(tmp_path / str(n_documents))  # what is imported or cached at first use does not count
        tracemalloc.start()
        try:
            assert verify(tmp_path / str(n_documents)).problems == ()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(1000) < 1.1 * peak(10)
