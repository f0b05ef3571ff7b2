"""Stored activations, against the model run on one window after another."""

import dataclasses
import functools
from pathlib import Path
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import saved_runs

from topklm.errors import UserError
from topklm.layout import one_device
from topklm.model import transformer
from topklm.neurons import harvest as harvest_lib
from topklm.neurons import segment as segment_lib
from topklm.neurons.documents import TextModel, windows_of
from topklm.neurons.harvest import ALL, Share, harvest
from topklm.neurons.store import Metadata, Store, StoreWriter

SEPARATOR = 256
TOPK = dataclasses.replace(saved_runs.MODEL, n_layers=3, d_model=24, d_mlp=48)
BASE = dataclasses.replace(TOPK, n_nontopk=3)


class Texts:
    """Documents of random bytes; some are longer than a window, one is empty."""

    name, n_tokens = "random bytes", None

    def __init__(self, sizes, seed=0):
        rng = np.random.default_rng(seed)
        self.documents = [rng.integers(0, 256, n).astype(np.int32) for n in sizes]

    def __iter__(self):
        return iter(self.documents)


TEXTS = Texts([5, 31, 0, 32, 90, 1, 64, 17, 200, 3])


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    monkeypatch.setattr(harvest_lib, "_SEGMENT_TOKENS", 40)
    monkeypatch.setattr(harvest_lib, "_SEGMENT_EVENTS", 1)


@functools.cache
def params_of(config):
    return jax.jit(transformer.create, static_argnums=(0, 1))(config, 1)


def metadata_of(config, parts=1):
    kind, layers = harvest_lib.kind_and_layers(config)
    return Metadata(
        run="r",
        step=1,
        tokenizer_sha256="0",
        source=TEXTS.name,
        kind=kind,
        layers=layers,
        d_model=config.d_model,
        topk_k=config.topk_k,
        topk_activation=config.topk_activation,
        context_length=config.context_length,
        parts=parts,
    )


def harvested(folder, config, texts=TEXTS, share=ALL, **options):
    writer = StoreWriter(folder, metadata_of(config, share.count), share.index)
    model = TextModel(config, params_of(config), one_device(), SEPARATOR, batch_rows=3)
    harvest(model, texts, writer, share=share, **options)
    return Store(folder)


def dense(store, layer):
    """Returns [N, D]."""
    d = store.metadata.d_model
    found = np.zeros((store.n_tokens, d), np.float32)
    for neuron in range(d):
        events = store.neuron(layer, neuron)
        found[events.tokens, neuron] = events.values
    return found


@functools.cache
def forward(config):
    @jax.jit
    def run(params, tokens):
        model = transformer.bind(config, params)
        h, states = model.hidden(tokens, capture=lambda h, u, h_next: h_next)
        return jax.nn.log_softmax(model.logits(h)), states

    return run


def document(store, number):
    """Returns where a document lies in a store."""
    at = np.flatnonzero(store.documents(0, store.n_tokens) == number)
    return slice(at[0], at[-1] + 1)


def one_by_one(config, texts):
    """Returns the same from single windows: tokens, documents, losses, and states [L, N, D]."""
    tokens, documents, losses, states = [], [], [], []
    for number, ids in enumerate(texts):
        for window in windows_of(number, ids, SEPARATOR, config.context_length):
            n = len(window.inputs)
            padded = np.full(config.context_length, SEPARATOR, np.int32)
            padded[:n] = window.inputs
            log_p, seen = forward(config)(params_of(config), jnp.asarray(padded)[None])
            new = np.arange(window.n_known, n)
            tokens.append(window.inputs[new])
            documents.append(np.full(len(new), number))
            losses.append(-np.asarray(log_p)[0, new - 1, window.inputs[new]])
            states.append(np.asarray(seen, np.float32)[:, 0, new])
    return *map(np.concatenate, (tokens, documents, losses)), np.concatenate(states, axis=1)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(TOPK, marks=pytest.mark.slow),
        BASE,
        dataclasses.replace(TOPK, topk_activation="abs", layer_stack="scanned"),
        pytest.param(dataclasses.replace(TOPK, dtype="bfloat16"), marks=pytest.mark.slow),
    ],
    ids=["relu", "base", "abs", "bfloat16"],
)
def test_the_store_holds_what_the_model_does_at_every_token(tmp_path, config):
    store = harvested(tmp_path / "store", config)
    tokens, documents, losses, states = one_by_one(config, TEXTS)
    n = store.n_tokens
    assert n == sum(map(len, TEXTS))
    assert len(store.segments) > 3
    np.testing.assert_array_equal(store.tokens(0, n), tokens)
    np.testing.assert_array_equal(store.documents(0, n), documents)
    tolerance = 0.05 if config.dtype == "bfloat16" else 1e-3
    np.testing.assert_allclose(store.losses(0, n), losses, rtol=2e-3, atol=tolerance)
    for layer in store.metadata.layers:
        want = states[layer] if config.n_topk_layers else np.maximum(states[layer], 0)
        # Rounding may make another entry the k-th in bfloat16, rarely.
        far = np.abs(dense(store, layer) - want.astype(ml_dtypes.bfloat16).astype(np.float32)) > 0.05
        assert far.mean() < (0.02 if config.dtype == "bfloat16" else 1e-4)
    if config.n_topk_layers and config.topk_activation == "abs":
        assert store.n_events == n * config.topk_k * config.n_topk_layers


