import hashlib
from importlib import metadata
import json
import os
import socket
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from topklm.data import formats
from topklm.data.documents import Document, Problem
from topklm.data.formats import QUICKSTART
from topklm.data.sources import FileReader, SourceFile, corpus_name, find, is_remote
from topklm.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*paths, text="x"):
    for path in paths:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w") as file:
            file.write(text)


def names(*given):
    """What is found, relative to the current folder."""
    return [os.path.relpath(file.url) for file in find(given)]


# Local files.


def test_a_file_is_found_with_its_ending_size_and_version(folder):
    write("a.jsonl.gz", text="12345")
    status = os.stat("a.jsonl.gz")
    expected = SourceFile(str(folder / "a.jsonl.gz"), ".jsonl.gz", 5, str(status.st_mtime_ns))
    assert find(["a.jsonl.gz"]) == find([f"file://{folder}/a.jsonl.gz"]) == (expected,)


@pytest.mark.parametrize("ending", formats.endings())
def test_every_known_ending_is_told_from_the_others(folder, ending):
    write(f"a.b{ending}")
    assert [file.ending for file in find(["*"])] == [ending]


def test_another_version_is_another_file(folder):
    write("a.txt")
    (before,) = find(["a.txt"])
    os.utime("a.txt", ns=(1, 1))
    assert find(["a.txt"])[0] != before


def test_files_are_sorted_and_each_is_found_once_however_it_is_named(folder):
    write("c.txt", "a.txt", "b.txt")
    os.symlink("c.txt", "d.txt")
    given = ["c.txt", "*.txt", f"../{folder.name}/a.txt", "./b.txt", str(folder)]
    assert names(*given) == names(*reversed(given)) == ["a.txt", "b.txt", "c.txt"]


def test_a_glob_crosses_folders_with_two_stars_and_finds_no_folders(folder):
    write("a.txt", "x/b.txt", "x/y/c.txt", "x/y.txt/d.jsonl")
    assert names("*") == ["a.txt"]
    assert names("**/*.txt") == ["a.txt", "x/b.txt", "x/y/c.txt"]
    assert names("x/?.txt", "[a-b].txt") == ["a.txt", "x/b.txt"]


def test_a_folder_is_all_files_below_it_with_a_known_ending(folder):
    write("d/b.txt", "d/x/a.parquet", "d/notes.md", "d/.hidden.txt", "d/.git/c.txt")
    assert names("d") == names("d/") == names(f"file://{folder}/d") == ["d/b.txt", "d/x/a.parquet"]


def test_folders_that_links_lead_to_are_read_each_once(folder):
    write("d/real/a.txt", "elsewhere/b.txt", "elsewhere/deep/c.txt", "deepest/e.txt")
    os.symlink("../elsewhere", "d/linked")
    os.symlink("../elsewhere", "d/again")
    os.symlink("real", "d/a-second-name")
    os.symlink("../../deepest", "elsewhere/deep/link")  # a link in a folder that a link leads to
    os.symlink("..", "d/up")  # in a circle
    os.symlink("self", "d/self")
    os.symlink("nowhere", "d/.hidden")
    # By its own name, or that of the first link to it.
    assert names("d") == ["d/again/b.txt", "d/again/deep/c.txt", "d/real/a.txt", "d/up/deepest/e.txt"]
    assert len(names("d", "elsewhere", "deepest")) == 4


def test_what_a_folder_holds_besides_text_is_said_with_counts_by_ending(folder):
    write("d/a.jsonl", "d/b.md", "d/x/c.MD", "d/x/d.jsonl.bz2", "d/_SUCCESS", "d/.hidden.md", "d/e.tar.gz")
    lines = []
    assert len(find(["d", "d/a.jsonl"], say=lines.append)) == 1
    (line,) = lines
    assert "left out 5 file(s)" in line
    assert line.endswith(": .md 2, .jsonl.bz2 1, .tar.gz 1, no ending 1")


def test_a_folder_of_nothing_but_text_needs_no_line(folder, capsys):
    write("d/a.jsonl", "d/b.txt")
    find(["d"])
    assert capsys.readouterr() == ("", "")
    write("d/c.csv")
    find(["d"])  # who asks for no lines gets them on standard error
    assert "left out 1 file(s)" in capsys.readouterr().err


