import dataclasses
import hashlib
import json
import multiprocessing
import os
from pathlib import Path
import time

from helpers import sentences, write_documents
from making import rewrite_description
import numpy as np
import pytest

from topklm.config import DataConfig
from topklm.data.building.build import prepare
from topklm.data.dataset import load_dataset, read_description, verify
from topklm.errors import UserError

TEXTS = [f"Ship {n} sailed on day {n * n} to the port of {n % 7} hills." for n in range(120)]


@pytest.fixture
def data(tmp_path):
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "ships.jsonl").write_text("\n".join(lines))
    return DataConfig(
        source=str(tmp_path / "ships.jsonl"),
        vocab_size=300,
        heldout_fraction=0.2,
        dir=str(tmp_path / "datasets"),
    )


HASHES = ["644ff756d5eee31a", "709d7d1110209eef"]  # of the tokens of train and heldout


def quiet(_):
    pass


def prepared(data, announce=quiet):
    (dataset,) = prepare(data, announce).datasets
    return dataset


def test_a_dataset_is_the_same_when_it_is_made_again_elsewhere(data, tmp_path):
    first = prepared(data)
    second = prepared(dataclasses.replace(data, dir=str(tmp_path / "elsewhere")))
    assert first.path.name == second.path.name == f"ships-{first.fingerprint[:12]}"
    for file in first.path.iterdir():
        assert (second.path / file.name).read_bytes() == file.read_bytes()


def test_today_s_program_makes_the_datasets_of_earlier_ones(tmp_path, monkeypatch):
    # As the program of before this test made it; runs are continued with their data, which are found by name.
    monkeypatch.setattr("tokenizers.__version__", "0.23.3")
    write_documents(tmp_path / "village.jsonl", sentences(0, 300))
    (tmp_path / "text.txt").write_text("\n\n".join(sentences(1, 400)))
    source = f"{tmp_path}/village.jsonl,{tmp_path}/text.txt"
    dataset = prepared(DataConfig(source=source, vocab_size=400, dir=str(tmp_path / "datasets")))
    assert dataset.path.name == "text-and-1-more-85cb447fa8fe"
    streams = [dataset.tokens(split).read(0, split.tokens) for split in dataset.splits.values()]
    assert [hashlib.sha256(ids.tobytes()).hexdigest()[:16] for ids in streams] == HASHES


def test_a_finished_dataset_is_reused_with_one_line(data):
    first, lines = prepared(data), []
    written = {file: file.stat().st_mtime_ns for file in first.path.iterdir()}
    second = prepared(data, lines.append)
    assert len(lines) == 1
    assert "reusing" in lines[0]
    assert str(first.train.documents) in lines[0]
    assert (second.train, second.heldout) == (first.train, first.heldout)
    assert {file: file.stat().st_mtime_ns for file in first.path.iterdir()} == written


@pytest.mark.parametrize("change", [{"vocab_size": 310}, {"heldout_fraction": 0.3}, {"text_field": "body"}])
def test_another_setting_is_another_dataset(data, tmp_path, change):
    lines = [json.dumps({"text": text, "body": text}) for text in TEXTS]
    (tmp_path / "ships.jsonl").write_text("\n".join(lines))
    assert prepared(data).path != prepared(dataclasses.replace(data, **change)).path


def test_other_text_is_another_dataset_and_another_place_is_not(data, tmp_path):
    first = prepared(data)
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "ships.jsonl").rename(tmp_path / "moved" / "ships.jsonl")
    moved_data = dataclasses.replace(data, source=str(moved))
    assert prepared(moved_data).path == first.path
    with moved.open("a") as file:
        file.write('\n{"text": "one more"}')
    assert prepared(moved_data).path != first.path


def test_several_sources_are_separated_by_commas(data, tmp_path):
    (tmp_path / "more.txt").write_text("And one about trains.")
    dataset = prepared(dataclasses.replace(data, source=f"{data.source}, {tmp_path / '*.txt'}"))
    assert dataset.train.documents + dataset.heldout.documents == len(TEXTS) + 1