def test_of_a_base_model_the_largest_entries_of_each_token_may_be_kept_alone(tmp_path):
    every, few = harvested(tmp_path / "every", BASE), harvested(tmp_path / "few", BASE, keep=3)
    for layer in every.metadata.layers:
        all_of_them, kept = dense(every, layer), dense(few, layer)
        ranks = np.argsort(np.argsort(-all_of_them, axis=1, kind="stable"), axis=1, kind="stable")
        np.testing.assert_array_equal((kept > 0).sum(axis=1), 3)
        same = kept == np.where(ranks < 3, all_of_them, 0)
        assert same.mean() > 0.999  # of those that bfloat16 makes equal, another may be the third


def test_what_the_layers_of_a_topk_model_are():
    assert harvest_lib.kind_and_layers(TOPK) == ("topk", (0, 1))
    assert harvest_lib.kind_and_layers(BASE) == ("dense", (0, 1, 2))


def same(one, other):
    assert one.n_tokens == other.n_tokens
    n = one.n_tokens
    for read in ("tokens", "documents", "losses"):
        np.testing.assert_array_equal(getattr(one, read)(0, n), getattr(other, read)(0, n))
    for layer in one.metadata.layers:
        np.testing.assert_array_equal(dense(one, layer), dense(other, layer))


def test_a_store_is_continued_where_it_stops(tmp_path):
    whole = harvested(tmp_path / "whole", TOPK)
    for n_tokens in (1, 100, 101, None):
        parts = harvested(tmp_path / "parts", TOPK, n_tokens=n_tokens)
        assert n_tokens is None or n_tokens <= parts.n_tokens < n_tokens + TOPK.context_length
    same(parts, whole)
    again = harvested(tmp_path / "parts", TOPK)  # there is nothing left to do
    assert len(again.segments) == len(parts.segments)


def test_shares_together_hold_all_documents(tmp_path):
    whole = harvested(tmp_path / "whole", TOPK)
    for index in (2, 0, 1):  # hosts end in any order
        shares = harvested(tmp_path / "shares", TOPK, share=Share(index, 3))
    assert shares.n_tokens == whole.n_tokens
    rows = {layer: (dense(whole, layer), dense(shares, layer)) for layer in (0, 1)}
    for number, ids in enumerate(TEXTS):
        if not len(ids):
            continue
        a, b = document(whole, number), document(shares, number)
        np.testing.assert_array_equal(shares.tokens(b.start, b.stop), ids)
        for of_whole, of_shares in rows.values():
            np.testing.assert_array_equal(of_shares[b], of_whole[a])


def test_other_text_is_not_added_to_a_store(tmp_path):
    harvested(tmp_path / "store", TOPK, n_tokens=100)
    with pytest.raises(UserError, match="the text has changed"):
        harvested(tmp_path / "store", TOPK, Texts([7, 300]))


def test_sparse_arrays_give_the_same_segment_as_dense_ones():
    """Takes activations as they come from an accelerator: sparse."""
    rng = np.random.default_rng(0)
    layers = rng.normal(size=(2, 50, 24)).astype(ml_dtypes.bfloat16)
    order = np.argsort(-np.abs(layers.astype(np.float32)), axis=-1)[..., :7]
    kept = np.zeros_like(layers)
    np.put_along_axis(kept, order, np.take_along_axis(layers, order, -1), -1)
    kept[0, 3] = 0  # a token at which nothing is active
    values = np.take_along_axis(kept, order, -1)
    text = rng.integers(0, 9, 50), np.arange(50) // 9, rng.normal(size=50)
    want = segment_lib.from_dense(*text, kept)
    got = segment_lib.from_sparse(*text, order.astype(np.uint8), values, 24)
    for name in ("offsets", "token_index", "values"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))


def test_what_an_accelerator_would_send_is_what_the_layers_hold():
    tokens = jax.random.randint(jax.random.key(0), (2, 32), 0, 256)
    arrays = tokens, jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(32), (2, 32))
    nll, (layers, _) = harvest_lib._forward(TOPK, False, None, params_of(TOPK), *arrays)
    sparse_nll, (neurons, _) = harvest_lib._forward(TOPK, True, None, params_of(TOPK), *arrays)
    np.testing.assert_allclose(sparse_nll, nll, rtol=1e-5)
    np.testing.assert_array_equal(neurons.dense(), layers)


@pytest.mark.parametrize("number", [0, 2, -1])
def test_what_a_damaged_store_advises_mends_it(tmp_path, number):
    """Deletes all segments from the damaged one on; they are harvested again."""
    whole = harvested(tmp_path / "whole", TOPK)
    folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / "damaged"))
    shard = Store(folder).segments[number].folder / "values" / "c" / "0"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="is damaged") as damaged:
        dense(Store(folder), 0)
    advised = re.search(r"delete (0-\d+)(?: to (0-\d+))? in segments, and run the same", str(damaged.value))
    first, last = advised[1], advised[2] or advised[1]
    for segment in (folder / "segments").iterdir():
        if first <= segment.name <= last:
            shutil.rmtree(segment)
    with pytest.raises(UserError, match=r"of \d+ segments of part 0 only \d+ are there"):
        Store(folder)
    same(harvested(folder, TOPK), whole)
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        assert path.name == ".lock" or (folder / path).read_bytes() == (whole.folder / path).read_bytes()
