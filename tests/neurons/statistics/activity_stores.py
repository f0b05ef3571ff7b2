"""Stores and blocks of activations made from dense arrays, for tests of what is measured on them."""

import itertools

import ml_dtypes
import numpy as np

from topklm.neurons import segment as segment_lib
from topklm.neurons.store import Metadata, NeuronBlock, Store, StoreWriter


def metadata(n_layers, d_model):
    return Metadata(
        run="village",
        step=24,
        tokenizer_sha256="ab" * 32,
        source="held-out text of village-0123",
        kind="topk",
        layers=tuple(range(1, n_layers + 1)),  # not their own places
        d_model=d_model,
        topk_k=min(4, d_model),
        topk_activation="relu",
        context_length=64,
    )


def random_dense(seed, n_layers, n_tokens, d_model, share=0.15, signed=False):
    """Returns float32[S, N, D] that bfloat16 holds exactly; the last neuron of every layer is dead."""
    rng = np.random.default_rng(seed)
    dense = rng.gamma(1.5, size=(n_layers, n_tokens, d_model)) * (
        rng.random((n_layers, n_tokens, d_model)) < share
    )
    if signed:
        dense *= rng.choice([-1, 1], dense.shape)
    dense[..., -1] = 0
    return dense.astype(ml_dtypes.bfloat16).astype(np.float32)


def make_store(folder, dense, tokens, documents, cuts=()):
    """Returns a store of `dense`, float32[S, N, D], in segments that end at `cuts`."""
    writer = StoreWriter(folder, metadata(dense.shape[0], dense.shape[2]))
    edges = [0, *cuts, len(tokens)]
    for a, b in itertools.pairwise(edges):
        layers = dense[:, a:b].astype(ml_dtypes.bfloat16)
        writer.append(segment_lib.from_dense(tokens[a:b], documents[a:b], np.zeros(b - a), layers))
    return Store(folder)


def block_of(dense):
    """Returns the block of these neurons, float32[N, n]."""
    neurons, tokens = np.nonzero(dense.T)
    offsets = np.concatenate([[0], np.cumsum((dense != 0).sum(axis=0))])
    return NeuronBlock(offsets, tokens, dense[tokens, neurons].astype(np.float32))
