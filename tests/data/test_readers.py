import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import zlib

from helpers import tries
from hypothesis import given
from hypothesis import strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from topklm.data import documents as documents_module
from topklm.data.documents import PROBLEMS, Document, Problem
from topklm.data.formats import QUICKSTART
from topklm.data.sources import FileReader, SourceFile, find
from topklm.errors import UserError

COMPRESS = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}
COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def read(path, text_field="text"):
    """Texts, problems, and the reader at its end."""
    reader = FileReader(*find([str(path)]), text_field)
    items = list(reader)
    assert reader.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert reader.bytes_read == path.stat().st_size
    assert all(isinstance(item, Document) or item.kind in PROBLEMS for item in items)
    return (
        [i.text for i in items if isinstance(i, Document)],
        [i for i in items if isinstance(i, Problem)],
        items,
    )


def json_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write_lines(path, *texts):
    ending = "." + path.name.split(".", 1)[1]
    path.write_bytes(COMPRESS[ending](json_lines(texts)))
    return path


def write_table(path, texts, **options):
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path, **options)
    return path


def paragraphs(n, length=1000):
    return [f"paragraph {i} " + "x" * length + "\n" for i in range(n)]


# Text files.


def test_a_long_text_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    text = "\n".join(paragraphs(100))
    (tmp_path / "a.txt").write_text(text)
    documents, problems, items = read(tmp_path / "a.txt")
    assert "".join(documents) == text
    assert all(16 * 1024 <= len(d) < 18 * 1024 and d.endswith("\n\n") for d in documents[:-1])
    assert (len(documents), problems) == (6, [])
    assert [item.where for item in items[:2]] == ["byte 0", f"byte {len(documents[0])}"]


def cut_line_by_line(text):
    """The rule, in the plainest words, for texts whose lines are short."""
    documents, pending = [], b""
    for line in text.splitlines(keepends=True):
        pending += line
        if len(pending) >= 16 * 1024 and not line.strip():
            documents.append(pending.decode())
            pending = b""
    return documents + ([pending.decode()] if pending.strip() else [])


@pytest.mark.parametrize("seed", range(5))
def test_documents_of_a_text_file_end_after_the_first_blank_line_past_16_kib(tmp_path, seed):
    rng = random.Random(seed)
    lines = rng.choices(
        [b"\n", b" \t\r\n", b"short\n", b"y" * 700 + b"\n", "é".encode() * 90 + b"\r\n"], k=9000
    )
    text = b"begin" + b"".join(lines)
    (tmp_path / "a.txt").write_bytes(text)
    documents, problems, _ = read(tmp_path / "a.txt")
    assert documents == cut_line_by_line(text)
    assert problems == []


def test_a_short_text_file_is_one_document_with_its_newlines_and_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\n\r\ntwo é\n".encode())
    _, _, items = read(tmp_path / "a.txt")
    assert items == [Document("one\r\n\r\ntwo é\n", "byte 0", 0)]


def test_a_text_without_blank_lines_is_cut_at_the_end_of_a_line(tmp_path):
    text = "".join(paragraphs(4000))
    (tmp_path / "a.txt").write_text(text)
    documents, _, _ = read(tmp_path / "a.txt")
    assert "".join(documents) == text
    assert len(documents) == 4
    assert all(1 << 20 <= len(d) < (1 << 20) + 1100 and d.endswith("x\n") for d in documents[:-1])


def test_a_text_without_lines_is_cut_between_characters(tmp_path):
    text = "a" + "€" * 3_000_000
    (tmp_path / "a.txt").write_text(text)
    documents, _, items = read(tmp_path / "a.txt")
    assert "".join(documents) == text
    assert all(item.replaced == 0 and len(item.text.encode()) <= 2 << 20 for item in items)
    assert len(documents) == 5


