"""Finds the neurons that turn the next token toward a pattern: by what they do, not by where they are active.

Of every living neuron, adding to it is tried as in the survey (`topklm.steering.survey`): its unit vector,
times each of several lengths, at every position of the prompts. The pattern stands for a set of tokens: those
that begin a match at half of their occurrences or more. The gain is the rise of ln P(the next token is one of
these), the cost the KL divergence of the steered next-token distribution from the unsteered one, both means
over prompts, nats. A neuron counts at the largest length within the bound of the divergence, in which choice
the gain has no part; neurons are ranked by gain for each nat of divergence there. Beside each stands the 95th
percentile of the same figure over random directions of that length.

Prompts are pieces of one half of the documents; the other half is left for seeing whether it holds. The
definitions are ours. Dims: N tokens of the store, C prompts of T tokens, X lengths, D neurons of a layer, R
random directions.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from topklm.config import ModelConfig
from topklm.errors import UserError
from topklm.model import transformer
from topklm.neurons import ablate_targets
from topklm.neurons.search import Matches
from topklm.neurons.store import Store
from topklm.progress import Progress
from topklm.steering import SurveySettings, next_token_effects
from topklm.steering.next_token_effects import TreatmentEffects
from topklm.steering.survey import Prompts

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
    before = next_token_effects.unsteered(config, params, prompts.tokens)
    concept_NKM, rng = tokens[None, None], np.random.default_rng(settings.seed)
    at_once = next_token_effects.treatments_at_once(config, len(prompts.tokens), concept_NKM)
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
                    return next_token_effects.add_vectors(
                        config, params, layer, vectors, following, concept_NKM, before
                    )

                effects = next_token_effects.in_parts(
                    add, directions * (strength * norm), at_once, lambda n: report(n, 0, 0)
                )
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
    random_X = np.quantile(per_nat_XR[:, n:], next_token_effects.QUANTILE, axis=1)
    strengths = next_token_effects.largest_within(divergences_XR[:, :n], settings.bound)
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
        if x != next_token_effects.NO_STRENGTH
    ]
