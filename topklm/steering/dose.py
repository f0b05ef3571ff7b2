"""The dose-response of a neuron: the same prompts continued with it set to one value after another.

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
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import numpy as np

from topklm.errors import ArgumentError
from topklm.inference.interventions import DEFAULT_MODE, Intervention, Positions
from topklm.inference.language_model import LanguageModel
from topklm.neurons.ablate_set import Estimate
from topklm.steering import Sampled
from topklm.steering.concepts import Concept

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
