"""`topklm export` and `topklm import`: from a run to a folder, and back to a run that can be used."""

import json

from helpers import assert_one_line_error, in_this_process
import numpy as np
import pytest

import topklm
from topklm.checkpoint import run_folder


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "made"
    done = in_this_process("export", str(finished_run), "--out", str(out))
    assert done.exit_code == 0, done.errors
    return out, done.output


@pytest.fixture(scope="module")
def imported(exported, tmp_path_factory):
    run = tmp_path_factory.mktemp("import") / "run"
    done = in_this_process("import", str(exported[0]), "--out", str(run))
    assert done.exit_code == 0, done.errors
    return run


def test_the_card_and_the_output_say_what_it_is_and_how_to_open_it(finished_run, exported):
    out, output = exported
    assert f'from_pretrained("{out}", trust_remote_code=True)' in output
    card = (out / "README.md").read_text()
    metrics = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    bits = [line["eval/bits_per_byte"] for line in metrics if "eval/bits_per_byte" in line][-1]
    assert f"| held-out bits per byte | {bits:.4f} (after step 24) |" in card
    assert "| TopK | keeps 8 of 32 in 1 of 2 layers |" in card


def test_a_run_that_went_out_and_came_back_is_the_same_model(finished_run, imported):
    ours, again = topklm.load(finished_run), topklm.load(imported)
    assert again.step == ours.step
    assert again.config == ours.config
    assert again.tokenizer.to_bytes() == ours.tokenizer.to_bytes()
    np.testing.assert_array_equal(again("the river"), ours("the river"))
    # Another step, and a second export: the same files.
    assert in_this_process("generate", str(imported), "the", "--max-new-tokens", "3").exit_code == 0
    harvest = in_this_process("neurons", "harvest", str(imported), "--tokens", "300")
    assert harvest.exit_code == 0, harvest.errors


def test_exporting_an_import_gives_the_same_files(exported, imported, tmp_path):
    assert in_this_process("export", str(imported), "--out", str(tmp_path / "again")).exit_code == 0
    for name in ("model.safetensors", "tokenizer.json", "generation_config.json", "modeling_topklm.py"):
        assert (tmp_path / "again" / name).read_bytes() == (exported[0] / name).read_bytes()


def test_training_begins_with_an_import_and_does_not_continue_it(trainer, imported, tmp_path):
    process = trainer.train(imported, {"train.steps": 30})
    assert process.exit_code == 2
    assert "--config.train.init=" in assert_one_line_error(process.errors)
    assert not run_folder.has_checkpoint(tmp_path)
    begun = trainer.train(tmp_path / "run", {"train.init": imported, "train.steps": 2, "model.topk_k": 4})
    assert begun.exit_code == 0, begun.errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "{run}", "--out", "{run}"], "exists: give a folder that is to be made"),
        (["export", "nowhere", "--out", "{new}"], "nowhere"),
        (["export", "{run}", "--out", "{new}", "--step", "7"], "has checkpoints"),
        (["export", "{run}", "--out", "{new}", "--format", "delphi"], "harvest"),
        (["export", "{run}", "--out", "gs://b/x"], "must be a local path"),
        (["export", "{run}", "--out", "{new}", "--format", "gguf"], "--format"),
        (["import", "{run}", "--out", "{new}"], "no model_type: it is a run of topklm already"),
        (["show", "{made}"], "is a model in Hugging Face's format, no run: make a run of it: topklm import"),
        (["train", "--config={made}"], "is a model in Hugging Face's format, no run"),
        (["import", "nowhere", "--out", "{new}"], "has no config.json"),
        (["import", "{made}", "--out", "{run}"], "exists"),
        (["import", "{made}", "--out", "{new}", "--tokenizer", "nowhere.json"], "nowhere.json"),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(
    arguments, said, finished_run, exported, tmp_path
):
    places = {"run": finished_run, "made": exported[0], "new": tmp_path / "new"}
    done = in_this_process(*(word.format(**places) for word in arguments))
    assert done.exit_code == 2
    assert said in assert_one_line_error(done.errors)
    assert not list(tmp_path.iterdir())
