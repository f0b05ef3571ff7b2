import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys

from etils import epath
from helpers import ROOT, STEPS, arrays, assert_same_bits, coordinator_port, devices
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import saved_runs

import topklm
from topklm.config import MeshConfig, from_saved
from topklm.data.tokenizer import train_bpe
from topklm.errors import UserError
from topklm.layout import make_layout
from topklm.model import transformer


@pytest.fixture(scope="module")
def model(finished_run):
    return topklm.load(finished_run)


def test_the_newest_checkpoint_is_loaded_with_its_config_and_tokenizer(model, finished_run):
    assert model.step == STEPS
    assert model.run == str(finished_run)
    assert model.config == from_saved(json.loads((finished_run / "config.json").read_text()))
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
    mesh = make_layout(MeshConfig()).mesh
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
    saved_runs.make_earlier_version(run_copy / "checkpoints" / str(STEPS))
    with pytest.raises(UserError, match=r"checkpoint 24 .*blocks\.mlp\.down\.kernel is \[2, 64, 32\]"):
        topklm.load(run_copy)


def test_every_weight_that_does_not_fit_is_named_in_one_line(tmp_path):
    saved_runs.save(tmp_path, [5])
    params = tmp_path / "checkpoints" / "5" / "params"
    tree = arrays(tmp_path, 5)["params"]
    del tree["embed"]["embedding"]
    del tree["blocks"]["mlp"]["up"]
    tree["extra"] = np.zeros(3, np.float32)
    tree["unembed"]["kernel"] = tree["unembed"]["kernel"][:, :100]
    shutil.rmtree(params)
    ocp.PyTreeCheckpointer().save(params, tree)
    saved_runs.make_earlier_version(tmp_path / "checkpoints" / "5")
    with pytest.raises(UserError) as refused:
        topklm.load(tmp_path)
    for problem in (
        "embed.embedding is missing",
        "blocks.mlp.up.kernel is missing",
        "extra is not part of this model",
        "unembed.kernel is [32, 100], this model needs [32, 384]",
    ):
        assert problem in str(refused.value)


