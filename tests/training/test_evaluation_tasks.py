"""`eval.tasks`: figures in the metrics, of the saved model, and a training that they do not change."""

import json

from helpers import WALL_CLOCK_FIGURES
import jax
import numpy as np
import pytest

import topklm
from topklm.config import Config
from topklm.errors import UserError
from topklm.eval import scoring, tasks
from topklm.layout import one_device
from topklm.neurons.documents import TextModel
from topklm.training import evaluation, metrics

OTHERWISE = (*WALL_CLOCK_FIGURES, "eval/blimp", "eval/mine")
QUESTIONS = [
    {"query": "The old baker", "choices": ["found a lantern.", "of."], "gold": n % 2} for n in range(4)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tasks")
    pairs = [{"sentence_good": f"a {x} b", "sentence_bad": f"b {x}", "UID": x[0]} for x in ("ca", "cb", "de")]
    (made / "blimp.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (made / "mine.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    return made


@pytest.fixture(scope="module")
def run(trainer, folder):
    settings = {"eval.tasks": "blimp, mine", "eval.tasks_dir": folder, "eval.tasks_limit": 2}
    ended = trainer.train(folder / "run", settings)
    assert ended.exit_code == 0, ended.errors
    assert ended.output.count("tasks: blimp ") == ended.output.count("sample: ")
    return folder / "run"


def test_tasks_change_no_bit_of_the_training(run, finished_run):
    def lines(folder):
        return [
            {name: value for name, value in line.items() if not name.startswith(OTHERWISE)}
            for line in metrics.read(folder)
        ]

    assert lines(run) == lines(finished_run)
    ours, theirs = topklm.load(run), topklm.load(finished_run)
    assert ours.step == theirs.step
    equal = [
        np.array_equal(a, b)
        for a, b in zip(*(jax.tree.leaves(lm.params) for lm in (ours, theirs)), strict=True)
    ]
    assert len(equal) > 5
    assert all(equal)


def test_figures_are_those_of_the_saved_model(run, folder):
    lm = topklm.load(run)
    last = metrics.read(run)[-1]
    model = TextModel(lm.cfg, lm.params, one_device(), lm.tokenizer.separator_id)
    program = scoring.make_program(lm.cfg, one_device(), in_float32=False)
    for task, names in (
        (tasks.find("blimp", folder, 2), {"acc": "blimp", "bits_per_byte": "blimp_bits_per_byte"}),
        (tasks.find("mine", folder, 2), {"acc": "mine", "acc_bytes": "mine_acc_bytes"}),
    ):
        outcome = tasks.tokenize(task, model, lm.tokenizer).evaluate(model, program=program)
        figures = {f.measure: f.estimate().value for f in tasks.figures_of(outcome) if not f.part}
        for measure, name in names.items():
            assert last[f"eval/{name}"] == pytest.approx(figures[measure], rel=1e-6)
    assert last["step"] == lm.step


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"eval.tasks": "blinp"}, "eval.tasks = blinp: there is no such task; did you mean blimp?"),
        (
            {"eval.tasks": "piqa"},
            "eval.tasks = piqa: its data do not ship with topklm; give a folder that holds",
        ),
        ({"eval.tasks": "blimp", "eval.tasks_dir": "nowhere"}, "eval.tasks_dir = nowhere: is no folder"),
        ({"eval.tasks_limit": -1}, "eval.tasks_limit"),
        ({"eval.tasks": "mine", "eval.tasks_dir": "HERE"}, "mine.jsonl: line 1: is no JSON"),
    ],
)
def test_mistakes_show_before_the_data_are_prepared(trainer, tmp_path, settings, said):
    (tmp_path / "mine.jsonl").write_text("text")
    here = {name: str(tmp_path) if value == "HERE" else value for name, value in settings.items()}
    ended = trainer.train(tmp_path / "run", here | {"data.source": tmp_path / "nothing.jsonl"})
    assert ended.exit_code == 2
    assert said in ended.errors
    assert not (tmp_path / "run").exists()


def test_hosts_with_other_files_are_refused(monkeypatch, folder):
    monkeypatch.setattr(evaluation.distributed, "process_count", lambda: 2)
    monkeypatch.setattr(evaluation.distributed, "gather", lambda name, value: [value, "other"])
    with pytest.raises(UserError, match=r"eval\.tasks_dir: processes have other files"):
        evaluation.TaskEvaluation(Config(), [tasks.find("mine", folder)], None, one_device())
