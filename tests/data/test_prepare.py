import dataclasses
import hashlib
import json
import multiprocessing
import os
from pathlib import Path
import time

import numpy as np
import pytest

from topklm.config import DataConfig
from topklm.data import prepare as prepare_module
from topklm.data.prepare import load_dataset, prepare, verify_dataset
from topklm.errors import UserError

TEXTS = [f"Ship {n} sailed on day {n * n} to the port of {n % 7} hills." for n in range(120)]


def is_heldout(text, fraction):
    first = hashlib.sha256(text.encode()).digest()[:8]
    return int.from_bytes(first, "big") / 2**64 < fraction


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


def quiet(_):
    pass


def documents_of(dataset, split):
    tokens = dataset.tokens(split).read(0, split.tokens)
    starts = np.flatnonzero(tokens == dataset.tokenizer.separator_id)
    assert starts[0] == 0
    return [dataset.tokenizer.decode(part) for part in np.split(tokens, starts[1:])]


def test_each_split_holds_its_documents_in_order_and_none_is_lost(data):
    dataset = prepare(data, quiet)
    assert documents_of(dataset, dataset.heldout) == [t for t in TEXTS if is_heldout(t, 0.2)]
    assert documents_of(dataset, dataset.train) == [t for t in TEXTS if not is_heldout(t, 0.2)]


def test_the_counts_are_those_of_the_text(data):
    dataset = prepare(data, quiet)
    for split in (dataset.train, dataset.heldout):
        documents = documents_of(dataset, split)
        assert split.documents == len(documents)
        assert split.utf8_bytes == sum(len(text.encode()) for text in documents)
        assert split.text_tokens == sum(len(dataset.tokenizer.encode(text)) for text in documents)
        assert split.tokens == split.text_tokens + split.documents == len(dataset.tokens(split))


def test_a_dataset_is_the_same_when_it_is_made_again_elsewhere(data, tmp_path):
    first = prepare(data, quiet)
    second = prepare(dataclasses.replace(data, dir=str(tmp_path / "elsewhere")), quiet)
    assert first.path.name == second.path.name == f"ships-{first.fingerprint[:12]}"
    for file in first.path.iterdir():
        assert (second.path / file.name).read_bytes() == file.read_bytes()


def test_a_finished_dataset_is_reused_with_one_line(data):
    first, lines = prepare(data, quiet), []
    written = {file: file.stat().st_mtime_ns for file in first.path.iterdir()}
    second = prepare(data, lines.append)
    assert len(lines) == 1
    assert "reusing" in lines[0]
    assert str(first.train.documents) in lines[0]
    assert (second.train, second.heldout) == (first.train, first.heldout)
    assert {file: file.stat().st_mtime_ns for file in first.path.iterdir()} == written


@pytest.mark.parametrize("change", [{"vocab_size": 310}, {"heldout_fraction": 0.3}, {"text_field": "body"}])
def test_another_setting_is_another_dataset(data, tmp_path, change):
    lines = [json.dumps({"text": text, "body": text}) for text in TEXTS]
    (tmp_path / "ships.jsonl").write_text("\n".join(lines))
    assert prepare(data, quiet).path != prepare(dataclasses.replace(data, **change), quiet).path


def test_other_text_is_another_dataset_and_another_place_is_not(data, tmp_path):
    first = prepare(data, quiet)
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "ships.jsonl").rename(tmp_path / "moved" / "ships.jsonl")
    moved_data = dataclasses.replace(data, source=str(moved))
    assert prepare(moved_data, quiet).path == first.path
    with moved.open("a") as file:
        file.write('\n{"text": "one more"}')
    assert prepare(moved_data, quiet).path != first.path


def test_the_tokenizer_learns_nothing_from_held_out_text(data, tmp_path):
    heldout = next(f"qqxxzz {n}" for n in range(1000) if is_heldout(f"qqxxzz {n}", 0.2))
    without = prepare(data, quiet)
    with (tmp_path / "ships.jsonl").open("a") as file:
        for _ in range(50):
            file.write("\n" + json.dumps({"text": heldout}))
    with_it = prepare(data, quiet)
    assert with_it.heldout.documents == without.heldout.documents + 50  # copies stay together
    assert with_it.tokenizer.sha256 == without.tokenizer.sha256


def test_the_description_says_where_the_dataset_comes_from(data):
    dataset = prepare(data, quiet)
    content = json.loads((dataset.path / "dataset.json").read_text())
    (file,) = content["files"]
    raw = Path(data.source).read_bytes()
    assert (file["path"], file["size"]) == (data.source, len(raw))
    assert file["sha256"] == hashlib.sha256(raw).hexdigest()
    assert content["tokenizer_sha256"] == dataset.tokenizer.sha256
    assert content["text"]["documents"] == len(TEXTS)
    assert content["splits"]["train"]["text_tokens"] == dataset.train.text_tokens


