"""The survey: for every living neuron, whether adding to it raises its concept. No text is generated.

A neuron is steered by adding a vector to what its layer hands on, at every position of the prompts: its own
unit vector, times the strength, times the mean length of what the layer hands on. So all neurons of a layer
are changed by the same length, and so are random directions beside them, drawn evenly from the sphere. The
next token after each prompt is measured. Definitions of verdicts: `next_token_effects`; of concepts:
`concepts`; both are ours. Memory does not grow with the text beyond a few bytes for each token.

Neurons that turn the next token toward a pattern (`rank`) are found in the same way, by what they do and not
by where they are active. The pattern stands for a set of tokens: those that begin a match at half of their
occurrences or more. The gain is the rise of ln P(the next token is one of these), the cost the KL divergence
of the steered next-token distribution from the unsteered one, both means over prompts, nats. A neuron counts
at the largest length within the bound of the divergence, in which choice the gain has no part; neurons are
ranked by gain for each nat of divergence there. Beside each stands the 95th percentile of the same figure
over random directions of that length.

Prompts are pieces of one half of the documents; the other half is left for seeing whether it holds. The
definitions are ours. Dims there: N tokens of the store, C prompts of T tokens, X lengths, D neurons of a
layer, R random directions.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

import numpy as np

from topklm.config import ModelConfig
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError
from topklm.model import transformer
from topklm.neurons import ablate_targets
from topklm.neurons.search import Matches
from topklm.neurons.statistics.lenses import spread_ends
from topklm.neurons.store import Store
from topklm.progress import Progress
from topklm.steering import SurveySettings, dose
from topklm.steering.concepts import KINDS, NO_TOKEN, ConceptReader, Concepts, token_sets
from topklm.steering.dose import MeasuredLayer, TreatmentEffects, Unsteered, Verdicts

PROMPTED = ("input", "next")  # kinds of concepts; the tokens of "distinct" ones are much those of "input"
_OTHERS = 256  # neurons of a layer that are tried with all of its concepts


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """C prompts of T tokens."""

    tokens: np.ndarray  # int32[C, T], the separator first, as before every prompt of `generate`
    following: np.ndarray  # int32[C], the token that follows in the text

    def with_prefix(self, prefix: np.ndarray) -> np.ndarray:
        """Returns int32[C, T + m], with m token ids between the separator and the text."""
        middle = np.broadcast_to(prefix.astype(np.int32), (len(self.tokens), len(prefix)))
        return np.concatenate([self.tokens[:, :1], middle, self.tokens[:, 1:]], axis=1)


def neutral_prompts(
    store: Store, n: int, length: int, separator_id: int, seed: int, among: np.ndarray | None = None
) -> Prompts:
    """Draws n pieces of some documents evenly, `length` tokens with the separator; UserError for too few.

    `among` are the tokens of these documents, bool[N]; None: those of odd number.
    """
    documents = store.documents(0, store.n_tokens)
    which = "documents of odd number" if among is None else "half of the documents"
    among = documents % 2 == 1 if among is None else among
    # The text of a prompt, and the token after it, are of one document.
    last = length - 1
    fits = documents[: max(len(documents) - last, 0)] == documents[last:]
    starts = np.flatnonzero(fits & among[: len(fits)])
    if len(starts) < n:
        raise UserError(
            f"{store.folder} has {len(starts):,} places for a prompt of {last} tokens in its {which}, "
            f"{n} are needed: harvest more text"
        )
    chosen = starts[spread_ends(len(starts), n, seed)]
    stored = store.tokens(0, store.n_tokens)
    text = stored[chosen[:, None] + np.arange(length)].astype(np.int32)
    separators = np.full((n, 1), separator_id, np.int32)
    return Prompts(np.concatenate([separators, text[:, :-1]], axis=1), text[:, -1])


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """Results of a layer.

    The control beside steering is to prompt with a concept: all its tokens, one after another, stand between
    the separator and the prompt. Concepts of each kind are prompted with their own tokens.
    """

    concepts: Concepts  # of its N neurons
    n_alive: int  # neurons with activations; N, or more if some were drawn
    norm: float  # mean length of its output, which strength 1 stands for
    measured: MeasuredLayer  # effects of steering
    verdicts: Verdicts  # on them
    prompting_gains: np.ndarray  # float32[N, P], of a neuron's concepts of the kinds `PROMPTED`, nats
    prompting_divergences: np.ndarray  # float32[N, P], from the prompt alone, nats


def survey(
    store: Store,
    config: ModelConfig,
    params: transformer.Parameters,
    *,
    separator_id: int,
    settings: SurveySettings,
    progress: Progress,
) -> dict[int, Layer]:
    """Surveys layers of a model on one device; UserError for too small a store, or a layer it has not."""
    layers = store.metadata.layers if settings.layers is None else settings.layers
    if unknown := sorted(set(layers) - set(store.metadata.layers)):
        raise UserError(
            f"layer {unknown[0]}: {store.folder} has activations of the layers "
            f"{', '.join(map(str, store.metadata.layers))}; give one of these"
        )
    chosen = neutral_prompts(store, settings.prompts, settings.prompt_tokens, separator_id, settings.seed)
    reader = ConceptReader(store, config.vocab_size)
    before = dose.unsteered(config, params, chosen.tokens)
    rng = np.random.default_rng(settings.seed)
    found = {}
    for layer in layers:
        concepts = reader.read(layer)
        n_alive = len(concepts.neurons)
        if settings.neurons is not None and settings.neurons < n_alive:
            drawn = np.sort(rng.permutation(n_alive)[: settings.neurons])
            concepts = Concepts(layer, concepts.neurons[drawn], concepts.tokens[drawn])
        found[layer] = _survey_layer(
            config, params, chosen, before, concepts, n_alive, settings, rng, progress
        )
    return found


def _survey_layer(
    config: ModelConfig,
    params: transformer.Parameters,
    prompts: Prompts,
    before: Unsteered,
    concepts: Concepts,
    n_alive: int,
    settings: SurveySettings,
    rng: np.random.Generator,
    progress: Progress,
) -> Layer:
    layer, neurons = concepts.layer, concepts.neurons
    norm, d, rows = float(before.norms[layer]), config.d_model, np.arange(len(neurons))
    random = rng.standard_normal((settings.random_directions, d))
    random /= np.linalg.norm(random, axis=1, keepdims=True)
    others_at = np.sort(rng.permutation(len(neurons))[:_OTHERS])
    at_once = dose.treatments_at_once(config, len(prompts.tokens), concepts.tokens)
    rest = prompts.following, concepts.tokens, before

    def add(length: float, directions: np.ndarray) -> TreatmentEffects:
        """Adds vectors of this length along directions, [R, D], or neurons, [R]."""
        if directions.ndim == 1:
            directions = (directions[:, None] == np.arange(d)).astype(np.float64)
        return dose.add_vectors(config, params, layer, directions * length, *rest)

    def prompt(tokens_RM: np.ndarray) -> TreatmentEffects:
        tokens = np.stack([prompts.with_prefix(_prefix(ids)) for ids in tokens_RM])
        return dose.change_prompts(config, params, tokens, *rest)

    def treat(run: Callable[[np.ndarray], TreatmentEffects], treatments: np.ndarray) -> TreatmentEffects:
        return dose.in_parts(run, treatments, at_once, report)

    total = len(settings.strengths) * (len(neurons) + len(random)) + len(PROMPTED) * len(neurons)
    steered, prompted = [], []
    with progress.phase(f"steering the neurons of layer {layer}", total) as report:
        for strength in settings.strengths:
            of_length = functools.partial(add, strength * norm)
            own, of_random = treat(of_length, neurons), treat(of_length, random)
            figures = own.gains[rows, rows], own.divergences, own.losses
            steered.append((*figures, of_random.gains, of_random.divergences, own.gains[others_at]))
        for kind in map(KINDS.index, PROMPTED):
            effects = treat(prompt, concepts.tokens[:, kind])
            prompted.append((effects.gains[rows, rows, kind], effects.divergences))
    measured = MeasuredLayer(*[*map(np.stack, zip(*steered, strict=True)), others_at])
    verdicts = dose.judge(measured, settings.bound)
    gains, divergences = (np.stack(figures, axis=1) for figures in zip(*prompted, strict=True))
    return Layer(concepts, n_alive, norm, measured, verdicts, gains, divergences)


def _prefix(concept: np.ndarray) -> np.ndarray:
    """Returns `SIZE` tokens; a smaller concept is written again from its beginning."""
    there_are = concept[concept != NO_TOKEN]
    # Of an empty one no gain can come, whatever stands there.
    return np.resize(there_are if len(there_are) else np.zeros(1, np.int32), len(concept))


def summarise(layers: Mapping[int, Layer], settings: SurveySettings) -> dict[str, Any]:
    """Counts steerable neurons of a survey by layer and kind of concept, as a JSON object; NaN is null.

    It has "settings", and "layers", a list of one object for each layer and one, of layer "all", for all
    together.
    """
    by_layer = [_of_layers(str(number), [layer], settings) for number, layer in layers.items()]
    together = [_of_layers("all", list(layers.values()), settings)] if len(layers) > 1 else []
    return without_nan({"settings": dataclasses.asdict(settings), "layers": by_layer + together})


def neuron_rows(
    layers: Mapping[int, Layer], settings: SurveySettings, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Returns each neuron's concepts and verdicts, as JSON objects."""
    rows: list[dict[str, Any]] = []
    for number, layer in layers.items():
        words = {kind: token_sets(layer.concepts, kind) for kind in KINDS}
        for place, neuron in enumerate(layer.concepts.neurons):
            x = int(layer.verdicts.strength[place])
            there_is = x != dose.NO_STRENGTH
            rows.append(
                {
                    "layer": number,
                    "neuron": int(neuron),
                    "strength": settings.strengths[x] if there_is else None,
                    "divergence": float(layer.measured.divergences[x, place]) if there_is else None,
                    "concepts": {
                        kind: {
                            "tokens": tokenizer.token_strings(words[kind][place]),
                            **{
                                name: getattr(layer.verdicts, name)[place, k].item()
                                for name in ("gain", "random", "others", "steerable", "specific")
                            },
                        }
                        for k, kind in enumerate(KINDS)
                    },
                }
            )
            for kind, gain in zip(PROMPTED, layer.prompting_gains[place].tolist(), strict=True):
                rows[-1]["concepts"][kind]["prompting_gain"] = gain
    return without_nan(rows)


