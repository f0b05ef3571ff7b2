"""Generation without a cache, one forward pass over the text for each token: what tests compare with."""

import contextlib
import dataclasses
import functools

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np

import topklm
from topklm.config import Config, ModelConfig
from topklm.data.tokenizer import train_bpe
from topklm.model import transformer
from topklm.model.block import LayerHooks

CONFIG = ModelConfig(
    d_model=24,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_mlp=32,
    vocab_size=50,
    context_length=32,
    topk_k=6,
    n_nontopk=1,
    init_residual_scale=3.0,
)


@functools.cache
def params_of(config):
    """Random ones, louder than at initialisation, so that what comes next depends on what came before."""
    params = jax.jit(transformer.create, static_argnums=(0, 1))(config, 0)
    return {**params, "unembed": jax.tree.map(lambda x: 3 * x, params["unembed"])}


@functools.cache
def byte_model():
    """A language model of random parameters whose tokens are bytes: any text is easily written as ids."""
    # Of the ways to compute TopK, that which compiles fastest.
    config = dataclasses.replace(CONFIG, vocab_size=257, topk_backend="lax")
    return topklm.LanguageModel("a run", 7, Config(model=config), train_bpe([], 257), params_of(config))


def whole(model, ids):
    """Logits of rows of one length, float32[B, T, V], by the model without what calling it does."""
    return np.asarray(jax.jit(transformer.bind(model.cfg, model.params))(np.asarray(ids, np.int32)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(config, change, params, tokens_1T, first, prompt_length):
    """Logits of a window; `change(h, layer, positions, prompt length)` edits what layers hand on."""

    def edit(h, layer):
        return change(h, layer, first + jnp.arange(tokens_1T.shape[1]), prompt_length)

    model = transformer.bind(config, params)
    hooks = LayerHooks(output=edit if change else None)
    h, _ = model.hidden(tokens_1T, hooks=hooks, hook_inputs=jnp.arange(config.n_layers))
    return model.logits(h)[0]


def plain_loop(config, params, prompt, n, sampling, *, stop_token=-1, halve=False, change=None):
    """New tokens of one prompt."""
    tokens, first, context = list(prompt), 0, config.context_length
    first = max(0, len(tokens) - context)
    key = jax.random.fold_in(
        jax.random.fold_in(jax.random.key(sampling.seed % 2**32), sampling.seed >> 32), 0
    )
    for number in range(n):
        if len(tokens) - first > context:
            first = len(tokens) - (context // 2 if halve else context)
        window = tokens[first:]
        # One shape, so that this compiles once; what follows a position cannot change it.
        padded = np.array([window + [0] * (context - len(window))])
        logits = _forward(config, change, params, padded, first, len(prompt))[len(window) - 1]
        # The separator, which ends texts too, is never penalised.
        others = [token for token in tokens if token != stop_token]
        limited = limited_logits(np.asarray(logits), others, sampling)
        if sampling.temperature == 0:
            token = int(np.argmax(limited))
        else:
            token = int(jax.random.categorical(jax.random.fold_in(key, number), jnp.asarray(limited)))
        if token == stop_token:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def limited_logits(logits, tokens, sampling):
    """float32[V] -> the same with minus infinity for what must not be drawn, by sorting."""
    logits = np.array(logits, np.float32)
    for token in set(tokens):
        penalty = np.float32(sampling.repetition_penalty)
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    if sampling.temperature == 0:
        return logits
    logits = logits / np.float32(sampling.temperature)
    if sampling.top_k:
        logits[logits < np.sort(logits)[::-1][: sampling.top_k][-1]] = -np.inf
    probabilities = np.exp(logits.astype(np.float64) - logits.max())
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        falling = np.sort(probabilities)[::-1]
        n_kept = np.searchsorted(np.cumsum(falling), sampling.top_p) + 1
        logits[probabilities < falling[: int(n_kept)][-1]] = -np.inf
    logits[probabilities < sampling.min_p * probabilities.max()] = -np.inf
    return logits


@contextlib.contextmanager
def compilations():
    """A list that holds one entry for each program that is compiled, or read from a cache on disk, inside."""
    found = []

    def listen(event, _seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
