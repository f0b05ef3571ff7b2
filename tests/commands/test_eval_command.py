"""`topklm eval` on small runs: figures against the library, pairs, steering, and mistakes."""

import dataclasses
import json

from helpers import in_this_process
import making
import numpy as np
import pytest
import saved_runs

import topklm
from topklm.eval import tasks
from topklm.inference.interventions import Intervention
from topklm.layout import one_device
from topklm.neurons.documents import TextModel

STEPS = (3, 7)
TEXTS = ["the sea and the Sea", "no ships at sea", "towns 12 sea", "a sea, s\u00e9as", "by sea"]
PAIRS = [
    {"sentence_good": f"a {x} b", "sentence_bad": f"b {x} a{x}", "UID": uid, "field": field}
    for uid, field in (("one", "syntax"), ("two", "syntax"), ("three", "semantics"))
    for x in "cdefg"
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two seeds with TopK and two without, of one dataset, and a folder of tasks."""
    folder = tmp_path_factory.mktemp("eval")
    making.make_dataset(folder / "data", ["nothing"], TEXTS, tokenizer=saved_runs.tokenizer())
    data = dataclasses.replace(saved_runs.CONFIG.data, source=str(folder / "data"))
    config = dataclasses.replace(saved_runs.CONFIG, data=data)
    base = dataclasses.replace(config, model=dataclasses.replace(saved_runs.MODEL, n_nontopk=2))
    for seed in STEPS:
        saved_runs.save(folder / f"small{seed}", [seed], config)
        saved_runs.save(folder / f"base{seed}", [seed], base)
    other = dataclasses.replace(config, data=dataclasses.replace(data, source="elsewhere"))
    saved_runs.save(folder / "other", [3], other)
    (folder / "tasks").mkdir()
    (folder / "tasks/blimp.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    long = [{"query": "x" * 30, "choices": ["a", "bb"], "gold": 0}]
    (folder / "tasks/mine.jsonl").write_text("\n".join(map(json.dumps, long)))
    (folder / "books.txt").write_text("A book about the sea.\n")
    return folder


@pytest.fixture
def call(monkeypatch, place):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments):
        return in_this_process("eval", *arguments)

    return run


def found(ended):
    assert ended.exit_code == 0, ended.errors
    return json.loads(ended.output)


def figure(content, *key):
    return next(one for one in content["figures"] if (one["task"], one["part"], one["measure"]) == key)


def by_library(place, name, task, steer=()):
    lm = topklm.load(place / name)
    model = TextModel(lm.cfg, lm.params, one_device(), lm.tokenizer.separator_id)
    from topklm.eval import scoring  # noqa: PLC0415

    interventions = scoring.interventions_for(lm.cfg, steer)
    outcome = tasks.tokenize(task, model, lm.tokenizer).evaluate(model, interventions)
    return {one.key: one for one in tasks.figures_of(outcome)}


def test_a_run_is_evaluated_at_its_text_and_all_tasks_there_are(call, place, tmp_path):
    items = tmp_path / "items.jsonl"
    ended = call("small3", "--data", "tasks", "--text", "books.txt", "--json", "--items", items)
    content = found(ended)
    assert [one["task"] for one in content["tasks"]] == ["heldout", "blimp", "mine", "books"]
    assert [one["items"] for one in content["tasks"]] == [5, 15, 1, 1]
    one = figure(content, "blimp", "", "acc")
    expected = by_library(place, "small3", tasks.find("blimp", place / "tasks"))
    want = expected["blimp", "", "acc"]
    assert one["runs"] == [dataclasses.asdict(want.estimate())]
    assert (one["unit"], one["units"], one["difference"]) == ("paradigm", 3, None)
    assert figure(content, "blimp", "syntax", "acc")["units"] == 2
    heldout = by_library(place, "small3", tasks.of_text("heldout", TEXTS, ""))["heldout", "", "bits_per_byte"]
    assert figure(content, "heldout", "", "bits_per_byte")["mean"]["value"] == heldout.estimate().value
    assert content["notes"] == ["mine: 1 of 1 contexts were cut to the 32 tokens of small3"]
    assert content["runs"][0]["cut"] == {"heldout": 0, "blimp": 0, "mine": 1, "books": 0}
    lines = [json.loads(line) for line in items.read_text().splitlines()]
    assert len(lines) == 5 + 15 + 1 + 1
    assert [line["item"] for line in lines if line["task"] == "blimp"] == list(range(15))
    pairs = np.array([line["nats"] for line in lines if line["task"] == "blimp"])
    assert (pairs[:, 0] < pairs[:, 1]).mean() == pytest.approx(one["mean"]["value"])
    assert {(line["side"], line["run"]) for line in lines} == {("runs", "small3")}


def test_runs_are_paired_with_others_by_their_order(call, place):
    arguments = "small3", "small7", "--against", "base3", "base7", "--tasks", "blimp,heldout"
    content = found(call(*arguments, "--data", "tasks", "--json"))
    task = tasks.find("blimp", place / "tasks")
    sides = [[by_library(place, f"{kind}{seed}", task) for seed in STEPS] for kind in ("small", "base")]
    for key in (("blimp", "", "acc"), ("blimp", "syntax", "acc")):
        want = tasks.difference(*([run[key] for run in side] for side in sides))
        assert figure(content, *key)["difference"] == {
            **dataclasses.asdict(want),
            "by_run": list(want.by_run),
        }
    assert [one["run"] for one in content["against"]] == ["base3", "base7"]
    shown = call(*arguments, "--data", "tasks", "--margin", "acc=0.25").output
    assert "in brackets 95 % over units and runs" in shown
    assert (
        "margins: bits_per_byte 0.01, acc 0.25" in shown or "margins: acc 0.25, bits_per_byte 0.01" in shown
    )
    assert "blimp semantics" in shown


def test_a_table_of_several_runs_has_their_mean(call):
    ended = call("small3", "small7", "--tasks", "heldout")
    assert ended.exit_code == 0, ended.errors
    assert all(word in ended.output for word in ("small3", "small7", "mean", "heldout", "bits/byte"))


def test_steering_and_another_k_are_of_the_runs_and_not_of_those_beside_them(call, place):
    arguments = "small3", "--against", "small3", "--tasks", "blimp", "--data", "tasks", "--json"
    content = found(call(*arguments, "--steer", "0:3=50"))
    task = tasks.find("blimp", place / "tasks")
    steered = by_library(place, "small3", task, [Intervention(0, 3, 50.0)])["blimp", "", "bits_per_byte"]
    plain = by_library(place, "small3", task)["blimp", "", "bits_per_byte"]
    one = figure(content, "blimp", "", "bits_per_byte")
    assert one["mean"]["value"] == steered.estimate().value != plain.estimate().value
    assert one["mean_against"]["value"] == plain.estimate().value
    assert one["difference"]["verdict"] in ("worse", "no worse", "open")
    (facts,) = content["runs"]
    assert [(s["layer"], s["neuron"], s["value"]) for s in facts["steer"]] == [(0, 3, 50.0)]
    other = found(call(*arguments, "--topk-k", "1"))
    assert other["runs"][0]["topk_k"] == 1
    assert figure(other, "blimp", "", "bits_per_byte")["difference"]["value"] != 0


def test_other_data_and_contexts_are_said(call, place):
    content = found(call("small3", "--against", "other", "--tasks", "heldout", "--json"))
    assert content["notes"] == [
        "other was trained on other data, of which held-out text of the first run may be a part"
    ]


def test_without_data_of_its_own_the_rest_is_evaluated(call):
    content = found(call("other", "--data", "tasks", "--limit", "1", "--json"))
    assert [one["task"] for one in content["tasks"]] == ["blimp", "mine"]
    assert [one["items"] for one in content["tasks"]] == [3, 1]
    assert content["notes"][0].startswith("without heldout text: ")


def test_tokenizers_that_differ_leave_out_what_cannot_be_compared(call, place, monkeypatch):
    monkeypatch.setattr(tasks, "keeps", lambda tokenizer, task: False)
    real = topklm.data.tokenizer.Tokenizer.__init__
    count = iter(range(100))

    def init(self, content):
        real(self, content)
        self.sha256 = f"{next(count)}"

    monkeypatch.setattr("topklm.data.tokenizer.Tokenizer.__init__", init)
    content = found(call("small3", "--against", "base3", "--tasks", "blimp", "--data", "tasks", "--json"))
    assert figure(content, "blimp", "", "bits_per_byte")["difference"] is None
    assert figure(content, "blimp", "", "acc")["difference"] is not None
    assert content["notes"] == [
        "base3 has another tokenizer than small3",
        "blimp: bits per byte not compared: tokenizers differ, and one does not keep the text as it is",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "nothing is not a run folder with checkpoints"),
        (["small3", "--against", "nothing"], "nothing is not a run folder with checkpoints"),
        (["small3", "--step", "9"], "step = 9: small3 has checkpoints 3"),
        (
            ["small3", "--against", "base3", "base7"],
            "--against = base3 base7: names 2 runs, to be paired with 1",
        ),
        (["small3", "--tasks", "blinp"], "--tasks = blinp: there is no such task; did you mean blimp?"),
        (["small3", "--tasks", "piqa"], "--tasks = piqa: its data do not ship with topklm; give a folder"),
        (["small3", "--data", "books.txt"], "--data = books.txt: is no folder; give one with files of tasks"),
        (["small3", "--text", "no.txt"], "no.txt"),
        (["small3", "--text", "blimp=books.txt"], "--text = blimp=books.txt: two tasks are called blimp"),
        (["small3", "--limit", "0"], "--limit = 0: must be 1 or more"),
        (["small3", "--margin", "acc"], "--margin = acc: must be MEASURE=NUMBER"),
        (["small3", "small7", "--steer", "0:1=2"], "--steer with several RUNs"),
        (["small3", "--steer", "9:1=2", "--tasks", "heldout"], "--steer = 9:1=2: layer = 9: must be"),
        (["base3", "--topk-k", "3", "--tasks", "heldout"], "--topk-k = 3: the model has no layer with TopK"),
        (["small3", "--items", "no/where.jsonl"], "no/where.jsonl"),
        (["small3", "--harness", "piqa", "--against", "base3"], "--against: goes without --harness only"),
        (["small3", "small7", "--harness", "piqa"], "--harness = piqa: takes one RUN"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(call, arguments, said):
    ended = call(*arguments)
    assert ended.exit_code == 2
    assert said in ended.errors
    assert len(ended.errors.strip().splitlines()) == 1
