"""k that falls over the first steps of a run: `train.topk_k_start`."""

import dataclasses
import shutil

from helpers import arrays, metrics
import jax
import numpy as np
import pytest

from topklm.commands import train
from topklm.config import Config, resolve
from topklm.errors import UserError

SCHEDULE = {"train.topk_k_start": 32, "train.topk_k_steps": 6, "checkpoint.every_steps": 4, "train.steps": 8}


def config_of(d_model, k, start, steps):
    model, trained = dataclasses.replace(Config().model, d_model=d_model, topk_k=k), {"topk_k_start": start}
    return resolve({"model": dataclasses.asdict(model), "train": {**trained, "topk_k_steps": steps}})


@pytest.mark.parametrize(
    ("k", "start", "steps"), [(32, 256, 600), (1, 4, 4), (100, 101, 7), (5, 5, 3), (8, 64, 2)]
)
def test_k_falls_in_equal_stages_by_a_factor_of_at_most_sqrt_2(k, start, steps):
    config = config_of(256, k, start, steps)
    found = [config.topk_k_at(step) for step in range(1, steps + 5)]
    assert found[0] == start
    assert found[steps:] == [k] * 4
    assert found == sorted(found, reverse=True)
    lengths = np.unique(found[:steps], return_counts=True)[1]
    assert lengths.max() - lengths.min() <= 1
    if steps > 20:
        ratios = np.array(found[:-1]) / found[1:]
        assert ratios.max() < 2**0.5 * 1.02  # k is a whole number


def test_without_a_schedule_k_is_the_models():
    assert {Config().topk_k_at(step) for step in (1, 2, 10**6)} == {Config().model.topk_k}


def losses(run):
    return {line["step"]: line["train/loss"] for line in metrics(run) if "train/loss" in line}


def test_a_run_goes_through_the_stages_and_resumes_within_one_to_the_same_bits(trainer, tmp_path):
    whole, fixed = tmp_path / "whole", tmp_path / "fixed"
    done = trainer.train(whole, SCHEDULE)
    assert done.exit_code == 0, done.errors
    said = [
        line.split(" in ")[0] for line in done.output.splitlines() if line.startswith("compiled the train")
    ]
    assert said == [f"compiled the train step that keeps {k} neurons" for k in (32, 23, 16, 11, 8)]
    plain = trainer.train(fixed, {"model.topk_k": 32, "train.steps": 8})
    assert plain.exit_code == 0, plain.errors
    # The first stage keeps all, and takes two of six steps; then it is another model.
    assert losses(whole)[1] == losses(fixed)[1]
    assert losses(whole)[2] == losses(fixed)[2]
    assert losses(whole)[6] != losses(fixed)[6]
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints/8")
    resumed = trainer.train(again, SCHEDULE)
    assert "that keeps 16 neurons" in resumed.output
    jax.tree.map(np.testing.assert_array_equal, arrays(again, 8), arrays(whole, 8))
    assert losses(again) == losses(whole)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"train": {"topk_k_start": 16, "topk_k_steps": 9}},
            r"topk_k_start = 16: must be from model.topk_k \(32\)",
        ),
        ({"train": {"topk_k_start": 300, "topk_k_steps": 9}}, r"to model.d_model \(256\)"),
        ({"train": {"topk_k_start": 64}}, "train.topk_k_steps = 0: must be 1 or more"),
        ({"train": {"topk_k_steps": 64}}, "train.topk_k_start = 0: must be from"),
        (
            {"model": {"topk_groups": "128:16,128:16"}, "train": {"topk_k_start": 64, "topk_k_steps": 9}},
            "train.topk_k_start = 64: must be 0 where model.topk_groups is given",
        ),
    ],
    ids=str,
)
def test_a_schedule_that_cannot_be_is_refused(changes, said):
    with pytest.raises(UserError, match=said):
        resolve(changes)


def test_a_run_stands_for_its_config(finished_run, tmp_path):
    config, _ = train.parse([f"--config={finished_run}", "--config.model.topk_k=4", "--workdir=runs/x"])
    saved, _ = train.parse([f"--config={finished_run}"])
    assert (config.model.topk_k, saved.model.topk_k, config.model.d_model) == (4, 8, 32)
    assert config.model.vocab_size == 0
    with pytest.raises(UserError, match="is no run folder"):
        train.parse([f"--config={tmp_path}"])
