"""The store of activations with any of its files damaged, missing, or in the place of another one."""

import dataclasses
import itertools
import os
from pathlib import Path
import shutil

import damage
import ml_dtypes
import numpy as np
import pytest
import test_store

from topklm.neurons import segment as segment_lib
from topklm.neurons.store import Store, StoreWriter

S, D, K, N = 2, 12, 4, 90
METADATA = dataclasses.replace(
    test_store.METADATA,
    layers=tuple(range(S)),
    d_model=D,
    topk_k=K,
    topk_activation="abs",
    parts=2,
    parameters="cd" * 32,
)


def segment(seed):
    """Makes N tokens with exactly k activations each, so that arrays of all segments are equally long."""
    rng = np.random.default_rng(seed)
    layers = rng.normal(size=(S, N, D)).astype(np.float32)
    smaller = np.argsort(np.argsort(-np.abs(layers), axis=-1), axis=-1) >= K
    layers[smaller] = 0
    documents = seed * 3 + np.arange(N) // 40
    losses = rng.normal(size=N)
    return segment_lib.from_dense(
        rng.integers(0, 500, N), documents, losses, layers.astype(ml_dtypes.bfloat16)
    )


def write(folder, seeds, metadata=METADATA):
    """Returns three segments of part 0, and one of part 1."""
    with StoreWriter(folder, metadata) as writer:
        for seed in seeds[:3]:
            writer.append(segment(seed))
    with StoreWriter(folder, metadata, part=1) as writer:
        writer.append(segment(seeds[3]))
    return folder


def everything(folder):
    """Returns all that a store says, by every way of asking it."""
    store = Store(folder)
    n, every = store.n_tokens, range(S * D)
    return {
        "metadata": store.metadata,
        "counts": (store.n_tokens, store.n_events),
        "neurons": [store.neuron(number // D, number % D) for number in every],
        "blocks": [store.block(layer, 2, D) for layer in range(S)],
        "text": [read(0, n) for read in (store.tokens, store.losses, store.documents)],
        "documents": store.document_bounds(),
        "whole": [reader.read() for reader in store.segments],
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write(tmp_path_factory.mktemp("store") / "store", range(4))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Returns one of the same text, of the same sizes, of another model."""
    metadata = dataclasses.replace(METADATA, parameters="ef" * 32)
    return write(tmp_path_factory.mktemp("other") / "store", range(10, 14), metadata)


@pytest.fixture
def copies(tmp_path):
    """Makes copies; of links if nothing but names is to be changed."""
    numbers = itertools.count()

    def of(folder, copy_function=os.link):
        place = tmp_path / str(next(numbers))
        return lambda: Path(shutil.copytree(folder, place / str(next(numbers)), copy_function=copy_function))

    return of


def has_no_influence(path):
    """Ignores lock files, which say nothing once their owner has ended."""
    return path.name == ".lock"


def test_whatever_is_damaged_is_named_or_does_not_matter(store, other, copies):
    n = damage.check(
        copies(store), everything, everything(store), other=other, ignore=has_no_influence, share=0.1
    )
    assert n > 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_every_damage_is_named_or_does_not_matter(store, other, copies, seed):
    reference = everything(store)
    damage.check(
        copies(store), everything, reference, seed=seed, per_file=5, other=other, ignore=has_no_influence
    )


def test_what_may_not_be_read_is_not_called_damaged(store, copies):
    n = damage.check_unreadable(
        copies(store, shutil.copy), everything, everything(store), ignore=has_no_influence, share=0.3
    )
    assert n > 10
