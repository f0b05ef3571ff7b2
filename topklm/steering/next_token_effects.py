"""Effects of treatments on the next token: the programs of the steering survey.

A treatment is a vector that is added to a layer's output, after its TopK, at every position of every prompt;
or another way to write the prompts. Vectors, layers and prompts are data, so all treatments share one
program. Computed in float32, whatever the dtype of the model. Dims: R treatments, C prompts of T tokens, B =
R x C rows, V vocabulary, D d_model, L layers, N concepts of K kinds with M tokens each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.model import transformer
from topklm.model.block import TokenInput, end_layer
from topklm.steering.concepts import NO_TOKEN

_MAX_ROWS = 256  # R x C
_MAX_LOGITS = 1 << 23
_MAX_PICKED = 1 << 23  # probabilities of concepts' tokens that are held at once


class Unsteered(NamedTuple):
    """The model's own run of the prompts."""

    tokens: Any  # int32[C, T]
    states: Any  # float32[L, C, T, D], the output of each layer
    log_p: Any  # float32[C, V], log-probabilities of the next token
    # float32[L], mean over tokens of the length of each layer's output; the first position of the prompts,
    # that of the separator, is left out
    norms: Any


class TreatmentEffects(NamedTuple):
    """Effects of treatments, each a mean over the prompts, nats."""

    gains: Any  # float32[R, N, K], rise of ln P(the next token is one of the concept's)
    divergences: Any  # float32[R], KL of the treated next-token distribution from the untreated one
    losses: Any  # float32[R], rise of the loss of the token that follows in the text


@transformer.jit_in_float32
def unsteered(config: ModelConfig, params: transformer.Parameters, tokens_CT: jax.Array) -> Unsteered:
    """Runs the model as it is, on prompts int32[C, T]."""
    model = transformer.bind(config, params)
    h_CTD, states_LCTD = model.hidden(tokens_CT, capture=lambda _h, _u, h_next: h_next)
    norms_LCT = jnp.linalg.norm(states_LCTD, axis=-1)
    log_p_CV = jax.nn.log_softmax(model.logits(h_CTD[:, -1]))
    return Unsteered(tokens_CT, states_LCTD, log_p_CV, norms_LCT[:, :, 1:].mean(axis=(1, 2)))


@transformer.jit_in_float32
def add_vectors(
    config: ModelConfig,
    params: transformer.Parameters,
    layer: int | jax.Array,
    vectors_RD: jax.Array,
    following_C: jax.Array,
    concepts_NKM: jax.Array,
    before: Unsteered,
) -> TreatmentEffects:
    """Measures the effects of R vectors, float32[R, D], each added at every position of every prompt.

    They are added to a layer's output; only the layers after it are run. `following_C`, int32, is the token
    that follows each prompt in the text, concepts int32[N, K, M] ids with `NO_TOKEN` after the last, `before`
    is `unsteered` of the prompts.
    """
    model, state_CTD = transformer.bind(config, params), before.states[layer]
    r, (c, t, d) = len(vectors_RD), state_CTD.shape
    rotation = model.rotation(jnp.broadcast_to(jnp.arange(t), (r * c, t)))
    _, token_BTD = model.embedded(jnp.tile(before.tokens, (r, 1)))

    def run_layer(number: jax.Array, h_BTD: jax.Array) -> jax.Array:
        ends_in_topk, follows_topk = model.topk_around(number)
        token = TokenInput.of_layer(token_BTD, ends_in_topk, follows_topk)
        segment_ids_BT = jnp.ones((r * c, t), jnp.int32)
        a_BTD, written_BTD = model.block(number)(h_BTD, rotation, segment_ids_BT, token=token)
        return end_layer(config, a_BTD, written_BTD, ends_in_topk)

    h_BTD = (state_CTD + vectors_RD[:, None, None]).reshape(r * c, t, d)
    # The layers up to the one that is changed are the same for all.
    h_BTD = jax.lax.fori_loop(layer + 1, config.n_layers, run_layer, h_BTD)
    logits_RCV = model.logits(model.final_norm(h_BTD[:, -1])).reshape(r, c, -1)
    return _effects(logits_RCV, following_C, concepts_NKM, before.log_p)


@transformer.jit_in_float32
def change_prompts(
    config: ModelConfig,
    params: transformer.Parameters,
    tokens_RCT: jax.Array,
    following_C: jax.Array,
    concepts_NKM: jax.Array,
    before: Unsteered,
) -> TreatmentEffects:
    """Measures the effects of R other ways to write the prompts, int32[R, C, T]; as `add_vectors`."""
    model = transformer.bind(config, params)
    r, c, t = tokens_RCT.shape
    h_BTD, _ = model.hidden(tokens_RCT.reshape(r * c, t))
    logits_RCV = model.logits(h_BTD[:, -1]).reshape(r, c, -1)
    return _effects(logits_RCV, following_C, concepts_NKM, before.log_p)


def treatments_at_once(config: ModelConfig, n_prompts: int, concepts_NKM: np.ndarray) -> int:
    """Returns how many treatments fit into one call of `add_vectors`."""
    of_one = max(
        n_prompts / _MAX_ROWS,
        n_prompts * config.vocab_size / _MAX_LOGITS,
        n_prompts * concepts_NKM.size / _MAX_PICKED,
    )
    return max(1, int(1 / of_one))


def in_parts(
    run: Callable[[np.ndarray], TreatmentEffects],
    treatments: np.ndarray,
    at_once: int,
    report: Callable[[int], object],
) -> TreatmentEffects:
    """Runs treatments, [R, ...], some at once; `report` is told how many are done since the last time."""
    parts = []
    for first in range(0, len(treatments), at_once):
        part = treatments[first : first + at_once]
        # Filled up to one shape, so that nothing is compiled for what is left over.
        effects = run(np.resize(part, (at_once, *part.shape[1:])))
        parts.append([np.asarray(figures)[: len(part)] for figures in effects])
        report(len(part))
    return TreatmentEffects(*map(np.concatenate, zip(*parts, strict=True)))


def _effects(
    logits_RCV: jax.Array, following_C: jax.Array, concepts_NKM: jax.Array, before_CV: jax.Array
) -> TreatmentEffects:
    after_RCV = jax.nn.log_softmax(logits_RCV)
    divergences_RC = jnp.sum(jnp.exp(after_RCV) * (after_RCV - before_CV), axis=-1)
    losses_RC = (before_CV - after_RCV)[:, jnp.arange(len(following_C)), following_C]
    gains_RCNK = _of_concepts(after_RCV, concepts_NKM) - _of_concepts(before_CV, concepts_NKM)
    return TreatmentEffects(gains_RCNK.mean(axis=1), divergences_RC.mean(axis=1), losses_RC.mean(axis=1))


def _of_concepts(log_p: jax.Array, concepts_NKM: jax.Array) -> jax.Array:
    """Computes ln P(the token is one of a concept's), float32[..., N, K], from log-probabilities [..., V].

    A concept without tokens has 0: nothing changes for it.
    """
    picked = jnp.take(log_p, jnp.maximum(concepts_NKM, 0), axis=-1)
    picked = jnp.where(concepts_NKM != NO_TOKEN, picked, -jnp.inf)
    empty_NK = jnp.all(concepts_NKM == NO_TOKEN, axis=-1)
    return jnp.where(empty_NK, 0.0, jax.nn.logsumexp(picked, axis=-1))
