"""Ablates neurons, and measures what is lost at the tokens that a pattern matches, and what elsewhere.

The text is that of a store. Tokens are in three groups, of which each token is in one:

    targets        tokens that hold a part of a match
    after targets  other tokens right after a target of the same document
    elsewhere      all others

A neuron is active at the token that is read, and its effect is on the next one; so what it is worth for a
kind of token shows best at targets that follow a target. They are a fourth group, a part of the first.

Neurons that a pattern chooses are those with the highest F1 (`topklm.neurons.search`) on one half of the
documents; losses are those of the other half. Neurons that are given are measured on all documents: nothing
here knows which text they were chosen on. Dims: N tokens of the store, S layers, D neurons per layer.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools

import numpy as np

from topklm.errors import ArgumentError, UserError
from topklm.neurons import ablate_set, search
from topklm.neurons.ablate_set import AblatedLosses, Neuron, Outcome, Report
from topklm.neurons.documents import TextModel
from topklm.neurons.search import Matches, RankedNeuron
from topklm.neurons.store import Store

GROUPS = ("targets", "targets after targets", "others after targets", "elsewhere")


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Sets of neurons, and the text on which they are to be measured."""

    sets: Sequence[tuple[Neuron, ...]]
    ranked: Mapping[Neuron, RankedNeuron]  # of each chosen neuron; empty where they were given
    layers: tuple[int, ...]  # of the store
    density: np.ndarray  # float64[S, D], on the documents on which neurons were chosen, or on all
    documents: Sequence[np.ndarray]  # token ids of each, on which losses are measured
    groups: Mapping[str, np.ndarray]  # which of their tokens are of each of `GROUPS`, bool
    n_chosen_on: int  # documents; 0 where neurons were given

    def n_tokens(self, n_random: int) -> int:
        """Returns how many tokens are read by `measure`."""
        return sum(map(len, self.documents)) * (1 + len(self.sets) * (1 + n_random))

    def measure(
        self,
        model: TextModel,
        *,
        n_random: int,
        seed: int = 0,
        report: Report = lambda tokens: None,
    ) -> tuple[dict[str, float], list[Outcome]]:
        """Measures all sets beside random ones, as `ablate_set.measure`; a gap is targets less elsewhere."""
        texts = [AblatedLosses(model, self.documents, self.groups)]
        return ablate_set.measure(
            texts, self.sets, self.density, self.layers, n_random=n_random, seed=seed, report=report
        )


def given(store: Store, sets: Sequence[Sequence[Neuron]], targets: Matches, *, tokens: int) -> Plan:
    """Plans to measure sets on the first `tokens` of a store; UserError for no such neuron, or no target."""
    bounds = store.document_bounds()
    numbers = np.arange(len(bounds) - 1)
    density = densities(store, np.ones(store.n_tokens, bool))
    rows = {layer: number for number, layer in enumerate(store.metadata.layers)}
    for layer, neuron in itertools.chain(*sets):
        if layer not in rows or not 0 <= neuron < store.metadata.d_model:
            allowed = f"a neuron from 0 to {store.metadata.d_model - 1} of layer {_listed(rows)}"
            raise ArgumentError(field="neurons", value=f"{layer}:{neuron}", allowed=allowed)
        if not density[rows[layer], neuron]:
            text = f"is active at none of the {store.n_tokens:,} tokens harvested; leave it out"
            raise ArgumentError(text, field="neurons", value=f"{layer}:{neuron}")
    once = [tuple(dict.fromkeys(neurons)) for neurons in sets]
    return Plan(once, {}, store.metadata.layers, density, *_text(store, bounds, numbers, targets, tokens), 0)


