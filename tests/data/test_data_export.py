"""`topklm data export` gives back the documents that a dataset was made of."""

import gzip
import json
import shutil

from helpers import assert_one_line_error, in_this_process
from making import make_dataset
import pytest

from topklm.data.tokenizer import train_bpe

TRAIN = [f"Letter {n} came by boat.\n\n" * (1 + n % 3) + "Señor Þór ☂ \U0001f6f6" for n in range(60)]
HELDOUT = [f"Parcel {n} came by {'Train' if n % 3 else 'sea'}." for n in range(30)]
WITH_TRAIN = [text for text in HELDOUT if "Train" in text]


@pytest.fixture
def folder(tmp_path):
    tokenizer = train_bpe(TRAIN + HELDOUT, 270)
    make_dataset(tmp_path / "letters", TRAIN, HELDOUT, tokenizer=tokenizer, shard_tokens=2048)
    return tmp_path / "letters"


def exported(folder, *flags, name="out.jsonl"):
    out = folder.parent / name
    process = in_this_process("data", "export", folder, "--out", out, *flags)
    assert process.exit_code == 0, process.errors
    content = gzip.decompress(out.read_bytes()) if name.endswith(".gz") else out.read_bytes()
    return [json.loads(line)["text"] for line in content.decode().splitlines()], process.output


def test_documents_come_back_as_they_were(folder):
    texts, output = exported(folder)
    assert texts == HELDOUT
    assert "out.jsonl: 30 of 30 documents (heldout)" in output
    assert exported(folder, "--split", "train", name="out.jsonl.gz")[0] == TRAIN
    assert sorted(path.name for path in folder.parent.iterdir()) == ["letters", "out.jsonl", "out.jsonl.gz"]
    before = (folder.parent / "out.jsonl.gz").read_bytes()
    exported(folder, "--split", "train", name="out.jsonl.gz")
    assert (folder.parent / "out.jsonl.gz").read_bytes() == before


def test_a_pattern_chooses_documents_in_any_case_unless_asked(folder):
    assert exported(folder, "--regex", "TRAIN|x{9}")[0] == WITH_TRAIN
    assert exported(folder, "--regex", "Train", "--case")[0] == WITH_TRAIN
    facts = folder.parent / "facts.json"
    exported(folder, "--regex", "parcel 2?7", "--json", facts)
    assert json.loads(facts.read_text()) == {
        "file": str(folder.parent / "out.jsonl"),
        "split": "heldout",
        "documents": 30,
        "written": 2,
    }


def test_the_data_of_a_run_are_found(trainer, run_copy):
    texts, _ = exported(run_copy, name="texts.jsonl")
    lines = trainer.corpus.read_text("utf-8", errors="replace").splitlines()
    all_texts = {json.loads(line)["text"] for line in lines}
    assert texts and set(texts) < all_texts
    train, _ = exported(run_copy, "--split", "train", name="texts.jsonl")
    assert {*texts, *train} == {text for text in all_texts if text.strip()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "x.txt"], "--out = x.txt: must be a name that ends in .jsonl or .jsonl.gz"),
        (["--out", "no/x.jsonl"], "--out = no/x.jsonl: there is no folder"),
        (["--out", "x.jsonl", "--regex", "("], "--regex = (: is no regular expression"),
        (["--out", "x.jsonl", "--regex", "Train", "--case", "--split", "train"], "no document matches"),
        (["--out", "x.jsonl", "--case"], "--case: goes with --regex only"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(folder, monkeypatch, flags, message):
    monkeypatch.chdir(folder.parent)
    process = in_this_process("data", "export", folder, *flags)
    assert process.exit_code == 2
    assert message in assert_one_line_error(process.errors)
    assert [path.name for path in folder.parent.iterdir()] == ["letters"]


def test_a_damaged_dataset_leaves_the_file_that_was_there(folder):
    (out := folder.parent / "out.jsonl").write_text("before")
    shards = sorted(folder.glob("heldout-*"))
    shards[0].write_bytes(shards[0].read_bytes()[:-40])
    process = in_this_process("data", "export", folder, "--out", out)
    assert process.exit_code == 2
    assert_one_line_error(process.errors)
    assert out.read_text() == "before"
    shutil.rmtree(folder)
    folder.mkdir()
    process = in_this_process("data", "export", folder, "--out", out)
    assert "must be the folder of a dataset or of a run" in assert_one_line_error(process.errors)