def test_a_prepared_folder_is_taken_as_it_is(data):
    made, lines = prepared(data), []
    found = prepared(DataConfig(source=str(made.path)), lines.append)
    assert found.path == made.path
    assert str(made.train.documents) in lines[0]


def test_a_mixture_takes_prepared_folders_by_weight(data, tmp_path):
    first = prepared(data)
    (tmp_path / "more.jsonl").write_text("\n".join(json.dumps({"text": text * 2}) for text in TEXTS))
    with pytest.raises(UserError, match=r"data\.mixture"):
        prepare(DataConfig(mixture=f"{first.path}:0.5,{tmp_path / 'nothing'}:0.5"), quiet)
    mixture = prepare(DataConfig(mixture=f"{first.path}:0.75"), quiet)
    assert [dataset.path for dataset in mixture.datasets] == [first.path]


def test_the_description_says_where_the_dataset_comes_from(data):
    dataset = prepared(data)
    content = read_description(dataset.path)
    (file,) = content["sources"]
    raw = Path(data.source).read_bytes()
    assert (file["url"], file["size"]) == (data.source, len(raw))
    assert file["sha256"] == hashlib.sha256(raw).hexdigest()
    assert content["tokenizer"]["sha256"] == dataset.tokenizer.sha256
    assert content["text"]["documents"] == len(TEXTS)
    assert content["splits"]["train"]["text_tokens"] == dataset.train.text_tokens


def test_replaced_empty_and_unreadable_text_is_announced(data, tmp_path):
    with (tmp_path / "ships.jsonl").open("ab") as file:
        file.write(b'\n{"text": "a\xff b\xff"}\n{"text": ""}\nno json')
    lines = []
    prepare(data, lines.append)
    assert any("replaced 2 invalid UTF-8 sequences in 1 documents" in line for line in lines)
    assert any("1 x empty; the first: " in line and "line 122" in line for line in lines)
    assert any("1 x invalid JSON; the first: " in line and "line 123" in line for line in lines)


