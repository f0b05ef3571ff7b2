"""`topklm unlearn` on a tiny run: the table, the run that it makes, and wrong input."""

import json
import os
import signal
import sys

import helpers
from helpers import in_this_process
import jax
import numpy as np
import pytest

import topklm
from topklm.neurons.ablate_set import halves
from topklm.training import only, unlearn

PAIRS = [
    {"UID": uid, "field": "syntax", "sentence_good": f"The {a} hid.", "sentence_bad": f"Hid {a} the."}
    for uid, animals in {"one": ("crow", "horse"), "two": ("child", "kitten")}.items()
    for a in animals
]
FORGET = [f"The old crow {verb} a boat." for verb in ("found", "lost", "hid", "sold", "mended", "painted")]
RETAIN = [f"A tall baker {verb} the coat." for verb in ("found", "lost", "hid", "sold", "mended", "watched")]
FLAGS = {"count": 3, "retain-frequency": 1, "steps": 4, "batch-size": 2, "random-sets": 2, "relearn-steps": 2}


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unlearn")
    (folder / "tasks").mkdir()
    (folder / "tasks/blimp.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    write(folder / "forget.jsonl", FORGET)
    write(folder / "retain.jsonl", RETAIN)
    return folder


@pytest.fixture
def call(monkeypatch, place, finished_run):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "160")

    flags = [f"--{name}={value}" for name, value in FLAGS.items()]

    def run(*arguments, texts=("--forget", "forget.jsonl", "--retain", "retain.jsonl")):
        return in_this_process("unlearn", finished_run, *texts, *flags, "--data", "tasks", *arguments)

    return run


def test_the_run_that_is_made_opens_and_the_table_says_what_it_cost(call, place, finished_run):
    ended = call("--out", "new", "--json", "found.json")
    assert not (place / "new.begun").exists()
    assert ended.exit_code == 0, ended.errors
    content = json.loads((place / "found.json").read_text())
    assert content == json.loads((place / "new/unlearn.json").read_text())
    methods = {one["method"]: one for one in content["methods"]}
    assert list(methods) == [
        "as it was",
        "chosen neurons",
        "chosen set to 0",
        "random neurons 1",
        "random neurons 2",
        "all parameters",
        "gradient ascent",
    ]
    before, after = (topklm.load(run).params for run in (finished_run, place / "new"))
    chosen = methods["chosen neurons"]
    mask = only.neuron_mask(topklm.load(finished_run).cfg, [tuple(n) for n in chosen["neurons"]])
    for m, a, b in zip(*map(jax.tree.leaves, (mask, before, after)), strict=True):
        moved = np.asarray(a) != np.asarray(b)
        assert not moved[~np.broadcast_to(m, a.shape)].any()
    assert chosen["parameters"] == only.n_marked(mask, before)
    for one in methods.values():
        for column in ("forget", "retain", "blimp", "bits_per_byte", "relearned"):
            change = one[column]["value"] - methods["as it was"][column]["value"]
            assert one[column]["change"]["value"] == pytest.approx(change, abs=1e-9)
            assert one[column]["low"] <= one[column]["value"] <= one[column]["high"]
    chosen_neurons = {tuple(n) for n in chosen["neurons"]}
    assert all(
        not chosen_neurons & {tuple(n) for n in methods[f"random neurons {r}"]["neurons"]} for r in (1, 2)
    )
    assert f"{chosen['forget']['change']['value']:+.3f}" in ended.output
    assert "wrote new: the model of chosen neurons" in ended.output
    text = in_this_process("generate", "new", "The", "--max-new-tokens", 4)
    assert text.exit_code == 0, text.errors
    # Its losses are those that the table has of it, by another path.
    scored = [FORGET[i] for i in halves(6)[1]]
    write(place / "scored.jsonl", scored)
    evaluated = in_this_process(
        "eval", "new", "--tasks", "heldout", "--text", "scored=scored.jsonl", "--tokens", 0, "--json"
    )
    assert evaluated.exit_code == 0, evaluated.errors
    figures = {one["task"]: one["mean"]["value"] for one in json.loads(evaluated.output)["figures"]}
    n_tokens = sum(len(topklm.load(finished_run).tokenizer.encode(t)) for t in scored)
    nats = figures["scored"] * np.log(2) * sum(map(len, scored)) / n_tokens
    assert nats == pytest.approx(chosen["forget"]["value"], rel=1e-4)


# It is killed when two results are written.
KILLED = """
import os, signal, sys
from topklm import cli
from topklm.training.unlearn import Parts

write, done = Parts._write, []

def killed(self, path, result):
    write(self, path, result)
    done.append(path)
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

Parts._write = killed
cli.run(sys.argv[1:])
"""


def killed(words):
    process = helpers.Process(
        [sys.executable, "-c", KILLED, *words], env={**os.environ, "PYTHONPATH": str(helpers.ROOT)}
    )
    assert process.finish() == -signal.SIGKILL


def interrupted(words):
    """The same by Ctrl-C, which takes no process of its own."""
    run, done = unlearn.Unlearning.run, []

    def run_two(self, *given):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(given)
        return run(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unlearn.Unlearning, "run", run_two)
        assert in_this_process(*words).exit_code == 130


