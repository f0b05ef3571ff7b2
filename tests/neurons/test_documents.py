"""Text that neurons are looked at on: the documents that are read, and what is said of those that are not."""

import json
import shutil

import pytest
import saved_runs

from topklm.config import DataConfig
from topklm.data.building.build import prepare
from topklm.data.dataset import load_dataset
from topklm.neurons.documents import COPY, described, no_text, open_documents

PARIS = "Paris is the capital of France, and has been for long."
LINES = [
    json.dumps({"text": PARIS}),
    json.dumps({"text": "Berlin is the capital of Germany, and was so before."}),
    json.dumps({"text": PARIS}),
    json.dumps({"text": ""}),
    json.dumps({"text": "   "}),
    json.dumps({"text": "a\0b"}),
    json.dumps({"txt": "another field"}),
    "{no JSON",
    json.dumps({"text": PARIS}),
    json.dumps({"text": PARIS + " "}),
]


@pytest.fixture
def tokenizer():
    return saved_runs.tokenizer()


@pytest.fixture
def odd(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    return path


def opened(source, tokenizer, **settings):
    return open_documents(tokenizer, DataConfig(**settings), str(source))


def test_copies_and_what_cannot_be_read_are_left_out_and_counted(odd, tokenizer):
    documents = opened(odd, tokenizer)
    for _ in range(2):  # whoever reads it again gets the same
        texts = [tokenizer.decode(ids) for ids in documents]
        assert texts == [PARIS, "Berlin is the capital of Germany, and was so before.", PARIS + " "]
        assert documents.left_out == {
            COPY: 2,
            "empty": 2,
            "NUL bytes": 1,
            "no text field": 1,
            "invalid JSON": 1,
        }
    assert described(documents.left_out) == (
        "1 x NUL bytes, 2 x empty, 2 x exact copy of a document before, 1 x invalid JSON, 1 x no text field"
    )


def test_copies_in_another_file_are_copies(odd, tmp_path, tokenizer):
    shutil.copy(odd, tmp_path / "second.jsonl")
    both = opened(f"{odd},{tmp_path / 'second.jsonl'}", tokenizer)
    assert len(list(both)) == 3
    assert both.left_out[COPY] == 2 * 2 + 3


def test_what_is_left_out_is_what_preparing_leaves_out(odd, tmp_path):
    config = DataConfig(source=str(odd), dir=str(tmp_path / "prepared"), vocab_size=300, heldout_fraction=0.0)
    prepare(config, lambda line: None)
    (folder,) = (path.parent for path in (tmp_path / "prepared").glob("*/dataset.json"))
    tokenizer = load_dataset(folder).tokenizer
    prepared = [ids.tolist() for ids in open_documents(tokenizer, config, str(folder), "train")]
    read = [ids.tolist() for ids in opened(odd, tokenizer)]
    assert len(read) == 3 and sorted(read) == sorted(prepared)


@pytest.mark.parametrize(("field", "ending"), [("txt", "jsonl"), ("doc", "jsonl"), ("", "txt")])
def test_text_without_a_document_names_the_field_that_was_looked_for(tmp_path, tokenizer, field, ending):
    path = tmp_path / f"empty.{ending}"
    path.write_text('{"text": "a town"}\n{"text": "a village"}\n' if field else " \n")
    documents = opened(path, tokenizer, text_field=field or "text")
    assert list(documents) == []
    said = str(no_text(documents, f"--source = {path}"))
    if field:
        assert f"there is no text in it (2 x no text field; the field '{field}' was looked for)" in said
    else:
        assert "field" not in said


def test_names_of_many_files_are_not_taken_for_one(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"{number:03}-{'x' * 40}.txt" for number in range(12)]
    for name in names:
        (tmp_path / name).write_text(f"text of {name}")
    assert len(list(opened(",".join(names), tokenizer))) == len(names)
