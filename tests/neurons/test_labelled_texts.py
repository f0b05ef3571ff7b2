"""Texts with labels: how files are read, and which tokens examples are."""

import gzip
from importlib import metadata
import json

import numpy as np
import pyarrow as pa
import pytest

from topklm.data.tokenizer import train_bpe
from topklm.errors import UserError
from topklm.neurons import labelled_texts
from topklm.neurons.labelled_texts import LAST, MEAN, LabelledTexts

CONLLU = """# text = I'm in Köln.
1-2\tI'm\t_\t_\t_\t_\t_\t_\t_\t_
1\tI\tI\tPRON\t_\t_\t_\t_\t_\t_
2\t'm\tbe\tAUX\t_\t_\t_\t_\t_\t_
3\tin\tin\tADP\t_\t_\t_\t_\t_\t_
3.1\tnot\tnot\tPART\t_\t_\t_\t_\t_\t_
4\tKöln\tKöln\tPROPN\t_\t_\t_\t_\t_\t_
5\t.\t.\tPUNCT\t_\t_\t_\t_\t_\t_

# text = No
1\tNo\tno\tINTJ\t_\t_\t_\t_\t_\t_
"""


def given(texts, text, end, labels=None):
    n = len(text)
    labels = np.array(labels or ["a"] * n)
    return LabelledTexts(
        "some", "here", texts, np.array(text), np.array(end), labels, np.zeros(n, int), np.ones(n, bool)
    )


@pytest.mark.parametrize("is_packed", [False, True])
def test_words_are_at_their_bytes_with_their_tags(tmp_path, is_packed):
    path = tmp_path / ("some.conllu.gz" if is_packed else "some.conllu")
    path.write_bytes(gzip.compress(CONLLU.encode()) if is_packed else CONLLU.encode())
    found = labelled_texts.of_conllu(path)
    assert found.labels.tolist() == ["PRON", "AUX", "ADP", "PROPN", "PUNCT", "INTJ"]
    assert found.texts == ["I'm in Köln.", "No"]
    ends = [found.texts[t].encode()[:e].decode() for t, e in zip(found.text, found.end, strict=True)]
    assert ends == ["I", "I'm", "I'm in", "I'm in Köln", "I'm in Köln.", "No"]
    assert found.to_fit.tolist() == [True] * 5 + [False]


def test_lines_of_labels_are_split_by_text(tmp_path):
    path = tmp_path / "labels.jsonl"
    rows = [{"text": f"text {i}", "label": i % 3} for i in range(100)]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    found = labelled_texts.of_json_lines(path)
    assert (len(found.texts), set(found.labels), found.to_fit.sum()) == (100, {"0", "1", "2"}, 70)
    np.testing.assert_array_equal(found.to_fit, labelled_texts.of_json_lines(path).to_fit)
    assert (found.to_fit != labelled_texts.of_json_lines(path, seed=1).to_fit).any()


@pytest.mark.parametrize(
    ("read", "content", "words"),
    [
        ("of_json_lines", b'{"text": "a", "label": "b"}\nnothing\n', "--labels = .*: line 2 must be"),
        ("of_json_lines", b'{"text": "a"}\n', "line 1 must be"),
        ("of_json_lines", b"\n", "--labels = .*: holds no line"),
        ("of_json_lines", b"\xff\xfe", "--labels = .*: is damaged, or no UTF-8"),
        ("of_conllu", b"1\tI\n", "--conllu = .*: holds no word"),
        ("of_conllu", None, "--conllu = .*: No such file"),
    ],
)
def test_a_file_of_something_else_is_refused_in_a_line(tmp_path, read, content, words):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        getattr(labelled_texts, read)(path)


def test_a_packed_file_that_is_cut_is_refused(tmp_path):
    path = tmp_path / "some.conllu.gz"
    path.write_bytes(gzip.compress(CONLLU.encode() * 50)[:-20])
    with pytest.raises(UserError, match="is damaged, or no UTF-8"):
        labelled_texts.of_conllu(path)


