"""The store of activations against dense arrays in memory; killed, damaged and misused."""

import dataclasses
import json
import multiprocessing
import os
from pathlib import Path
import shutil
import signal
import threading
import time
import zipfile

import ml_dtypes
import numpy as np
import pytest

from topklm.errors import UserError
from topklm.neurons import segment as segment_lib
from topklm.neurons import store as store_lib
from topklm.neurons.store import Metadata, Store, StoreWriter

S, D, K = 2, 24, 5
METADATA = Metadata(
    run="village",
    step=24,
    tokenizer_sha256="ab" * 32,
    source="held-out text of village-0123",
    kind="topk",
    layers=tuple(range(S)),
    d_model=D,
    topk_k=K,
    topk_activation="relu",
    context_length=64,
)


def random_layers(n, seed):
    """Draws the output of layers, [S, n, D] in bfloat16, k entries a token or fewer."""
    rng = np.random.default_rng(seed)
    dense = rng.normal(size=(S, n, D)).astype(ml_dtypes.bfloat16)
    threshold = -np.sort(-dense.astype(np.float32), axis=-1)[..., K - 1 : K]
    return np.where((dense >= threshold) & (dense > 0), dense, np.zeros_like(dense))


def random_segment(n, seed, first_document=0):
    """Returns a segment, and the dense layers that it is made of."""
    rng = np.random.default_rng(seed)
    layers = random_layers(n, seed)
    documents = first_document + np.cumsum(rng.random(n) < 0.02)
    losses = rng.normal(size=n).astype(np.float16)
    return segment_lib.from_dense(rng.integers(0, 500, n), documents, losses, layers), layers


@pytest.fixture
def filled(tmp_path):
    """Returns a store of three segments; and its segments as they were, with all dense layers, [S, N, D]."""
    writer, segments, layers = StoreWriter(tmp_path / "store", METADATA), [], []
    first = 0
    for seed, n in enumerate((300, 1, 40_000)):
        segment, dense = random_segment(n, seed, first)
        writer.append(segment)
        segments.append(segment)
        layers.append(dense)
        first = int(segment.documents[-1])  # it goes on in the next segment
    return tmp_path / "store", segments, np.concatenate(layers, axis=1)


@pytest.mark.parametrize(("begin", "end"), [(0, D), (3, 4), (5, 17)])
def test_a_block_of_neurons_is_what_they_are_one_by_one(filled, begin, end):
    store = Store(filled[0])
    for layer in range(S):
        block = store.block(layer, begin, end)
        for place, neuron in enumerate(range(begin, end)):
            part, events = slice(*block.offsets[place : place + 2]), store.neuron(layer, neuron)
            np.testing.assert_array_equal(block.tokens[part], events.tokens)
            np.testing.assert_array_equal(block.values[part], events.values)


def joined(segments, name):
    return np.concatenate([getattr(segment, name) for segment in segments])


def test_every_neurons_events_come_back(filled):
    folder, _, dense = filled
    store = Store(folder)
    assert (store.n_tokens, store.n_events) == (dense.shape[1], np.count_nonzero(dense))
    for layer in range(S):
        for neuron in range(D):
            events = store.neuron(layer, neuron)
            np.testing.assert_array_equal(events.tokens, np.flatnonzero(dense[layer, :, neuron]))
            np.testing.assert_array_equal(events.values, dense[layer, events.tokens, neuron])


def test_a_segment_read_whole_is_what_was_written(filled):
    folder, segments, _ = filled
    for reader, segment in zip(Store(folder).segments, segments, strict=True):
        found = reader.read()
        for field in dataclasses.fields(segment):
            np.testing.assert_array_equal(getattr(found, field.name), getattr(segment, field.name))


def test_stretches_of_text_are_read_across_segments(filled):
    folder, segments, _ = filled
    store = Store(folder)
    for begin, end in ((0, 10), (295, 310), (300, 301), (-5, 3), (40_290, 50_000), (60_000, 60_010), (7, 7)):
        wanted = slice(max(begin, 0), max(end, 0))
        np.testing.assert_array_equal(store.tokens(begin, end), joined(segments, "tokens")[wanted])
        np.testing.assert_array_equal(store.losses(begin, end), joined(segments, "losses")[wanted])
        np.testing.assert_array_equal(store.documents(begin, end), joined(segments, "documents")[wanted])


def test_documents_are_found_even_across_segments_and_reads(filled, monkeypatch):
    folder, segments, _ = filled
    numbers = joined(segments, "documents")
    wanted = [0, *np.flatnonzero(np.diff(numbers)) + 1, len(numbers)]
    for stretch in (1 << 18, 300, 97):
        monkeypatch.setattr(store_lib, "_READ", stretch)
        np.testing.assert_array_equal(Store(folder).document_bounds(), wanted)


