"""Saving and loading are measured on real checkpoints, beside files of the same bytes."""

import argparse
import dataclasses

import jax
import pytest

from benchmarks.cases import checkpoint
from topklm.config import Config, ModelConfig
from topklm.errors import UserError
from topklm.model import transformer

MODEL = ModelConfig(
    d_model=32,
    n_layers=2,
    n_heads=2,
    n_kv_heads=2,
    d_mlp=48,
    vocab_size=300,
    context_length=32,
    topk_k=8,
    n_nontopk=1,
)
CONFIG = Config(model=MODEL)


@pytest.mark.slow
def test_the_report_has_saves_and_loads_beside_plain_files(tmp_path):
    report = checkpoint.run(argparse.Namespace(peer="", repeats=2, folder=str(tmp_path)), CONFIG)
    results = {result.name: result for result in report.results}
    assert results[checkpoint.SAVE].unit == "s"
    assert results[checkpoint.SAVE].floor > 0
    assert results[checkpoint.SAVE_BLOCKS].floor is None
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(transformer.create(MODEL, 0)))
    settings = report.to_dict()["settings"]
    assert settings["loaded_bytes"] == parameters
    assert 3 * parameters <= settings["saved_bytes"] < 3 * parameters + 100  # and both moments
    rate, seconds = results[f"{checkpoint.LOAD}, rate"], results[checkpoint.LOAD]
    assert rate.samples == pytest.approx([parameters / 1e6 / s for s in seconds.samples])
    assert list(tmp_path.iterdir()) == []


def test_a_plain_file_holds_the_bytes_of_the_state(tmp_path):
    saved = checkpoint._SavedRun(tmp_path, CONFIG)
    saved._write_plainly()
    assert (tmp_path / "plain").stat().st_size == checkpoint.n_bytes(saved.state)


@pytest.mark.slow
def test_the_ways_to_load_read_the_same_files(tmp_path):
    n_bytes = checkpoint.write_run(tmp_path, CONFIG)
    ways = checkpoint.ways_to_load(tmp_path, 1)
    assert checkpoint.n_bytes(ways["load"]()) == n_bytes
    files = ways["read_into_memory"]()
    assert sum(map(len, files)) >= n_bytes
    assert sum(ways["read_and_forget"]()) == sum(map(len, files))
    assert checkpoint.load_memory(tmp_path)["parameters"] == n_bytes / 4


def test_a_peer_is_refused(tmp_path):
    with pytest.raises(UserError, match="--peer = torch: checkpoints are compared with plain files"):
        checkpoint.run(argparse.Namespace(peer="torch", repeats=2, folder=str(tmp_path)), CONFIG)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--folder = .*/no: there is no such folder"):
        checkpoint.run(argparse.Namespace(peer="", repeats=2, folder=str(tmp_path / "no")), CONFIG)


def test_a_vocabulary_is_filled_in(tmp_path):
    model = dataclasses.replace(MODEL, vocab_size=0)
    report = checkpoint.run(
        argparse.Namespace(peer="", repeats=1, folder=str(tmp_path)), dataclasses.replace(CONFIG, model=model)
    )
    assert report.to_dict()["settings"]["model"]["vocab_size"] == CONFIG.data.vocab_size
