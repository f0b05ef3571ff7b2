"""The dose-response of a neuron: the same prompts continued with it set to one value after another.

A sample has the same seed at every value, so texts that lie side by side differ by the neuron alone.
"""

from collections.abc import Callable, Sequence
import dataclasses

import numpy as np

from topklm.errors import ArgumentError
from topklm.inference.intervention_batch import InterventionBatch
from topklm.inference.interventions import DEFAULT_MODE, Intervention, Positions
from topklm.inference.language_model import LanguageModel
from topklm.inference.sampling import Sampling
from topklm.inference.scheduler import Generation
from topklm.steering import text_metrics
from topklm.steering.concepts import Concept
from topklm.steering.text_metrics import Estimate

DISTINCT = (1, 2, 3)
PROMPTS = (
    "The",
    "It was",
    "In the",
    "There is",
    "When he",
    "One of the",
    "After that,",
    "She said that",
)

_MAX_ROWS = 64  # texts that are generated together


@dataclasses.dataclass(frozen=True)
class Sampled:
    """How texts are generated.

    Attributes:
        prompts: At least one.
        samples: Of each prompt.
        max_new_tokens: Of each text.
        temperature: 0 takes the most likely token each time.
        seed: Of a prompt's first sample; its others have the numbers that follow.
    """

    prompts: tuple[str, ...] = PROMPTS
    samples: int = 4
    max_new_tokens: int = 40
    temperature: float = 0.7
    seed: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Response:
    """The text of a model at one value.

    Attributes:
        value: Of the neuron, in units of its activation; None: nothing was done.
        texts: Continuations, without the prompt: for each prompt its samples.
        n_tokens: Of all texts.
        rates: Hits for each token, of each concept.
        perplexity: By the unsteered model.
        distinct: Distinct-n by n.
    """

    value: float | None
    texts: list[list[str]]
    n_tokens: int
    rates: dict[str, Estimate]
    perplexity: Estimate
    distinct: dict[int, Estimate]


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

    Args:
        model: Writes them.
        neuron: Layer and number.
        values: In units of the neuron's activation; their meaning depends on the mode.
        concepts: To be counted; their names differ.
        sampled: How texts are generated.
        mode: As in `Intervention`.
        positions: As in `Intervention`.
        report: Told how many texts have been finished since the last time.

    Raises:
        ValueError: For what is not allowed, in one line; a prompt with its continuation must fit the model's
            context, or some of the text would not be seen when its perplexity is taken.
    """
    if not sampled.prompts or sampled.samples < 1:
        given = f"{sampled.samples} of {len(sampled.prompts)} prompts"
        raise ArgumentError(field="samples", value=given, allowed="1 or more of 1 or more")
    ids = [np.asarray(model.to_tokens(text))[0].tolist() for text in sampled.prompts]
    longest, context = max(map(len, ids)), model.config.model.context_length
    if longest + sampled.max_new_tokens > context:
        text = f"a prompt of {longest} tokens and its continuation must fit the model's context of {context}"
        advice = "ask for fewer, or shorten the prompt"
        raise ArgumentError(text, field="max_new_tokens", value=sampled.max_new_tokens, advice=advice)
    rows = [
        (value, prompt, sample)
        for value in (None, *values)
        for prompt in range(len(ids))
        for sample in range(sampled.samples)
    ]
    done: list[list[int]] = []
    for first in range(0, len(rows), _MAX_ROWS):
        part = rows[first : first + _MAX_ROWS]
        # Filled up to one number of rows, so that nothing is compiled for the last ones.
        filled = part + part[-1:] * (min(_MAX_ROWS, len(rows)) - len(part))
        done += _generate(model, neuron, filled, ids, sampled, mode, positions)[: len(part)]
        report(len(part))
    each = len(ids) * sampled.samples
    prompts = [ids[prompt] for _, prompt, _ in rows[:each]]
    return [
        _measure(model, value, prompts, done[number * each : (number + 1) * each], concepts, sampled)
        for number, value in enumerate((None, *values))
    ]


def _generate(
    model: LanguageModel,
    neuron: tuple[int, int],
    rows: Sequence[tuple[float | None, int, int]],
    prompts: Sequence[list[int]],
    sampled: Sampled,
    mode: str,
    positions: Positions,
) -> list[list[int]]:
    """Returns token ids of each row's continuation."""
    steer = [
        Intervention(*neuron, value, mode, positions, row)
        for row, (value, _, _) in enumerate(rows)
        if value is not None
    ]
    generation = Generation(
        model.config.model,
        model.params,
        [prompts[prompt] for _, prompt, _ in rows],
        [
            Sampling(temperature=sampled.temperature, seed=sampled.seed + sample).check()
            for _, _, sample in rows
        ],
        max_new_tokens=[sampled.max_new_tokens] * len(rows),
        stop_token=model.tokenizer.separator_id,
        interventions=InterventionBatch.of(model.config.model, steer),
    )
    while not generation.done:
        generation.advance()
    return [text[len(prompts[prompt]) :] for text, (_, prompt, _) in zip(generation.texts, rows, strict=True)]


def _measure(
    model: LanguageModel,
    value: float | None,
    prompts: Sequence[list[int]],
    continuations: Sequence[list[int]],
    concepts: Sequence[Concept],
    sampled: Sampled,
) -> Response:
    texts = [model.tokenizer.decode(tokens) for tokens in continuations]
    lengths = np.array([len(tokens) for tokens in continuations], np.float64)
    # With one prompt there is nothing but its samples to draw from.
    by_prompt = np.repeat(np.arange(len(sampled.prompts)), sampled.samples)
    groups = by_prompt if len(sampled.prompts) > 1 else np.arange(len(texts))
    hits = {
        concept.name: np.array([concept.count(*one) for one in zip(continuations, texts, strict=True)])
        for concept in concepts
    }
    whole = [prompt + tokens for prompt, tokens in zip(prompts, continuations, strict=True)]
    found = text_metrics.losses(model.config.model, model.params, whole, [len(prompt) for prompt in prompts])
    total_losses = np.array([of_text.sum() for of_text in found])
    varied = {n: np.array([text_metrics.distinct(tokens, n) for tokens in continuations]) for n in DISTINCT}
    there_is = lengths > 0
    return Response(
        value=value,
        texts=[texts[first : first + sampled.samples] for first in range(0, len(texts), sampled.samples)],
        n_tokens=int(lengths.sum()),
        rates={
            name: text_metrics.ratio(counts.astype(float), lengths, groups) for name, counts in hits.items()
        },
        perplexity=text_metrics.exp(text_metrics.ratio(total_losses, lengths, groups)),
        distinct={
            n: text_metrics.ratio(np.where(there_is, figures, 0.0), there_is.astype(float), groups)
            for n, figures in varied.items()
        },
    )
