import json
import re

from helpers import assert_one_line_error
from making import make_dataset
import pytest

from topklm import cli, errors
from topklm.data.tokenizer import train_bpe

TEXTS = [f"Letter {n} came by boat. " * (1 + n % 9) for n in range(60)]


@pytest.fixture
def folder(tmp_path):
    return make_dataset(tmp_path / "letters", TEXTS, TEXTS[:5], tokenizer=train_bpe(TEXTS, 300)).path


@pytest.fixture
def output_of(capsys):
    """Runs `topklm data ...` and returns what it printed."""

    def run(*arguments, code=0):
        assert errors.guarded(lambda: cli.dispatch(["data", *map(str, arguments)])) == code
        captured = capsys.readouterr()
        if code == 0:
            assert captured.err == ""
            return captured.out
        return captured.out, assert_one_line_error(captured.err)

    return run


def test_show_prints_whole_documents_with_a_rule_before_each(folder, output_of):
    printed = output_of("show", folder, "--split", "heldout", "--context-length", 100_000)
    title, *rest = printed.splitlines()
    assert re.match(r"heldout, tokens 0 to \d+, 5 documents ═+$", title)
    assert "\x1b" not in printed
    rules, texts = rest[0::2], rest[1::2]
    assert all(re.match(r"<\|endoftext\|> ┄+$", rule) for rule in rules)
    assert texts == TEXTS[:5]


def test_show_prints_as_many_windows_as_asked_for_and_the_same_every_time(folder, output_of):
    printed = output_of("show", folder, "--windows", 4, "--context-length", 32, "--seed", 1)
    assert len(re.findall(r"^train, tokens \S+ to \S+, \d+ documents? ═+$", printed, re.M)) == 4
    assert printed == output_of("show", folder, "--windows", 4, "--context-length", 32, "--seed", 1)
    assert printed != output_of("show", folder, "--windows", 4, "--context-length", 32, "--seed", 2)


def test_show_prints_json(folder, output_of):
    printed = json.loads(output_of("show", folder, "--context-length", 100_000, "--json"))
    assert (printed["path"], printed["split"]) == (str(folder), "train")
    (window,) = printed["windows"]
    assert (window["start"], window["documents"]) == (0, 60)
    assert [piece["text"] for piece in window["pieces"]] == TEXTS
    assert all(piece["begins"] for piece in window["pieces"])


def test_show_prints_text_as_it_is_but_nothing_that_a_terminal_obeys(tmp_path, output_of):
    make_dataset(tmp_path / "odd", ["[bold]:smile: \x1b[31mred\x07\rsome\x9b2J http://a.b " + "long " * 40])
    lines = output_of("show", tmp_path / "odd", "--context-length", 10_000).splitlines()
    assert lines[2] == "[bold]:smile: \\x1b[31mred\\x07\\x0dsome\\x9b2J http://a.b " + "long " * 40


def test_verify_prints_what_it_counted(folder, output_of):
    printed = output_of("verify", folder)
    n_bytes = f"{sum(len(text) for text in TEXTS):,}"
    assert re.search(rf"bytes of text, recounted +│ +{n_bytes} │", printed)
    assert re.search(r"documents +│ +60 │ +5 │", printed)
    assert printed.splitlines()[-1] == "everything is as it was written"


def test_verify_lists_every_problem_and_ends_with_one_line(folder, output_of):
    (folder / "train-00000-of-00001.arrayrecord").unlink()
    (folder / "tokenizer.json").write_bytes(b"{}")
    (folder / "stray").touch()
    printed, error = output_of("verify", folder, code=2)
    assert "train-00000-of-00001.arrayrecord: is missing" in printed.splitlines()
    assert "tokenizer.json: has the sha256" in printed
    assert "stray: not a file of this dataset" in printed.splitlines()
    assert "everything" not in printed
    assert f"{folder}: 2 problem(s)" in error


def test_verify_prints_json(folder, output_of):
    report = json.loads(output_of("verify", folder, "--json"))
    assert report["ok"]
    assert report["path"] == str(folder)
    assert report["splits"]["heldout"]["documents"] == 5
    (folder / "train-00000-of-00001.arrayrecord").unlink()
    printed, _ = output_of("verify", folder, "--json", code=2)
    report = json.loads(printed)
    assert not report["ok"]
    assert report["problems"] == [{"file": "train-00000-of-00001.arrayrecord", "what": "is missing"}]