def chosen(
    store: Store,
    matched: np.ndarray,
    targets: Matches,
    *,
    counts: Sequence[int],
    tokens: int,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> Plan:
    """Plans to measure the `counts` neurons that best tell matched tokens, bool[N], from others.

    They are ranked on one half of the documents, targets are in the other, of which at most `tokens` tokens
    are measured. UserError if fewer neurons are active at a match, or there is no target.
    """
    bounds = store.document_bounds()
    if len(bounds) < 3:
        raise UserError(f"{store.folder} holds one document: neurons are chosen on some; harvest more text")
    choose, measure = ablate_set.halves(len(bounds) - 1, seed)
    among = np.zeros(store.n_tokens, bool)
    for number in choose:
        among[bounds[number] : bounds[number + 1]] = True
    ranked = search.rank(store, matched, max(counts), layers, among)
    if len(ranked) < max(counts):
        allowed = f"at most {len(ranked)}, the neurons that are active at a match in the half to choose on"
        raise ArgumentError(field="count", value=max(counts), allowed=allowed)
    order = [(one.layer, one.neuron) for one in ranked]
    return Plan(
        [tuple(order[:count]) for count in counts],
        dict(zip(order, ranked, strict=True)),
        store.metadata.layers,
        densities(store, among),
        *_text(store, bounds, measure, targets, tokens),
        len(choose),
    )


def densities(store: Store, among: np.ndarray) -> np.ndarray:
    """Computes the share of some tokens, bool[N], at which each neuron is active, float64[S, D]."""
    counts = np.zeros((len(store.metadata.layers), store.metadata.d_model))
    for row, layer in enumerate(store.metadata.layers):
        for begin, end in store.blocks(layer, search.BLOCK_EVENTS, search.BLOCK_NEURONS):
            counts[row, begin:end] = np.diff(store.block(layer, begin, end).at(among).offsets)
    return counts / max(int(np.count_nonzero(among)), 1)


def groups_of(is_target: np.ndarray, follows: np.ndarray) -> dict[str, np.ndarray]:
    """Returns which tokens are of each of `GROUPS`, bool[n]; `follows`: the one before is of its document."""
    after = follows & np.roll(is_target, 1)
    parts = is_target, is_target & after, ~is_target & after, ~is_target & ~after
    return dict(zip(GROUPS, parts, strict=True))


def _text(
    store: Store, bounds: np.ndarray, numbers: np.ndarray, targets: Matches, most_tokens: int
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Reads documents of these numbers, the last of which may be cut, and the groups of their tokens."""
    documents, spans, left = list[np.ndarray](), list[np.ndarray](), most_tokens
    for begin, end in zip(bounds[numbers], bounds[numbers + 1], strict=True):
        if not left:
            break
        span = np.arange(begin, end)[:left]
        left -= len(span)
        documents.append(store.tokens(begin, begin + len(span)).astype(np.int32))
        spans.append(span)
    at = np.concatenate(spans)
    is_target = targets.touched[at]
    if not is_target.any():
        text = f"none of the {len(at):,} tokens that are measured match; give another pattern, or more tokens"
        raise ArgumentError(text, field="targets")
    follows = ~np.isin(at, bounds[:-1])
    return documents, groups_of(is_target, follows)


def _listed(layers: Mapping[int, int]) -> str:
    return " or ".join(map(str, layers))


@dataclasses.dataclass(frozen=True)
class BestNeuron:
    """The neuron of a layer that tells matched tokens best on one half of the documents."""

    layer: int
    neuron: int
    threshold: float  # its |activation| from which on it counts as firing, chosen on that half
    f1: float  # on the other half; NaN where it does not fire and nothing matches there
    low: float  # of the 95 % interval by bootstrap over documents
    high: float


def best_neurons(store: Store, matched: np.ndarray, seed: int = 0) -> list[BestNeuron]:
    """Finds each layer's best neuron for matched tokens, bool[N], if any; UserError for a single document."""
    bounds = store.document_bounds()
    if len(bounds) < 3:
        raise UserError(f"{store.folder} holds one document: neurons are chosen on some; harvest more text")
    document = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    choose, _ = ablate_set.halves(len(bounds) - 1, seed)
    among = np.isin(document, choose)
    found = []
    for layer in store.metadata.layers:
        for best in search.rank(store, matched, 1, [layer], among):
            block = store.neuron(layer, best.neuron).at(~among)
            firing = block.tokens[np.abs(block.values) >= best.threshold]

            def by_document(tokens: np.ndarray) -> np.ndarray:
                return np.bincount(document[tokens], minlength=len(bounds) - 1)

            hits = by_document(firing[matched[firing]])
            wanted = by_document(firing) + by_document(np.flatnonzero(matched & ~among))
            # F1 = 2 hits / (firing + matched), a ratio of sums over documents.
            f1 = ablate_set.estimate(2.0 * hits, wanted, np.random.default_rng(seed))
            found.append(BestNeuron(layer, best.neuron, best.threshold, f1.value, f1.low, f1.high))
    return found
