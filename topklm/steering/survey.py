"""The survey: for every living neuron, whether adding to it raises its concept. No text is generated.

A neuron is steered by adding a vector to what its layer hands on, at every position of the prompts: its own
unit vector, times the strength, times the mean length of what the layer hands on. So all neurons of a layer
are changed by the same length, and so are random directions beside them, drawn evenly from the sphere. The
next token after each prompt is measured. Definitions of verdicts: `significance`; of concepts: `concepts`;
both are ours. Memory does not grow with the text beyond a few bytes for each token.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses

import numpy as np

from topklm.config import ModelConfig
from topklm.errors import UserError
from topklm.model import transformer
from topklm.neurons.store import Store
from topklm.progress import Progress
from topklm.steering import next_token_effects, significance
from topklm.steering.concepts import KINDS, NO_TOKEN, ConceptReader, Concepts
from topklm.steering.next_token_effects import TreatmentEffects, Unsteered
from topklm.steering.significance import MeasuredLayer, Verdicts

STRENGTHS = (0.5, 0.75, 1.0, 1.5)
PROMPTED = ("input", "next")  # kinds of concepts; the tokens of "distinct" ones are much those of "input"
_OTHERS = 256  # neurons of a layer that are tried with all of its concepts


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """C prompts of T tokens.

    Attributes:
        tokens: int32[C, T], the separator first, as before every prompt of `generate`.
        following: int32[C], the token that follows in the text.
    """

    tokens: np.ndarray
    following: np.ndarray

    def with_prefix(self, prefix: np.ndarray) -> np.ndarray:
        """Returns int32[C, T + m], with m token ids between the separator and the text."""
        middle = np.broadcast_to(prefix.astype(np.int32), (len(self.tokens), len(prefix)))
        return np.concatenate([self.tokens[:, :1], middle, self.tokens[:, 1:]], axis=1)


def neutral_prompts(store: Store, n: int, length: int, separator_id: int, seed: int) -> Prompts:
    """Pieces of the documents of odd number, drawn evenly over them.

    Args:
        store: Of the text.
        n: C.
        length: T, the separator counted; 2 or more.
        separator_id: Of the tokenizer.
        seed: Of the draw.

    Raises:
        UserError: If there are not so many pieces.
    """
    documents = store.documents(0, store.n_tokens)
    # The text of a prompt, and the token after it, are of one document.
    last = length - 1
    fits = documents[: max(len(documents) - last, 0)] == documents[last:]
    starts = np.flatnonzero(fits & (documents[: len(fits)] % 2 == 1))
    if len(starts) < n:
        raise UserError(
            f"{store.folder} has {len(starts):,} places for a prompt of {last} tokens in its documents of "
            f"odd number, {n} are needed: harvest more text"
        )
    shares = (np.arange(n) + np.random.default_rng(seed).random(n)) / n
    chosen = starts[(shares * len(starts)).astype(np.int64)]
    stored = store.tokens(0, store.n_tokens)
    text = stored[chosen[:, None] + np.arange(length)].astype(np.int32)
    separators = np.full((n, 1), separator_id, np.int32)
    return Prompts(np.concatenate([separators, text[:, :-1]], axis=1), text[:, -1])


@dataclasses.dataclass(frozen=True)
class SurveySettings:
    """How much is measured.

    Attributes:
        strengths: In units of the mean length of what the layer hands on, rising.
        bound: Of the divergence from the unsteered model, nats a token, within which fluency counts as kept.
        prompts: C.
        prompt_tokens: T, the separator counted.
        random_directions: R, of each layer.
        neurons: N, drawn from each layer's living ones; None: all.
        layers: Of the model; None: all that the store has.
        seed: Of prompts, directions and neurons.
    """

    strengths: tuple[float, ...] = STRENGTHS
    bound: float = 1.0
    prompts: int = 24
    prompt_tokens: int = 16
    random_directions: int = 128
    neurons: int | None = None
    layers: tuple[int, ...] | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Prompting:
    """The effect of prompting with a concept: the control beside steering.

    All tokens of a concept, one after another, stand between the separator and the prompt. Concepts of each
    kind are prompted with their own tokens.

    Attributes:
        gains: float32[N, P], of a neuron's concepts of the kinds `PROMPTED`, nats.
        divergences: float32[N, P], from the prompt alone, nats.
    """

    gains: np.ndarray
    divergences: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """All that is known of a layer.

    Attributes:
        concepts: Of its N neurons.
        n_alive: Neurons with activations; N, or more if some were drawn.
        norm: Mean length of what it hands on, which strength 1 stands for.
        measured: TreatmentEffects of steering.
        verdicts: On them.
        prompting: TreatmentEffects of prompting.
    """

    concepts: Concepts
    n_alive: int
    norm: float
    measured: MeasuredLayer
    verdicts: Verdicts
    prompting: Prompting


def survey(
    store: Store,
    config: ModelConfig,
    params: transformer.Parameters,
    *,
    separator_id: int,
    settings: SurveySettings,
    progress: Progress,
) -> dict[int, Layer]:
    """Surveys the layers of a model, by their numbers.

    Args:
        store: Of activations of the model.
        config: Its shape.
        params: Its parameters, on one device.
        separator_id: Of the tokenizer.
        settings: How much is measured.
        progress: Shows how far it is.

    Raises:
        UserError: If the store is too small, or a layer is asked for that it does not have.
    """
    layers = store.metadata.layers if settings.layers is None else settings.layers
    if unknown := sorted(set(layers) - set(store.metadata.layers)):
        raise UserError(
            f"layer {unknown[0]}: {store.folder} has activations of the layers "
            f"{', '.join(map(str, store.metadata.layers))}; give one of these"
        )
    chosen = neutral_prompts(store, settings.prompts, settings.prompt_tokens, separator_id, settings.seed)
    reader = ConceptReader(store, config.vocab_size)
    before = next_token_effects.unsteered(config, params, chosen.tokens)
    rng = np.random.default_rng(settings.seed)
    found = {}
    for layer in layers:
        concepts = reader.read(layer)
        n_alive = len(concepts.neurons)
        if settings.neurons is not None and settings.neurons < n_alive:
            concepts = concepts[np.sort(rng.permutation(n_alive)[: settings.neurons])]
        work = _Work(config, params, chosen, before, concepts, settings)
        found[layer] = work.measure(n_alive, rng, progress)
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class _Work:
    """One layer's."""

    config: ModelConfig
    params: transformer.Parameters
    prompts: Prompts
    before: Unsteered
    concepts: Concepts
    settings: SurveySettings

    def measure(self, n_alive: int, rng: np.random.Generator, progress: Progress) -> Layer:
        layer, neurons = self.concepts.layer, self.concepts.neurons
        norm, d = float(self.before.norms[layer]), self.config.d_model
        random = rng.standard_normal((self.settings.random_directions, d))
        random /= np.linalg.norm(random, axis=1, keepdims=True)
        others_at = np.sort(rng.permutation(len(neurons))[:_OTHERS])
        strengths = self.settings.strengths
        total = len(strengths) * (len(neurons) + len(random)) + len(PROMPTED) * len(neurons)
        parts = []
        with progress.phase(f"steering the neurons of layer {layer}", total) as report:

            def add(vectors_RD: np.ndarray) -> TreatmentEffects:
                effects = self._add(vectors_RD)
                report(len(vectors_RD), 0, 0)
                return effects

            for strength in strengths:
                length = strength * norm
                one_by_one = (_unit_vectors(part, d) * length for part in _parts(neurons, self._at_once))
                of_neurons = [add(vectors) for vectors in one_by_one]
                of_directions = [add(part * length) for part in _parts(random, self._at_once)]
                parts.append(_of_strength(of_neurons, of_directions, others_at))
            prompting = self._prompting(report)
        own, divergences, losses, of_random, random_divergences, others = (
            np.stack(arrays) for arrays in zip(*parts, strict=True)
        )
        measured = MeasuredLayer(own, divergences, losses, of_random, random_divergences, others, others_at)
        verdicts = significance.judge(measured, self.settings.bound)
        return Layer(self.concepts, n_alive, norm, measured, verdicts, prompting)

    @property
    def _at_once(self) -> int:
        return next_token_effects.treatments_at_once(
            self.config, len(self.prompts.tokens), self.concepts.tokens
        )

    def _add(self, vectors_RD: np.ndarray) -> TreatmentEffects:
        # Filled up to one shape, so that nothing is compiled for what is left over.
        filled = np.zeros((self._at_once, self.config.d_model))
        filled[: len(vectors_RD)] = vectors_RD
        following, concepts = self.prompts.following, self.concepts.tokens
        effects = next_token_effects.add_vectors(
            self.config, self.params, self.concepts.layer, filled, following, concepts, self.before
        )
        return TreatmentEffects(*(np.asarray(figures)[: len(vectors_RD)] for figures in effects))

    def _prompting(self, report: Callable[[int, int, int], None]) -> Prompting:
        gains, divergences = [], []
        for kind in PROMPTED:
            number = KINDS.index(kind)
            places = np.arange(len(self.concepts.neurons))
            found = [self._prompt(part, number, report) for part in _parts(places, self._at_once)]
            own, of_prompts = zip(*found, strict=True)
            gains.append(np.concatenate(own))
            divergences.append(np.concatenate(of_prompts))
        return Prompting(np.stack(gains, axis=1), np.stack(divergences, axis=1))

    def _prompt(
        self, places: np.ndarray, kind: int, report: Callable[[int, int, int], None]
    ) -> tuple[np.ndarray, np.ndarray]:
        filled = np.resize(places, self._at_once)
        tokens = [self.prompts.with_prefix(_prefix(self.concepts.tokens[place, kind])) for place in filled]
        following, concepts = self.prompts.following, self.concepts.tokens
        effects = next_token_effects.change_prompts(
            self.config, self.params, np.stack(tokens), following, concepts, self.before
        )
        report(len(places), 0, 0)
        own = np.asarray(effects.gains)[np.arange(len(places)), places, kind]
        return own, np.asarray(effects.divergences)[: len(places)]