def test_many_endings_are_said_in_one_line(folder):
    write("d/a.txt", *(f"d/b.x{n}" for n in range(30)), "d/c.\x1b[31m" + "y" * 100)
    lines = []
    find(["d"], say=lines.append)
    assert len(lines) == 1
    assert len(lines[0]) < 500
    assert lines[0].isprintable()
    assert "and 23 more endings" in lines[0]


def test_endings_are_known_in_capitals_too(folder):
    write("A.JSONL", "b.Txt.GZ", "C.PARQUET")
    assert [file.ending for file in find(["*"])] == [".jsonl", ".parquet", ".txt.gz"]
    assert corpus_name(find(["A.JSONL"])) == "A"


def test_a_folder_without_text_is_refused(folder):
    write("d/notes.md")
    with pytest.raises(
        UserError, match=r"SOURCE: no file below '.*/d' ends in \.txt, .*\.parquet \(there are: \.md 1\)"
    ):
        find(["d"])


def test_a_name_with_brackets_is_taken_literally_when_the_file_exists(folder):
    write("a[1].txt", "a1.txt", "d[1]/b.txt")
    assert names("a[1].txt") == ["a[1].txt"]
    assert names("d[1]") == ["d[1]/b.txt"]
    os.remove("a[1].txt")
    assert names("a[1].txt") == ["a1.txt"]


def test_a_comma_is_part_of_a_name(folder):
    write("a,b.txt")
    assert names("a,b.txt") == ["a,b.txt"]


def test_a_tilde_is_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    write("a.txt")
    assert names("~/a.txt") == ["a.txt"]


def test_an_unknown_ending_is_refused_also_when_a_glob_finds_it(folder):
    write("a.pdf", "b.txt")
    for given in (["a.pdf"], ["*"], ["b.txt", "a.pdf"]):
        with pytest.raises(
            UserError, match=r"a\.pdf.*must end in \.txt, \.jsonl, .*\.gz or \.zst\) or \.parquet"
        ):
            find(given)


def test_what_matches_nothing_is_refused_even_beside_what_does(folder):
    write("a.txt")
    with pytest.raises(UserError, match=r"data\.source: 'b\*\.txt' matches no file; check the path"):
        find(["a.txt", "b*.txt"], flag="data.source")
    for given in ([], [" "]):
        with pytest.raises(UserError, match="names no file"):
            find(given)


def test_what_is_no_file_is_refused(folder):
    os.mkfifo("a.txt")
    os.symlink("nowhere", "b.txt")
    with pytest.raises(UserError, match=r"a\.txt' is not a file"):
        find(["a.txt"])
    with pytest.raises(UserError, match=r"cannot read '.*b\.txt': No such file"):
        find(["b.txt"])


def test_a_file_that_may_not_be_read_is_refused(folder, monkeypatch):
    write("a.txt")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever runs the tests may read everything
    with pytest.raises(UserError, match=r"no permission to read '.*a\.txt'; change its mode"):
        find(["a.txt"])


def test_a_folder_that_may_not_be_listed_is_refused(folder, monkeypatch):
    write("d/e/a.txt")
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("/e"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"cannot list '.*/d/e': Permission denied"):
        find(["d"])


def test_the_corpus_name_is_fit_for_a_folder_and_says_how_many_more(folder):
    write("my plays (1623).txt", "x/my plays (1623).txt", "日本.txt")
    assert corpus_name(find(["my plays (1623).txt"])) == "my-plays-1623"
    assert corpus_name(find(["**/my*.txt"])) == "my-plays-1623-and-1-more"
    assert corpus_name(find(["日本.txt"])) == "corpus"
    units = [SourceFile(f"hf:org/books:default:train#{i}/3", "hf", 0, "") for i in range(3)]
    assert corpus_name(units) == "books-train"
    assert corpus_name([SourceFile("https://host/a.jsonl.gz?key=1", ".jsonl.gz", 0, "")]) == "a"
    assert corpus_name([SourceFile("/x/summaries_en-us.json", QUICKSTART, 0, "")]) == "quickstart"


@pytest.mark.parametrize(
    ("url", "expected"),
    [("s3://a/b", True), ("https://a/b", True), ("/a/b", False), ("a:b", False), ("hf:a", False)],
)
def test_a_remote_url_is_told_from_a_path(url, expected):
    assert is_remote(url) == expected


