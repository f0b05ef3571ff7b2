"""Effects of treatments on the next token: the programs of the steering survey, and verdicts on its neurons.

A treatment is a vector that is added to a layer's output, after its TopK, at every position of every prompt;
or another way to write the prompts. Vectors, layers and prompts are data, so all treatments share one
program. Computed in float32, whatever the dtype of the model. Dims: R treatments, C prompts of T tokens, B =
R x C rows, V vocabulary, D d_model, L layers, N concepts of K kinds with M tokens each.

Verdicts say which neurons are steerable, and how sure that is; the definitions are ours. Of neuron j of a
layer, let g[x, r, i] be the gain of concept i (`concepts`) when vector r is added at strength x: the rise of
ln P(the next token is one of the concept's), a mean over the prompts. And d[x, r]: the KL divergence of the
steered next-token distribution from the unsteered one, nats, a mean likewise. It says what the unsteered
model loses on text that the steered one writes, beyond what that one loses itself; so fluency is kept while d
is at most a bound.

    strength     x_j, the largest at which d[x, j] is within the bound. The gain has no part in that choice,
                 so it is one test a neuron, whatever the number of strengths.
    steerable    g[x_j, j, j] is above 0, and above `QUANTILE` of the gains that random directions of the
                 same length give the same concept, at the same place and strength.
    specific     steerable, and above the same quantile of the gains that the other neurons of its layer give
                 its concept, each at that strength.
    mismatched   of all pairs of a neuron and another's concept, the share that is steerable by that test.
                 Where it is far above 5 %, random directions do little of anything, most neurons beat them
                 for any concept, and only what goes beyond this share says something about concepts.

A neuron without a strength within the bound is neither. By chance a neuron beats a quantile in 5 of 100
cases. Dims of verdicts: X strengths, N neurons, R random directions, S neurons that were tried with all
concepts, K kinds.
"""

from collections.abc import Callable
import dataclasses
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
    """Computes ln P(the token is of a concept), float32[..., N, K], of [..., V]; 0 for an empty concept."""
    picked = jnp.take(log_p, jnp.maximum(concepts_NKM, 0), axis=-1)
    picked = jnp.where(concepts_NKM != NO_TOKEN, picked, -jnp.inf)
    empty_NK = jnp.all(concepts_NKM == NO_TOKEN, axis=-1)
    return jnp.where(empty_NK, 0.0, jax.nn.logsumexp(picked, axis=-1))


QUANTILE = 0.95
NO_STRENGTH = -1


@dataclasses.dataclass(frozen=True, eq=False)
class MeasuredLayer:
    """The measurements in a layer, nats."""

    own: np.ndarray  # float32[X, N, K], gains of each neuron's own concepts
    divergences: np.ndarray  # float32[X, N]
    losses: np.ndarray  # float32[X, N], rise of the loss of the text's own next token
    random: np.ndarray  # float32[X, R, N, K], gains of all concepts by random directions
    random_divergences: np.ndarray  # float32[X, R]
    others: np.ndarray  # float32[X, S, N, K], gains of all concepts by some of the neurons
    others_at: np.ndarray  # int64[S], which of the N neurons those are


@dataclasses.dataclass(frozen=True, eq=False)
class Verdicts:
    """Of each neuron."""

    strength: np.ndarray  # int64[N], which of the strengths; `NO_STRENGTH` where none is within the bound
    gain: np.ndarray  # float64[N, K], nats, at that strength; NaN without one, as in the next two
    random: np.ndarray  # float64[N, K], the quantile of random directions' gains
    others: np.ndarray  # float64[N, K], that of the other neurons' gains
    steerable: np.ndarray  # bool[N, K]
    specific: np.ndarray  # bool[N, K]
    mismatched: np.ndarray  # float64[K], share of pairs; NaN without any


def judge(measured: MeasuredLayer, bound: float) -> Verdicts:
    """Judges all neurons of a layer; strengths rise along X, the bound is of the divergence, nats."""
    n, k = measured.own.shape[1:]
    strength = largest_within(measured.divergences, bound)
    of_random = np.quantile(measured.random.astype(np.float64), QUANTILE, axis=1)
    chosen, rows = np.maximum(strength, 0), np.arange(n)
    there_is = (strength != NO_STRENGTH)[:, None]
    gain = measured.own[chosen, rows].astype(np.float64)
    above_random = of_random[chosen, rows]
    above_others = np.full((n, k), np.nan)  # nothing is above that
    for j in rows:
        # Its own gain is none of the others'.
        others = measured.others[chosen[j], measured.others_at != j, j]
        if len(others):
            above_others[j] = np.quantile(others.astype(np.float64), QUANTILE, axis=0)
    steerable = there_is & (gain > 0) & (gain > above_random)
    at = measured.others_at
    gains_SNK = measured.others[chosen[at], np.arange(len(at))]
    passed = there_is[at, None] & (gains_SNK > 0) & (gains_SNK > of_random[chosen[at]])
    passed[np.arange(len(at)), at] = False  # its own concept is none of the pairs
    n_pairs = len(at) * (n - 1)
    return Verdicts(
        strength,
        np.where(there_is, gain, np.nan),
        np.where(there_is, above_random, np.nan),
        np.where(there_is, above_others, np.nan),
        steerable,
        steerable & (gain > above_others),
        passed.sum(axis=(0, 1)) / n_pairs if n_pairs else np.full(k, np.nan),
    )


def largest_within(divergences_XN: np.ndarray, bound: float) -> np.ndarray:
    """Returns int64[N], the last strength whose divergence is at most the bound, or `NO_STRENGTH`."""
    within = divergences_XN <= bound
    last = len(within) - 1 - np.argmax(within[::-1], axis=0)
    return np.where(within.any(axis=0), last, NO_STRENGTH)


def wilson(count: int, n: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share by Wilson (1927), as if the n neurons were independent."""
    if n == 0:
        return float("nan"), float("nan")
    from scipy.stats import binomtest  # noqa: PLC0415  (half a second, which no other verb shall take)

    found = binomtest(count, n).proportion_ci(method="wilson")
    return float(found.low), float(found.high)