def without_nan(tree: Any) -> Any:
    """Returns the same with None for numbers that JSON does not have."""
    if isinstance(tree, dict):
        return {name: without_nan(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_nan(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _of_layers(name: str, layers: list[Layer], settings: SurveySettings) -> dict[str, Any]:
    strength = _joined(layers, lambda layer: layer.verdicts.strength)
    steered = strength != dose.NO_STRENGTH
    divergences = _joined(
        layers,
        lambda layer: layer.measured.divergences[
            np.maximum(layer.verdicts.strength, 0), np.arange(len(layer.verdicts.strength))
        ],
    )
    return {
        "layer": name,
        "n_alive": sum(layer.n_alive for layer in layers),
        "n_neurons": len(strength),
        "norm": layers[0].norm if len(layers) == 1 else None,
        "within_bound": int(steered.sum()),
        "median_strength": _median(np.asarray(settings.strengths)[strength[steered]]),
        "median_divergence": _median(divergences[steered]),
        "concepts": {kind: _of_kind(layers, k, steered) for k, kind in enumerate(KINDS)},
        "by_strength": [_at_strength(layers, x, value) for x, value in enumerate(settings.strengths)],
    }


def _of_kind(layers: list[Layer], k: int, steered: np.ndarray) -> dict[str, Any]:
    gain, random, steerable, specific = (
        np.concatenate([getattr(layer.verdicts, name)[:, k] for layer in layers])
        for name in ("gain", "random", "steerable", "specific")
    )
    n_pairs = [len(layer.measured.others_at) * (len(layer.concepts.neurons) - 1) for layer in layers]
    passed = sum(n * layer.verdicts.mismatched[k] for n, layer in zip(n_pairs, layers, strict=True) if n)
    found = {
        "steerable": _share(steerable),
        "specific": _share(specific),
        "mismatched": float(passed / max(1, sum(n_pairs))),
        "median_gain": _median(gain[steered]),
        "median_random": _median(random[steered]),
    }
    if KINDS[k] in PROMPTED:
        number = PROMPTED.index(KINDS[k])
        prompting = _joined(layers, lambda layer: layer.prompting_gains[:, number])
        found["prompting"] = {
            "median_gain": _median(prompting),
            "median_divergence": _median(
                _joined(layers, lambda layer: layer.prompting_divergences[:, number])
            ),
            "steering_gains_more": _share(np.nan_to_num(gain, nan=-np.inf) > prompting),
        }
    return found


def _at_strength(layers: list[Layer], x: int, value: float) -> dict[str, Any]:
    def median(name: str, *at: Any) -> float:
        return _median(_joined(layers, lambda layer: getattr(layer.measured, name)[x, *at]))

    return {
        "strength": value,
        "median_divergence": median("divergences"),
        "median_random_divergence": median("random_divergences"),
        "median_loss": median("losses"),
        "median_gain": {kind: median("own", slice(None), k) for k, kind in enumerate(KINDS)},
    }


def _joined(layers: list[Layer], get: Callable[[Layer], np.ndarray]) -> np.ndarray:
    return np.concatenate([get(layer) for layer in layers])


def _share(passed: np.ndarray) -> dict[str, float]:
    low, high = dose.wilson(int(passed.sum()), len(passed))
    return {"share": float(passed.mean()) if len(passed) else math.nan, "low": low, "high": high}


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if len(values) else math.nan


MOST_TOKENS = 64  # of a pattern: the tokens that begin most of its matches


@dataclasses.dataclass(frozen=True)
class TowardNeuron:
    """A neuron, and what adding to it does to the next token; means over the prompts."""

    layer: int
    neuron: int
    strength: float  # length of the added vector, in units of the mean length of what the layer hands on
    gain: float  # rise of ln P(the next token is one of the pattern's), nats
    divergence: float  # KL of the steered from the unsteered next-token distribution, nats
    gain_per_nat: float  # gain / divergence
    random: float  # the 95th percentile of gain / divergence over random directions of this length


def pattern_tokens(store: Store, matches: Matches, vocab_size: int) -> np.ndarray:
    """Returns tokens that begin a match at half their places or more, int32[n]; UserError for none."""
    ids = store.tokens(0, store.n_tokens).astype(np.int64)
    goes_on = np.roll(matches.touched & ~matches.ends, 1)
    goes_on[store.document_bounds()[:-1]] = False
    begins = np.bincount(ids[matches.touched & ~goes_on], minlength=vocab_size)
    counts = np.bincount(ids, minlength=vocab_size)
    tokens = np.flatnonzero((begins > 0) & (2 * begins >= counts))
    if not len(tokens):
        text = (
            f"{matches.count:,} matches in the harvested text, and no token begins one at half of its places"
        )
        raise UserError(f"{text}: give words that are one token, or a longer list of them")
    order = np.argsort(-begins[tokens], kind="stable")
    return tokens[order][:MOST_TOKENS].astype(np.int32)


def rank(
    store: Store,
    config: ModelConfig,
    params: transformer.Parameters,
    tokens: np.ndarray,
    prompts: Prompts,
    settings: SurveySettings,
    progress: Progress,
) -> list[TowardNeuron]:
    """Ranks the living neurons of a model, whose parameters are on one device, but those beyond the bound.

    By the pattern's tokens, int32[n], after prompts of one half of the documents. The settings are strengths,
    the bound, random directions, and which layers, of which UserError names one the store lacks, and how many
    neurons of each.
    """
    layers = store.metadata.layers if settings.layers is None else settings.layers
    if unknown := sorted(set(layers) - set(store.metadata.layers)):
        there = ", ".join(map(str, store.metadata.layers))
        raise UserError(f"layer {unknown[0]}: {store.folder} has activations of the layers {there}")
    alive = ablate_targets.densities(store, np.ones(store.n_tokens, bool)) > 0
    before = dose.unsteered(config, params, prompts.tokens)
    concept_NKM, rng = tokens[None, None], np.random.default_rng(settings.seed)
    at_once = dose.treatments_at_once(config, len(prompts.tokens), concept_NKM)
    found = list[TowardNeuron]()
    for layer in layers:
        neurons = np.flatnonzero(alive[store.metadata.layers.index(layer)])
        if settings.neurons is not None and settings.neurons < len(neurons):
            neurons = np.sort(rng.permutation(neurons)[: settings.neurons])
        random = rng.standard_normal((settings.random_directions, config.d_model))
        random /= np.linalg.norm(random, axis=1, keepdims=True)
        directions = np.concatenate([np.eye(config.d_model)[neurons], random])
        total, norm = len(settings.strengths) * len(directions), float(before.norms[layer])
        gains, divergences = list[np.ndarray](), list[np.ndarray]()
        with progress.phase(f"steering the neurons of layer {layer}", total) as report:
            for strength in settings.strengths:

                def add(vectors: np.ndarray, layer: int = layer) -> TreatmentEffects:
                    following = prompts.following
                    return dose.add_vectors(config, params, layer, vectors, following, concept_NKM, before)

                effects = dose.in_parts(add, directions * (strength * norm), at_once, report)
                gains.append(effects.gains[:, 0, 0])
                divergences.append(effects.divergences)
        found += _of_layer(layer, neurons, np.stack(gains), np.stack(divergences), settings)
    return sorted(found, key=lambda one: (-one.gain_per_nat, one.layer, one.neuron))


def _of_layer(
    layer: int,
    neurons: np.ndarray,
    gains_XR: np.ndarray,
    divergences_XR: np.ndarray,
    settings: SurveySettings,
) -> Sequence[TowardNeuron]:
    """Judges neurons, of which the first treatments are; the others are random directions."""
    n = len(neurons)
    per_nat_XR = gains_XR / np.maximum(divergences_XR, 1e-9)
    random_X = np.quantile(per_nat_XR[:, n:], dose.QUANTILE, axis=1)
    strengths = dose.largest_within(divergences_XR[:, :n], settings.bound)
    return [
        TowardNeuron(
            layer,
            int(neuron),
            settings.strengths[x],
            float(gains_XR[x, place]),
            float(divergences_XR[x, place]),
            float(per_nat_XR[x, place]),
            float(random_X[x]),
        )
        for place, (neuron, x) in enumerate(zip(neurons, strengths, strict=True))
        if x != dose.NO_STRENGTH
    ]
