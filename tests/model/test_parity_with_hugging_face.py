"""The same weights in Hugging Face's Llama (or Qwen3), with TopK as a forward hook, are the same model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topklm.config import ModelConfig
from topklm.model import transformer
from topklm.model.losses import cross_entropy

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

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
}


@pytest.fixture(params=VARIANTS, ids=str, scope="module")
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


# Our block parameter -> Hugging Face's name inside a layer, and whether it is a transposed matrix.
BLOCK_NAMES = {
    ("attention", "query", "kernel"): "self_attn.q_proj",
    ("attention", "key", "kernel"): "self_attn.k_proj",
    ("attention", "value", "kernel"): "self_attn.v_proj",
    ("attention", "out", "kernel"): "self_attn.o_proj",
    ("mlp", "gate", "kernel"): "mlp.gate_proj",
    ("mlp", "up", "kernel"): "mlp.up_proj",
    ("mlp", "down", "kernel"): "mlp.down_proj",
    ("attention_norm", "scale"): "input_layernorm",
    ("mlp_norm", "scale"): "post_attention_layernorm",
}
QK_NORM_NAMES = {
    ("attention", "query_norm", "scale"): "self_attn.q_norm",
    ("attention", "key_norm", "scale"): "self_attn.k_norm",
}


def in_torch_names(tree, config):
    """A tree of parameters, or of their gradients, as Hugging Face's state dict of NumPy arrays."""
    v = config.vocab_size  # rows of padding have no counterpart
    named = {"model.embed_tokens.weight": tree["embed"]["embedding"][:v]}
    named["model.norm.weight"] = tree["final_norm"]["scale"]
    if not config.tie_embeddings:
        named["lm_head.weight"] = tree["unembed"]["kernel"].T[:v]
    for path, name in (BLOCK_NAMES | (QK_NORM_NAMES if config.qk_norm else {})).items():
        stacked = tree["blocks"]
        for key in path:
            stacked = stacked[key]
        for layer in range(config.n_layers):
            value = stacked[layer].T if path[-1] == "kernel" else stacked[layer]
            named[f"model.layers.{layer}.{name}.weight"] = value
    return {name: np.asarray(value) for name, value in named.items()}


def peer(config, params):
    """Llama, or Qwen3, which differs in its norm of queries and keys."""
    kind = "Qwen3" if config.qk_norm else "Llama"
    settings = {"head_dim": config.head_dim} if config.qk_norm else {"mlp_bias": False}
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_mlp,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
            max_position_embeddings=config.context_length,
            attention_bias=False,
            attn_implementation="eager",
            **settings,
        )
    )
    state = {name: torch.tensor(value) for name, value in in_torch_names(params, config).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"} and bool(missing) == config.tie_embeddings
    model.tie_weights()
    return model.eval()


def add_topk(model, config, masks=None):
    """A forward hook on each TopK layer: `torch.topk`, or a given mask [S, B, T, D]."""

    def topk(u):
        judged = u.abs() if config.topk_activation == "abs" else u
        index = torch.topk(judged, config.topk_k, dim=-1).indices
        kept = torch.zeros_like(u).scatter(-1, index, u.gather(-1, index))
        return kept.relu() if config.topk_activation == "relu" else kept

    def hook(layer):
        def replace(module, arguments, output):
            u = output[0] if isinstance(output, tuple) else output
            h = topk(u) if masks is None else u * torch.tensor(masks[layer])
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return replace

    for layer in range(config.n_topk_layers):
        model.model.layers[layer].register_forward_hook(hook(layer))


def relative_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def test_the_logits_are_the_same(config, params, tokens):
    model = peer(config, params)
    add_topk(model, config)
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
    model = peer(config, params)
    add_topk(model, config, masks=np.asarray(masks))
    logits = model(torch.tensor(tokens[:, :-1])).logits
    want_loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, config.vocab_size), torch.tensor(tokens[:, 1:]).reshape(-1)
    )
    want_loss.backward()
    assert abs(got_loss - want_loss.item()) < 1e-5 * want_loss.item()
    parameters = dict(model.named_parameters())
    ours = in_torch_names(grads, config)
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
    add_topk(model, config)
    with torch.no_grad():
        want = np.concatenate([model(torch.tensor(d)).logits.numpy() for d in (first, second)], axis=1)
    packed, segment_ids = np.concatenate([first, second], axis=1), [[1] * 9 + [2] * 13]
    got = logits_of(config, params, packed, segment_ids, [[*range(9), *range(13)]])
    assert relative_error(got, want) < 1e-4
