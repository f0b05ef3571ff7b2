"""Averaged Jacobians against differences of a model in float64, and against the model's own forward mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain_model
from plain_model import SEPARATOR, configured, final_hidden, handed_on, params, random_documents
import pytest
from references import attention_reference

from topklm.model import attention, layers, transformer
from topklm.model.block import LayerHooks
from topklm.neurons.statistics import lenses

DOCUMENTS = random_documents((30, 4, 1, 17))
SETTINGS = {"n_contexts": 5, "context_tokens": 9, "seed": 3}
TINY = 1e-6  # of float64, so that rounding and curvature cost the same


def stored(tmp_path, config):
    return plain_model.make_store(tmp_path / "store", config, DOCUMENTS)


def text_of(store):
    return store.tokens(0, store.n_tokens), store.document_bounds()


def measured(config, parameters, store, **settings):
    settings = {"separator_id": SEPARATOR, **SETTINGS, **settings}
    return lenses.averaged_jacobians(config, parameters, *text_of(store), **settings)


def contexts(store, n=SETTINGS["n_contexts"]):
    ends = lenses.spread_ends(store.n_tokens, n, SETTINGS["seed"])
    return lenses.excerpts(*text_of(store), ends, SETTINGS["context_tokens"], SEPARATOR)


def texts(store):
    """Returns the contexts as lists of ids."""
    found = contexts(store)
    return [row[there == 1] for row, there in zip(found.tokens, found.segments, strict=True)]


def differences(config, tokens, layer):
    """Computes d(normed final state) / d(a layer's output), both at the last position, by differences."""
    supports = handed_on(config, tokens) != 0

    def moved(neuron, step):
        seen = []

        def change(at, h):
            h = h.copy()
            if at == layer:
                h[-1, neuron] += step
            else:
                seen.append((h != 0) == supports[at])
            return h

        hidden = final_hidden(config, tokens, change)[-1]
        assert np.all(seen)  # no support changes
        return hidden

    columns = [(moved(j, TINY) - moved(j, -TINY)) / (2 * TINY) for j in range(config.d_model)]
    return np.stack(columns, axis=1)


@pytest.mark.parametrize(
    "fields",
    [
        {"topk_activation": "relu"},
        {"topk_activation": "abs", "n_nontopk": 0, "dtype": "bfloat16"},
        {"n_nontopk": 3, "remat": "full", "layer_stack": "unrolled"},
        {"token_input": "every", "topk_groups": "4:1,12:4", "n_nontopk": 2},
        {"topk_centred": True, "topk_groups": "4:1,12:4"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_they_are_the_mean_of_differences_in_every_layer(tmp_path, fields):
    config = configured(**fields)
    store = stored(tmp_path, config)
    found = measured(config, params(), store)
    assert found.shape == (config.n_layers, config.d_model, config.d_model)
    assert found.dtype == np.float32
    for layer in range(config.n_layers):
        expected = np.mean([differences(config, tokens, layer) for tokens in texts(store)], axis=0)
        np.testing.assert_allclose(found[layer], expected, atol=1e-4 * np.abs(expected).max())


def mean_of_last(config, store, change):
    """Returns the mean over contexts of the normed final state, [D], as a function of `change`, [L, D], which
    is added to what the layers hand on at the last position."""
    found = contexts(store)
    hooks = LayerHooks(output=lambda h, e: h.at[:, -1].add(e))
    hidden, _ = transformer.bind(config, params()).hidden(
        found.tokens, found.segments, found.positions, hooks=hooks, hook_inputs=change
    )
    return hidden[:, -1].mean(axis=0)


def test_they_are_what_forward_mode_gives_for_single_neurons(tmp_path, monkeypatch):
    config = configured()
    store = stored(tmp_path, config)
    found = measured(config, params(), store)
    # Rules written out for the backward pass know no forward mode: the same by plain formulas.
    monkeypatch.setattr(layers, "matmul", jnp.matmul)
    monkeypatch.setattr(layers, "swiglu", lambda x, gate, up, down: jax.nn.silu(x @ gate) * (x @ up) @ down)
    monkeypatch.setattr(attention, "causal_attention", attention_reference)

    @jax.jit
    def slope(direction):
        run = functools.partial(mean_of_last, config, store)
        return jax.jvp(run, (jnp.zeros_like(direction),), (direction,))[1]

    zero = jnp.zeros((config.n_layers, config.d_model))
    for layer, neuron in ((0, 3), (1, 11), (2, 0)):
        expected = slope(zero.at[layer, neuron].set(1.0))
        np.testing.assert_allclose(found[layer, :, neuron], expected, atol=1e-5)


def test_they_do_not_depend_on_how_much_is_done_at_once(tmp_path, monkeypatch):
    config = configured()
    store = stored(tmp_path, config)
    found = measured(config, params(), store)
    monkeypatch.setattr(lenses, "_BATCH", 2)
    few = measured(config, params(), store)
    np.testing.assert_allclose(few, found, atol=1e-6)


def test_the_last_layers_is_that_of_the_norm_at_shapes_that_xla_gets_wrong_vectorised(tmp_path, monkeypatch):
    # [256, 16, 256], in XLA 0.10.2 for CPUs.
    monkeypatch.setattr(lenses, "_BATCH", 16)
    config = configured(d_model=256, n_layers=1, n_nontopk=1)
    store = stored(tmp_path, configured())
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: transformer.create(config, 0))
    parameters = jax.tree.map(lambda leaf: 0.1 * random.standard_normal(leaf.shape, np.float32), shapes)
    found = measured(config, parameters, store, n_contexts=16)

    @jax.jit
    def last(p):
        model = transformer.bind(config, p)
        return model.hidden(*contexts(store, 16), capture=lambda _h, _u, h: h[:, -1])[1][0]

    h = np.asarray(last(parameters), np.float64)
    rms = np.sqrt((h**2).mean(axis=1) + config.norm_eps)
    scale = parameters["final_norm"]["scale"][:, None]
    each = [scale * (np.eye(256) / r - np.outer(x, x) / (256 * r**3)) for x, r in zip(h, rms, strict=True)]
    np.testing.assert_allclose(found[0], np.mean(each, axis=0), atol=1e-6)
