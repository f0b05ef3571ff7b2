"""`topklm runs` and `topklm show` on runs that are whole, new, damaged, and no runs."""

import dataclasses
import json
import shutil

import damage
from helpers import CONFIG_FILE, STEPS, assert_one_line_error, in_this_process
import pytest
import saved_runs

from topklm.commands import runs, show, train
from topklm.config import Config


@pytest.fixture
def folder(tmp_path, finished_run):
    """A folder with a finished run, one without evaluations, a damaged one, and things that are no runs."""
    place = tmp_path / "runs"
    (place / "empty").mkdir(parents=True)
    (place / "notes.txt").write_text("mine")
    shutil.copytree(finished_run, place / "trained")
    saved_runs.save(place / "saved", [5])
    saved_runs.describe(place / "broken [b]")
    (place / "broken [b]" / "config.json").write_text('{"model": ')
    return place


def test_runs_are_listed_with_their_figures(folder):
    process = in_this_process("runs", folder, "--json")
    assert process.exit_code == 0, process.errors
    found = {one["run"].rpartition("/")[2]: one for one in json.loads(process.output)["runs"]}
    assert set(found) == {"trained", "saved", "broken [b]"}
    lines = [json.loads(line) for line in (folder / "trained/metrics.jsonl").read_text().splitlines()]
    bits = [line["eval/bits_per_byte"] for line in lines if "eval/bits_per_byte" in line]
    trained = found["trained"]
    assert (trained["step"], trained["steps"], trained["bits_per_byte"]) == (STEPS, STEPS, bits[-1])
    assert (found["saved"]["step"], found["saved"]["bits_per_byte"]) == (5, None)
    assert trained["problems"] == found["saved"]["problems"] == []
    (problem,) = found["broken [b]"]["problems"]
    assert "config.json is damaged" in problem


def test_the_table_fits_a_narrow_terminal_and_says_what_is_damaged(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    process = in_this_process("runs", folder)
    assert process.exit_code == 0, process.errors
    *table, more = process.output.splitlines()
    assert max(map(len, table)) <= 80
    assert more == f"topklm show '{folder / 'broken [b]'}' says more of its damage"
    assert f"{STEPS} of {STEPS}" in process.output
    assert "damaged:" in process.output
    assert "broken [b]" in process.output
    assert "notes" not in process.output


def test_a_folder_without_runs_and_one_that_is_not_there(folder, tmp_path, monkeypatch):
    assert "no runs yet" in in_this_process("runs", folder / "empty").output
    assert "trained" in in_this_process("runs", folder / "trained").output  # itself a run
    monkeypatch.chdir(tmp_path)
    assert "trained" in in_this_process("runs").output
    monkeypatch.chdir(folder)
    process = in_this_process("runs")
    assert process.exit_code == 2
    assert "FOLDER = runs: there is no such folder" in assert_one_line_error(process.errors)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--config=small"], ("small", 0)),
        (["--config=small:base"], ("small:base", 0)),
        (["--config=paper:400m", "--config.train.seed=4"], ("paper:400m", 1)),
        (
            [f"--config={CONFIG_FILE}:hour", "--config.model.topk_k=9", "--config.log.every_steps=3"],
            ("small:hour", 2),
        ),
    ],
)
def test_a_config_is_named_by_the_nearest_that_comes_with_topklm(flags, expected):
    config = train.parse(flags)[0]
    trained = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=999))
    assert runs.nearest(trained) == expected


@pytest.mark.parametrize(("seconds", "said"), [(0, "now"), (90, "90 s"), (7000, "117 min"), (9e5, "10 d")])
def test_ages_are_short(seconds, said):
    assert runs.age(seconds) == said


def test_no_damage_ends_the_list_of_runs(tmp_path):
    saved_runs.save(tmp_path / "whole", [5])
    (tmp_path / "whole" / "metrics.jsonl").write_text('{"step": 5, "train/loss": 2.5}\n')
    done = 0
    for number, (words, apply) in enumerate(damage.damages(tmp_path / "whole", per_file=1)):
        if number % 9:
            continue
        copy = shutil.copytree(tmp_path / "whole", tmp_path / "copies" / "run", dirs_exist_ok=False)
        apply(copy)
        process = in_this_process("runs", tmp_path / "copies", "--json")
        assert process.exit_code == 0, (words, process.errors)
        shown = in_this_process("show", copy)
        assert shown.exit_code in (0, 2), words
        if shown.exit_code:
            assert_one_line_error(shown.errors)
        shutil.rmtree(copy)
        done += 1
    assert done > 5


def test_a_run_is_shown_with_its_changes_its_curve_and_its_checkpoints(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    process = in_this_process("show", folder / "trained", "--json", folder / "facts.json")
    assert process.exit_code == 0, process.errors
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["differences"]["model.d_model"] == {"run": 32, "default": Config().model.d_model}
    assert "optim.beta1" not in facts["differences"]
    assert facts["checkpoints"] == [5, 10, 15, 20, 24]
    assert facts["neurons"] == []
    assert facts["curve"][0].keys() >= {"step", "train/loss"}
    for words in ("model.d_model", "checkpoints: 5, 10, 15, 20, 24", "nothing harvested", "o held out"):
        assert words in process.output
    curve = process.output[process.output.index("loss, nats") :].splitlines()
    assert max(map(len, curve[:15])) <= 80


def test_what_is_harvested_is_shown(folder):
    assert in_this_process("neurons", "harvest", folder / "trained", "--tokens", "500").exit_code == 0
    output = in_this_process("show", folder / "trained").output
    assert "neurons of step 24: " in output
    assert "not measured: topklm neurons measure" in output
    (folder / "trained/neurons/24/store/metadata.json").write_text("[]")
    process = in_this_process("show", folder / "trained")
    assert "neurons of step 24: cannot be read" in process.output
    assert process.exit_code == 2
    assert "store" in assert_one_line_error(process.errors)


def test_a_curve_runs_from_the_highest_loss_to_the_lowest():
    lines = [{"step": step, "train/loss": 9.0 - step} for step in range(1, 5)]
    drawn = show.curve([*lines, {"step": 4, "eval/loss": 7.0}, {"step": 5, "train/loss": float("nan")}])
    rows = [line.partition("|")[2] for line in drawn[1:13]]
    assert drawn[1].split("|")[0].strip() == "8"
    assert drawn[12].split("|")[0].strip() == "5"
    assert rows[0].index(".") == 0
    assert rows[11].rstrip().endswith(".") and len(rows[11]) == 66
    assert sum(row.count("o") for row in rows) == 1
    assert show.curve(lines[:1]) == []


@pytest.mark.parametrize("name", ["empty", "nowhere", "notes.txt", "notes.txt/under"])
def test_what_is_no_run_is_one_line(folder, name):
    process = in_this_process("show", folder / name)
    assert process.exit_code == 2
    assert "RUN = " in assert_one_line_error(process.errors)


def test_a_damaged_config_is_one_line_below_what_can_be_read(folder):
    process = in_this_process("show", folder / "broken [b]")
    assert process.exit_code == 2
    assert "config.json is damaged" in assert_one_line_error(process.errors)
    assert "checkpoints: none" in process.output