def _of_strength(
    own: Sequence[TreatmentEffects], random: Sequence[TreatmentEffects], others_at: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Returns the fields of `MeasuredLayer` but the last, without their first axis."""
    diagonal, others, first = [], [], 0
    for effects in own:
        rows = np.arange(len(effects.gains))
        diagonal.append(effects.gains[rows, first + rows])
        others.append(effects.gains[np.isin(first + rows, others_at)])
        first += len(rows)
    return (
        np.concatenate(diagonal),
        np.concatenate([effects.divergences for effects in own]),
        np.concatenate([effects.losses for effects in own]),
        np.concatenate([effects.gains for effects in random]),
        np.concatenate([effects.divergences for effects in random]),
        np.concatenate(others),
    )


def _unit_vectors(neurons: np.ndarray, d: int) -> np.ndarray:
    """Returns float64[n, D]."""
    return (neurons[:, None] == np.arange(d)).astype(np.float64)


def _prefix(concept: np.ndarray) -> np.ndarray:
    """Returns `SIZE` tokens; a smaller concept is written again from its beginning."""
    there_are = concept[concept != NO_TOKEN]
    # Of an empty one no gain can come, whatever stands there.
    return np.resize(there_are if len(there_are) else np.zeros(1, np.int32), len(concept))


def _parts(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for first in range(0, len(rows), size):
        yield rows[first : first + size]
