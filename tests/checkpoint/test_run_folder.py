import dataclasses
import json
import os
import subprocess
import sys
import types

import pytest

from topklm.checkpoint import run_folder
from topklm.config import Config, ModelConfig, TrainConfig
from topklm.data.tokenizer import train_bpe
from topklm.errors import UserError
from topklm.training import setup

HOLDS_THE_LOCK = """
import pathlib, sys, time
from topklm.checkpoint import run_folder

with run_folder.owned(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def write_config(folder, config):
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


def test_an_owned_folder_is_created_with_its_parents(tmp_path):
    with run_folder.owned(tmp_path / "a" / "b") as folder:
        assert folder.is_dir()


def test_a_folder_is_free_again_after_its_owner_leaves(tmp_path):
    for _ in range(2):
        with run_folder.owned(tmp_path):
            pass


def test_the_owner_is_named_to_a_second_one(tmp_path):
    with (
        run_folder.owned(tmp_path),
        pytest.raises(UserError, match=f"in use by process {os.getpid()}: .*--workdir"),
        run_folder.owned(tmp_path),
    ):
        raise AssertionError("was let in")


def test_a_killed_owner_leaves_the_folder_free(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS_THE_LOCK, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {owner.pid}"), run_folder.owned(tmp_path):
            pass
        owner.kill()
        owner.wait()
    with run_folder.owned(tmp_path):
        pass


def test_a_new_folder_has_no_config_and_no_checkpoint(tmp_path):
    assert run_folder.saved_config(tmp_path) is None
    assert not run_folder.has_checkpoint(tmp_path)
    run_folder.check_same_run(tmp_path, Config())


def test_a_checkpoint_counts_only_once_it_is_whole(tmp_path):
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    assert not run_folder.has_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "5").mkdir()
    assert run_folder.has_checkpoint(tmp_path)


def test_what_was_set_aside_or_not_finished_is_no_checkpoint(tmp_path):
    for name in ("10", "5", "15.orbax-checkpoint-tmp", "20.damaged-1", "notes"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert run_folder.complete_steps(tmp_path) == [5, 10]


def test_a_folder_that_is_shared_passes_and_keeps_no_marker(tmp_path):
    token = run_folder.write_marker(tmp_path / "run")
    run_folder.check_marker(tmp_path / "run", token)
    run_folder.remove_marker(tmp_path / "run", token)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_another_host_does_not_see_is_refused(tmp_path):
    token = run_folder.write_marker(tmp_path / "here")
    with pytest.raises(UserError, match=r"--workdir = .*elsewhere: host \S+ does not see what the first"):
        run_folder.check_marker(tmp_path / "elsewhere", token, patience_seconds=0.0)


def test_a_local_folder_is_owned_until_it_is_let_go(tmp_path):
    with run_folder.owned(tmp_path):
        run_folder.check_owned(tmp_path)


def test_the_saved_config_is_read_back(tmp_path):
    config = Config(train=TrainConfig(steps=7, seed=3))
    write_config(tmp_path, config)
    assert run_folder.saved_config(tmp_path) == config


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        run_folder.saved_config(tmp_path)


def test_another_length_is_the_same_run_and_another_seed_is_not(tmp_path):
    config = Config()
    write_config(tmp_path, config)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2000))
    run_folder.check_same_run(tmp_path, longer)
    reseeded = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1))
    with pytest.raises(UserError, match=r"train\.seed was 0, now 1\. .*--workdir"):
        run_folder.check_same_run(tmp_path, reseeded)


@pytest.mark.parametrize("kind", ["made before", "new"])
def test_a_run_says_to_other_programs_which_token_begins_and_ends_texts(tmp_path, kind):
    tokenizer = train_bpe(["the old baker"] * 20, 280)
    config = dataclasses.replace(Config(), model=ModelConfig(context_length=48))
    if kind == "made before":
        write_config(tmp_path, config)
        tokenizer.save(tmp_path / "tokenizer.json")
    setup._describe(config, tmp_path, types.SimpleNamespace(tokenizer=tokenizer))
    told = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (told["bos_token"], told["eos_token"], told["model_max_length"]) == ("<|endoftext|>",) * 2 + (48,)
    transformers = pytest.importorskip("transformers")
    read = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert (read.bos_token_id, read.eos_token_id) == (tokenizer.separator_id,) * 2
    text = "the old baker, über 🙂"
    assert read(text, add_special_tokens=False).input_ids == tokenizer.encode(text).tolist()
    assert read.decode(tokenizer.encode(text)) == text


def test_a_tokenizer_that_is_no_tokenizer_json_is_not_announced_as_one(tmp_path):
    other = types.SimpleNamespace(kind="sentencepiece", to_bytes=lambda: b"{}")
    setup._describe(Config(), tmp_path, types.SimpleNamespace(tokenizer=other))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "tokenizer.json"]
