import json
import os
import shutil
import signal
import subprocess
import sys

from helpers import (
    CONFIG_FILE,
    STEPS,
    arrays,
    assert_one_line_error,
    assert_same_bits,
    checkpoint_steps,
    devices,
    sentences,
    write_documents,
)
from making import rewrite_description
import pytest
import saved_runs

import topklm
from topklm import cli, errors
from topklm.checkpoint import manager
from topklm.data.tokenizer import train_bpe

# The trainer with little patience for storage that fails, and a limit on the size of its files: `SCRIPT BYTES
# FLAGS...`.
WITH_A_FILE_SIZE_LIMIT = """
import resource, sys
from topklm import main
from topklm.checkpoint import manager

manager.PATIENCE = manager.Patience(while_training_s=2.0, at_end_s=2.0)
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(main.run())
"""


@pytest.fixture
def refusal(capsys, monkeypatch):
    """Runs the trainer in this process and returns the one line with which it must refuse."""
    monkeypatch.setenv("TOPKLM_ALLOCATOR", "system")

    def run(arguments):
        capsys.readouterr()
        assert errors.guarded(lambda: cli.dispatch(["train", *map(str, arguments)])) == 2
        return assert_one_line_error(capsys.readouterr().err)

    return run


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.modl.d_model=32", ["modl", "did you mean config.model?"]),
        ("--config.model.topk=8", ["topk", "did you mean config.model.topk_k?"]),
        ("--config.model.topk_k=eight", ["--config.model.topk_k=eight"]),
        ("--config.model.topk_k=1.5", ["--config.model.topk_k=1.5"]),
        ("--config.model.tie_embeddings=perhaps", ["--config.model.tie_embeddings=perhaps"]),
        ("--config.optim.learning_rate=fast", ["--config.optim.learning_rate=fast"]),
        ("--config.optim.learning_rate=nan", ["optim.learning_rate = nan", "finite"]),
        ("--config.model.topk_k=0", ["model.topk_k = 0", "from 1 to model.d_model (32)"]),
        ("--config.model.topk_groups=8:2;24:6", ["model.topk_groups = '8:2;24:6'", "WIDTH:K"]),
        ("--config.model.topk_groups=8:9,24:1", ["of 8 neurons 9 cannot be kept"]),
        ("--config.model.topk_groups=8:2,8:2", ["holds 16 neurons", "model.d_model (32)"]),
        ("--config.model.topk_groups=8:2,24:1", ["keeps 3 neurons", "model.topk_k ("]),
        ("--config.model.topk_k=33", ["model.topk_k = 33", "from 1 to model.d_model (32)"]),
        ("--config.model.n_nontopk=0", ["model.n_nontopk = 0", "from 1 to model.n_layers (2"]),
        ("--config.model.n_nontopk=3", ["model.n_nontopk = 3", "from 1 to model.n_layers (2"]),
        ("--config.model.n_heads=3", ["model.n_heads = 3", "divisor of model.d_model (32)"]),
        ("--config.model.n_heads=0", ["model.n_heads = 0", "1 or more"]),
        ("--config.model.n_heads=32", ["model.n_heads = 32", "is even"]),
        ("--config.model.head_dim=3", ["model.head_dim = 3", "even"]),
        ("--config.model.n_kv_heads=3", ["model.n_kv_heads = 3", "divisor of model.n_heads (2)"]),
        ("--config.model.topk_activation=gelu", ["model.topk_activation = 'gelu'", "relu, identity, abs"]),
        ("--config.train.grad_accumulation=3", ["train.batch_size = 4", "train.grad_accumulation (3)"]),
        ("--config.train.steps=0", ["train.steps = 0", "1 or more"]),
        ("--config.data.vocab_size=100", ["data.vocab_size = 100", "257 or more"]),
        ("--config.model.vocab_size=100", ["model.vocab_size = 100", "or the tokenizer's 320"]),
        ("--config.mesh.data=0", ["mesh.data = 0", "-1"]),
        ("--config.mesh.fsdp=3", ["mesh data=-1 fsdp=3 context=1 tensor=1", "multiply"]),
        ("--config.data.source=nowhere/*.txt", ["data.source", "nowhere/*.txt", "matches no file"]),
        ("--config.data.text_field=body", ["no text in", "data.text_field", "line 1", "no 'body' in 'text'"]),
        ("--config.model.context_length=1000000", ["model.context_length = 1000000", "at most"]),
        ("--wrkdir=here", ["wrkdir", "did you mean --workdir?"]),
        ("surplus", ["'surplus' is not a flag"]),
        (f"--config={CONFIG_FILE}:nonsense", ["nonsense", "the variants are topk, base"]),
        ("--config=configs/missing.py", ["--config = configs/missing.py", "no such file", "paper, small"]),
        ("--config=smal", ["--config = smal: there is no such file", "books, paper, small"]),
        ("--config=", ["--config = "]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_that_names_it(trainer, refusal, tmp_path, flag, words):
    line = refusal([*trainer.arguments(tmp_path / "run"), flag])
    for word in words:
        assert word in line


def test_a_config_file_that_is_not_python_is_named(refusal, tmp_path):
    (tmp_path / "notes.txt").write_text("\nmy notes")
    assert f"{tmp_path / 'notes.txt'}, line 2" in refusal([f"--config={tmp_path / 'notes.txt'}"])


def test_a_misspelt_field_inside_a_config_file_is_named(refusal, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from topklm import config\n\n"
        "def get_config(variant=None):\n"
        "    mine = config.default()\n"
        "    mine.model.d_modl = 64\n"
        "    return mine\n"
    )
    line = refusal([f"--config={file}"])
    assert "config.model.d_modl is not a field; did you mean d_model?" in line


def test_a_file_without_text_is_named(trainer, refusal, tmp_path):
    empty = write_documents(tmp_path / "empty.jsonl", ["", "  \n"])
    line = refusal(trainer.arguments(tmp_path / "run", {"data.source": empty}))
    assert "no text" in line
    assert str(empty) in line


def test_a_file_in_the_way_of_the_run_folder_is_named(trainer, refusal, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        line = refusal(trainer.arguments(folder))
        assert f"run folder {folder}" in line
        assert "choose another path" in line
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_in_the_way_of_the_datasets_is_named(trainer, refusal, tmp_path):
    (tmp_path / "file").write_text("mine")
    line = refusal(trainer.arguments(tmp_path / "run", {"data.dir": tmp_path / "file"}))
    assert "preparing the data" in line
    assert str(tmp_path / "file") in line


def test_each_field_that_would_make_it_another_run_is_named(trainer, refusal, run_copy):
    before = (run_copy / "config.json").read_bytes()
    changes = {"model.topk_k": 4, "optim.learning_rate": 0.5, "train.seed": 7, "eval.every_steps": 9}
    line = refusal(trainer.arguments(run_copy, changes))
    assert str(run_copy) in line
    assert "model.topk_k was 8, now 4" in line
    assert "optim.learning_rate was 0.003, now 0.5" in line
    assert "train.seed was 0, now 7" in line
    assert "eval" not in line.replace(str(run_copy), "")  # may change
    assert (run_copy / "config.json").read_bytes() == before


def test_other_data_than_the_run_began_with_is_refused(trainer, refusal, run_copy):
    train_bpe(sentences(3, 300), 320).save(run_copy / "tokenizer.json")
    line = refusal(trainer.arguments(run_copy))
    assert f"{run_copy / 'tokenizer.json'} is not the tokenizer of the data" in line


def test_a_run_goes_on_with_its_data_elsewhere_and_not_with_other_data(
    trainer, refusal, finished_run, run_copy, tmp_path
):
    (dataset,) = (finished_run.parent / "datasets").glob("village-*")
    moved = shutil.copytree(dataset, tmp_path / "moved")
    finished = trainer.train(run_copy, {"data.source": moved})
    assert finished.exit_code == 0, finished.errors
    assert "is finished at step 24" in finished.output

    rewrite_description(moved, lambda description: description.update(fingerprint="0" * 64))
    line = refusal(trainer.arguments(run_copy, {"data.source": moved, "train.steps": STEPS + 1}))
    assert f"not the data that {run_copy} was trained on" in line
    assert "fingerprint 000000000000" in line


def test_a_run_that_saved_nothing_may_start_over_with_another_config(trainer, refusal, tmp_path):
    arguments = trainer.arguments(tmp_path / "run", {"model.context_length": 1_000_000})
    assert "model.context_length" in refusal(arguments)
    # The next mistake is reported, not that the first one was mended.
    arguments = trainer.arguments(tmp_path / "run", {"model.context_length": 2_000_000})
    assert "model.context_length = 2000000" in refusal(arguments)


def test_a_checkpoint_of_another_model_is_refused_and_its_arrays_are_named(trainer, refusal, run_copy):
    config = json.loads((run_copy / "config.json").read_text())
    config["model"]["d_mlp"] = 96
    (run_copy / "config.json").write_text(json.dumps(config))
    line = refusal(trainer.arguments(run_copy, {"model.d_mlp": 96, "train.steps": STEPS + 1}))
    assert "checkpoint 24 of" in line
    assert "holds another model" in line
    assert "blocks.mlp.down.kernel is [2, 64, 32], this model needs [2, 96, 32]" in line
    assert "blocks.mlp.up.kernel" in line
    assert "attention" not in line


def test_a_checkpoint_with_another_tokenizer_is_refused(trainer, refusal, run_copy):
    facts = run_copy / "checkpoints" / str(STEPS) / "facts" / "metadata"
    content = json.loads(facts.read_text())
    facts.write_text(json.dumps({**content, "tokenizer_sha256": "0" * 64}))
    # With a record, the checkpoint would be taken for damaged.
    saved_runs.make_earlier_version(run_copy / "checkpoints" / str(STEPS))
    line = refusal(trainer.arguments(run_copy, {"train.steps": STEPS + 1}))
    assert "checkpoint 24" in line
    assert "another tokenizer" in line


def test_a_config_json_that_is_damaged_is_named(trainer, refusal, run_copy):
    (run_copy / "config.json").write_text('{"model"')
    line = refusal(trainer.arguments(run_copy))
    assert str(run_copy / "config.json") in line
    assert "is damaged" in line


def test_a_folder_that_another_process_uses_is_refused(trainer, refusal, tmp_path):
    owner = trainer.start(tmp_path / "run")
    try:
        owner.wait_for_line("data:")
        owner.signal(signal.SIGSTOP)
        line = refusal(trainer.arguments(tmp_path / "run"))
        assert f"run folder {tmp_path / 'run'} is in use by process {owner.pid}" in line
    finally:
        owner.kill()


def test_a_mistake_ends_the_process_with_code_2_and_one_line(trainer, tmp_path):
    process = trainer.run(tmp_path / "run", {"model.topk_k": 0})
    assert process.exit_code == 2
    assert "model.topk_k = 0" in assert_one_line_error(process.errors)
    assert process.output == ""
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_mesh_cannot_split_is_refused(trainer, tmp_path):
    settings = {"mesh.data": 4, "mesh.fsdp": 2}
    process = trainer.run(tmp_path / "run", settings, environment=devices(8))
    assert process.exit_code == 2
    line = assert_one_line_error(process.errors)
    assert "train.batch_size = 4: must be a multiple of 8 (mesh data 4 x fsdp 2" in line


def test_invalid_utf8_is_counted_replaced_and_trained_on(finished_run):
    output = finished_run.with_suffix(".out").read_text()
    assert "data: replaced 2 invalid UTF-8 sequences in 1 documents with U+FFFD" in output
    assert checkpoint_steps(finished_run)[-1] == STEPS


def test_a_full_disk_while_data_is_prepared_leaves_nothing_that_looks_whole(trainer, tmp_path):
    arguments = trainer.arguments(tmp_path / "run", {"data.dir": tmp_path / "datasets"})
    process = trainer.start_python("-c", WITH_A_FILE_SIZE_LIMIT, "5000", *arguments)
    assert process.finish() == 2
    assert "preparing the data" in assert_one_line_error(process.errors)
    assert all(path.name.endswith(".partial") for path in (tmp_path / "datasets").iterdir())
    assert list((tmp_path / "datasets").rglob("dataset.json")) == []


def forget_checkpoints_after(run, step):
    for later in checkpoint_steps(run):
        if later > step:
            shutil.rmtree(run / "checkpoints" / str(later))


def assert_step_5_is_as_good_as_ever(run, finished_run):
    assert checkpoint_steps(run) == [5]
    assert topklm.load(run).step == 5
    assert_same_bits(arrays(run, 5), arrays(finished_run, 5))


@pytest.mark.slow
def test_a_checkpoint_too_large_to_be_written_leaves_the_one_before(trainer, run_copy, finished_run):
    forget_checkpoints_after(run_copy, 5)
    arguments = trainer.arguments(run_copy, {"data.dir": finished_run.parent / "datasets"})
    process = trainer.start_python("-c", WITH_A_FILE_SIZE_LIMIT, "60000", *arguments)
    assert process.finish() == 2, process.errors
    line = assert_one_line_error(process.errors)
    assert str(run_copy) in line
    assert "size limit" in line
    assert_step_5_is_as_good_as_ever(run_copy, finished_run)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_full_disk_while_a_checkpoint_is_saved_leaves_the_one_before(
    trainer, small_disk, run_copy, finished_run, monkeypatch
):
    forget_checkpoints_after(run_copy, 5)
    run = shutil.copytree(run_copy, small_disk / "run")
    monkeypatch.setattr(manager, "PATIENCE", manager.Patience(while_training_s=2.0, at_end_s=2.0))
    process = trainer.train(run, {"data.dir": finished_run.parent / "datasets"})
    assert process.exit_code == 2, process.errors
    line = assert_one_line_error(process.errors)
    assert str(run) in line
    assert "no space left on the disk" in line
    assert_step_5_is_as_good_as_ever(run, finished_run)
    assert os.path.getsize(run / "metrics.jsonl")
