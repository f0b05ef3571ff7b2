"""A new run may begin with the parameters of another: `train.init`."""

import shutil

from helpers import arrays, assert_one_line_error, checkpoint_steps, metrics, sentences, write_documents
import jax
import numpy as np
import pytest

# A step so small that it changes nothing that float32 shows.
ONE_STILL_STEP = {"train.steps": 1, "optim.learning_rate": 1e-20, "optim.warmup_steps": 0}


def refusal(ended):
    assert ended.exit_code == 2, ended.output
    return assert_one_line_error(ended.errors)


def test_a_run_begins_with_the_parameters_of_the_newest_checkpoint(trainer, finished_run, tmp_path):
    run = tmp_path / "run"
    ended = trainer.train(run, {"train.init": finished_run, "train.seed": 5, **ONE_STILL_STEP})
    assert ended.exit_code == 0, ended.errors
    assert f"begun with those of {finished_run}" in ended.output
    saved, begun = arrays(finished_run, checkpoint_steps(finished_run)[-1]), arrays(run, 1)
    jax.tree.map(np.testing.assert_array_equal, saved["params"], begun["params"])
    # The step starts at 0.
    (last,) = (line for line in metrics(finished_run) if line["step"] == 24 and "eval/loss" in line)
    (evaluated,) = (line for line in metrics(run) if "eval/loss" in line)
    assert evaluated["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-6)
    assert evaluated["tokens_seen"] < last["tokens_seen"]


def test_a_base_lm_becomes_a_topk_lm(trainer, finished_run, tmp_path):
    """The same parameters under other settings of TopK: the loss is that of `load` with these."""
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    changes = {"model.n_nontopk": 2, "train.steps": 3, "checkpoint.every_steps": 0}
    assert trainer.train(dense, changes).exit_code == 0
    settings = {"train.init": dense, "model.topk_k": 4, "model.topk_activation": "abs", **ONE_STILL_STEP}
    assert trainer.train(sparse, settings).exit_code == 0
    saved, begun = arrays(dense, 3), arrays(sparse, 1)
    jax.tree.map(np.testing.assert_array_equal, saved["params"], begun["params"])


def test_a_wider_model_begins_as_the_narrow_one(trainer, finished_run, tmp_path):
    run = tmp_path / "run"
    settings = {"train.init": finished_run, "model.d_model": 40, "model.head_dim": 16, **ONE_STILL_STEP}
    ended = trainer.train(run, settings)
    assert ended.exit_code == 0, ended.errors
    saved, begun = (
        arrays(finished_run, checkpoint_steps(finished_run)[-1])["params"],
        arrays(run, 1)["params"],
    )

    def same_corner(path, narrow, wide):
        factor = (32 / 40) ** 0.5 if path[-1].key == "scale" else 1
        corner = wide[tuple(map(slice, narrow.shape))]
        np.testing.assert_allclose(corner, factor * narrow, rtol=1e-6)

    jax.tree_util.tree_map_with_path(same_corner, saved, begun)
    assert np.std(begun["embed"]["embedding"][:, 32:]) == pytest.approx(0.1, rel=0.2)
    assert np.std(begun["blocks"]["mlp"]["gate"]["kernel"][:, 32:]) == pytest.approx(40**-0.5, rel=0.2)
    (last,) = (line for line in metrics(finished_run) if line["step"] == 24 and "eval/loss" in line)
    (evaluated,) = (line for line in metrics(run) if "eval/loss" in line)
    assert abs(evaluated["eval/loss"] - last["eval/loss"]) < 0.2


def test_a_run_that_has_begun_no_longer_needs_the_other(trainer, run_copy, tmp_path):
    settings = {"train.init": run_copy, "train.steps": 2}
    assert trainer.train(tmp_path / "run", settings).exit_code == 0
    shutil.rmtree(run_copy)
    ended = trainer.train(tmp_path / "run", {**settings, "train.steps": 3})
    assert ended.exit_code == 0, ended.errors
    assert checkpoint_steps(tmp_path / "run")[-1] == 3


def test_a_run_without_a_checkpoint_is_refused_before_the_data(trainer, tmp_path):
    line = refusal(
        trainer.train(tmp_path / "run", {"train.init": tmp_path / "none", "data.source": tmp_path / "no.txt"})
    )
    assert (
        line
        == f"error: train.init = {tmp_path / 'none'}: has no checkpoint: train it first, or check the path"
    )


def test_parameters_of_another_shape_are_refused_and_the_fields_named(trainer, finished_run, tmp_path):
    changes = {"model.d_model": 48, "model.n_layers": 3, "model.topk_k": 4, "model.qk_norm": True}
    line = refusal(trainer.train(tmp_path / "run", {"train.init": finished_run, **changes}))
    for words in ("d_model was 32, now 48", "n_layers was 2, now 3", "qk_norm was False, now True"):
        assert f"model.{words}" in line
    assert "topk_k" not in line
    assert not checkpoint_steps(tmp_path / "run")


def test_another_tokenizer_is_refused(trainer, finished_run, tmp_path):
    text = write_documents(tmp_path / "other.jsonl", sentences(9, 300))
    line = refusal(trainer.train(tmp_path / "run", {"train.init": finished_run, "data.source": text}))
    assert f"train.init = {finished_run}: was trained with another tokenizer" in line


def test_a_damaged_run_is_refused(trainer, run_copy, tmp_path):
    newest = run_copy / "checkpoints" / str(checkpoint_steps(run_copy)[-1])
    for file in newest.rglob("*"):
        if file.is_file() and "ocdbt" not in file.name and file.stat().st_size > 1000:
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 255
            file.write_bytes(content)
    line = refusal(trainer.train(tmp_path / "run", {"train.init": run_copy}))
    assert str(run_copy) in line
    assert "damaged" in line
