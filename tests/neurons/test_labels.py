"""Labels come back, are never lost between two who write at once, and do no harm where they are shown."""

import csv
import io
import json
import multiprocessing
import os

import pytest

from topklm.errors import UserError
from topklm.neurons.labels import MAX_CHARACTERS, Labels, Note, read_export


@pytest.fixture
def labels(tmp_path):
    return Labels(tmp_path / "neurons" / "labels.json")


def test_without_a_file_there_are_no_labels_and_reading_makes_none(labels, tmp_path):
    assert labels.all() == {}
    assert list(tmp_path.iterdir()) == []


def test_labels_come_back_sorted_from_another_reader(labels, tmp_path):
    for layer, neuron, text in ((1, 3, "ships"), (0, 17, "  das Meer, 海 \U0001f30a "), (0, 2, "old")):
        labels.set(layer, neuron, text)
    labels.set(0, 2, "new")
    other = Labels(tmp_path / "neurons" / "labels.json")
    assert list(other.all().items()) == [
        ((0, 2), "new"),
        ((0, 17), "das Meer, 海 \U0001f30a"),
        ((1, 3), "ships"),
    ]
    assert other.all()[1, 3] == "ships"
    assert (3, 1) not in other.all()


def test_an_empty_text_removes_a_label_also_one_that_is_not_there(labels):
    labels.set(0, 1, "a")
    labels.set(0, 2, "b")
    labels.set(0, 1, " ")
    labels.set(7, 7, "")
    assert labels.all() == {(0, 2): "b"}


def test_joiners_that_belong_to_words_and_emoji_are_kept(labels):
    text = "\u0645\u06cc\u200c\u062e\u0648 \U0001f469\u200d\U0001f680"
    labels.set(0, 0, text)
    assert labels.all()[0, 0] == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x" * (MAX_CHARACTERS + 1), "201 characters, at most 200"),
        ("two\nlines", "must be one line without control characters; leave U[+]000A out"),
        ("tab\there", "U[+]0009"),
        ("\x1b[2Jgone", r"label = '\\x1b\[2Jgone': .*U[+]001B"),
        ("turned \u202e round", "U[+]202E"),
        ("two\u2028lines", "U[+]2028"),
        ("half \ud83c", "U[+]D83C"),
    ],
)
def test_a_text_that_is_no_label_is_refused_and_nothing_changes(labels, text, message):
    labels.set(0, 0, "before")
    with pytest.raises(UserError, match=message) as caught:
        labels.set(0, 0, text)
    assert str(caught.value).isprintable()
    assert labels.all() == {(0, 0): "before"}


def test_the_longest_label_is_kept_whole(labels):
    labels.set(0, 0, "ü" * MAX_CHARACTERS)
    assert labels.all()[0, 0] == "ü" * MAX_CHARACTERS


@pytest.mark.parametrize(("layer", "neuron"), [(-1, 0), (0, -1)])
def test_a_neuron_below_zero_is_refused(labels, layer, neuron):
    with pytest.raises(UserError, match="both must be 0 or more"):
        labels.set(layer, neuron, "x")


def entry(layer=0, neuron=1, label="sea", **more):
    return {"layer": layer, "neuron": neuron, "label": label, **more}


def written(*entries, version=1):
    return json.dumps({"format": version, "labels": entries})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        b"\xff\xfe",
        '{"format": 1}',
        '{"format": 1, "labels": {}}',
        written(version=4),
        written(entry(from_step="1"), version=3),
        written(entry(to_step=True), version=3),
        written(entry(from_step=-1), version=3),
        written(entry(from_step=65, to_step=64), version=3),
        written(entry(comment=1), version=2),
        written(entry(), entry(), version=2),
        written(entry(by="two\nlines"), version=2),
        written(3),
        written({"layer": 0, "neuron": 1}),
        written(entry(more=1)),
        written(entry(layer="0")),
        written(entry(layer=True)),
        written(entry(neuron=-1)),
        written(entry(neuron=1.5)),
        written(entry(label=None)),
        written(entry(label="")),
        written(entry(label="two\nlines")),
        written(entry(label="x" * 201)),
        written(entry(), entry(label="ocean")),
    ],
)
def test_a_damaged_file_is_named_and_never_overwritten(tmp_path, content):
    path, content = tmp_path / "labels.json", content if isinstance(content, bytes) else content.encode()
    path.write_bytes(content)
    labels = Labels(path)
    for doing in (labels.all, labels.as_csv, labels.as_json, lambda: labels.set(0, 1, "new")):
        with pytest.raises(
            UserError, match=r"labels.json is damaged \(.*: mend it, put a copy back, or move"
        ):
            doing()
    assert path.read_bytes() == content


