"""Neurons of two models that are found by the same pattern."""

import dataclasses

import numpy as np

from topklm.errors import UserError
from topklm.neurons import ablate_set, search
from topklm.neurons.store import Store


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