def test_replaced_and_empty_text_is_announced(data, tmp_path):
    with (tmp_path / "ships.jsonl").open("ab") as file:
        file.write(b'\n{"text": "a\xff b\xff"}\n{"text": ""}')
    lines = []
    prepare(data, lines.append)
    assert any("replaced 2 invalid UTF-8 sequences in 1 documents" in line for line in lines)
    assert any("skipped 1 empty documents" in line for line in lines)


def test_long_documents_are_encoded_in_pieces_as_if_whole(data, tmp_path, monkeypatch):
    text = "\n".join(TEXTS * 40)
    (tmp_path / "ships.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in [*TEXTS, text]))
    monkeypatch.setattr(prepare_module, "_BATCH_CHARS", 5000)
    dataset = prepare(data, quiet)
    tokens = dataset.tokens(dataset.train).read(0, dataset.train.tokens)
    start = np.flatnonzero(tokens == 0)[-1]
    np.testing.assert_array_equal(tokens[start + 1 :], dataset.tokenizer.encode(text))
    assert text in documents_of(dataset, dataset.train)


@pytest.mark.parametrize(("fraction", "split"), [(1e-9, "heldout"), (1 - 1e-9, "train")])
def test_a_split_without_documents_is_refused_and_nothing_is_left(data, tmp_path, fraction, split):
    with pytest.raises(UserError, match=rf"data\.heldout_fraction.*none came into the {split} split"):
        prepare(dataclasses.replace(data, heldout_fraction=fraction), quiet)
    assert list((tmp_path / "datasets").iterdir()) == []


def test_a_bad_line_late_in_the_text_leaves_nothing(data, tmp_path):
    with (tmp_path / "ships.jsonl").open("a") as file:
        file.write("\nno json")
    with pytest.raises(UserError, match=r"ships\.jsonl, line 121"):
        prepare(data, quiet)
    assert list((tmp_path / "datasets").iterdir()) == []


def test_a_source_that_changes_while_it_is_read_is_refused(data, tmp_path):
    def change(line):
        if "vocabulary" in line:
            (tmp_path / "ships.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS[:-1]))

    with pytest.raises(UserError, match="a file changed while it was read"):
        prepare(data, change)


def test_stale_temporary_folders_go_and_young_ones_stay(data, tmp_path):
    root = tmp_path / "datasets"
    old, young, theirs = (
        root / f".ships-abc.{'0' * 32}.tmp",
        root / f".ships-abc.{'1' * 32}.tmp",
        root / ".somebody-elses.tmp",
    )
    for folder in (old, young, theirs):
        folder.mkdir(parents=True)
        (folder / "train-00000.arrayrecord").write_bytes(b"half")
    two_days_ago = time.time() - 2 * 24 * 3600
    for folder in (old, theirs, young):
        os.utime(folder, (two_days_ago, two_days_ago))
    for folder in (old, theirs):
        os.utime(folder / "train-00000.arrayrecord", (two_days_ago, two_days_ago))
    prepare(data, quiet)
    assert not old.exists()
    assert young.exists()  # its folder is old, but the file in it is being written
    assert theirs.exists()


def test_the_process_that_comes_second_uses_what_the_first_made(data):
    other = []

    def meanwhile(line):
        if "vocabulary" in line and not other:
            other.append(None)
            other[0] = prepare(data, quiet)

    dataset = prepare(data, meanwhile)
    assert dataset.path == other[0].path
    assert [path.name for path in dataset.path.parent.iterdir()] == [dataset.path.name]


def prepare_in_process(data, barrier, queue):
    barrier.wait()
    queue.put(prepare(data, quiet).fingerprint)


def test_two_processes_at_once_agree(data):
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2), context.Queue()
    processes = [context.Process(target=prepare_in_process, args=(data, barrier, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    fingerprints = {queue.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert fingerprints == {prepare(data, quiet).fingerprint}


def test_a_tokenizer_of_another_dataset_is_refused(data):
    dataset = prepare(data, quiet)
    other = prepare(dataclasses.replace(data, vocab_size=310), quiet)
    other.tokenizer.save(dataset.path / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json is not the tokenizer of this dataset"):
        load_dataset(dataset.path)


@pytest.mark.parametrize("name", ["dataset.json", "tokenizer.json", "train-00000-of-00001.arrayrecord"])
def test_a_folder_with_a_missing_file_is_refused_and_the_file_named(data, name):
    path = prepare(data, quiet).path
    (path / name).unlink()
    for use in (lambda: load_dataset(path), lambda: prepare(data, quiet)):
        with pytest.raises(UserError, match=name):
            use()


def test_a_format_of_another_version_is_refused(data):
    file = prepare(data, quiet).path / "dataset.json"
    file.write_text(file.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(UserError, match="format_version = 99, this program reads 1"):
        load_dataset(file.parent)


def test_verification_finds_a_changed_byte(data):
    dataset = prepare(data, quiet)
    verify_dataset(dataset)
    file = dataset.path / dataset.heldout.shards[0].name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=file.name):
        verify_dataset(dataset)


def test_a_folder_that_cannot_be_made_is_a_user_error(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="preparing the data"):
        prepare(dataclasses.replace(data, dir=str(tmp_path / "file" / "datasets")), quiet)