def test_bytes_that_are_no_characters_do_not_keep_a_text_from_being_cut(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\x80" * (5 << 20))
    _, _, items = read(tmp_path / "a.txt")
    assert [item.replaced for item in items] == [2 << 20, 2 << 20, 1 << 20]


def test_blank_lines_at_the_end_of_a_text_are_no_document_but_a_blank_file_is_a_problem(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 20_000 + "\n\n \n\n")
    (tmp_path / "b.txt").write_text(" \n\n")
    (tmp_path / "c.txt").write_text("")
    assert [len(read(tmp_path / f"{name}.txt")[0]) for name in "abc"] == [1, 0, 0]
    kinds = [[p.kind for p in read(tmp_path / f"{name}.txt")[1]] for name in "abc"]
    assert kinds == [[], ["empty"], ["empty"]]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_compressed_text_is_cut_as_one_that_is_not(tmp_path, compression):
    text = "\ufeff" + "".join(paragraphs(2000)) + "\n\n".join(words(30_000))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / f"b.TXT{compression}").write_bytes(COMPRESSIONS[compression](text.encode()))
    _, _, items = read(tmp_path / "a.txt")
    assert len(items) > 10
    assert read(tmp_path / f"b.TXT{compression}")[2] == items


def test_a_compressed_text_that_is_cut_short_keeps_what_came_before(tmp_path):
    text = "\n\n".join(words(30_000))
    whole = gzip.compress(text.encode())
    (tmp_path / "a.txt.gz").write_bytes(whole[: len(whole) // 2])
    documents, (problem,), _ = read(tmp_path / "a.txt.gz")
    assert text.startswith("".join(documents))
    assert len(documents) > 3
    assert (problem.kind, problem.where) == ("damaged file", f"byte {len(''.join(documents))}")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("ending", [".txt", ".txt.gz", ".jsonl", ".json", ".jsonl.zst"])
def test_text_in_another_encoding_is_named_as_that(tmp_path, encoding, ending):
    text = "Señor Þór\n\n" * 50 if ".txt" in ending else json.dumps({"text": "Señor Þór"})
    path = tmp_path / f"a{ending}"
    compress = COMPRESSIONS[ending[ending.rindex(".") :] if ending.count(".") > 1 else ""]
    path.write_bytes(compress(text.encode(encoding)))
    documents, problems, _ = read(path)
    assert documents == []
    assert all("UTF-16: convert the file to UTF-8" in problem.what for problem in problems)
    has_mark = encoding in ("utf-16", "utf-32")
    assert {problem.kind for problem in problems} == {"not UTF-8" if has_mark else "NUL bytes"}


# JSON lines.


@pytest.mark.parametrize("ending", COMPRESS)
def test_each_json_line_is_a_document(tmp_path, ending):
    _, _, items = read(write_lines(tmp_path / f"a{ending}", "one", "two\nlines \u2028 \x0b"))
    assert items == [Document("one", "line 1", 0), Document("two\nlines \u2028 \x0b", "line 2", 0)]


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip)


@pytest.mark.parametrize("ending", [*COMPRESS, ".parquet"])
@tries(60)
@given(texts=st.lists(TEXTS, max_size=30))
def test_what_was_written_is_read_whatever_the_format(tmp_path_factory, ending, texts):
    path = tmp_path_factory.mktemp("written") / f"a{ending}"
    if ending == ".parquet":
        write_table(path, pa.array(texts, pa.string()), row_group_size=7)
    else:
        path.write_bytes(COMPRESS[ending](json_lines(texts)))
    documents, problems, _ = read(path)
    assert (documents, problems) == (texts, [])


def test_the_text_field_can_have_another_name_and_blank_lines_are_no_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\r\n \n\n{"body": "two"}')
    _, _, items = read(tmp_path / "a.jsonl", "body")
    assert items == [Document("one", "line 1", 0), Document("two", "line 4", 0)]


@pytest.mark.parametrize(
    ("line", "kind", "what"),
    [
        ('{"text": "cut', "invalid JSON", "Unterminated string starting at at character 9"),
        ("[" * 100_000, "invalid JSON", "recursion"),
        ('{"text": "a", "n": ' + "1" * 5000 + "}", "invalid JSON", "digits"),
        ('{"txt": "a", "id": 3}', "no text field", "no 'text' in 'txt', 'id'"),
        ("{}", "no text field", "an empty object"),
        ('{"text": 3}', "no text field", "'text' is no text but int"),
        ('["text"]', "no text field", "no object but list"),
        ("3", "no text field", "no object but int"),
        ('{"text": null}', "empty", "null"),
        ('{"text": ""}', "empty", "no character"),
        ('{"text": " \\n\\u3000"}', "empty", "nothing but white space"),
        ('{"text": "a\\u0000b"}', "NUL bytes", "character 1"),
        ('{"text": "a\0b"}', "NUL bytes", "character 11 of the line"),
        ("\0" * 4096, "NUL bytes", "character 0 of the line"),
    ],
)
def test_a_line_that_holds_no_document_is_a_problem_with_its_number_and_the_rest_is_read(
    tmp_path, line, kind, what
):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n{{"text": "good"}}\n')
    documents, problems, _ = read(tmp_path / "a.jsonl")
    assert documents == ["fine", "good"]
    assert [(p.kind, p.where) for p in problems] == [(kind, "line 2")]
    assert what in problems[0].what


def test_a_long_list_of_other_keys_is_not_shown_whole(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"k" * 1000 + str(i): i for i in range(1000)}))
    assert len(read(tmp_path / "a.jsonl")[1][0].what) < 600


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_line_that_is_too_long_is_a_problem_wherever_it_stands(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(documents_module, "MAX_LINE_BYTES", 3_000_000)
    fits = "y" * (3_000_000 - len('{"text": ""}'))
    documents, problems, _ = read(
        write_lines(tmp_path / f"a{ending}", "x" * 3_000_000, "a", fits, "z" * 9_000_000, "b", fits + "y")
    )
    assert documents == ["a", fits, "b"]
    assert [(p.kind, p.where) for p in problems] == [("line too long", f"line {n}") for n in (1, 4, 6)]


MEMORY_OF_READING = """
import resource, sys
from topklm.data.sources import FileReader
from topklm.data.sources import find
file, = find([sys.argv[1]])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print([getattr(item, "kind", None) or len(item.text) for item in FileReader(file, "text")])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
def test_a_line_of_200_mb_is_never_held_in_memory(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    opener = {".jsonl.gz": gzip.open, ".jsonl.zst": zstandard.open}[ending]
    with opener(path, "wb") as file:
        file.write(b'{"text": "before"}\n{"text": "')
        for _ in range(200):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"text": "after"}\n')
    assert path.stat().st_size < 2_000_000
    output = subprocess.run(
        [sys.executable, "-c", MEMORY_OF_READING, path], capture_output=True, text=True, check=True
    )
    items, mebibytes = output.stdout.splitlines()
    assert items == "[6, 'line too long', 5]"
    assert int(mebibytes) < 150  # 64 MiB, and as much again while it is put together


# Encodings.


def test_invalid_utf8_is_replaced_and_each_sequence_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\xff b\xe2\x82 \xef\xbf\xbd c\xc0")
    # The middle one was there before.
    assert read(tmp_path / "a.txt")[2] == [Document("a\ufffd b\ufffd \ufffd c\ufffd", "byte 0", 3)]


def test_invalid_utf8_in_a_json_line_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "a\xff"}\n')
    assert read(tmp_path / "a.jsonl")[2] == [Document("ok", "line 1", 0), Document("a\ufffd", "line 2", 1)]


def test_an_unpaired_surrogate_escape_is_replaced_and_a_pair_is_a_character(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud83d \ud83d\ude00"}')
    assert read(tmp_path / "a.jsonl")[2] == [Document("a\ufffd \U0001f600", "line 1", 1)]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "two"}\n\xef\xbb\xbf{"text": "three"}\n')
    assert read(tmp_path / "a.txt")[0] == ["one"]
    assert read(tmp_path / "b.jsonl")[0] == ["two", "three"]  # files that were put together keep theirs


def test_nul_bytes_in_a_text_file_are_a_problem(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine " * 4000 + b"\n\n" + b"a\0b")
    documents, problems, _ = read(tmp_path / "a.txt")
    assert documents == ["fine " * 4000 + "\n\n"]
    assert problems == [Problem("NUL bytes", "byte 20002", "U+0000 at character 1")]


# Damage.


def words(n):
    rng = random.Random(0)
    return ["".join(rng.choices("abcdefgh ", k=rng.randrange(20, 60))) + "." for _ in range(n)]


def with_names(texts):
    return [f"{i} {text}" for i, text in enumerate(texts)]


def many_frames(raw):
    """Frames of every kind: with and without checksum and size, empty, skippable."""
    third = len(raw) // 3
    plain = zstandard.ZstdCompressor(write_checksum=False, write_content_size=False)
    checked = zstandard.ZstdCompressor(write_checksum=True)
    skippable = b"\x53\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
    return (
        plain.compress(raw[:third])
        + skippable
        + checked.compress(b"")
        + checked.compress(raw[third : 2 * third])
        + zstandard.ZstdCompressor(level=19).compress(raw[2 * third :])
    )


def two_members(raw):
    return gzip.compress(raw[:1000]) + gzip.compress(b"") + gzip.compress(raw[1000:])


@pytest.mark.parametrize(("ending", "compress"), [(".jsonl.gz", two_members), (".jsonl.zst", many_frames)])
def test_all_members_of_a_compressed_file_are_read(tmp_path, ending, compress):
    texts = words(500)
    (tmp_path / f"a{ending}").write_bytes(compress(json_lines(texts)))
    assert read(tmp_path / f"a{ending}")[:2] == (texts, [])


def test_zeros_after_a_gzip_file_fill_it_up(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(["one"])) + b"\0" * 3_000_000)
    assert read(tmp_path / "a.jsonl.gz")[:2] == (["one"], [])


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
def test_other_bytes_after_a_compressed_file_are_damage(tmp_path, ending):
    path = write_lines(tmp_path / f"a{ending}", "one", "two")
    path.write_bytes(path.read_bytes() + b"garbage" * 300_000)
    documents, problems, _ = read(path)
    assert documents == ["one", "two"]
    assert [(p.kind, p.where) for p in problems] == [("damaged file", "line 3")]
    assert "after the compressed data" in problems[0].what


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("content", [b"", b"x", b"no such format, but rather long"])
def test_a_file_of_another_format_is_damaged(tmp_path, ending, content):
    (tmp_path / f"a{ending}").write_bytes(content)
    documents, problems, _ = read(tmp_path / f"a{ending}")
    assert documents == []
    assert [p.kind for p in problems] == ["damaged file"]


@pytest.mark.parametrize(("ending", "compress"), [(".jsonl.gz", two_members), (".jsonl.zst", many_frames)])
def test_a_truncated_file_keeps_what_came_before(tmp_path, ending, compress):
    texts = with_names(words(300))
    whole = compress(json_lines(texts))
    path = tmp_path / f"a{ending}"
    seen = set()
    for length in [*range(40), *range(40, len(whole) - 40, 41), *range(len(whole) - 40, len(whole))]:
        path.write_bytes(whole[:length])
        documents, problems, items = read(path)
        assert documents == texts[: len(documents)]
        is_between_members = any(
            compress is f and length in borders(f, texts) for f in (two_members, many_frames)
        )
        if not is_between_members:
            assert items[-1] is problems[-1]
            assert [p.kind for p in problems] == ["damaged file"]
            assert problems[0].where == f"line {len(documents) + 1}"
        seen.add(len(documents))
    assert len(seen) > (100 if ending == ".jsonl.gz" else 2)  # a block of zstd comes whole or not at all


def borders(compress, texts):
    """Lengths at which a truncated file cannot be told from a whole one, as it ends with a member."""
    raw = json_lines(texts)
    if compress is two_members:
        first = len(gzip.compress(raw[:1000]))
        return {first, first + len(gzip.compress(b""))}
    whole, magics = compress(raw), (b"\x28\xb5\x2f\xfd", b"\x53\x2a\x4d\x18")
    return {i for i in range(1, len(whole)) if whole[i : i + 4] in magics}


def test_everything_before_a_broken_byte_of_a_gzip_file_is_read(tmp_path):
    texts = with_names(words(20_000))
    compressor = zlib.compressobj(9, wbits=31)
    parts = [compressor.compress(json_lines([t])) + compressor.flush(zlib.Z_SYNC_FLUSH) for t in texts[:400]]
    good = b"".join(parts)
    path = tmp_path / "a.jsonl.gz"
    # Begins a block of a type that does not exist.
    path.write_bytes(good + b"\7" + compressor.compress(json_lines(texts[400:])) + compressor.flush())
    documents, problems, _ = read(path)
    assert documents == texts[:400]
    assert [(p.kind, p.where) for p in problems] == [("damaged file", "line 401")]


def test_everything_before_a_broken_block_of_a_zstd_file_is_read(tmp_path):
    texts = with_names(words(3000))
    compressor = zstandard.ZstdCompressor().compressobj()
    good = b""
    for text in texts:
        good += compressor.compress(json_lines([text])) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    (tmp_path / "a.jsonl.zst").write_bytes(good + b"\7\0\0" + b"rest")  # block type 3 does not exist
    documents, problems, _ = read(tmp_path / "a.jsonl.zst")
    assert documents == texts
    assert [(p.kind, p.where) for p in problems] == [("damaged file", "line 3001")]


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_flipped_bits_are_problems_and_never_crash(tmp_path, ending):
    rng = random.Random(1)
    path = tmp_path / f"a{ending}"
    texts = with_names(words(400))
    if ending == ".parquet":
        write_table(path, texts, row_group_size=100, data_page_size=2000, write_page_checksum=True)
    else:
        path.write_bytes({".jsonl.gz": gzip.compress, ".jsonl.zst": many_frames}[ending](json_lines(texts)))
    whole = path.read_bytes()
    n_reported = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            documents, problems, _ = read(path)
        except UserError as e:
            assert "column" in str(e)  # the name or type of one was hit
            continue
        n_reported += bool(problems)
        assert problems or documents == texts or ending != ".jsonl.gz"
    assert n_reported > 75


# Tables.


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()],
)
def test_a_column_of_text_may_have_any_type_that_holds_text(tmp_path, kind):
    texts = ["one", None, "zwei é", "", "one"]
    if kind == pa.binary():
        texts = [text if text is None else text.encode() for text in texts]
    column = pa.array(texts, pa.string() if pa.types.is_dictionary(kind) else kind)
    write_table(
        tmp_path / "a.parquet", column.dictionary_encode() if pa.types.is_dictionary(kind) else column
    )
    assert read(tmp_path / "a.parquet")[2] == [
        Document("one", "row 1", 0),
        Problem("empty", "row 2", "null"),
        Document("zwei é", "row 3", 0),
        Problem("empty", "row 4", "no character"),
        Document("one", "row 5", 0),
    ]


def test_rows_with_broken_text_are_mended_or_problems(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "MAX_LINE_BYTES", 100)
    write_table(tmp_path / "a.parquet", pa.array([b"a\xff", b"b\0", b"c" * 101, b"d"], pa.binary()))
    items = read(tmp_path / "a.parquet")[2]
    assert items[0] == Document("a\ufffd", "row 1", 1)
    assert [(p.kind, p.where) for p in items[1:3]] == [("NUL bytes", "row 2"), ("line too long", "row 3")]
    assert items[3] == Document("d", "row 4", 0)


def test_a_table_without_the_column_is_refused_with_its_columns(tmp_path):
    write_table(tmp_path / "a.parquet", ["one"])
    with pytest.raises(
        UserError, match=r"text_field = 'body': .*a\.parquet has no such column.*'id', 'text'"
    ):
        read(tmp_path / "a.parquet", "body")


def test_a_column_that_holds_no_text_is_refused(tmp_path):
    write_table(tmp_path / "a.parquet", ["one"])
    with pytest.raises(UserError, match=r"text_field = 'id': .* holds int64, not text; there are also: text"):
        read(tmp_path / "a.parquet", "id")


def test_a_damaged_page_of_a_table_keeps_the_rows_before_it(tmp_path):
    texts = with_names(words(1000))
    path = write_table(
        tmp_path / "a.parquet",
        texts,
        row_group_size=500,
        data_page_size=1000,
        write_batch_size=10,
        compression="NONE",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    content = path.read_bytes()
    for number in (0, 77, 300, 777):
        path.write_bytes(content.replace(texts[number].encode(), texts[number].upper().encode(), 1))
        documents, problems, _ = read(path)
        assert documents == texts[: len(documents)]
        assert [(p.kind, p.where) for p in problems] == [("damaged file", f"row {len(documents) + 1}")]
        assert number - 40 < len(documents) <= number  # all but the damaged page


def test_a_table_that_is_cut_short_is_damaged(tmp_path):
    path = write_table(tmp_path / "a.parquet", words(1000))
    path.write_bytes(path.read_bytes()[:-1])
    assert [p.kind for p in read(path)[1]] == ["damaged file"]


def test_reading_a_large_table_takes_little_memory(tmp_path):
    rng = random.Random(0)
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("text", pa.string())])) as writer:
        block = [rng.randbytes(50_000).hex() for _ in range(20)]
        writer.write_table(pa.table({"text": block * 60}), row_group_size=10_000)  # one group of 120 MB
    program = MEMORY_OF_READING.replace("import resource", "import pyarrow.parquet, resource")
    output = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "a.parquet"], capture_output=True, text=True, check=True
    )
    assert int(output.stdout.splitlines()[1]) < 90


COLUMNS = {
    "list": pa.array([["one"]]),
    "struct": pa.array([{"body": "one"}]),
    "map": pa.array([[("a", "one")]], pa.map_(pa.string(), pa.string())),
    "list of binary": pa.array([[b"one"]], pa.list_(pa.binary())),
    "large list": pa.array([["one"]], pa.large_list(pa.large_string())),
    "fixed-size list": pa.array([["one"]], pa.list_(pa.string(), 1)),
    "struct of lists": pa.array([{"string": ["one"]}]),
    "number": pa.array([1.5]),
    "dictionary of numbers": pa.array([1]).dictionary_encode(),
}


@pytest.mark.parametrize("column", COLUMNS)
def test_a_column_of_another_kind_than_text_is_refused_and_no_damage(tmp_path, column):
    pq.write_table(pa.table({"id": ["x"], "text": COLUMNS[column]}), tmp_path / "a.parquet")
    inside = r"text\.body, id" if column == "struct" else ".*id"
    with pytest.raises(UserError, match=rf"text_field = 'text': .* not text; there are also: {inside}"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "kind", ["string", "large_string", "string_view", "binary", "large_binary", "binary(3)", "dictionary"]
)
def test_a_column_of_any_kind_of_text_is_read(tmp_path, kind):
    text = pa.array(["one", "two"])
    types = {"string_view": pa.string_view(), "binary(3)": pa.binary(3)}
    if kind == "dictionary":
        column = text.dictionary_encode()
    else:
        column = text.cast(pa.binary()).cast(types[kind]) if kind in types else text.cast(kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0] == ["one", "two"]


def test_a_column_without_any_value_is_rows_without_text(tmp_path):
    pq.write_table(pa.table({"text": pa.array([None, None], pa.null())}), tmp_path / "a.parquet")
    assert [(p.kind, p.where) for p in read(tmp_path / "a.parquet")[1]] == [
        ("empty", f"row {n}") for n in (1, 2)
    ]


@pytest.mark.parametrize("names", [["text", "text"], ["text", "id", "text", "text"]])
def test_several_columns_of_the_name_are_refused(tmp_path, names):
    table = pa.Table.from_arrays([pa.array(["one"])] * len(names), names=names)
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"has {names.count('text')} columns of that name"):
        read(tmp_path / "a.parquet")
    if "id" in names:  # others may be there twice
        assert read(tmp_path / "a.parquet", "id")[0] == ["one"]


# Texts inside of other objects.

NESTED = [
    {"doc": {"text": "one"}, "text": "other"},
    {"doc": {"text": None}},
    {"doc": None},
    {"doc": {"text": "two", "n": {"text": "three"}}},
]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_a_text_inside_of_another_object_is_named_with_dots(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(NESTED), path)
    else:
        path.write_text("\n".join(map(json.dumps, NESTED)))
    assert read(path, "doc.text")[0] == ["one", "two"]
    assert len(read(path, "doc.text")[1]) == 2
    assert read(path, "doc.n.text")[0] == ["three"]
    assert read(path, "text")[0] == ["other"]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_a_key_that_holds_the_dots_itself_comes_first(tmp_path, ending):
    rows = [{"doc.text": "literal", "doc": {"text": "inside", "a.b": "half"}, "doc.x": {"y": "other half"}}]
    path = tmp_path / f"a{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows[0]))
    for field, text in {"doc.text": "literal", "doc.a.b": "half", "doc.x.y": "other half"}.items():
        assert read(path, field)[0] == [text]


def test_a_name_that_leads_nowhere_is_refused_with_the_columns_there_are(tmp_path):
    pq.write_table(pa.Table.from_pylist(NESTED), tmp_path / "a.parquet")
    for field in ("doc.body", "doc.n.text.more", ".text", "doc.", "."):
        with pytest.raises(UserError, match=r"has no such column; .* of 'doc', 'text'"):
            read(tmp_path / "a.parquet", field)
    with pytest.raises(UserError, match=r"holds struct.*, not text; there are also: doc\.text, doc\.n, text"):
        read(tmp_path / "a.parquet", "doc")


# JSON files.


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(
    "layout",
    [
        lambda rows: "\n".join(map(json.dumps, rows)),
        json.dumps,
        lambda rows: json.dumps(rows, indent=2),
        lambda rows: "\ufeff \n" + json.dumps(rows),
        lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows),
    ],
    ids=["lines", "array", "indented array", "byte order mark", "indented objects"],
)
def test_a_json_file_holds_lines_or_an_array_or_objects_over_several_lines(tmp_path, layout, compression):
    rows = [{"text": text, "n": [i, {"a": "]}"}]} for i, text in enumerate(words(3000))]
    path = tmp_path / f"a.json{compression}"
    path.write_bytes(
        COMPRESSIONS[compression](layout([*rows, {"text": 5}, {"text": "half \ud83d"}]).encode())
    )
    documents, problems, items = read(path)
    assert documents == [*words(3000), "half \ufffd"]
    assert [p.kind for p in problems] == ["no text field"]
    assert items[-1].replaced == 1


def test_an_array_may_be_larger_than_what_is_read_at_once(tmp_path, monkeypatch):
    texts = [char * 700_000 for char in "abcdef"]
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
    assert read(tmp_path / "a.json")[0] == texts
    monkeypatch.setattr(documents_module, "MAX_LINE_BYTES", 600_000)
    assert [(p.kind, p.where) for p in read(tmp_path / "a.json")[2]] == [("line too long", "item 1")]


@pytest.mark.parametrize(
    ("content", "texts", "where"),
    [
        (b'[{"text": "a"}, {"text": "b"}', ["a", "b"], "item 3"),
        (b'[{"text": "a"}, {"text": "b', ["a"], "item 2"),
        (b'[{"text": "a"}, no json]', ["a"], "item 2"),
        (b'[{"text": "a"}] {"text": "b"}', ["a"], "item 2"),
        (b"[" * 100_000, [], "item 1"),
        (b'{\n"text": "a"\n}\n{\n"te', ["a"], "item 2"),
    ],
)
def test_a_json_array_that_breaks_keeps_what_came_before(tmp_path, content, texts, where):
    (tmp_path / "a.json").write_bytes(content)
    documents, problems, _ = read(tmp_path / "a.json")
    assert documents == texts
    assert [(p.kind, p.where) for p in problems] == [("damaged file", where)]


def test_bytes_that_are_no_utf8_are_replaced_in_an_array_too(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"text": "a\xff\xfeb"}]')
    assert read(tmp_path / "a.json")[2] == [Document("a\ufffd\ufffdb", "item 1", 2)]


# The quickstart corpus.


def test_the_quickstart_file_is_read_in_its_order(tmp_path):
    path = tmp_path / "summaries_en-us.json"
    path.write_text(json.dumps({"B": {"extract": "bee"}, "A": {"extract": "ay"}, "C": {}, "D": 4}))
    reader = FileReader(SourceFile(str(path), QUICKSTART, path.stat().st_size, ""), "text")
    items = list(reader)
    assert items[:2] == [Document("bee", "row 1", 0), Document("ay", "row 2", 0)]
    assert [(p.kind, p.where) for p in items[2:]] == [("no text field", "row 3"), ("no text field", "row 4")]
    assert reader.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_a_damaged_quickstart_file_is_a_problem(tmp_path, content):
    path = tmp_path / "summaries_en-us.json"
    path.write_text(content)
    assert [p.kind for p in FileReader(SourceFile(str(path), QUICKSTART, 1, ""), "text")] == ["damaged file"]


# What stops everything.


def test_a_file_that_changes_or_vanishes_while_it_is_read_stops_the_reading(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", *words(10))
    for change in (lambda: os.utime(path, ns=(1, 1)), path.unlink):
        items = iter(FileReader(*find([str(path)]), "text"))
        next(items)
        change()
        with pytest.raises(UserError, match=r"a\.jsonl (has changed|cannot be read: No such file)"):
            list(items)


def test_a_file_that_changed_or_vanished_before_it_is_read_stops_the_reading(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", "one")
    (file,) = find([str(path)])
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match=r"a\.jsonl has changed since the command began; start it again"):
        list(FileReader(file, "text"))
    path.unlink()
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read: No such file or directory"):
        list(FileReader(file, "text"))


@pytest.mark.parametrize(
    ("ending", "module", "extra"),
    [(".jsonl.zst", "zstandard", "zstd"), (".parquet", "pyarrow.parquet", "parquet")],
)
def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch, ending, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / f"a{ending}").write_bytes(b"x")
    with pytest.raises(UserError, match=rf"{module}.*pip install 'topklm\[{extra}\]'"):
        read(tmp_path / f"a{ending}")


def test_a_reader_tells_how_far_it_is_and_can_be_left_early(tmp_path):
    path = write_table(tmp_path / "a.parquet", words(3000), row_group_size=500)
    reader = FileReader(*find([str(path)]), "text")
    seen = []
    for _ in reader:
        seen.append(reader.bytes_read)
        if len(seen) == 1500:
            break
    assert seen == sorted(seen)
    assert abs(seen[-1] - path.stat().st_size / 2) < 100
    assert len(list(reader)) == 3000  # from the start again
    assert reader.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
