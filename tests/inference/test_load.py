import json
import shutil
import subprocess
import sys

from helpers import STEPS, arrays, assert_same_bits
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import topklm
from topklm import sharding
from topklm.config import MeshConfig, from_json
from topklm.data.tokenizer import train_bpe
from topklm.errors import UserError


@pytest.fixture(scope="module")
def model(finished_run):
    return topklm.load(finished_run)


def test_the_newest_checkpoint_is_loaded_with_its_config_and_tokenizer(model, finished_run):
    assert model.step == STEPS
    assert model.run == str(finished_run)
    assert model.config == from_json((finished_run / "config.json").read_text())
    assert model.config.model.vocab_size == model.tokenizer.vocab_size == 320


def test_a_model_says_in_one_line_what_it_is(model, finished_run):
    shape = "2 layers of width 32, vocabulary 320, TopK keeps 8 in 1 layers"
    assert repr(model) == f"LanguageModel({finished_run}, step {STEPS}: {shape})"


def test_the_parameters_are_those_of_the_checkpoint(model, finished_run):
    assert_same_bits(model.params, arrays(finished_run, STEPS)["params"])


def test_an_earlier_step_is_loaded_when_asked_for(model, finished_run):
    earlier = topklm.load(str(finished_run), step=10)
    assert earlier.step == 10
    assert_same_bits(earlier.params, arrays(finished_run, 10)["params"])
    assert not np.array_equal(earlier.params["embed"]["embedding"], model.params["embed"]["embedding"])


def test_parameters_live_on_the_first_device_or_on_the_mesh_that_is_given(model, finished_run):
    for leaf in jax.tree.leaves(model.params):
        assert leaf.devices() == {jax.devices()[0]}
    mesh = sharding.make_mesh(MeshConfig())
    on_mesh = topklm.load(finished_run, mesh=mesh)
    assert_same_bits(on_mesh.params, model.params)
    assert on_mesh.params["embed"]["embedding"].sharding.mesh == mesh


def test_a_run_is_found_under_a_relative_path(model, finished_run, monkeypatch):
    monkeypatch.chdir(finished_run.parent)
    assert_same_bits(topklm.load(finished_run.name).params, model.params)


def test_a_run_copied_elsewhere_is_complete(model, run_copy, finished_run):
    copy = topklm.load(run_copy)
    assert copy.run == str(run_copy)
    assert_same_bits(copy.params, model.params)
    assert copy.generate("The old", 5, seed=1) == model.generate("The old", 5, seed=1)


def test_the_optimizer_is_not_needed(model, run_copy):
    for item in ("optimizer", "data"):
        shutil.rmtree(run_copy / "checkpoints" / str(STEPS) / item)
    assert_same_bits(topklm.load(run_copy).params, model.params)


def test_loading_says_nothing(finished_run):
    script = f"import topklm; topklm.load({str(finished_run)!r})"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout + loaded.stderr == ""


def test_loading_changes_nothing(run_copy):
    def files():
        return {path: path.stat().st_mtime_ns for path in run_copy.rglob("*")}

    before = files()
    topklm.load(run_copy)
    assert files() == before


def test_a_step_that_is_not_there_is_refused_with_those_that_are(finished_run):
    with pytest.raises(UserError, match=r"step = 6: .* has checkpoints 5, 10, 15, 20, 24"):
        topklm.load(finished_run, step=6)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"{folder} is not a run folder"):
            topklm.load(folder)


def test_a_run_without_a_complete_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(UserError, match="no complete checkpoint yet"):
        topklm.load(tmp_path)


def test_a_missing_tokenizer_is_named(run_copy):
    (run_copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing: copy the whole run folder"):
        topklm.load(run_copy)


def damage(path):
    path.write_text("{}")


@pytest.mark.parametrize("other", [train_bpe(["some other text"] * 10, 320).save, damage])
def test_another_tokenizer_is_refused(run_copy, other):
    other(run_copy / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json is not the tokenizer that this model"):
        topklm.load(run_copy)


def test_parameters_that_do_not_fit_the_config_are_named(run_copy):
    facts = run_copy / "checkpoints" / str(STEPS) / "facts" / "metadata"
    content = json.loads(facts.read_text())
    content["config"]["model"]["d_mlp"] = 96
    facts.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"checkpoint 24 .*blocks\.mlp\.down\.kernel is \[2, 64, 32\]"):
        topklm.load(run_copy)


def test_a_run_from_before_the_vocabulary_was_padded_is_loaded(model, run_copy):
    step = run_copy / "checkpoints" / str(STEPS)
    facts = json.loads((step / "facts" / "metadata").read_text())
    del facts["config"]["model"]["vocab_multiple"]
    (step / "facts" / "metadata").write_text(json.dumps(facts))
    bare = jax.tree.map(np.asarray, model.params)
    bare["embed"] = {"embedding": bare["embed"]["embedding"][:320]}
    bare["unembed"] = {"kernel": bare["unembed"]["kernel"][:, :320]}
    shutil.rmtree(step / "params")
    ocp.PyTreeCheckpointer().save(step / "params", bare)
    old = topklm.load(run_copy)
    assert_same_bits(old.params, bare)
    np.testing.assert_allclose(old("The old baker"), model("The old baker"), rtol=1e-5, atol=1e-5)
    assert old.generate("The old", 5, seed=1) == model.generate("The old", 5, seed=1)


def test_a_text_becomes_tokens_behind_the_separator_and_back(model):
    tokens = model.to_tokens("The old baker")
    assert (tokens.dtype, tokens.shape[0]) == (np.int32, 1)
    assert tokens[0, 0] == model.tokenizer.separator_id
    assert "".join(model.to_str_tokens("The old baker")) == "<|endoftext|>The old baker"
    assert "".join(model.to_str_tokens("The old baker", prepend_separator=False)) == "The old baker"


def test_logits_of_a_text_are_those_of_its_tokens(model):
    logits = model("The old baker")
    tokens = model.to_tokens("The old baker")
    assert (logits.dtype, logits.shape) == (np.float32, (*tokens.shape, 320))
    assert_same_bits(logits, model(np.asarray(tokens)))
    assert_same_bits(logits, model(np.asarray(tokens).tolist()))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([1, 2, 3], r"must be \[B, T\]"), ([[320]], "from 0 to 319"), ([[-1]], "from 0 to 319")],
)
def test_tokens_that_make_no_sense_are_refused(model, tokens, message):
    with pytest.raises(ValueError, match=message):
        model(tokens)
