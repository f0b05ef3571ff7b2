"""A format of files is one entry of one table: found, read, named in errors and in the documentation."""

import gzip
from pathlib import Path

import pytest

from topklm.data.documents import Document, Problem
from topklm.data.formats import FORMATS, Format
from topklm.data.sources import FileReader, find
from topklm.errors import UserError

DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"


def read_shouting(blocks, text_field):
    for number, line in enumerate(b"".join(blocks).decode().splitlines(), start=1):
        where = f"line {number}"
        yield Document(line.upper(), where, 0) if line else Problem("empty", where, text_field)


@pytest.fixture
def shouting(monkeypatch):
    monkeypatch.setitem(FORMATS, ".shout", Format("a document a line, loud", read_shouting))


def test_a_format_that_is_added_is_found_and_read(tmp_path, shouting):
    (tmp_path / "a.SHOUT").write_text("one\n\ntwo\n")
    (tmp_path / "b.md").write_text("left out")
    (file,) = find([str(tmp_path)], say=lambda line: None)
    assert file.ending == ".shout"
    items = list(FileReader(file, "body"))
    assert items == [
        Document("ONE", "line 1", 0),
        Problem("empty", "line 2", "body"),
        Document("TWO", "line 3", 0),
    ]


def test_a_format_that_is_added_may_be_compressed_and_damaged(tmp_path, shouting):
    whole = gzip.compress(b"one\ntwo\n")
    (tmp_path / "a.shout.gz").write_bytes(whole)
    (tmp_path / "b.shout.gz").write_bytes(whole[:-9])
    (tmp_path / "c.shout.zst").write_bytes(b"no such data")
    read = [list(FileReader(file, "text")) for file in find([str(tmp_path)])]
    assert [item.text for item in read[0]] == ["ONE", "TWO"]
    assert [[item.kind for item in items] for items in read[1:]] == [["damaged file"]] * 2


def test_a_format_that_is_added_is_named_where_an_ending_is_unknown(tmp_path, shouting):
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(
        UserError, match=r"must end in .*\.shout \(each also with \.gz or \.zst\) or \.parquet"
    ):
        find([str(tmp_path / "a.csv")])
    with pytest.raises(UserError, match=r"no file below .* ends in .*\.shout .*\(there are: \.csv 1\)"):
        find([str(tmp_path)])


def test_a_compressed_ending_that_is_no_format_is_refused(tmp_path):
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    with pytest.raises(UserError, match="files must end in"):
        find([str(tmp_path / "a.parquet.gz")])


@pytest.mark.parametrize("ending", [ending for ending in FORMATS if ending.startswith(".")])
def test_every_format_has_its_line_in_the_documentation(ending):
    kind = FORMATS[ending]
    needs = f"`topklm[{kind.extra}]`" if kind.extra else ""
    lines = [" ".join(line.split()) for line in DOCUMENT.read_text(encoding="utf-8").splitlines()]
    assert f"| `{ending}` | {kind.help} | {needs} |".replace("  ", " ") in lines
