import dataclasses
import gzip
import hashlib
import json

import fsspec
import numpy as np
import pytest

from topklm.data.building import encode
from topklm.data.building.build import build
from topklm.data.building.chunks import ShardTask, Storage
from topklm.data.building.encode import DatasetSettings, DatasetSources, Selection
from topklm.data.building.engines import LocalEngine
from topklm.data.dataset import load_dataset, read_description
from topklm.data.records import RECORD_TOKENS
from topklm.data.sources import find
from topklm.data.tokenizer import train_bpe
from topklm.errors import UserError
from topklm.progress import Progress

TEXTS = [f"Ship {n} sailed on day {n * n} to the port of {n % 7} hills.\n" * (1 + n % 5) for n in range(400)]
SELECTION = Selection(heldout_fraction=0.2)
SETTINGS = DatasetSettings(SELECTION, "train:300")


def is_heldout(text, fraction=0.2):
    first = hashlib.sha256(text.encode()).digest()[:8]
    return int.from_bytes(first, "big") / 2**64 < fraction


def write_lines(path, texts):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps({"text": text}) for text in texts))
    return path


@pytest.fixture
def sources(tmp_path):
    """Five files of 80 documents."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(5):
        write_lines(folder / f"{i}.jsonl{'.gz' if i % 2 else ''}", TEXTS[80 * i : 80 * i + 80])
    return DatasetSources(find([str(folder)]))


def make(sources, out, settings=SETTINGS, cores=1):
    lines = []
    with LocalEngine(cores) as engine:
        build(sources, settings, Storage(out), engine, Progress(lines.append))
    return load_dataset(out), lines


def texts_of(dataset, split):
    tokens = dataset.tokens(split).read(0, split.tokens)
    if not tokens.size:
        return []
    starts = np.flatnonzero(tokens == dataset.tokenizer.separator_id)
    assert starts[0] == 0
    return [dataset.tokenizer.decode(part) for part in np.split(tokens, starts[1:])]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_split_holds_its_documents_in_order_and_none_is_lost(sources, tmp_path):
    dataset, _ = make(sources, tmp_path / "out")
    assert texts_of(dataset, dataset.train) == [t for t in TEXTS if not is_heldout(t)]
    assert texts_of(dataset, dataset.heldout) == [t for t in TEXTS if is_heldout(t)]


def test_the_counts_are_those_of_the_text(sources, tmp_path):
    dataset, _ = make(sources, tmp_path / "out")
    for split in (dataset.train, dataset.heldout):
        texts = texts_of(dataset, split)
        assert split.documents == len(texts)
        assert split.utf8_bytes == sum(len(text.encode()) for text in texts)
        assert split.text_tokens == sum(len(dataset.tokenizer.encode(text)) for text in texts)
    text = read_description(dataset.path)["text"]
    assert text["documents"] == len(TEXTS)
    assert text["utf8_bytes"] == dataset.train.utf8_bytes + dataset.heldout.utf8_bytes


@pytest.mark.parametrize("cores", [2, 5, 9])
def test_the_number_of_workers_changes_no_byte(sources, tmp_path, cores, monkeypatch):
    settings = dataclasses.replace(SETTINGS, shard_tokens=3 * RECORD_TOKENS)
    one, _ = make(sources, tmp_path / "one", settings)
    many, _ = make(sources, tmp_path / "many", settings, cores)
    assert contents(one.path) == contents(many.path)
    assert len(one.train.shards) > 2


def test_small_chunks_and_batches_change_no_shard(sources, tmp_path, monkeypatch):
    settings = dataclasses.replace(SETTINGS, shard_tokens=RECORD_TOKENS)
    whole, _ = make(sources, tmp_path / "whole", settings)
    monkeypatch.setattr(encode, "CHUNK_DOCUMENTS", 7)
    monkeypatch.setattr(encode, "_BATCH_CHARS", 500)
    cut, _ = make(sources, tmp_path / "cut", settings)
    assert contents(whole.path) == contents(cut.path)


def test_shards_are_of_near_equal_size(sources, tmp_path):
    dataset, _ = make(
        sources, tmp_path / "out", dataclasses.replace(SETTINGS, shard_tokens=2 * RECORD_TOKENS)
    )
    records = [-(-shard.tokens // RECORD_TOKENS) for shard in dataset.train.shards]
    assert len(records) > 2
    assert max(records) - min(records) <= 1
    assert sum(shard.tokens for shard in dataset.train.shards) == dataset.train.tokens


def test_a_finished_dataset_is_left_alone(sources, tmp_path):
    dataset, _ = make(sources, tmp_path / "out")
    written = {file: file.stat().st_mtime_ns for file in dataset.path.iterdir()}
    again, lines = make(sources, tmp_path / "out")
    assert len(lines) == 1
    assert "is prepared already" in lines[0]
    assert {file: file.stat().st_mtime_ns for file in dataset.path.iterdir()} == written
    assert again.fingerprint == dataset.fingerprint


def test_touched_files_of_the_same_content_are_the_same_sources(sources, tmp_path):
    make(sources, tmp_path / "out")
    for path in (tmp_path / "text").iterdir():
        path.touch()
    _, lines = make(DatasetSources(find([str(tmp_path / "text")])), tmp_path / "out")
    assert "is prepared already" in lines[0]


def test_a_folder_with_another_dataset_is_refused_naming_the_difference(sources, tmp_path):
    make(sources, tmp_path / "out")
    other = dataclasses.replace(SETTINGS, selection=dataclasses.replace(SELECTION, min_chars=3))
    with pytest.raises(UserError, match=r"another dataset: min_chars was 0, now 3"):
        make(sources, tmp_path / "out", other)
    write_lines(tmp_path / "text" / "0.jsonl", ["something else"])
    with pytest.raises(UserError, match="its sources are others or have changed"):
        make(DatasetSources(find([str(tmp_path / "text")])), tmp_path / "out")


def test_a_folder_with_other_things_is_refused(sources, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(UserError, match="is no prepared dataset"):
        make(sources, tmp_path / "out")
    (tmp_path / "out" / "thesis.tex").unlink()
    make(sources, tmp_path / "out")  # an empty folder is taken


def test_nothing_but_the_dataset_is_left(sources, tmp_path):
    make(sources, tmp_path / "datasets" / "out")
    assert [path.name for path in (tmp_path / "datasets").iterdir()] == ["out"]


def test_copies_are_dropped_and_the_held_out_one_stays(tmp_path):
    train = write_lines(tmp_path / "train.jsonl", ["a b", "c d", "a b", "e f", "both", "c d "])
    heldout = write_lines(tmp_path / "heldout.jsonl", ["x y", "both", "x y"])
    sources = DatasetSources(find([str(train)]), find([str(heldout)]))
    settings = DatasetSettings(Selection(heldout_fraction=0), "train:300")
    dataset, lines = make(sources, tmp_path / "out", settings)
    assert texts_of(dataset, dataset.train) == ["a b", "c d", "e f", "c d "]
    assert texts_of(dataset, dataset.heldout) == ["x y", "both"]
    assert any("dropped 3 documents that are copies" in line for line in lines)
    assert read_description(dataset.path)["text"]["duplicates"] == 3
    kept, _ = make(sources, tmp_path / "kept", dataclasses.replace(settings, deduplicate=False))
    assert texts_of(kept, kept.train) == ["a b", "c d", "a b", "e f", "both", "c d "]
    assert texts_of(kept, kept.heldout) == ["x y", "both", "x y"]


def test_copies_are_found_across_files_and_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "CHUNK_DOCUMENTS", 3)
    rng = np.random.default_rng(0)
    files = [[f"text {n}" for n in rng.integers(0, 60, 50)] for _ in range(4)]
    for i, texts in enumerate(files):
        write_lines(tmp_path / f"{i}.jsonl", texts)
    dataset, _ = make(DatasetSources(find([f"{tmp_path}/*.jsonl"])), tmp_path / "out")
    once = list(dict.fromkeys(text for texts in files for text in texts))
    assert texts_of(dataset, dataset.train) == [t for t in once if not is_heldout(t)]
    assert texts_of(dataset, dataset.heldout) == [t for t in once if is_heldout(t)]


def test_documents_that_are_too_short_or_too_long_are_left_out_and_counted(sources, tmp_path):
    selection = dataclasses.replace(SELECTION, min_chars=60, max_chars=150)
    dataset, lines = make(sources, tmp_path / "out", dataclasses.replace(SETTINGS, selection=selection))
    wanted = [t for t in TEXTS if 60 <= len(t) <= 150]
    assert texts_of(dataset, dataset.train) == [t for t in wanted if not is_heldout(t)]
    text = read_description(dataset.path)["text"]
    assert text["too_short"] == sum(len(t) < 60 for t in TEXTS) > 0
    assert text["too_long"] == sum(len(t) > 150 for t in TEXTS) > 0
    assert any(f"left out {text['too_short']} documents shorter" in line for line in lines)


def test_a_tokenizer_from_a_file_is_used_as_it_is(sources, tmp_path):
    tokenizer = train_bpe(TEXTS[:100], 290)
    tokenizer.save(tmp_path / "tokenizer.json")
    settings = dataclasses.replace(SETTINGS, tokenizer=str(tmp_path / "tokenizer.json"))
    dataset, _ = make(sources, tmp_path / "out", settings)
    assert dataset.tokenizer.sha256 == tokenizer.sha256
    assert read_description(dataset.path)["settings"]["tokenizer"] == tokenizer.sha256
    text = next(t for t in TEXTS if not is_heldout(t))
    first = dataset.tokens(dataset.train).read(1, 1 + len(tokenizer.encode(text)))
    np.testing.assert_array_equal(first, tokenizer.encode(text))


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path):
    words = [f"w{n:05d}" for n in range(66_000)]
    vocabulary = {"[UNK]": 0, "[SEP]": 1, **{word: 2 + i for i, word in enumerate(words)}}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    special = [{"id": 1, "content": "[SEP]", "special": True, "single_word": False, "lstrip": False}]
    special[0] |= {"rstrip": False, "normalized": False}
    content = {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": {"type": "Whitespace"},
        "model": model,
    }
    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**nothing, **content}))
    texts = [" ".join(words[i : i + 50]) for i in range(0, 66_000, 50)]
    sources = DatasetSources(find([str(write_lines(tmp_path / "words.jsonl", texts))]))
    dataset, _ = make(sources, tmp_path / "out", DatasetSettings(SELECTION, str(tmp_path / "tokenizer.json")))
    tokens = np.concatenate([dataset.tokens(s).read(0, s.tokens) for s in (dataset.train, dataset.heldout)])
    assert sorted(tokens[tokens > 1]) == list(range(2, 66_002))


def test_the_tokenizer_learns_nothing_from_held_out_text(sources, tmp_path):
    heldout = next(f"qqxxzz {n}" for n in range(1000) if is_heldout(f"qqxxzz {n}"))
    without, _ = make(sources, tmp_path / "without")
    write_lines(tmp_path / "text" / "more.jsonl", [heldout] * 50)
    with_it, _ = make(DatasetSources(find([str(tmp_path / "text")])), tmp_path / "with")
    assert with_it.heldout.documents == without.heldout.documents + 1
    assert with_it.tokenizer.sha256 == without.tokenizer.sha256


def test_what_cannot_be_read_is_skipped_counted_and_named(tmp_path):
    lines = [
        b'{"text": "good one"}',
        b"no json",
        b'{"body": "x"}',
        b'{"text": " "}',
        b'{"text": "a\\u0000b"}',
    ]
    lines += [b'{"text": "bad \xff byte"}', b'{"text": "good two"}']
    (tmp_path / "mixed.jsonl").write_bytes(b"\n".join(lines))
    settings = DatasetSettings(Selection(heldout_fraction=0), "train:300")
    sources = DatasetSources(find([str(tmp_path / "mixed.jsonl")]))
    dataset, said = make(sources, tmp_path / "out", settings)
    assert texts_of(dataset, dataset.train) == ["good one", "bad � byte", "good two"]
    content = read_description(dataset.path)
    counts = {"empty": 1, "invalid JSON": 1, "no text field": 1, "NUL bytes": 1}
    assert content["text"]["problems"] == counts
    assert content["text"]["replaced_sequences"] == 1
    for number, kind in ((2, "invalid JSON"), (3, "no text field"), (4, "empty"), (5, "NUL bytes")):
        assert any(f"mixed.jsonl, line {number}: {kind}" in e for e in content["problem_examples"])
        assert any(f"1 x {kind}; the first: " in line for line in said)
    assert any("line 6: invalid UTF-8" in e for e in content["problem_examples"])


def test_strict_stops_at_the_first_problem_also_one_that_was_skipped_before(sources, tmp_path):
    with (tmp_path / "text" / "2.jsonl").open("a") as file:
        file.write("\nno json")
    sources = DatasetSources(find([str(tmp_path / "text")]))
    strict = dataclasses.replace(SETTINGS, selection=dataclasses.replace(SELECTION, strict=True))
    with pytest.raises(UserError, match=r"strict: .*2\.jsonl, line 81: invalid JSON"):
        make(sources, tmp_path / "out", strict)
    assert not (tmp_path / "out").exists()
    make(sources, tmp_path / "out")
    assert (tmp_path / "out").exists()


def test_what_leaves_out_all_documents_is_named_with_counts_by_reason(sources, tmp_path):
    with (tmp_path / "text" / "0.jsonl").open("a") as file:
        file.write('\n{"text": ""}\nno json\n{"text": "' + "x" * 2000 + '"}')
    sources = DatasetSources(find([str(tmp_path / "text")]))
    selection = Selection(min_chars=1000, max_chars=1500)
    counts = (
        r"too short \(min_chars = 1000\): 400, too long \(max_chars = 1500\): 1, empty: 1, invalid JSON: 1"
    )
    with pytest.raises(UserError, match=rf"no text in .*, left out {counts}: give longer documents"):
        make(sources, tmp_path / "out", DatasetSettings(selection, "train:300"))


@pytest.mark.parametrize(("sizes", "total"), [((0, 0), 0), ((5, 0), 0), ((5, 7), 12)])
def test_how_far_the_encoding_is_is_told_only_where_all_sizes_are_known(tmp_path, sizes, total):
    memory = fsspec.filesystem("memory")
    names = [f"memory://unmeasured/{n}.jsonl" for n in range(2)]
    for number, name in enumerate(names):
        memory.pipe(name, "\n".join(json.dumps({"text": t}) for t in TEXTS[number::2]).encode())
    files = [dataclasses.replace(f, size=size) for f, size in zip(find(names), sizes, strict=True)]
    totals = {}

    class Noted(Progress):
        def phase(self, what, total):
            totals[what] = total
            return super().phase(what, total)

    with LocalEngine(1) as engine:
        build(
            DatasetSources(tuple(files)),
            SETTINGS,
            Storage(tmp_path / "out"),
            engine,
            Noted(lambda _: 0),
        )
    memory.rm("/unmeasured", recursive=True)
    assert totals["encoding"] == total


def test_it_says_when_it_begins_to_train_the_tokenizer(sources, tmp_path):
    _, lines = make(sources, tmp_path / "out")
    said = ["to train the tokenizer", "training a tokenizer of 300 tokens", "300 tokens in the vocabulary"]
    assert [part for line in lines for part in said if part in line] == said


def test_text_without_a_document_is_refused_with_the_first_problem(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"body": "x"}\n{"body": "y"}')
    with pytest.raises(
        UserError, match=r"no text in .*bad\.jsonl.*the first problem: .*line 1: no text field"
    ):
        make(DatasetSources(find([str(tmp_path / "bad.jsonl")])), tmp_path / "out")


def in_order_of_their_hashes(texts):
    return sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())


@pytest.mark.parametrize(("n", "fraction"), [(3, 0.4), (3, 0.01), (16, 0.05), (400, 1e-9)])
def test_where_the_share_holds_out_none_the_document_with_the_lowest_hash_is(tmp_path, n, fraction):
    texts = [t for t in TEXTS * 2 if not is_heldout(t, fraction)][:n]
    for i, part in enumerate((texts[: n // 2], texts[n // 2 :], texts[:2])):
        write_lines(tmp_path / f"{i}.jsonl", part)
    settings = DatasetSettings(Selection(heldout_fraction=fraction), "train:300")
    given = DatasetSources(find([f"{tmp_path}/*.jsonl"]))
    dataset, lines = make(given, tmp_path / "out", settings)
    first = in_order_of_their_hashes(texts)[0]
    assert texts_of(dataset, dataset.heldout) == [first]
    assert texts_of(dataset, dataset.train) == [text for text in dict.fromkeys(texts) if text != first]
    assert any(f"heldout_fraction = {fraction}" in line and "lowest hashes" in line for line in lines)
    if n == 16:
        many, _ = make(given, tmp_path / "many", settings, cores=3)
        assert contents(many.path) == contents(dataset.path)


@pytest.mark.parametrize(("n", "fraction"), [(3, 0.9), (40, 0.99)])
def test_where_the_share_leaves_none_to_train_on_the_two_with_the_highest_hashes_are(tmp_path, n, fraction):
    texts = [t for t in TEXTS if is_heldout(t, fraction)][:n]
    given = DatasetSources(find([str(write_lines(tmp_path / "few.jsonl", texts))]))
    dataset, _ = make(
        given, tmp_path / "out", DatasetSettings(Selection(heldout_fraction=fraction), "train:300")
    )
    assert set(texts_of(dataset, dataset.train)) == set(in_order_of_their_hashes(texts)[-2:])
    assert dataset.heldout.documents == n - 2


def test_the_tokenizer_learns_nothing_from_a_document_that_few_others_make_held_out(tmp_path):
    texts = [t for t in TEXTS if not is_heldout(t, 0.05)][:16]
    settings = DatasetSettings(Selection(heldout_fraction=0.05), "train:300")
    dataset, _ = make(
        DatasetSources(find([str(write_lines(tmp_path / "a.jsonl", texts))])), tmp_path / "a", settings
    )
    expected = train_bpe([t for t in texts if t != in_order_of_their_hashes(texts)[0]], 300)
    assert dataset.tokenizer.sha256 == expected.sha256


@pytest.mark.parametrize("texts", [["one"], ["one", "two"], ["one", "two"] * 50])
def test_of_fewer_than_three_documents_none_can_be_held_out(tmp_path, texts):
    given = DatasetSources(find([str(write_lines(tmp_path / "few.jsonl", texts))]))
    settings = DatasetSettings(Selection(heldout_fraction=0.01), "train:300", deduplicate=False)
    with pytest.raises(
        UserError, match=rf"of {len(texts)} document.* into the heldout split.* --heldout FILE"
    ):
        make(given, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    more = DatasetSources(given.train, find([str(write_lines(tmp_path / "more.jsonl", ["held out"]))]))
    dataset, _ = make(more, tmp_path / "out", settings)
    assert texts_of(dataset, dataset.heldout) == ["held out"]


def test_documents_that_are_held_out_stay_so_as_the_corpus_grows(tmp_path):
    held = set()
    for n in (30, 100, 400):
        file = write_lines(tmp_path / f"{n}.jsonl", TEXTS[:n])
        dataset, _ = make(DatasetSources(find([str(file)])), tmp_path / str(n))
        assert held <= set(texts_of(dataset, dataset.heldout))
        held = set(texts_of(dataset, dataset.heldout))
    assert held


def test_an_unusable_vocabulary_size_is_refused():
    for size in ("", "many", "256", "-5", "999999999999", "16777217", "1" * 5000, "\u0661\u0660\u0660\u0660"):
        with pytest.raises(UserError, match=r"257 or more .* and 16777216 or less"):
            DatasetSettings(SELECTION, f"train:{size}").to_json()
    for tokenizer in ("train:257", "train:16777216"):
        DatasetSettings(SELECTION, tokenizer).to_json()


class Interruption(Exception):  # noqa: N818 - no error
    pass


@pytest.mark.parametrize("batches", [1, 3, 10, 25, 60])
def test_an_interrupted_attempt_is_continued_to_the_same_bytes(sources, tmp_path, monkeypatch, batches):
    monkeypatch.setattr(encode, "CHUNK_DOCUMENTS", 30)
    monkeypatch.setattr(encode, "_BATCH_CHARS", 2000)
    settings = dataclasses.replace(SETTINGS, shard_tokens=RECORD_TOKENS)
    undisturbed, _ = make(sources, tmp_path / "undisturbed", settings)
    encoded = []

    def interrupted_encode(batch, *how, encode_batch=encode._encode):
        encoded.append(len(batch.texts))
        if len(encoded) == batches:
            raise Interruption
        return encode_batch(batch, *how)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "_encode", interrupted_encode)
        try:
            make(sources, tmp_path / "out", settings)
        except Interruption:
            assert not (tmp_path / "out").exists()
        done_before = sum(encoded[:-1])
        encoded.clear()
        encoded.extend([0] * batches)  # lets it go on to the end
        dataset, _ = make(sources, tmp_path / "out", settings)
    assert contents(dataset.path) == contents(undisturbed.path)
    # At most the chunk that was being written, and what had been read ahead of it, is encoded twice.
    assert done_before + sum(encoded[batches:]) <= len(TEXTS) + 2 * 30


def test_only_a_file_that_was_mended_is_read_again(sources, tmp_path, monkeypatch):
    train_bpe(TEXTS, 300).save(tmp_path / "tokenizer.json")
    strict = dataclasses.replace(SELECTION, strict=True)
    settings = dataclasses.replace(SETTINGS, selection=strict, tokenizer=str(tmp_path / "tokenizer.json"))
    smallest = tmp_path / "text" / "3.jsonl.gz"  # the others come before it
    write_lines(smallest, [*TEXTS[240:319], " "])
    with pytest.raises(UserError, match=r"3\.jsonl\.gz, line 80: empty"):
        make(DatasetSources(find([str(tmp_path / "text")])), tmp_path / "out", settings)
    write_lines(smallest, TEXTS[240:320])
    opened = []

    def noted(file, text_field, reader=encode.FileReader):
        opened.append(file.url)
        return reader(file, text_field)

    monkeypatch.setattr(encode, "FileReader", noted)
    dataset, _ = make(DatasetSources(find([str(tmp_path / "text")])), tmp_path / "out", settings)
    assert opened[1:] == [str(smallest)]  # before that, the first one is asked for a document of each split
    assert texts_of(dataset, dataset.train) == [t for t in TEXTS if not is_heldout(t)]


def test_what_a_killed_process_was_writing_does_not_stay(sources, tmp_path, monkeypatch):
    run = LocalEngine.run

    def leaving_a_half_written_file(self, tasks, *arguments):
        if isinstance(tasks[0], ShardTask):
            folder = tasks[0].folder.path
            folder.mkdir(parents=True)
            (folder / ".train-00000-of-00001.arrayrecord.0123.tmp").write_bytes(b"half")
        return run(self, tasks, *arguments)

    monkeypatch.setattr(LocalEngine, "run", leaving_a_half_written_file)
    make(sources, tmp_path / "out")
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.endswith(".tmp")]