# The quickstart corpus.


class FakePackageFile:
    def __init__(self, path):
        self.path, self.name = path, path.name

    def locate(self):
        return self.path


def test_quickstart_is_a_file_of_the_installed_package(tmp_path, monkeypatch):
    path = tmp_path / "summaries_en-us.json"
    path.write_text(json.dumps({"B": {"extract": "bee"}, "A": {"extract": "ay"}}))
    other = FakePackageFile(tmp_path / "summaries_fr-fr.json")
    monkeypatch.setattr(metadata, "files", lambda _: [other, FakePackageFile(path)])
    (file,) = find([" quickstart "])
    assert (file.url, file.ending, file.size) == (str(path), QUICKSTART, path.stat().st_size)
    assert [item.text for item in FileReader(file, "text")] == ["bee", "ay"]


def test_quickstart_that_is_not_installed_says_what_to_install(monkeypatch):
    def not_installed(name):
        raise metadata.PackageNotFoundError(name)

    for files in (not_installed, lambda _: None):
        monkeypatch.setattr(metadata, "files", files)
        with pytest.raises(UserError, match=r"pip install 'topklm\[quickstart\]'"):
            find(["quickstart"])


# Hugging Face datasets.


@pytest.fixture
def dataset_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "books"
    path.mkdir()
    return path


def hf_texts(source, text_field="text"):
    return [[item.text for item in FileReader(file, text_field)] for file in find([source])]


def write_jsonl_parts(path, n):
    texts = [[f"text {part} {i}" for i in range(part + 1)] for part in range(n)]
    for part, lines in enumerate(texts):
        content = "".join(json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate(lines))
        (path / f"part-{part:02}.jsonl").write_text(content)
    return texts


def test_each_shard_of_a_hugging_face_dataset_is_one_unit(dataset_folder):
    texts = write_jsonl_parts(dataset_folder, 12)
    files = find([f"hf:{dataset_folder}"])
    assert [f.url for f in files] == [f"hf:{dataset_folder}:default:train#{i:02}/12" for i in range(12)]
    assert {(f.ending, f.size) for f in files} == {("hf", 0)}
    assert len({f.version for f in files}) == 1
    assert hf_texts(f"hf:{dataset_folder}") == texts
    assert corpus_name(files) == "books-train"


def test_a_hugging_face_dataset_of_tables_is_read_by_its_rows(dataset_folder):
    table = pa.table({"id": [1, 2, 3, 4, 5], "text": ["one", None, " ", "a\0b", "five é"]})
    pq.write_table(table, dataset_folder / "train.parquet")
    (file,) = find([f"hf:{dataset_folder}"])
    reader = FileReader(file, "text")
    assert list(reader) == [
        Document("one", "row 1", 0),
        Problem("empty", "row 2", "null"),
        Problem("empty", "row 3", "nothing but white space"),
        Problem("NUL bytes", "row 4", "U+0000 at character 1"),
        Document("five é", "row 5", 0),
    ]
    raw = [text.encode() for text in ("one", "", " ", "a\0b", "five é")]
    together = b"".join(len(text).to_bytes(8, "little") + text for text in raw)
    assert reader.sha256 == hashlib.sha256(together).hexdigest()
    assert reader.bytes_read == 5


def test_a_text_inside_of_another_column_of_a_dataset_is_named_with_a_dot(dataset_folder):
    rows = [{"doc": {"text": "one"}, "n": 1}, {"doc": {"text": None}, "n": 2}, {"doc": None, "n": 3}]
    pq.write_table(pa.Table.from_pylist(rows), dataset_folder / "train.parquet")
    (file,) = find([f"hf:{dataset_folder}"])
    items = list(FileReader(file, "doc.text"))
    assert items[0] == Document("one", "row 1", 0)
    assert [item.kind for item in items[1:]] == ["empty", "no text field"]
    with pytest.raises(UserError, match=r"text_field = 'body.text': .* has no such column.* of 'doc', 'n'"):
        list(FileReader(file, "body.text"))


def test_changed_files_of_a_dataset_are_another_version_and_stop_the_reading(dataset_folder):
    write_jsonl_parts(dataset_folder, 2)
    before = find([f"hf:{dataset_folder}"])
    os.utime(dataset_folder / "part-00.jsonl", ns=(1, 1))
    assert find([f"hf:{dataset_folder}"])[0].version != before[0].version
    with pytest.raises(UserError, match="has changed since the command began; start it again"):
        list(FileReader(before[0], "text"))


