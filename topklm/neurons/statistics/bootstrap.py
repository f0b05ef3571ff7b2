"""Intervals by bootstrap over documents: figures of neurons from documents drawn with replacement.

Tokens of one document are not independent of each other, documents about are. So as many documents as there
are are drawn with replacement, R times; a draw is a weight for each document, how often it was drawn. The
figures of every neuron are computed again from each draw, exactly, from sums by document that are made once.

A draw holds some two thirds of the documents, and some of them twice: its entropies are lower than those of
the sample, and its groups look more alike, by more than draws differ among each other. So an interval is from
the 2.5th to the 97.5th percentile of draws that are moved until their mean is the figure. It says how far the
figure moves with the documents, not how far a sample of this size is from endless text. The choices are ours.
Dims: E events of a neuron, G documents, R draws.
"""

import dataclasses

import numpy as np
import scipy.sparse

LEVEL = 0.95


def document_weights(n_documents: int, n_draws: int, seed: int = 0) -> np.ndarray:
    """Counts how often each document is drawn, int64[G, R]; a column adds up to G.

    Stores of the same text have the same documents: the same seed draws the same ones of each, so that draws
    of two models may be subtracted from each other.
    """
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_documents, np.full(n_documents, 1 / n_documents), n_draws).T


@dataclasses.dataclass(frozen=True)
class Interval:
    """Of a figure."""

    figure: float  # from the sample as it is
    low: float
    high: float
    shift: float  # mean of the draws less the figure, which was taken off the draws


def interval(figure: float, draws: np.ndarray, level: float = LEVEL) -> Interval:
    """Returns the middle `level` of draws float[R], without NaN, moved so that their mean is the figure."""
    shift = float(np.nanmean(draws) - figure)
    low, high = np.nanquantile(draws - shift, [(1 - level) / 2, (1 + level) / 2])
    return Interval(figure, float(low), float(high), shift)


def sums_of_draws(
    ids: np.ndarray, documents: np.ndarray, values: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Adds up a neuron's values, float64[E], by token or cluster, int[E], in each draw.

    Documents, int[E], are rows of the weights, float64[G, R]. Returns int[u], the distinct ids, rising, and
    float64[u, R].
    """
    distinct, rows = np.unique(ids, return_inverse=True)
    # Sums by token and document; the product with the weights is the sum of every token in every draw.
    by_document = scipy.sparse.csr_array((values, (rows, documents)), (len(distinct), len(weights)))
    return distinct, by_document @ weights


def entropy_of_draws(sums: np.ndarray, n_active: np.ndarray) -> np.ndarray:
    """Computes `entropy.plug_in` and `entropy.miller_madow` of each draw, float64[R], nats; NaN for zeros.

    Sums of strengths, float64[u, R], are as from `sums_of_draws`, of `n_active` activations, float64[R].
    """
    totals = sums.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        # - sum of p ln p with p = s / total.
        plug_in = np.log(totals) - np.where(sums > 0, sums * np.log(sums), 0).sum(axis=0) / totals
        correction = (np.count_nonzero(sums, axis=0) - 1) / (2 * n_active)
        return np.where(totals > 0, np.maximum(plug_in, 0) + correction, np.nan)
