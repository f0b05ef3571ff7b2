"""`topklm bench data`: tokens per second of the training stream, beside its floor and what training consumes.

The floor is reading as many bytes as the windows have on disk from the page cache, without looking at them.
The peer is PyTorch's `DataLoader` over the same windows of one flat file.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import itertools
import json
import math
from pathlib import Path
import tempfile
import time
from typing import Any

import grain
import jax
import numpy as np

from benchmarks import peers
from benchmarks.harness.report import Comparison, Report, Result
from benchmarks.harness.shapes import with_model
from benchmarks.harness.timing import Samples, alternate
from benchmarks.harness.worker import Prepared, Worker
from topklm import config as config_lib
from topklm.config import Config
from topklm.data.building.build import prepare as prepare_data
from topklm.data.dataset import Dataset, Mixture, SplitInfo
from topklm.data.records import shard_bounds, shard_name, token_dtype, write_shard
from topklm.data.stream import Batch, DeviceBatch, Feed, train_stream, window_ids
from topklm.data.tokenizer import train_bpe
from topklm.errors import UserError
from topklm.layout import one_device

DESCRIPTION = (
    "Measures the training stream of a config's data, which are prepared first if need be, beside the train "
    "step that it has to feed."
)
EXAMPLE = "topklm bench data --config=configs/small.py --peer=torch"

# Of a turn, about. Each turn starts the stream again, so that none has read ahead while another had its turn.
_TURN_SECONDS = 0.5
_CALIBRATION_BATCHES = 16
_DOCUMENT_TOKENS = 500
_BLOCK_BYTES = 2**20
_COPIED_TOKENS = 2**20  # at a time

STREAM, FEED, BYTES, TRAIN_STEP = "stream", "stream, on the device", "bytes alone", "train step"
TOKENS_FILE, STARTS_FILE = "tokens.bin", "starts.npy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares flags of its own."""
    parser.add_argument(
        "--turn-seconds",
        type=float,
        default=_TURN_SECONDS,
        metavar="S",
        help="about how long a sample streams; default %(default)s",
    )


def run(arguments: argparse.Namespace, config: Config | None) -> Report:
    """Streams the config's data and trains on random tokens of the same shape, in turns.

    With a peer, the training tokens are copied into one flat file in a temporary folder.

    Args:
        arguments: `peer`, `repeats`, `turn_seconds`.
        config: Its data, context length and batch size; default the default experiment.

    Raises:
        UserError: For data that cannot be read, or a peer that is not installed.
    """
    config = config or config_lib.resolve(config_lib.default())
    if arguments.turn_seconds <= 0:
        raise UserError(f"--turn-seconds = {arguments.turn_seconds:g}: must be above 0")
    if arguments.peer:
        peers.require(arguments.peer)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        spec = {
            "config": config.to_dict(),
            "turn_seconds": arguments.turn_seconds,
            "copy_to": folder if arguments.peer else None,
        }
        ours = stack.enter_context(Worker(__name__, spec))
        fed = with_model(config, vocab_size=ours.facts["vocab_size"])
        step = stack.enter_context(Worker("benchmarks.subjects.train_step", {"config": fed.to_dict()}))
        subjects = {**ours.subjects(), TRAIN_STEP: step.subjects()["step"]}
        if arguments.peer:
            spec = {**ours.facts, "folder": folder}
            subjects |= stack.enter_context(Worker("benchmarks.peers.torch_data", spec)).subjects()
        samples = alternate(subjects, arguments.repeats, label="data")
        return _report(samples, ours.facts, config)


def prepare(spec: Mapping[str, Any]) -> Prepared:
    """Prepares the stream's subjects, in a process of their own; `spec` as `run` makes it."""
    config = config_lib.resolve(spec["config"])
    mixture = prepare_data(config.data, lambda line: None)
    batches = _batches_for(spec["turn_seconds"], config, mixture)
    n_tokens = batches * config.train.batch_size * config.model.context_length
    if spec["copy_to"]:
        _copy(mixture, config, batches, Path(spec["copy_to"]))
    dtype = token_dtype(mixture.tokenizer.vocab_size)
    subjects: dict[str, Callable[[], Any]] = {
        STREAM: lambda: _stream_batches(mixture, config, batches),
        FEED: lambda: _feed_batches(mixture, config, batches),
        BYTES: lambda: _read_bytes(mixture, n_tokens * dtype.itemsize),
    }
    facts = {
        "tokens": n_tokens,
        "windows": batches * config.train.batch_size,
        "context_length": config.model.context_length,
        "batch_size": config.train.batch_size,
        "dtype": dtype.name,
        "vocab_size": mixture.tokenizer.vocab_size,
    }
    return Prepared(subjects, facts)