@pytest.mark.parametrize("stop", [interrupted, pytest.param(killed, marks=pytest.mark.slow)])
def test_unlearning_that_was_stopped_goes_on_after_what_is_done(
    call, place, finished_run, monkeypatch, tmp_path, stop
):
    if not (place / "new").exists():
        call("--out", "new")
    for name in ("forget.jsonl", "retain.jsonl", "tasks"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    texts = "--forget", "forget.jsonl", "--retain", "retain.jsonl", "--data", "tasks", "--out", "again"
    stop(["unlearn", str(finished_run), *texts, *(f"--{name}={value}" for name, value in FLAGS.items())])
    assert {path.stem for path in (tmp_path / "again.begun").iterdir()} == {"as-it-was", "chosen-neurons"}
    assert not (tmp_path / "again").exists()
    refusals = [
        ((), "--out = again: again.begun holds unlearning that was begun for it: give --resume, or delete"),
        (("--resume", "--budget", 0.5), "--budget = 0.5: again.begun was begun with 0.05: give what"),
        (("--resume", "--seed", 1), "--seed = 1: again.begun was begun with 0"),
    ]
    for flags, said in refusals:
        ended = call("--out", "again", *flags)
        assert ended.exit_code == 2
        assert said in helpers.assert_one_line_error(ended.errors)
    damaged = tmp_path / "again.begun/as-it-was.npz"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:1000])
    ended = call("--out", "again", "--resume")
    assert "as-it-was.npz is damaged" in helpers.assert_one_line_error(ended.errors)
    damaged.write_bytes(whole)
    run, done = unlearn.Unlearning.run, []
    monkeypatch.setattr(unlearn.Unlearning, "run", lambda *given: done.append(given[1]) or run(*given))
    ended = call("--out", "again", "--resume")
    assert ended.exit_code == 0, ended.errors
    assert [m.name for m in done] == [
        "chosen set to 0",
        "random neurons 1",
        "random neurons 2",
        "all parameters",
        "gradient ascent",
    ]
    found, other = (
        json.loads((run / "unlearn.json").read_text()) for run in (place / "new", tmp_path / "again")
    )
    assert found == {**other, "out": "new"}
    helpers.assert_same_bits(topklm.load(place / "new").params, topklm.load(tmp_path / "again").params)
    assert {path.name for path in tmp_path.glob("*again*")} == {"again"}
    ended = call("--out", "third", "--resume")
    assert "third.begun holds nothing to go on from" in ended.errors


def test_documents_of_the_runs_own_data_are_chosen_by_a_pattern(call, place):
    ended = call("--out", "own", "--tokens", 400, "--json", texts=("--forget-regex", "crow"))
    assert ended.exit_code == 0, ended.errors
    content = json.loads(ended.output)
    assert content["forget"]["source"] == "crow" and content["retain"]["source"] == "all but crow"
    assert (place / "own/config.json").is_file()


def test_wrong_input_ends_in_a_line_and_leaves_nothing(call, place):
    both = write(place / "both.jsonl", [*RETAIN, FORGET[0]])
    one = write(place / "one.jsonl", FORGET[:1])
    mixed = "--forget", "forget.jsonl", "--retain", both
    cases = [
        (call("--out", "bad", texts=mixed), "--forget and --retain have 1 documents in common"),
        (call("--out", "bad", texts=("--forget", one, "--retain", "retain.jsonl")), "is one document"),
        (call("--out", "bad", "--layers", "1"), "--layers = 1: must be TopK layers, from 0 to 0"),
        (call("--out", "bad", "--count", 33), "--count = 33: layer 0 has"),
        (call("--out", "bad", "--count", 0), "--count = 0: must be 1 or more"),
        (call("--out", "bad", "--retain-frequency", 0), "--retain-frequency = 0.0: must be above 0"),
        (call("--out", "bad", "--budget", -1), "--budget = -1.0: must be 0 or more"),
        (call("--out", "bad", "--data", "nowhere"), "--data = nowhere: is no folder"),
        (call("--out", "tasks"), "tasks exists: give a folder that is to be made"),
    ]
    for ended, said in cases:
        assert ended.exit_code == 2
        assert said in helpers.assert_one_line_error(ended.errors)
    assert not (place / "bad").exists() and not list(place.glob(".bad*"))


def test_the_page_has_the_figures_of_its_json():
    page = (helpers.ROOT / "docs/unlearning.md").read_text(encoding="utf-8")
    found = json.loads((helpers.ROOT / "benchmarks/results/unlearning.json").read_text())["topk"][
        "over_seeds"
    ]
    formats = {"forget": ".2f", "retain": ".2f", "blimp": ".3f", "bits_per_byte": ".3f", "relearned": ".2f"}
    for name in ("chosen neurons", "chosen set to 0", "random neurons", "all parameters", "gradient ascent"):
        (row,) = (line for line in page.splitlines() if line.startswith(f"| {name}"))
        cells = [cell.strip() for cell in row.replace("*", "").split("|")[2:-1]]
        del cells[2], cells[0]  # figures of each seed; parameters
        for cell, (column, text) in zip(cells, formats.items(), strict=True):
            mean, low, high = (
                format(found[name][column][key], f"+{text}") for key in ("mean", "low", "high")
            )
            assert cell == f"{mean} ({low} to {high})", (name, column)
    gap = found["chosen neurons less random neurons"]["forget"]
    assert f"{gap['mean']:+.2f} ({gap['low']:+.2f} to {gap['high']:+.2f}) on forget" in page
