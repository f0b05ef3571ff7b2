"""Effects of setting a neuron: dose-response in text, and the next token.

Dose-response: the same prompts continued with the neuron set to one value after another.

A sample has the same seed at every value, so texts that lie side by side differ by the neuron alone.

    rate           hits of a concept (`concepts.Concept`) for each generated token
    perplexity     exp of the unsteered model's mean loss, nats, of the generated tokens, each given the
                   prompt and those before; low is not always good: a text that repeats itself has little
    distinct-n     distinct n-grams of a text's tokens for each of its tokens (Li et al. 2016,
                   arXiv:1510.03055), of each text by itself, since steering may make one repeat itself;
                   n-grams do not reach into the prompt

Each figure of many texts is a ratio of sums over texts (for distinct-n, the mean over texts). Intervals are
the middle 95 % of `RESAMPLES` ratios of texts drawn with replacement (percentile bootstrap), in whole
groups: all texts of a prompt are drawn together, for they have much in common.

Effects of treatments on the next token are the programs of the steering survey, and verdicts on its neurons.

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

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.errors import ArgumentError
from topklm.inference.interventions import DEFAULT_MODE, Intervention, Positions
from topklm.inference.language_model import LanguageModel
from topklm.model import transformer
from topklm.model.block import TokenInput, end_layer
from topklm.neurons.ablate_set import Estimate
from topklm.steering import Sampled
from topklm.steering.concepts import NO_TOKEN, Concept

DISTINCT = (1, 2, 3)
RESAMPLES = 2000

_MAX_ROWS = 64  # texts that are run together


@dataclasses.dataclass(frozen=True, eq=False)
class Response:
    """The text of a model at one value."""

    value: float | None  # of the neuron, in units of its activation; None: nothing was done
    texts: list[list[str]]  # continuations, without the prompt: for each prompt its samples
    n_tokens: int  # of all texts
    rates: dict[str, Estimate]  # hits for each token, of each concept
    perplexity: Estimate  # by the unsteered model
    distinct: dict[int, Estimate]  # distinct-n by n


def respond(
    model: LanguageModel,
    neuron: tuple[int, int],
    values: Sequence[float],
    concepts: Sequence[Concept],
    sampled: Sampled,
    *,
    mode: str = DEFAULT_MODE,
    positions: Positions = "all",
    report: Callable[[int], None] = lambda texts: None,
) -> list[Response]:
    """Measures texts at each value, without steering first.

    Values are in units of the neuron's activation, by mode; concepts have names that differ; `report` is told
    how many texts have been finished since the last time. ValueError, in one line, for what is not allowed; a
    prompt with its continuation must fit the model's context, or some of the text would not be seen when its
    perplexity is taken.
    """
    if not sampled.prompts or sampled.samples < 1:
        given = f"{sampled.samples} of {len(sampled.prompts)} prompts"
        raise ArgumentError(field="samples", value=given, allowed="1 or more of 1 or more")
    prompts = [np.asarray(model.to_tokens(text))[0].tolist() for text in sampled.prompts]
    longest, context = max(map(len, prompts)), model.cfg.context_length
    if longest + sampled.max_new_tokens > context:
        text = f"a prompt of {longest} tokens and its continuation must fit the model's context of {context}"
        advice = "ask for fewer, or shorten the prompt"
        raise ArgumentError(text, field="max_new_tokens", value=sampled.max_new_tokens, advice=advice)
    rows = [(value, prompt) for value in (None, *values) for prompt in prompts]
    size = min(_MAX_ROWS, len(rows))
    written: list[list[list[int]]] = [[] for _ in rows]  # of each row its samples
    for seed in range(sampled.seed, sampled.seed + sampled.samples):
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            # Filled up to one number of rows, so that nothing is compiled for the last ones.
            part += part[-1:] * (size - len(part))
            steer = [
                Intervention(*neuron, value, mode, positions, row)
                for row, (value, _) in enumerate(part)
                if value is not None
            ]
            asked = [np.array(prompt, np.int32) for _, prompt in part]
            found: Any = model.generate(
                asked, sampled.max_new_tokens, sampled.temperature, seed, steer=steer, return_tokens=True
            )
            part_written = written[first : first + size]
            for samples, prompt, text in zip(part_written, asked, found, strict=False):
                samples.append(text.tokens[len(prompt) :].tolist())
            report(len(part_written))
    n = len(prompts)
    return [
        _measure(model, value, prompts, written[number * n : (number + 1) * n], concepts)
        for number, value in enumerate((None, *values))
    ]


def _measure(
    model: LanguageModel,
    value: float | None,
    prompts: Sequence[list[int]],
    written: Sequence[list[list[int]]],
    concepts: Sequence[Concept],
) -> Response:
    """Takes the figures of the samples of each prompt."""
    rows = [(prompt, tokens) for prompt, samples in zip(prompts, written, strict=True) for tokens in samples]
    texts = [model.tokenizer.decode(tokens) for _, tokens in rows]
    samples = len(written[0])
    lengths = np.array([len(tokens) for _, tokens in rows], np.float64)
    # With one prompt there is nothing but its samples to draw from.
    groups = np.arange(len(rows)) // (samples if len(prompts) > 1 else 1)

    def figure(numerators: Sequence[float], denominators: np.ndarray = lengths) -> Estimate:
        return ratio(np.array(numerators, np.float64), denominators, groups)

    loss = figure(
        [
            sum_
            for first in range(0, len(rows), _MAX_ROWS)
            for sum_ in _losses(model, rows[first : first + _MAX_ROWS])
        ]
    )
    has_tokens = (lengths > 0).astype(np.float64)
    return Response(
        value=value,
        texts=[texts[first : first + samples] for first in range(0, len(texts), samples)],
        n_tokens=int(lengths.sum()),
        rates={
            concept.name: figure(
                [concept.count(tokens, text) for (_, tokens), text in zip(rows, texts, strict=True)]
            )
            for concept in concepts
        },
        perplexity=Estimate(*np.exp(dataclasses.astuple(loss)).tolist()),
        distinct={n: figure([distinct(tokens, n) for _, tokens in rows], has_tokens) for n in DISTINCT},
    )


def _losses(model: LanguageModel, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """Returns the sum of the unsteered model's losses of each text after its prompt, nats."""
    if not any(tokens for _, tokens in rows):
        return [0.0] * len(rows)
    whole = [np.array(prompt + tokens, np.int32) for prompt, tokens in rows]
    losses = np.asarray(model.loss(whole, per_token=True), np.float64)
    return [
        float(of_row[len(prompt) - 1 : len(prompt) + len(tokens) - 1].sum())
        for of_row, (prompt, tokens) in zip(losses, rows, strict=True)
    ]


def distinct(tokens: Sequence[int], n: int) -> float:
    """Returns distinct-n of one text; 0 without tokens."""
    grams = {tuple(tokens[first : first + n]) for first in range(len(tokens) - n + 1)}
    return len(grams) / max(len(tokens), 1)


def ratio(numerators: np.ndarray, denominators: np.ndarray, groups: np.ndarray) -> Estimate:
    """Returns the ratio of sums, float64[n], with its interval; groups int[n], from 0, are drawn together."""
    total = denominators.sum()
    value = float(numerators.sum() / total) if total else float("nan")
    count = int(groups.max()) + 1 if len(groups) else 0
    if count < 2 or not total:
        return Estimate(value, float("nan"), float("nan"))
    above = np.bincount(groups, numerators, count)
    below = np.bincount(groups, denominators, count)
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = (drawn @ above) / (drawn @ below)
    low, high = np.nanquantile(ratios, (0.025, 0.975))
    return Estimate(value, float(low), float(high))


_EFFECT_ROWS = 256  # R x C
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
        n_prompts / _EFFECT_ROWS,
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