def make_dataset(folder: Path, tokens: int, shard_tokens: int, heldout_tokens: int = 0) -> Dataset:
    """Writes a dataset of random tokens; the tokenizer only gives the sizes.

    Args:
        folder: To be made.
        tokens: How many, in documents of 500.
        shard_tokens: Tokens per shard, at most.
        heldout_tokens: The first ones again, as held-out text.
    """
    folder.mkdir()
    tokenizer = train_bpe(["abc"], 300)
    ids = np.random.default_rng(0).integers(1, tokenizer.vocab_size, tokens).astype(np.int32)
    ids[::_DOCUMENT_TOKENS] = tokenizer.separator_id
    bounds = shard_bounds(tokens, shard_tokens)
    shards = tuple(
        write_shard(folder / shard_name("train", i, len(bounds)), [ids[start:stop]], tokenizer.vocab_size)
        for i, (start, stop) in enumerate(bounds)
    )
    train = SplitInfo(tokens // _DOCUMENT_TOKENS, tokens, 0, shards)
    heldout = SplitInfo(0, 0, 0, ())
    if heldout_tokens:
        shard = write_shard(
            folder / shard_name("heldout", 0, 1), [ids[:heldout_tokens]], tokenizer.vocab_size
        )
        heldout = SplitInfo(heldout_tokens // _DOCUMENT_TOKENS, heldout_tokens, heldout_tokens, (shard,))
    dataset = Dataset(folder, tokenizer, train, heldout, "")
    tokenizer.save(folder / "tokenizer.json")
    content = {
        "format_version": 2,
        "fingerprint": "",
        "tokenizer": {"sha256": tokenizer.sha256},
        "splits": {name: _as_json(split) for name, split in dataset.splits.items()},
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return dataset


def _as_json(split: SplitInfo) -> dict[str, Any]:
    sizes = {"documents": split.documents, "tokens": split.tokens, "utf8_bytes": split.utf8_bytes}
    return {**sizes, "shards": [vars(shard) for shard in split.shards]}


def _report(samples: Mapping[str, Samples], facts: Mapping[str, Any], config: Config) -> Report:
    consumed = config.train.batch_size * config.model.context_length
    amounts = {name: facts["tokens"] for name in samples} | {TRAIN_STEP: consumed}
    rates = {name: s.rates(amounts[name]) for name, s in samples.items()}
    floor = facts["tokens"] / samples[BYTES].median
    results = [
        Result(name, "tokens/s", rate, None if name == TRAIN_STEP else floor) for name, rate in rates.items()
    ]
    windows = samples[STREAM].rates(facts["windows"])
    results.insert(1, Result("stream, windows", "windows/s", windows, floor / config.model.context_length))
    needed = zip(rates[FEED], rates[TRAIN_STEP], strict=True)
    comparisons = [
        Comparison(f"{FEED} / {TRAIN_STEP}", tuple(given / taken for given, taken in needed), at_least=1.0)
    ]
    loaders = [name for name in samples if name.startswith("torch")]
    if loaders:
        best = min(loaders, key=lambda name: samples[name].median)
        note = "the peer makes inputs and targets only; the stream also segments, positions and weights"
        comparisons.append(
            Comparison(f"{STREAM} / {best}", samples[STREAM].speedup_over(samples[best]), note=note)
        )
    return Report("data", {**facts, "data": dataclasses.asdict(config.data)}, results, comparisons)


def _batches_for(seconds: float, config: Config, mixture: Mixture) -> int:
    """Counts the batches that take that long from the start of a stream."""
    with contextlib.closing(_stream(mixture, config)) as stream:
        next(stream)
        began = time.perf_counter()
        _take(stream, _CALIBRATION_BATCHES)
        each = (time.perf_counter() - began) / _CALIBRATION_BATCHES
    return max(_CALIBRATION_BATCHES, math.ceil(seconds / each))


def _stream_batches(mixture: Mixture, config: Config, n: int) -> Batch:
    """Returns the last of n batches as the stream gives them."""
    with contextlib.closing(_stream(mixture, config)) as stream:
        return _take(stream, n)


def _feed_batches(mixture: Mixture, config: Config, n: int) -> DeviceBatch:
    """Returns the last of n batches as a training step gets them."""
    layout = one_device()
    with contextlib.closing(_stream(mixture, config)) as stream:
        feed = Feed(stream, lambda batch: layout.put_batch(batch, config.train.batch_size))
        return jax.block_until_ready(_take(feed, n))


def _stream(mixture: Mixture, config: Config) -> grain.DatasetIterator:
    return train_stream(
        mixture,
        context_length=config.model.context_length,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
    )


def _take(iterator: Iterator[Any], n: int) -> Any:
    """Returns the last of the next n."""
    for _ in range(n - 1):
        next(iterator)
    return next(iterator)


def _read_bytes(mixture: Mixture, n_bytes: int) -> None:
    """Reads from the shards in order, and from the first again after the last."""
    paths: list[Any] = [d.path / shard.name for d in mixture.datasets for shard in d.train.shards]
    block = memoryview(bytearray(_BLOCK_BYTES))
    for path in itertools.cycle(paths):
        with path.open("rb", buffering=0) as file:
            while n_bytes and (read := file.readinto(block[: min(n_bytes, _BLOCK_BYTES)])):
                n_bytes -= read
        if not n_bytes:
            return


def _copy(mixture: Mixture, config: Config, batches: int, folder: Path) -> None:
    """Writes what the peer reads: all training tokens in one file, and where each window of a turn begins."""
    dtype = token_dtype(mixture.tokenizer.vocab_size)
    first: list[int] = []
    lengths: list[int] = []
    with (folder / TOKENS_FILE).open("wb") as file:
        for dataset in mixture.datasets:
            tokens = dataset.tokens(dataset.train)
            first.append(sum(lengths))
            lengths.append(len(tokens))
            for start in range(0, len(tokens), _COPIED_TOKENS):
                tokens.read(start, min(start + _COPIED_TOKENS, len(tokens))).astype(dtype).tofile(file)
    length = config.model.context_length
    order = window_ids(
        mixture, context_length=length, batch_size=config.train.batch_size, seed=config.train.seed
    )
    ids = np.concatenate([order[batch] for batch in range(batches)])
    last = np.asarray(lengths)[ids[:, 0]] - length - 1
    np.save(folder / STARTS_FILE, np.asarray(first)[ids[:, 0]] + np.minimum(ids[:, 1] * length, last))