# Damage.


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A run folder with the steps 5 and 10, and their parameters; not to be changed."""
    folder = tmp_path_factory.mktemp("two")
    return folder, saved_runs.save(folder, [5, 10])


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_the_first_byte(path):
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 0x10]) + content[1:])


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), cut_in_half, change_the_first_byte])
def test_damage_is_named_with_an_older_checkpoint_or_does_no_harm(tmp_path, two_checkpoints, harm):
    original, saved = two_checkpoints
    folder = tmp_path / "run"
    shutil.copytree(original, folder)
    step = folder / "checkpoints" / "10"
    names = [p.relative_to(step) for item in ("params", "facts") for p in (step / item).rglob("*")]
    refusal = rf"checkpoint 10 of {folder} is damaged or incomplete \(.*\): load an older one, e\.g\. step=5$"
    n_refused = 0
    for name in filter(lambda name: (step / name).is_file(), names):
        content = (step / name).read_bytes()
        harm(step / name)
        try:
            assert_same_bits(topklm.load(folder).params, saved[10])
        except UserError as refused:
            n_refused += 1
            assert re.match(refusal, str(refused)), name
        (step / name).write_bytes(content)
    assert n_refused >= 4
    assert_same_bits(topklm.load(folder, step=5).params, saved[5])


def test_one_changed_bit_anywhere_in_the_arrays_is_found(tmp_path, two_checkpoints):
    original, saved = two_checkpoints
    folder = tmp_path / "run"
    shutil.copytree(original, folder)
    step = folder / "checkpoints" / "10"
    assert_same_bits(topklm.load(folder).params, saved[10])
    n_refused = 0
    for path in (path for path in (step / "params").rglob("d/*") if path.stat().st_size > 1000):
        content = path.read_bytes()
        for place in np.linspace(100, len(content) - 100, 5).astype(int):
            path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            try:
                assert_same_bits(topklm.load(folder).params, saved[10])
            except UserError as refused:
                n_refused += 1
                assert "checkpoint 10" in str(refused)
        path.write_bytes(content)
    assert n_refused >= 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.topk_k", 9),
        ("model.topk_activation", "abs"),
        ("model.n_nontopk", 2),
        ("model.rope_theta", 10001.0),
        ("model.norm_eps", 1e-4),
        ("model.vocab_size", 256),
        ("train.batch_size", 3),
    ],
)
def test_facts_that_name_another_model_are_damage(tmp_path, two_checkpoints, field, value):
    folder = shutil.copytree(two_checkpoints[0], tmp_path / "run")
    facts = folder / "checkpoints" / "10" / "facts" / "metadata"
    content = json.loads(facts.read_text())
    section, _, name = field.partition(".")
    assert content["config"][section][name] != value
    content["config"][section][name] = value
    facts.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"checkpoint 10 of .* is damaged .*facts: checksum.*step=5"):
        topklm.load(folder)


@pytest.mark.parametrize("content", [None, "{}", "[]", "null", '{"arrays": {}}', "[" * 100_000])
def test_a_record_that_is_missing_or_says_nothing_is_damage(tmp_path, two_checkpoints, content):
    folder = shutil.copytree(two_checkpoints[0], tmp_path / "run")
    record = folder / "checkpoints" / "10" / "facts" / "checksums.json"
    record.unlink()
    if content is not None:
        record.write_text(content)
    with pytest.raises(UserError, match=r"checkpoint 10 of .* is damaged"):
        topklm.load(folder)


@pytest.mark.parametrize("config", [[], None, 1, "x", {"model": []}, {"model": {"d_model": None}}])
def test_facts_of_an_earlier_version_without_a_config_are_one_line(tmp_path, two_checkpoints, config):
    folder = shutil.copytree(two_checkpoints[0], tmp_path / "run")
    facts = folder / "checkpoints" / "10" / "facts" / "metadata"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "config": config}))
    saved_runs.make_earlier_version(folder / "checkpoints" / "10")
    with pytest.raises(UserError, match="checkpoint 10 of"):
        topklm.load(folder)


def test_a_checkpoint_of_an_earlier_version_is_loaded_without_its_record(tmp_path, two_checkpoints):
    folder = shutil.copytree(two_checkpoints[0], tmp_path / "run")
    saved_runs.make_earlier_version(folder / "checkpoints" / "10")
    assert_same_bits(topklm.load(folder).params, two_checkpoints[1][10])


def test_the_path_of_a_checkpoint_is_answered_with_that_of_its_run(two_checkpoints):
    folder = two_checkpoints[0]
    with pytest.raises(UserError, match=rf"not a run folder: give {folder}, with step=10$"):
        topklm.load(folder / "checkpoints" / "10")


@pytest.mark.parametrize(
    "name",
    ["C#", "50%", "a%20b", "what?", "a|b", "back\\slash", "a b", "%2e%2e", "é名", "a:b@c", "[x]{y}", "~"],
)
def test_a_run_is_saved_and_loaded_under_any_name(tmp_path, name):
    saved = saved_runs.save(tmp_path / name / "run", [5])
    assert_same_bits(topklm.load(tmp_path / name / "run").params, saved[5])


def test_the_only_checkpoint_being_damaged_is_said(tmp_path):
    saved_runs.save(tmp_path, [5])
    (tmp_path / "checkpoints" / "5" / "params" / "manifest.ocdbt").unlink()
    with pytest.raises(UserError, match=r"checkpoint 5 of .* is damaged .*: there is no older one"):
        topklm.load(tmp_path)


def test_folders_that_are_no_checkpoints_are_passed_over(tmp_path):
    saved = saved_runs.save(tmp_path, [5])
    for name in ("10.orbax-checkpoint-tmp", "15.orbax-checkpoint-tmp-17", "20.damaged-1", "tmp", "+25"):
        shutil.copytree(tmp_path / "checkpoints" / "5", tmp_path / "checkpoints" / name)
    model = topklm.load(tmp_path)
    assert model.step == 5
    assert_same_bits(model.params, saved[5])


# Elsewhere.


SAVES_AS_ONE_OF_MANY = """
import sys

sys.path.insert(0, sys.argv[1])
import saved_runs
from topklm import distributed
from topklm.layout import make_layout
from topklm.checkpoint import run_folder
from topklm.config import MeshConfig
from topklm.checkpoint.manager import CheckpointManager
from topklm.storage.files import as_path

with distributed.session():
    layout = make_layout(MeshConfig(data=1, fsdp=4, tensor=2))
    state = saved_runs.state(7, layout=layout)
    folder = as_path(sys.argv[2]) / run_folder.CHECKPOINTS_FOLDER
    checkpoints = CheckpointManager(folder, saved_runs.CONFIG.checkpoint)
    checkpoints.save(state, {"position": 7}, saved_runs.facts(7))
    checkpoints.wait()
    checkpoints.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("n_processes", [2, 4])