def test_a_split_is_chosen_with_or_without_a_configuration(dataset_folder):
    for split in ("train", "test"):
        (dataset_folder / f"{split}.jsonl").write_text(json.dumps({"text": split}))
    assert hf_texts(f"hf:{dataset_folder}") == [["train"]]
    for form in ("test", ":test", "default:test"):
        assert hf_texts(f"hf:{dataset_folder}:{form}") == [["test"]]


def test_a_split_that_is_not_there_is_refused_with_those_that_are(dataset_folder):
    write_jsonl_parts(dataset_folder, 1)
    with pytest.raises(UserError, match=r"has no split 'test'; it has train"):
        find([f"hf:{dataset_folder}:default:test"])


def test_one_of_several_configurations_must_be_chosen(dataset_folder):
    for config in ("en", "de"):
        (dataset_folder / f"{config}.jsonl").write_text(json.dumps({"text": f"text {config}"}))
    (dataset_folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: en\n  data_files: en.jsonl\n"
        "- config_name: de\n  data_files: de.jsonl\n---\n"
    )
    for given, why in (("", "several configurations"), (":fr", "no configuration 'fr'")):
        with pytest.raises(UserError, match=rf"has {why}; give hf:.*books:CONFIG with one of de, en"):
            find([f"hf:{dataset_folder}{given}"])
    assert hf_texts(f"hf:{dataset_folder}:de") == [["text de"]]
    assert corpus_name(find([f"hf:{dataset_folder}:de:train"])) == "books-de-train"


def test_a_dataset_without_the_column_is_refused_with_its_columns(dataset_folder):
    write_jsonl_parts(dataset_folder, 1)
    with pytest.raises(UserError, match=r"text_field = 'body': hf:.* has no such column.* of 'n', 'text'"):
        hf_texts(f"hf:{dataset_folder}", "body")


def test_a_damaged_file_of_a_dataset_keeps_what_came_before(dataset_folder):
    for name in "ab":
        table = pa.table({"text": [f"{name} {i}" for i in range(3000)]})
        pq.write_table(table, dataset_folder / f"{name}.parquet", row_group_size=1000, compression="snappy")
    content = bytearray((dataset_folder / "b.parquet").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = b"\xff" * 200
    (dataset_folder / "b.parquet").write_bytes(content)
    first, second = (list(FileReader(file, "text")) for file in find([f"hf:{dataset_folder}"]))
    assert [item.text for item in first] == [f"a {i}" for i in range(3000)]
    assert (second[-1].kind, second[-1].where) == ("damaged file", f"row {len(second)}")
    assert [item.text for item in second[:-1]] == [f"b {i}" for i in range(len(second) - 1)]


@pytest.mark.parametrize("given", ["hf:", "hf:a:b:c:d"])
def test_a_dataset_is_named_by_at_most_three_parts(given):
    with pytest.raises(UserError, match="must be hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT"):
        find([given])


def test_a_dataset_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"'hf:.*empty' cannot be opened: .*check its name"):
        find([f"hf:{tmp_path}/empty"])


# Packages and protocols.


@pytest.mark.parametrize(
    ("source", "module", "extra"),
    [("hf:a", "datasets", "hf"), ("s3://a/b.txt", "s3fs", "s3"), ("gs://a/b.txt", "gcsfs", "gcs")],
)
def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch, source, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    for protocol in ("s3", "gs"):  # those in use already
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
    with pytest.raises(UserError, match=rf"pip install 'topklm\[{extra}\]'"):
        find([source])


def test_an_unknown_protocol_is_refused():
    with pytest.raises(UserError, match=r"'ftq://host/a\.txt': unknown protocol 'ftq'.*gs://, s3://"):
        find(["ftq://host/a.txt"])


def test_a_chain_of_urls_is_refused():
    with pytest.raises(UserError, match="chained URLs"):
        find(["zip://a.txt::s3://a/b.zip"])


def test_a_web_server_that_is_not_there_is_named():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        host = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        for name in ("a.txt", "*.txt"):
            with pytest.raises(UserError, match=rf"{host} gives no answer for '{host}/.*check the network"):
                find([f"{host}/{name}"])