def test_it_takes_less_than_four_bytes_an_activation(tmp_path):
    n, d, k = 16_384, 256, 32
    dense = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
    dense[dense < np.partition(dense, d - k, axis=1)[:, d - k, None]] = 0
    layers = [dense.astype(ml_dtypes.bfloat16)]
    segment = segment_lib.from_dense(np.arange(n) % 4096, np.arange(n) // 500, np.zeros(n), layers)
    StoreWriter(tmp_path / "store", METADATA).append(segment)
    size = sum(path.stat().st_size for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert size < 3 * len(segment.token_index)


def test_the_smallest_types_are_used(filled):
    arrays = {name: Store(filled[0]).segments[2].array(name) for name in segment_lib.ARRAYS}
    types = {name: array.dtype.name for name, array in arrays.items()}
    assert types["tokens"] == "uint16"
    assert types["gaps"] in ("uint8", "uint16")
    assert types["values"] == "bfloat16"


def test_a_writer_goes_on_behind_what_is_there_and_parts_stand_side_by_side(filled):
    folder, segments, dense = filled
    first, second = StoreWriter(folder, METADATA), StoreWriter(folder, METADATA, part=1)
    assert (first.n_tokens, second.n_tokens) == (dense.shape[1], 0)
    of_second, of_first = random_segment(50, 7)[0], random_segment(60, 8)[0]
    second.append(of_second)
    first.append(of_first)
    store = Store(folder)
    assert [reader.folder.name for reader in store.segments] == [
        "0-000000",
        "0-000001",
        "0-000002",
        "0-000003",
        "1-000000",
    ]
    everything = joined([*segments, of_first, of_second], "tokens")
    np.testing.assert_array_equal(store.tokens(0, store.n_tokens), everything)


def append_for_ever(folder):
    writer = StoreWriter(folder, METADATA)
    while True:
        writer.append(random_segment(3000, writer.n_tokens // 3000)[0])


def test_whoever_is_killed_leaves_whole_segments(tmp_path):
    folder = tmp_path / "store"
    context = multiprocessing.get_context("spawn")
    for seconds in (0.0, 0.05, 0.13, 0.31):
        process = context.Process(target=append_for_ever, args=(folder,), daemon=True)
        process.start()
        there = len(list(folder.glob("segments/0-*")))
        while len(list(folder.glob("segments/0-*"))) < there + 2:
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    writer, store = StoreWriter(folder, METADATA), Store(folder)
    assert not list(folder.glob("segments/.*"))
    assert writer.n_tokens == store.n_tokens == 3000 * len(store.segments)
    for number, reader in enumerate(store.segments):
        np.testing.assert_array_equal(reader.read().values, random_segment(3000, number)[0].values)


@pytest.mark.parametrize(("layer", "neuron"), [(-1, 0), (S, 0), (0, -1), (0, D)])
def test_what_there_is_not_is_refused(filled, layer, neuron):
    with pytest.raises(UserError, match=f"must be from 0 to {D - 1}|must be one of 0, {S - 1}"):
        Store(filled[0]).neuron(layer, neuron)


def test_activations_of_something_else_are_not_mixed_in(filled):
    with pytest.raises(UserError, match="holds activations of another step \\(24, not 25\\)"):
        StoreWriter(filled[0], dataclasses.replace(METADATA, step=25))


def test_a_folder_that_is_no_store_is_named(tmp_path):
    with pytest.raises(UserError, match="there are no activations here; run topklm neurons harvest"):
        Store(tmp_path)


@pytest.mark.parametrize("content", ["", "{", '{"format": 1}', "[]"])
def test_damaged_metadata_is_named(filled, content):
    (filled[0] / "metadata.json").write_text(content)
    with pytest.raises(UserError, match=r"metadata.json is damaged \("):
        Store(filled[0])


def test_a_store_of_a_later_format_is_refused(filled):
    path = filled[0] / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 3}))
    with pytest.raises(UserError, match="a store of format 3, this topklm reads 2"):
        Store(filled[0])


def test_a_segment_without_its_facts_is_named(filled):
    (filled[0] / "segments" / "0-000001" / "segment.json").unlink()
    with pytest.raises(UserError, match=r"0-000001 is damaged \(.*: delete 0-000001 to 0-000002 in"):
        Store(filled[0])


def test_an_array_that_is_gone_or_cut_off_is_named(filled):
    folder = filled[0] / "segments" / "0-000002"
    shutil.rmtree(folder / "gaps")
    with pytest.raises(UserError, match=r"0-000002.* is damaged"):
        Store(filled[0]).neuron(0, 0)
    values = next(
        path for path in (folder / "values").rglob("*") if path.is_file() and path.name != "zarr.json"
    )
    values.write_bytes(values.read_bytes()[:100])
    with pytest.raises(UserError, match=r"0-000002.* is damaged"):
        Store(filled[0]).segments[2].read()


def test_a_segment_is_never_read_in_the_place_of_another(filled):
    segments = filled[0] / "segments"
    (segments / "0-000001").rename(segments / "0-000003")
    with pytest.raises(UserError, match=r"0-000001 is missing.* delete 0-000002 to 0-000003 in segments"):
        Store(filled[0])
    (segments / "0-000003").rename(segments / "0-000001")
    (segments / "0-000002").rename(segments / "aside")
    shutil.copytree(segments / "0-000000", segments / "0-000002")
    with pytest.raises(UserError, match="0-000002 is of another store, or of another place in this one"):
        Store(filled[0])


def test_segments_that_are_gone_from_the_end_are_missed(filled):
    shutil.rmtree(filled[0] / "segments" / "0-000002")
    with pytest.raises(UserError, match="of 3 segments of part 0 only 2 are there: run the same topklm"):
        Store(filled[0])


def test_a_segment_that_was_written_just_before_a_kill_counts(filled):
    folder, segments, _ = filled
    counted = (folder / "parts" / "0" / "part.json").read_bytes()
    StoreWriter(folder, METADATA).append(random_segment(50, 7)[0])
    (folder / "parts" / "0" / "part.json").write_bytes(counted)
    assert len(Store(folder).segments) == len(segments) + 1


def test_one_process_at_a_time_writes_to_a_part(filled):
    folder, _, _ = filled
    with StoreWriter(folder, METADATA):
        begun = folder / "segments" / ".0-000003"
        begun.mkdir()
        with pytest.raises(UserError, match=rf"process {os.getpid()} is writing to part 0"):
            StoreWriter(folder, METADATA)
        assert begun.exists()
        StoreWriter(folder, METADATA, part=1).close()
    StoreWriter(folder, METADATA).close()
    assert not begun.exists()


def test_the_next_writer_goes_on_when_the_one_before_has_ended(filled):
    folder, segments, _ = filled
    first, owners = StoreWriter(folder, METADATA), []

    def write_more():
        with StoreWriter(folder, METADATA, wait=owners.append) as writer:
            writer.append(random_segment(50, 7)[0])

    second = threading.Thread(target=write_more)
    second.start()
    while not owners:
        time.sleep(0.01)
    first.append(random_segment(60, 8)[0])
    first.close()
    second.join()
    assert owners == [str(os.getpid())]
    n_tokens = [reader.n_tokens for reader in Store(folder).segments]
    assert n_tokens == [*(len(segment.tokens) for segment in segments), 60, 50]


def test_without_its_metadata_a_store_is_neither_read_nor_added_to(filled):
    (filled[0] / "metadata.json").unlink()
    for opening in (Store, lambda folder: StoreWriter(folder, METADATA)):
        with pytest.raises(UserError, match=r"metadata.json is missing.* put it back, or delete"):
            opening(filled[0])


# The store in the archive was written by a version before digests: 361 tokens of two layers in two parts.


@pytest.fixture
def old(tmp_path):
    with zipfile.ZipFile(Path(__file__).with_name("store_of_format_1.zip")) as archive:
        archive.extractall(tmp_path / "old")
    return tmp_path / "old"


def activation(layer, token, neuron):
    """Returns everything that was stored there."""
    active = (token * 31 + neuron * 17 + layer * 7) % 97 < 20
    return np.where(active, ((token + neuron) % 13 + 1) / 4, 0)


def test_a_store_of_an_earlier_version_is_read(old):
    store, at = Store(old), np.arange(361)
    assert (store.n_tokens, store.n_events, len(store.segments)) == (361, 3573, 4)
    np.testing.assert_array_equal(store.tokens(0, 361), at % 50 + 1)
    np.testing.assert_array_equal(store.documents(0, 361), at // 120)
    np.testing.assert_array_equal(store.losses(0, 361), (at / 64).astype(np.float16))
    for layer in range(S):
        for neuron in range(D):
            wanted = activation(layer, at, neuron)
            events = store.neuron(layer, neuron)
            np.testing.assert_array_equal(events.tokens, np.flatnonzero(wanted))
            np.testing.assert_array_equal(events.values, wanted[wanted > 0])


@pytest.mark.parametrize("name", segment_lib.ARRAYS)
def test_what_a_store_of_an_earlier_version_lacks_does_not_read_as_zeros(old, name):
    shards = [path for path in sorted(old.glob(f"segments/*/{name}/c/0"))]
    assert shards
    for shard in shards:
        content = shard.read_bytes()
        shard.unlink()
        for broken in (lambda: None, shard.mkdir):
            broken()
            store = Store(old)
            with pytest.raises(UserError, match=rf"{shard.parents[2].name} is damaged"):
                [reader.read() for reader in store.segments]
        shard.rmdir()
        shard.write_bytes(content)
    shutil.rmtree(old / "segments" / "0-000001")
    with pytest.raises(UserError, match=r"0-000001 is missing.* delete 0-000002 in segments"):
        Store(old)


def test_offsets_that_cannot_be_are_refused_in_a_store_of_an_earlier_version(old):
    segment = old / "segments" / "1-000000"
    shutil.copy(old / "segments" / "0-000000" / "offsets" / "c" / "0", segment / "offsets" / "c" / "0")
    with pytest.raises(UserError, match="1-000000 is damaged"):
        Store(old).neuron(1, D - 1)


def test_nothing_is_added_to_a_store_of_an_earlier_version(old):
    metadata = dataclasses.replace(Store(old).metadata, parameters="ab")
    with StoreWriter(old, metadata) as writer:
        assert writer.n_tokens == 301
        with pytest.raises(UserError, match="was made by an earlier version of topklm"):
            writer.append(random_segment(50, 7)[0])
    assert Store(old).n_tokens == 361
