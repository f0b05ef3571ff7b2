"""How often and how strongly neurons are active, and what the other figures of a block of neurons share.

A neuron is *active* at a token where its value is not 0, and its *strength* there is the magnitude of the
value. With topk_activation "relu", and for the positive part of dense neurons, the two are the same; with
"identity" and "abs" values may be negative, and then every figure that weighs or ranks tokens goes by
strength. All tokens of the store count: it holds text only, no separators and no padding.
Dims: n neurons of a block, E events.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from topklm.errors import UserError
from topklm.neurons.store import Block

HISTOGRAM_BINS = 40


def columns(block: Block, n_tokens: int) -> Mapping[str, Any]:
    """Returns the columns of `table` that are about activity.

    `density` is the share of all tokens at which a neuron is active: n_active / N. Of a layer, densities add
    up to the mean number of active neurons per token, which is k where none of the k kept values is 0.
    `mean_activation` and `max_activation` are of strengths, over the active tokens. A dead neuron, one that
    is active nowhere in the store, has density 0 and no mean, maximum or histogram.

    Args:
        block: The neurons.
        n_tokens: N, of the whole store.

    Returns:
        For each column one value for each neuron; None where there is none.

    Raises:
        UserError: If an activation is NaN or infinite.
    """
    counts, strengths = n_active(block), np.abs(block.values)
    maxima = largest(strengths, block.offsets)
    if not np.all(np.isfinite(maxima)):
        raise UserError(
            "the store holds activations that are NaN or infinite: training diverged before this checkpoint; "
            "harvest an earlier step"
        )
    with np.errstate(invalid="ignore"):  # 0 / 0 of dead neurons
        means = sums(strengths, block.offsets) / counts
    histograms = histogram(block)
    return {
        "n_active": counts,
        "density": counts / n_tokens,
        "mean_activation": or_null(means),
        "max_activation": or_null(np.where(counts > 0, maxima, np.nan)),
        "histogram": [row.tolist() if count else None for row, count in zip(histograms, counts, strict=True)],
    }


def n_active(block: Block) -> np.ndarray:
    """Returns int64[n], at how many tokens each neuron is active."""
    return np.diff(block.offsets)


def owners(block: Block) -> np.ndarray:
    """Returns int64[E], which neuron of the block each event is of."""
    return np.repeat(np.arange(len(block.offsets) - 1), n_active(block))


def histogram(block: Block, n_bins: int = HISTOGRAM_BINS) -> np.ndarray:
    """Counts tokens by strength, in parts of equal width of (0, largest of the neuron]: int64[n, n_bins].

    A part holds its upper end and not its lower one. A dead neuron has zeros.
    """
    strengths = np.abs(block.values)
    bins = parts(strengths, np.repeat(largest(strengths, block.offsets), n_active(block)), n_bins)
    n = len(block.offsets) - 1
    return np.bincount(owners(block) * n_bins + bins, minlength=n * n_bins).reshape(n, n_bins)


def parts(strengths: np.ndarray, maximum: np.ndarray | float, n_parts: int) -> np.ndarray:
    """Returns int64[E], in which of `n_parts` parts of equal width of (0, maximum] strengths lie, from 0.

    Part p is (p / n_parts, (p + 1) / n_parts] of the maximum.

    Args:
        strengths: float32[E], above 0.
        maximum: One, or float32[E].
        n_parts: Into how many parts.
    """
    # In float64 the product is exact, so that what lies on an edge falls on the right side of it.
    shares = strengths.astype(np.float64) * n_parts / maximum
    return np.minimum(np.ceil(shares).astype(np.int64) - 1, n_parts - 1)


def sums(x: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Returns float64[n], the sum of x[offsets[j] : offsets[j + 1]] for each j; 0 where that is empty."""
    return _reduced(np.add, x.astype(np.float64), offsets)


def largest(x: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Returns float64[n], as `sums`, the largest; 0 where there is none."""
    return _reduced(np.maximum, x, offsets)


def or_null(figures: np.ndarray) -> list[float | None]:
    """Figures for a table: NaN, which stands for none, becomes None."""
    return [None if np.isnan(x) else x for x in figures.tolist()]


def _reduced(function: np.ufunc, x: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    result = np.zeros(len(offsets) - 1)
    there = np.diff(offsets) > 0  # of an empty range, reduceat would take the element after it
    if there.any():
        result[there] = function.reduceat(x, offsets[:-1][there])
    return result
