"""From measured effects to verdicts: which neurons are steerable, and how sure that is.

The definitions are ours. Of neuron j of a layer, let g[x, r, i] be the gain of concept i (`concepts`)
when vector r is added at strength x: the rise of ln P(the next token is one of the concept's), a mean over
the prompts. And d[x, r]: the KL divergence of the steered next-token distribution from the unsteered one,
nats, a mean likewise. It says what the unsteered model loses on text that the steered one writes, beyond
what that one loses itself; so fluency is kept while d is at most a bound.

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
cases. Dims: X strengths, N neurons, R random directions, S neurons that were tried with all concepts, K
kinds.
"""

import dataclasses

import numpy as np

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