def test_long_documents_are_encoded_as_if_whole(data, tmp_path):
    text = "\n".join(TEXTS * 40)
    (tmp_path / "ships.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in [*TEXTS, text]))
    dataset = prepared(dataclasses.replace(data, heldout_fraction=0.01))
    tokens = dataset.tokens(dataset.train).read(0, dataset.train.tokens)
    start = np.flatnonzero(tokens == 0)[-1]
    np.testing.assert_array_equal(tokens[start + 1 :], dataset.tokenizer.encode(text))


def test_a_split_without_documents_is_refused(data, tmp_path):
    (tmp_path / "ships.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS[:2]))
    with pytest.raises(UserError, match=r"heldout_fraction = 1e-09: of 2 .* --heldout FILE"):
        prepare(dataclasses.replace(data, heldout_fraction=1e-9), quiet)
    assert [path.name for path in (tmp_path / "datasets").iterdir() if path.name[0] != "."] == []


def test_a_source_that_changes_while_it_is_read_is_refused(data, tmp_path):
    def change(line):
        if "vocabulary" in line:
            (tmp_path / "ships.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS[:-1]))

    with pytest.raises(UserError, match="changed"):
        prepare(data, change)


def test_stale_unfinished_work_goes_and_young_work_stays(data, tmp_path):
    root = tmp_path / "datasets"
    old, young, theirs = root / ".ships-a.partial", root / ".ships-b.partial", root / ".somebody-elses"
    for folder in (old, young, theirs):
        folder.mkdir(parents=True)
        (folder / "000000.tokens").write_bytes(b"half")
    two_days_ago = time.time() - 2 * 24 * 3600
    for folder in (old, theirs, young):
        os.utime(folder, (two_days_ago, two_days_ago))
    for folder in (old, theirs):
        os.utime(folder / "000000.tokens", (two_days_ago, two_days_ago))
    prepare(data, quiet)
    assert not old.exists()
    assert young.exists()  # its folder is old, but the file in it is being written
    assert theirs.exists()


def prepare_in_process(data, barrier, queue):
    barrier.wait()
    queue.put(prepared(data).fingerprint)


def test_two_processes_at_once_agree(data):
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2), context.Queue()
    processes = [context.Process(target=prepare_in_process, args=(data, barrier, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    fingerprints = {queue.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert fingerprints == {prepared(data).fingerprint}
    assert len(list(Path(data.dir).iterdir())) == 1


def test_a_tokenizer_of_another_dataset_is_refused(data):
    dataset = prepared(data)
    other = prepared(dataclasses.replace(data, vocab_size=310))
    other.tokenizer.save(dataset.path / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json is not the tokenizer of this dataset"):
        load_dataset(dataset.path)


@pytest.mark.parametrize("name", ["tokenizer.json", "train-00000-of-00001.arrayrecord"])
def test_a_folder_with_a_missing_file_is_refused_and_the_file_named(data, name):
    path = prepared(data).path
    (path / name).unlink()
    for use in (lambda: load_dataset(path), lambda: prepare(data, quiet)):
        with pytest.raises(UserError, match=name):
            use()


def test_a_folder_without_its_description_is_no_dataset(data):
    path = prepared(data).path
    (path / "dataset.json").unlink()
    with pytest.raises(UserError, match=r"dataset\.json"):
        load_dataset(path)
    with pytest.raises(UserError, match="is no prepared dataset"):
        prepare(data, quiet)


@pytest.mark.parametrize("field", ["splits", "tokenizer", "fingerprint"])
def test_a_description_that_lacks_a_field_is_refused_in_one_line(data, field):
    folder = prepared(data).path
    rewrite_description(folder, lambda description: description.pop(field))
    with pytest.raises(UserError, match=rf"dataset\.json: damaged \(no '{field}'\)"):
        load_dataset(folder)


def test_a_format_of_another_version_is_refused(data):
    folder = prepared(data).path
    rewrite_description(folder, lambda description: description.update(format_version=99))
    with pytest.raises(UserError, match="format_version = 99, this program reads 3"):
        load_dataset(folder)


def test_a_dataset_of_the_version_before_is_read_and_named_by_the_same_fingerprint(data):
    dataset = prepared(data)
    older = {**read_description(dataset.path), "format_version": 2}  # as it was written, without a digest
    (dataset.path / "dataset.json").write_text(json.dumps(older, indent=1))
    assert str(prepared(data)) == str(dataset)
    assert load_dataset(dataset.path).fingerprint == dataset.fingerprint
    assert verify(dataset.path).problems == ()


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d["splits"]["heldout"].update(utf8_bytes=10**30),
        lambda d: d["splits"]["train"].update(documents=-1),
        lambda d: d["splits"]["train"]["shards"][0].update(tokens=2**63),
        lambda d: d["splits"]["train"]["shards"][0].update(tokens=True),
        lambda d: d["splits"]["train"]["shards"][0].update(name="../../tokenizer.json"),
        lambda d: d["splits"]["train"].update(shards={"name": 1}),
        lambda d: d.update(splits=[1, 2]),
        lambda d: d.update(tokenizer=None),
    ],
)
def test_a_description_without_a_digest_is_believed_only_where_it_can_be_true(data, edit):
    path = prepared(data).path
    older = {**read_description(path), "format_version": 2}
    edit(older)
    (path / "dataset.json").write_text(json.dumps(older))
    for use in (load_dataset, verify):
        with pytest.raises(UserError, match=r"dataset\.json: damaged"):
            use(path)


def test_a_folder_that_cannot_be_made_is_a_user_error(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="preparing the data"):
        prepare(dataclasses.replace(data, dir=str(tmp_path / "file" / "datasets")), quiet)
