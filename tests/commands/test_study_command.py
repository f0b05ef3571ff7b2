"""`topklm study`: its page, runs that it refuses, and one study from runs to verdicts."""

import dataclasses
import json
import os
import signal
import sys

from helpers import ROOT, Process, assert_one_line_error, in_this_process, wait_until
import pytest
import saved_runs

from topklm.eval import claims

TERMINATED = """
import sys, types
from pathlib import Path
from topklm import cli
from topklm.commands import study

# In place of Python that runs a command of the study.
study.sys = types.SimpleNamespace(executable="./command")
cli.dispatch = lambda argv: study._run(study._Command("one", "card", [], False), Path("one.json"), True)
sys.exit(cli.run(["study"]))
"""
SMALL = ("--kinds", "topk", "--sae-tokens", 4000, "--limit", 2, "--tokens", 1500)


@pytest.mark.parametrize(
    ("topk", "base", "words"),
    [
        (["run"], [], "--topk has 1 runs and --base 0"),
        (["run"], ["run"], "run is given twice"),
        (["base"], ["run"], "--topk = base: must be runs with TopK"),
        (["nowhere"], ["base"], "--topk = nowhere: there is no run"),
        (["run"], ["base", "--kinds", "topk,dense"], "--kinds = dense: must be one or more of topk, "),
        (["run"], ["base", "--limit", "0"], "--limit = 0: must be 1 or more"),
        (["run"], ["base", "--conllu", "no.conllu"], "--conllu = no.conllu: there is no such file"),
        (["run", "twin"], ["base", "other"], "RUN = other: is of another model than the first"),
        (["run", "twin"], ["base", "base2"], "--topk has runs of the seeds 0, 0: each must be of another"),
    ],
)
def test_runs_that_cannot_be_compared_end_in_a_line(tmp_path, monkeypatch, topk, base, words):
    monkeypatch.chdir(tmp_path)
    saved_runs.describe(tmp_path / "run")
    no_topk = dataclasses.replace(saved_runs.MODEL, n_nontopk=2)
    saved_runs.describe(tmp_path / "twin")
    for name, seed, width in (("base", 0, 32), ("base2", 1, 32), ("other", 1, 64)):
        model = dataclasses.replace(no_topk, d_mlp=width)
        train = dataclasses.replace(saved_runs.CONFIG.train, seed=seed)
        config = dataclasses.replace(saved_runs.CONFIG, model=model, train=train)
        saved_runs.describe(tmp_path / name, config)
    given = ["--topk", *topk, *(["--base", *base] if base else [])]
    ended = in_this_process("study", "results", *given)
    assert ended.exit_code == 2
    assert words in assert_one_line_error(ended.errors)
    assert not (tmp_path / "results").exists()


def test_several_studies_make_one_page(tmp_path):
    study = {"topk": ["a", "b"], "base": ["c", "d"], "steps": [800, 900], "settings": {"sae_tokens": 7}}
    study["claims"] = claims.judge({}, {"card": "no room"})
    for name in ("wiki", "books"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "claims.json").write_text(json.dumps(study))
    page = tmp_path / "docs" / "claims.md"
    ended = in_this_process("study", tmp_path / "wiki", tmp_path / "books", "--page", page, "--json")
    assert ended.exit_code == 0, ended.errors
    assert set(json.loads(ended.output)["studies"]) == {"wiki", "books"}
    text = page.read_text()
    assert "| claim | wiki | books |" in text
    assert text.count("**wiki: unmeasured**: no room") == 2
    assert (
        "2 TopK LMs and as many Base LMs, one for each seed, after 800, 900 steps; `--sae-tokens 7`" in text
    )
    assert (page.parent / "images" / "claims-books.svg").read_text().startswith("<svg")
    ended = in_this_process("study", tmp_path / "docs")
    assert ended.exit_code == 2
    assert "has no claims.json" in assert_one_line_error(ended.errors)
    (tmp_path / "wiki" / "claims.json").write_text('{"claims": [1]}'.replace("1", "{}"))
    ended = in_this_process("study", tmp_path / "wiki")
    assert ended.exit_code == 2
    assert "holds no claims, or those of another version" in assert_one_line_error(ended.errors)
    ended = in_this_process("study", tmp_path / "wiki", tmp_path / "docs" / ".." / "wiki")
    assert "two have one name" in assert_one_line_error(ended.errors)


@pytest.mark.slow
def test_a_study_measures_every_claim_and_nothing_twice(tmp_path, trainer):
    for name, n_nontopk, seed in (("topk0", 1, 0), ("base0", 2, 0), ("topk1", 1, 1), ("base1", 2, 1)):
        # Sentences of BLiMP need some context.
        of_run = {"model.n_nontopk": n_nontopk, "train.seed": seed, "model.context_length": 128}
        ended = trainer.run(tmp_path / name, of_run)
        assert ended.exit_code == 0, ended.errors
    of = [tmp_path / name for name in ("topk0", "topk1", "base0", "base1")]
    given = ["study", tmp_path / "small", "--topk", *of[:2], "--base", *of[2:], *SMALL]
    ended = in_this_process(*given)
    assert ended.exit_code == 0, ended.errors
    study = json.loads((tmp_path / "small" / "claims.json").read_text())
    words = {one["claim"]: (one["verdict"], one["why"]) for one in study["claims"]}
    assert "unmeasured" not in {verdict for verdict, _ in words.values()}, words
    figures = [figure for one in study["claims"] for figure in one["figures"]]
    assert all(len(figure["ours"]) == 2 for figure in figures)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "small").glob("*-?.json")}
    assert in_this_process(*given).exit_code == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_sigterm_ends_the_command_that_a_study_runs_too(tmp_path):
    script = tmp_path / "command"
    script.write_text("#!/bin/sh\necho $$ > pid.new\nmv pid.new pid\nexec sleep 600\n")
    script.chmod(0o700)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = Process([sys.executable, "-c", TERMINATED], cwd=tmp_path, env=environment)
    assert wait_until((tmp_path / "pid").exists, process)
    process.signal(signal.SIGTERM)
    assert process.finish() == 143
    assert process.errors == "SIGTERM: what was saved before stays\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