def test_examples_are_means_last_tokens_or_the_token_that_ends_a_word():
    tokenizer = train_bpe(["the sea the sea the sea"] * 20, 270)
    text = "the sea"
    ids = tokenizer.encode(text)
    pieces = tokenizer.token_bytes(ids)
    inside = next(n for n in range(1, 8) if n not in np.cumsum([len(p) for p in pieces]))
    asked = given([text, text, "", text], [0, 1, 2, 3, 3, 3], [MEAN, LAST, MEAN, len(text), inside, 3])
    found = labelled_texts.locate(asked, tokenizer, 64)
    n = len(ids)
    assert [len(d) for d in found.documents] == [n, n, n]
    assert found.kept.tolist() == ([0, 1, 3, 5] if 3 in np.cumsum([len(p) for p in pieces]) else [0, 1, 3])
    dense = found.pooling.toarray()
    wanted = np.zeros((2, 3 * n))
    wanted[0, :n], wanted[1, 2 * n - 1] = 1 / n, 1
    np.testing.assert_allclose(dense[:2], wanted, rtol=1e-6)
    assert np.flatnonzero(dense[2]).tolist() == [3 * n - 1]
    np.testing.assert_allclose(dense.sum(axis=1), 1, rtol=1e-6)


def test_long_texts_are_cut_to_the_context_and_keep_the_end_where_the_last_token_counts():
    tokenizer = train_bpe([], 257)
    text = "abcdefghij"
    found = labelled_texts.locate(given([text, text], [0, 1, 0], [MEAN, LAST, 9]), tokenizer, 5)
    assert [tokenizer.decode(ids) for ids in found.documents] == ["abcd", "ghij"]
    assert found.kept.tolist() == [0, 1]
    assert found.pooling.toarray().tolist() == [[0.25] * 4 + [0] * 4, [0] * 7 + [1]]


class _File:
    """As `importlib.metadata` gives files."""

    def __init__(self, path):
        self._path = path
        self.name, self.parent, self.suffixes = path.name, path.parent, path.suffixes

    def locate(self):
        return self._path

    def __str__(self):
        return str(self._path)


def test_files_of_sae_probes_with_two_labels_are_families(tmp_path, monkeypatch):
    folder = tmp_path / "cleaned_data"
    folder.mkdir()
    rows = "prompt,target\n" + "".join(f'"text, {i}",{i % 2}\n' for i in range(60))
    (folder / "1_two.csv.gz").write_bytes(gzip.compress(rows.encode()))
    (folder / "2_also.csv").write_text(rows)
    (folder / "2_zstd.csv.zst").write_bytes(pa.compress(rows.encode(), codec="zstd", asbytes=True))
    (folder / "3_three.csv").write_text("prompt,target\na,0\nb,1\nc,2\n")
    files = [_File(path) for path in folder.iterdir()]
    monkeypatch.setattr(metadata, "files", lambda name: files)
    monkeypatch.setattr(metadata, "version", lambda name: "0.4.2")
    found = labelled_texts.of_sae_probes()
    assert (len(found.texts), found.families.tolist()) == (180, [0] * 60 + [1] * 60 + [2] * 60)
    names = "1_two", "2_also", "2_zstd"
    assert set(found.labels) == {f"{name}: {label}" for name in names for label in (0, 1)}
    assert (found.end == LAST).all() and np.array_equal(found.text, np.arange(180))
    assert sorted(found.texts[:60]) == sorted(f"text, {i}" for i in range(60))


def test_without_the_package_its_data_are_named():
    with pytest.raises(UserError, match="--sae-probes: its data are not installed; run pip install"):
        labelled_texts.of_sae_probes()


def test_topics_are_those_of_the_quickstart_and_balanced():
    found = labelled_texts.topics()
    names, counts = np.unique(found.labels, return_counts=True)
    assert len(names) > 5 and counts.max() <= 160 and "Uncategorized" not in names
    assert min(map(len, found.texts)) > 300
