"""The same weights in Hugging Face's Llama (or Qwen3), with TopK as a forward hook, are the same model."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topklm.config import ModelConfig
from topklm.model import transformer
from topklm.model.losses import cross_entropy

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
llama = importlib.import_module("benchmarks.peers.llama")

CONFIG = ModelConfig(
    d_model=32,
    n_layers=3,
    n_heads=4,
    n_kv_heads=4,
    d_mlp=48,
    vocab_size=61,
    context_length=24,
    topk_k=8,
    n_nontopk=1,
    init_embed_std=1.0,
)
TIED = {"tie_embeddings": True, "init_embed_std": 0.3}
VARIANTS = {
    "topk": {},
    "topk-identity-grouped-queries": {"topk_activation": "identity", "n_kv_heads": 2},
    "topk-abs-tied": {"topk_activation": "abs", **TIED},
    "base": {"n_nontopk": 3},
    "base-grouped-queries-tied": {"n_nontopk": 3, "n_kv_heads": 1, **TIED},
    "topk-qk-norm-grouped-queries": {"qk_norm": True, "n_kv_heads": 2},
    "topk-narrow-heads": {"d_model": 36, "n_heads": 2, "n_kv_heads": 1, "head_dim": 10},
}


AT_NIGHT = ("topk-abs-tied", "base-grouped-queries-tied")


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.slow) if name in AT_NIGHT else name for name in VARIANTS],
    ids=str,
    scope="module",
)
def config(request):
    return dataclasses.replace(CONFIG, **VARIANTS[request.param])


@pytest.fixture(scope="module")
def params(config):
    """Random ones. Norm scales are moved away from 1, so that one left out would show."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        match path[-1].key:
            case "scale":
                values = 1 + 0.2 * rng.normal(size=leaf.shape)
            case "kernel":
                values = rng.normal(size=leaf.shape, scale=leaf.shape[-2] ** -0.5)
            case "embedding":
                values = rng.normal(size=leaf.shape, scale=config.init_embed_std)
        return np.float32(values)

    shapes = jax.eval_shape(lambda: transformer.create(config, seed=0))
    return jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.fixture(scope="module")
def tokens(config):
    return np.random.default_rng(1).integers(0, config.vocab_size, (3, config.context_length + 1))


def logits_of(config, params, *arguments):
    forward = jax.jit(lambda p, *arguments: transformer.bind(config, p)(*arguments))
    return forward(params, *(jnp.asarray(x, jnp.int32) for x in arguments))


def peer(config, params, masks=None):
    model = llama.build(config, "eager", masks)
    llama.load(model, llama.state_dict(config, params))
    return model.eval()


def relative_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def test_the_logits_are_the_same(config, params, tokens):
    model = peer(config, params)
    with torch.no_grad():
        want = model(torch.tensor(tokens)).logits.numpy()
    got = logits_of(config, params, tokens)
    assert relative_error(got, want) < 1e-4
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_the_gradients_are_the_same_with_the_active_sets_held_fixed(config, params, tokens):
    inputs, targets = jnp.asarray(tokens[:, :-1], jnp.int32), jnp.asarray(tokens[:, 1:], jnp.int32)
    weights = jnp.full(inputs.shape, 1 / inputs.size)

    def loss(p):
        model = transformer.bind(config, p)
        h, masks = model.hidden(inputs, capture=lambda h, u, h_next: h_next != 0)
        return cross_entropy(h, model.unembedding(), targets, weights, 0.0, config.vocab_size)[0], masks

    (got_loss, masks), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    model = peer(config, params, np.asarray(masks))
    logits = model(torch.tensor(tokens[:, :-1])).logits
    want_loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, config.vocab_size), torch.tensor(tokens[:, 1:]).reshape(-1)
    )
    want_loss.backward()
    assert abs(got_loss - want_loss.item()) < 1e-5 * want_loss.item()
    parameters = dict(model.named_parameters())
    ours = llama.state_dict(config, grads)
    assert set(ours) == set(parameters)
    for name, gradient in ours.items():
        assert relative_error(gradient, parameters[name].grad.numpy()) < 1e-4, name


@pytest.mark.parametrize(
    "config", ["topk-identity-grouped-queries", "base", "topk-qk-norm-grouped-queries"], indirect=True
)
def test_documents_packed_in_one_row_give_what_each_gives_alone(config, params):
    rng = np.random.default_rng(2)
    first, second = (rng.integers(0, config.vocab_size, (1, n)) for n in (9, 13))
    model = peer(config, params)
    with torch.no_grad():
        want = np.concatenate([model(torch.tensor(d)).logits.numpy() for d in (first, second)], axis=1)
    packed, segment_ids = np.concatenate([first, second], axis=1), [[1] * 9 + [2] * 13]
    got = logits_of(config, params, packed, segment_ids, [[*range(9), *range(13)]])
    assert relative_error(got, want) < 1e-4
