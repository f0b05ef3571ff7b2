"""Counts of active tokens against the model, run on one window after another."""

import dataclasses

import jax
import numpy as np
import saved_runs

from topklm.config import Config
from topklm.inference.language_model import LanguageModel
from topklm.layout import one_device
from topklm.neurons.documents import TextModel, windows_of
from topklm.neurons.harvest import count, kind_and_layers, unit_sizes

DOCUMENTS = [np.random.default_rng(n).integers(0, 256, n).astype(np.int32) for n in (9, 1, 75, 31, 20)]


def model_of(**changes):
    config = dataclasses.replace(saved_runs.MODEL, dtype="float32", **changes)
    tokenizer = saved_runs.tokenizer()
    params = jax.tree.map(np.array, saved_runs.state(3, Config(model=config)).params)
    return LanguageModel("a run", 3, Config(model=config), tokenizer, params)


def text_model(model):
    return TextModel(model.config.model, model.params, one_device(), model.tokenizer.separator_id)


def activations(model, ids):
    """Returns [S, n, D], what the layers hand on at the tokens of a document."""
    config, separator = model.config.model, model.tokenizer.separator_id
    names = [f"blocks.{layer}.hook_resid_post" for layer in kind_and_layers(config)[1]]
    parts = []
    for window in windows_of(0, ids, separator, config.context_length):
        padded = np.full((1, config.context_length), separator)
        padded[0, : len(window.inputs)] = window.inputs
        _, cache = model.run_with_cache(padded, names)
        states = np.stack([np.asarray(cache[name])[0] for name in names])
        parts.append(states[:, window.n_known : len(window.inputs)])
    return np.concatenate(parts, axis=1)


def counted(model, **arguments):
    return count(text_model(model), DOCUMENTS, **arguments)


def test_every_token_is_counted_once_where_it_belongs():
    model, done = model_of(), []
    whole = counted(model, report=done.append)
    assert (whole.layers, whole.n_tokens.tolist(), sum(done)) == ((0,), [9, 1, 75, 31, 20], 136)
    seen = [activations(model, ids) for ids in DOCUMENTS]
    np.testing.assert_array_equal(whole.active, [(states != 0).sum(axis=1) for states in seen])
    pieces = counted(model, piece=16)
    assert pieces.n_tokens.tolist() == [9, 1, 16, 16, 16, 16, 11, 16, 15, 16, 4]
    np.testing.assert_array_equal(pieces.active[4], (seen[2][:, 32:48] != 0).sum(axis=1))
    at = np.cumsum([0, 1, 1, 5, 2])
    np.testing.assert_array_equal(np.add.reduceat(pieces.active, at, axis=0), whole.active)


def test_of_a_base_model_the_largest_entries_of_every_layer_count():
    found = counted(model_of(n_nontopk=2), keep=5)
    assert found.layers == kind_and_layers(model_of(n_nontopk=2).config.model)[1] == (0, 1)
    # Of each token so many, for more than so many are above 0.
    np.testing.assert_array_equal(found.active.sum(axis=2), 5 * found.n_tokens[:, None].repeat(2, axis=1))


def test_pieces_end_with_their_documents():
    assert unit_sizes([5, 3], None).tolist() == [5, 3]
    assert unit_sizes([5, 3, 4], 2).tolist() == [2, 2, 1, 2, 1, 2, 2]
