"""The language model once more, in NumPy and float64, one text at a time; and stores made with it.

Written from the formulas, without the code under test. `change(layer, h)` sees what each layer hands on,
[T, D], and returns what it hands on instead.
"""

import dataclasses
import functools

import jax
import ml_dtypes
import numpy as np

from topklm.config import ModelConfig
from topklm.model import transformer
from topklm.neurons import segment as segment_lib
from topklm.neurons.store import Metadata, Store, StoreWriter

SEPARATOR = 0
V = 50
MODEL = ModelConfig(
    d_model=16,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    d_mlp=24,
    vocab_size=V,
    vocab_multiple=32,
    context_length=64,
    topk_k=5,
    layer_stack="scanned",  # compiles sooner
)


def configured(**fields):
    return dataclasses.replace(MODEL, **fields)


@functools.cache
def params():
    """Draws parameters, so that layers and norms differ; columns for no token would win if they were read."""
    draw = np.random.default_rng(1).standard_normal
    shapes = jax.eval_shape(functools.partial(transformer.create, MODEL, 0))
    drawn = jax.tree.map(lambda leaf: 0.3 * draw(leaf.shape, dtype=np.float32), shapes)
    drawn["final_norm"]["scale"] += 1
    drawn["unembed"]["kernel"][:, V:] = 1000
    return drawn


def unembedding():
    return np.asarray(params()["unembed"]["kernel"][:, :V], np.float64)


def final_hidden(config, tokens, change=lambda layer, h: h):
    """Returns the normed hidden state, [T, D]."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params())
    token = p["embed"]["embedding"][tokens]
    h = 0 * token if config.token_input == "every" else token
    for layer in range(config.n_layers):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["blocks"])
        read_by_all = config.token_input == "every"
        beside = token if read_by_all and layer < config.n_topk_layers else 0
        added = token if read_by_all and layer == config.n_topk_layers else 0
        a = h + _attention(config, block["attention"], _norm(config, block["attention_norm"], h + beside))
        a = a + added
        x, mlp = _norm(config, block["mlp_norm"], a + beside), block["mlp"]
        gate = x @ mlp["gate"]["kernel"]
        u = a + (gate / (1 + np.exp(-gate)) * (x @ mlp["up"]["kernel"])) @ mlp["down"]["kernel"]
        h = change(layer, _topk(config, u) if layer < config.n_topk_layers else u)
    return _norm(config, p["final_norm"], h)


def handed_on(config, tokens):
    """Returns the output of each layer, [L, T, D]."""
    seen = []

    def keep(_layer, h):
        seen.append(h)
        return h

    final_hidden(config, tokens, keep)
    return np.stack(seen)


def loss(hidden_D, token):
    logits = hidden_D @ unembedding()
    return np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[token]


def make_store(folder, config, documents):
    """Returns a store of these texts, each a list of ids, with activations from the whole text."""
    is_base = config.n_topk_layers == 0
    layers = tuple(range(config.n_topk_layers or config.n_layers))
    metadata = Metadata(
        run="plain",
        step=1,
        tokenizer_sha256="ab" * 32,
        source="random numbers",
        kind="dense" if is_base else "topk",
        layers=layers,
        d_model=config.d_model,
        topk_k=config.d_model if is_base else config.topk_k,
        topk_activation=config.topk_activation,
        context_length=config.context_length,
    )
    parts = [handed_on(config, [SEPARATOR, *ids])[: len(layers), 1:] for ids in documents]
    dense = np.concatenate(parts, axis=1).astype(ml_dtypes.bfloat16)
    dense = np.maximum(dense, 0) if is_base else dense
    numbers = np.repeat(np.arange(len(documents)), [len(ids) for ids in documents])
    tokens = np.concatenate(documents)
    segment = segment_lib.from_dense(tokens, numbers, np.zeros(len(tokens)), list(dense))
    StoreWriter(folder, metadata).append(segment)
    return Store(folder)


def random_documents(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, V, n) for n in lengths]


def _norm(config, parameters, x):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_eps) * parameters["scale"]


def _attention(config, parameters, x):
    length, width = len(x), config.head_width
    q, k, v = (
        (x @ parameters[name]["kernel"]).reshape(length, -1, width) for name in ("query", "key", "value")
    )
    q, k = (_rotated(config, y) for y in (q, k))
    mixed = np.zeros_like(q)
    for head in range(config.n_heads):
        shared = head * config.n_kv_heads // config.n_heads
        for t in range(length):
            scores = np.exp(k[: t + 1, shared] @ q[t, head] / np.sqrt(width))
            mixed[t, head] = scores @ v[: t + 1, shared] / scores.sum()
    return mixed.reshape(length, -1) @ parameters["out"]["kernel"]


def _rotated(config, x):
    half = config.head_width // 2
    angles = np.arange(len(x))[:, None] * config.rope_theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def groups_of(config):
    """Returns the first neuron of each group, the one after its last, and its k."""
    found, begin = [], 0
    for group in (config.topk_groups or f"{config.d_model}:{config.topk_k}").split(","):
        width, k = map(int, group.split(":"))
        found.append((begin, begin + width, k))
        begin += width
    return found


def _topk(config, u):
    if config.topk_centred:
        parts = [u[:, begin:end] for begin, end, _ in groups_of(config)]
        u = np.concatenate([x - x.mean(axis=-1, keepdims=True) for x in parts], axis=-1)
    score = np.abs(u) if config.topk_activation == "abs" else u
    kept = np.zeros_like(u)
    for begin, end, k in groups_of(config):
        threshold = -np.sort(-score[:, begin:end], axis=-1)[:, k - 1, None]
        kept[:, begin:end] = np.where(score[:, begin:end] >= threshold, u[:, begin:end], 0)
    return np.maximum(kept, 0) if config.topk_activation == "relu" else kept