def test_a_folder_in_the_way_is_named(tmp_path):
    (tmp_path / "labels.json").mkdir()
    with pytest.raises(UserError, match=r"labels\.json cannot be read"):
        Labels(tmp_path / "labels.json").all()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"writing a label.*in the way"):
        Labels(tmp_path / "file" / "labels.json").set(0, 0, "x")


def test_a_full_disk_leaves_the_labels_as_they_were(labels, monkeypatch):
    labels.set(0, 0, "kept")

    def full(_path):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("topklm.storage.files.fsync", full)
    with pytest.raises(UserError, match=r"writing a label.*no space left"):
        labels.set(0, 1, "lost")
    monkeypatch.undo()
    assert labels.all() == {(0, 0): "kept"}


def test_json_is_what_the_file_holds(labels, tmp_path):
    labels.set(2, 5, 'a "sea"')
    assert labels.as_json() == (tmp_path / "neurons" / "labels.json").read_bytes()
    assert json.loads(labels.as_json()) == {"format": 1, "labels": [entry(2, 5, 'a "sea"')]}


def test_csv_reads_back_and_holds_no_formulas(labels):
    texts = {
        "=HYPERLINK(0)": "'=HYPERLINK(0)",
        "+1": "'+1",
        "-1": "'-1",
        "@SUM(A1)": "'@SUM(A1)",
        "\uff1dA1": "'\uff1dA1",
        '=cmd|"/C calc"!A0': '\'=cmd|"/C calc"!A0',
        'plain, "quoted" = x': 'plain, "quoted" = x',
        "海": "海",
    }
    for neuron, text in enumerate(texts):
        labels.set(1, neuron, text)
    rows = list(csv.reader(io.StringIO(labels.as_csv().decode("utf-8"), newline="")))
    assert rows[0] == ["layer", "neuron", "label", "comment", "by", "from_step", "to_step"]
    assert rows[1:] == [
        ["1", str(neuron), shown, "", "", "", ""] for neuron, shown in enumerate(texts.values())
    ]
    assert {place: note.label for place, note in read_export(labels.as_csv().decode())} == labels.all()


def test_a_neuron_has_several_labels_with_comments_and_who_wrote_them(labels, tmp_path):
    labels.set(1, 3, Note("ships", "in novels", "Ann"))
    labels.set(1, 3, Note("boats", by="Ben"), at=1)
    labels.set(1, 3, "sails", at=9)  # after the last
    assert labels.all() == {(1, 3): "ships · boats · sails"}
    labels.set(1, 3, "", at=1)
    labels.set(1, 3, Note("vessels", "and novels", "Ann"), at=0)
    assert labels.notes() == {(1, 3): (Note("vessels", "and novels", "Ann"), Note("sails"))}
    with pytest.raises(UserError, match="label = 'sails': the neuron has it already"):
        labels.set(1, 3, "sails", at=0)
    content = json.loads((tmp_path / "neurons" / "labels.json").read_bytes())
    assert content["format"] == 2
    assert content["labels"][1] == entry(1, 3, "sails")
    with pytest.raises(UserError, match=r"comment = 'xxx.*1,001 characters, at most 1000"):
        labels.set(1, 3, Note("sails", "x" * 1001), at=1)