def test_what_many_processes_of_eight_devices_saved_is_loaded_onto_one(tmp_path, trainer, n_processes):
    saved_runs.describe(tmp_path)
    environment = {
        **devices(8 // n_processes),
        "TOPKLM_COORDINATOR": f"127.0.0.1:{coordinator_port()}",
        "TOPKLM_PROCESS_COUNT": str(n_processes),
    }
    processes = [
        trainer.start_python(
            "-c",
            SAVES_AS_ONE_OF_MANY,
            str(ROOT / "tests"),
            str(tmp_path),
            environment=environment | {"TOPKLM_PROCESS_ID": str(i)},
        )
        for i in range(n_processes)
    ]
    for process in processes:
        assert process.finish() == 0, process.errors
    model = topklm.load(tmp_path)
    assert model.step == 7
    for leaf in jax.tree.leaves(model.params):
        assert leaf.devices() == {jax.devices()[0]}
    assert_same_bits(model.params, jax.tree.map(np.array, saved_runs.state(7).params))


MEASURES_MEMORY = """
import json, resource, sys
import jax
import topklm

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

topklm.load(sys.argv[1])  # a small one: what loading itself takes is not of the parameters
before = peak_bytes()
model = topklm.load(sys.argv[2])
held = sum(x.nbytes for x in jax.tree.leaves(model.params))
print(json.dumps({"parameters": held, "taken": peak_bytes() - before}))
"""


def test_loading_takes_little_more_memory_than_the_parameters(tmp_path):
    saved_runs.save(tmp_path / "small", [1])
    shape = {"d_model": 768, "n_layers": 4, "n_heads": 12, "n_kv_heads": 12, "d_mlp": 2048}
    model = dataclasses.replace(saved_runs.MODEL, **shape, vocab_size=8192)
    config = dataclasses.replace(saved_runs.CONFIG, model=model)
    saved_runs.describe(tmp_path / "large", config)
    step = epath.Path(tmp_path / "large" / "checkpoints" / "1")
    step.mkdir(parents=True)
    draw = functools.partial(np.random.default_rng(0).standard_normal, dtype=np.float32)
    abstract = jax.eval_shape(functools.partial(transformer.create, model, 0))
    params = jax.tree.map(lambda leaf: draw(leaf.shape), abstract)
    # As training saves them: a chunk is read whole, and held twice where it is compressed.
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=16 * 2**20), params)
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)
    ocp.Checkpointer(handler).save(step / "params", ocp.args.PyTreeSave(params, save_args=chunks))
    facts = saved_runs.facts(1, config)
    ocp.Checkpointer(ocp.JsonCheckpointHandler()).save(step / "facts", facts)
    del params
    command = [sys.executable, "-c", MEASURES_MEMORY, str(tmp_path / "small"), str(tmp_path / "large")]
    measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert measured["parameters"] > 150e6
    assert measured["taken"] <= 1.2 * measured["parameters"]


def test_a_run_from_before_the_vocabulary_was_padded_is_loaded(model, run_copy):
    step = run_copy / "checkpoints" / str(STEPS)
    facts = json.loads((step / "facts" / "metadata").read_text())
    del facts["config"]["model"]["vocab_multiple"]
    (run_copy / "config.json").write_text(json.dumps(facts["config"]))
    (step / "facts" / "metadata").write_text(json.dumps(facts))
    saved_runs.make_earlier_version(step)
    bare = jax.tree.map(np.asarray, model.params)
    bare["embed"] = {"embedding": bare["embed"]["embedding"][:320]}
    bare["unembed"] = {"kernel": bare["unembed"]["kernel"][:, :320]}
    shutil.rmtree(step / "params")
    ocp.PyTreeCheckpointer().save(step / "params", bare)
    old = topklm.load(run_copy)
    assert_same_bits(old.params, bare)
    np.testing.assert_allclose(old("The old baker"), model("The old baker"), rtol=1e-5, atol=1e-5)
    assert old.generate("The old", 5, seed=1) == model.generate("The old", 5, seed=1)


def test_a_checkpoint_is_loaded_in_the_dtype_that_is_asked_for(finished_run, model):
    found = topklm.load(finished_run, dtype="bfloat16")
    assert found.cfg == dataclasses.replace(model.cfg, dtype="bfloat16")
    assert_same_bits(found.params, model.astype("bfloat16").params)
    assert found.params["embed"]["embedding"].dtype.name == "bfloat16"
    with pytest.raises(UserError, match="dtype = 'float16': must be one of float32, bfloat16"):
        topklm.load("nowhere", dtype="float16")


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
    [(1, r"must be .*\[T\] or \[B, T\]"), ([[320]], "from 0 to 319"), ([[-1]], "from 0 to 319")],
)
def test_tokens_that_make_no_sense_are_refused(model, tokens, message):
    with pytest.raises(ValueError, match=message):
        model(tokens)
