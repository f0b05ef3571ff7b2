"""The stream, its floor and PyTorch's loader do the same work on the same windows."""

import argparse
import dataclasses

import jax
import numpy as np
import pytest

from benchmarks.cases import data
from benchmarks.harness.timing import Samples
from topklm.config import Config, DataConfig, ModelConfig, TrainConfig
from topklm.data.dataset import Mixture
from topklm.data.stream import train_stream
from topklm.errors import UserError

MODEL = ModelConfig(
    d_model=32, n_layers=1, n_heads=2, n_kv_heads=2, d_mlp=32, context_length=32, topk_k=8, n_nontopk=1
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return data.make_dataset(tmp_path_factory.mktemp("data") / "random", 30_000, 8192)


@pytest.fixture(scope="module")
def config(dataset):
    return Config(model=MODEL, data=DataConfig(source=str(dataset.path)), train=TrainConfig(batch_size=4))


def test_a_dataset_is_made_of_documents_in_several_shards(dataset):
    tokens = dataset.tokens(dataset.train)
    assert len(tokens) == 30_000
    assert len(dataset.train.shards) == 4
    separators = np.flatnonzero(tokens.read(0, 30_000) == dataset.tokenizer.separator_id)
    assert set(range(0, 30_000, 500)) <= set(separators.tolist())


def test_the_sides_give_batches_of_the_stream(config, dataset):
    prepared = data.prepare({"config": config.to_dict(), "turn_seconds": 1e-4, "copy_to": None})
    facts = prepared.facts
    assert facts["tokens"] == facts["windows"] * 32
    assert facts["vocab_size"] == dataset.tokenizer.vocab_size
    for side in prepared.subjects.values():
        side()
    stream = train_stream(Mixture.single(dataset), context_length=32, batch_size=4, seed=0)
    want = [next(stream) for _ in range(facts["windows"] // 4)][-1]
    for name in (data.STREAM, data.FEED):
        jax.tree.map(np.testing.assert_array_equal, dict(prepared.subjects[name]()), dict(want))


def test_the_floor_reads_the_shards_in_order_and_from_the_first_again(dataset, tmp_path):
    opened = []

    class Watched(type(tmp_path)):
        def open(self, *arguments, **options):
            opened.append(self.name)
            return super().open(*arguments, **options)

    watched = Mixture.single(dataclasses.replace(dataset, path=Watched(dataset.path)))
    names = [shard.name for shard in dataset.train.shards]
    n_bytes = sum(shard.size for shard in dataset.train.shards)
    data._read_bytes(watched, n_bytes)
    assert opened == names
    data._read_bytes(watched, n_bytes + 1)
    assert opened == [*names, *names, names[0]]


def test_pytorch_reads_the_windows_of_the_stream_in_its_order(config, dataset, tmp_path):
    torch_data = pytest.importorskip("benchmarks.peers.torch_data", exc_type=ImportError)
    spec = {"config": config.to_dict(), "turn_seconds": 1e-4, "copy_to": str(tmp_path)}
    facts = {**data.prepare(spec).facts, "folder": str(tmp_path)}
    stream = train_stream(Mixture.single(dataset), context_length=32, batch_size=4, seed=0)
    batches = 0
    for inputs, targets in torch_data.make_loader(facts, workers=0):
        want = next(stream)
        np.testing.assert_array_equal(inputs.numpy(), want["inputs"])
        np.testing.assert_array_equal(targets.numpy(), want["targets"])
        batches += 1
    assert batches == facts["windows"] // 4


def test_the_report_sets_the_stream_beside_its_floor_the_train_step_and_the_better_loader(config):
    facts = {"tokens": 3200, "windows": 100, "dtype": "uint16"}
    seconds = {
        data.STREAM: (1.0, 2.0, 4.0),
        data.FEED: (2.0, 2.0, 2.0),
        data.BYTES: (0.1, 0.2, 0.3),
        data.TRAIN_STEP: (0.5, 1.0, 1.0),
        "torch DataLoader": (8.0, 8.0, 8.0),
        "torch DataLoader, 2 workers": (9.0, 4.0, 4.0),
    }
    report = data._report({name: Samples(s) for name, s in seconds.items()}, facts, config)
    results = {result.name: result for result in report.results}
    assert results[data.STREAM].samples == (3200.0, 1600.0, 800.0)
    assert results[data.STREAM].floor == pytest.approx(16_000)
    assert results["stream, windows"].samples == (100.0, 50.0, 25.0)
    assert results["stream, windows"].floor == pytest.approx(500)
    assert results[data.TRAIN_STEP].samples == (256.0, 128.0, 128.0)  # 4 windows of 32 tokens a step
    fed, peer = report.comparisons
    assert fed.samples == (6.25, 12.5, 12.5)
    assert fed.reached
    assert peer.name == "stream / torch DataLoader, 2 workers"
    assert peer.samples == (9.0, 2.0, 1.0)


@pytest.mark.slow
def test_everything_runs_in_processes_of_its_own_in_turns(config):
    pytest.importorskip("torch")
    report = data.run(argparse.Namespace(peer="torch", repeats=2, turn_seconds=1e-3), config)
    assert len(report.results) == 7
    assert all(len(result.samples) == 2 for result in report.results)
    assert report.to_dict()["settings"]["data"]["source"] == config.data.source


def test_a_turn_must_take_some_time(config):
    with pytest.raises(UserError, match="--turn-seconds = 0: must be above 0"):
        data.run(argparse.Namespace(peer="", repeats=2, turn_seconds=0.0), config)