@pytest.mark.parametrize("form", ["as_csv", "as_json"])
def test_an_export_is_read_into_another_run_and_labels_there_stay(labels, tmp_path, form):
    labels.set(0, 1, Note("=sea", "it says 'sea'", "Ann", 64, 1300))
    labels.set(0, 1, Note("water", from_step=0), at=1)
    labels.set(2, 5, "'quoted'")
    other = Labels(tmp_path / "other" / "labels.json")
    other.set(0, 1, Note("water", "mine"))
    other.set(7, 7, "kept")
    read = read_export(getattr(labels, form)().decode())
    assert other.add(read) == (2, 1)
    assert other.add(read) == (0, 0)
    notes = other.notes()
    assert set(notes[0, 1]) == set(labels.notes()[0, 1])
    assert (notes[2, 5], notes[7, 7]) == ((Note("'quoted'"),), (Note("kept"),))


def test_a_label_may_hold_at_some_steps_alone_and_then_says_so_elsewhere(labels, tmp_path):
    labels.set(1, 3, Note("ships", from_step=64, to_step=200))
    labels.set(1, 3, Note("boats", from_step=201), at=1)
    labels.set(1, 3, Note("sails", to_step=0), at=2)
    assert labels.all() == {(1, 3): "ships · boats · sails"}
    assert labels.all(64) == {(1, 3): "ships · boats (from step 201) · sails (to step 0)"}
    assert labels.all(1300)[1, 3] == "ships (from step 64 to 200) · boats · sails (to step 0)"
    ships = labels.notes()[1, 3][0]
    assert [ships.holds(step) for step in (63, 64, 200, 201)] == [False, True, True, False]
    content = json.loads((tmp_path / "neurons" / "labels.json").read_bytes())
    assert content["format"] == 3
    assert content["labels"][0] == entry(1, 3, "ships", from_step=64, to_step=200)
    with pytest.raises(UserError, match="from_step = 9: must be at most to_step, 8"):
        labels.set(1, 3, Note("ships", from_step=9, to_step=8))
    with pytest.raises(UserError, match="line 2: from_step = x: must be a step, a whole number from 0"):
        read_export("layer,neuron,label,from_step\n1,3,ships,x\n")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "does not name the columns layer, neuron and label"),
        ("neuron,label\n1,a\n", "does not name the columns"),
        ("layer,neuron,label\n0,1,sea\n0,x,a\n", "line 3: layer and neuron must be numbers"),
        ("layer,neuron,label\n0,1\n0,99999999999,a\n", "line 3: there is no neuron 0:99999999999"),
        ('layer,neuron,label\n0,1,"two\nlines"\n', "line 3: label = .*must be one line"),
        ('{"format": 9, "labels": []}', "its format is 9"),
        ('{"format": 1', "labels cannot be read"),
    ],
)
def test_a_file_that_holds_no_labels_is_refused(content, said):
    with pytest.raises(UserError, match=f"labels cannot be read .*{said}" if "cannot" not in said else said):
        read_export(content)


def test_columns_may_come_in_any_order_and_with_others():
    content = "\ufeffby,Neuron,score,LABEL,layer\r\nAnn,3,0.7,'=sea,1\r\n,4,,,1\r\n\r\n"
    assert read_export(content) == [((1, 3), Note("=sea", "", "Ann"))]


def write_many(path, layer, start):
    labels = Labels(path)
    start.wait()
    for neuron in range(40):
        labels.set(layer, neuron, f"label {neuron} of {layer}")


def test_two_who_write_at_the_same_time_lose_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    path, start = tmp_path / "neurons" / "labels.json", context.Barrier(2)
    processes = [context.Process(target=write_many, args=(path, layer, start)) for layer in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
        assert process.exitcode == 0
    assert Labels(path).all() == {
        (layer, j): f"label {j} of {layer}" for layer in range(2) for j in range(40)
    }
    assert {file.name for file in path.parent.iterdir()} == {"labels.json", ".lock"}
