"""Which neurons are active more often in one text than in another, and whether chance could have done it.

The figures are ours. A text is a number of *units*, documents or pieces of one. The *frequency* of a neuron
in a text is the share of the text's tokens at which it is active, the *difference* that in the positive text
less that in the negative one.

Tokens of a document are not independent, so a permutation deals whole units to the two texts, as many to each
as there are; that is fair if units are exchangeable where both texts are of one kind. No number of
tokens makes up for few units. With m permutations drawn, a p-value is (1 + number at least as extreme) /
(1 + m), which is never 0 (Phipson and Smyth 2010, "Permutation P-values should never be zero"); where there
are at most m ways to deal the units, all are gone through, and the p-value is the share of them that is at
least as extreme. Extreme is a difference that is large in magnitude.

There are many neurons, so two corrections stand beside that p-value: q-values (Benjamini and Hochberg 1995),
the share of false ones that is expected among the neurons with this q or a lower one; and family-wise
p-values (Westfall and Young 1993, single-step max T), the chance that any neuron at all would come as far.
For the latter, frequent and rare neurons are made comparable by the *score*, the difference in units of its
standard deviation under permutation: to first order

    (1/T+ + 1/T-) sqrt(G+ G- / (G (G - 1)) sum_g (c_g - f n_g)^2)

with c_g the active tokens of unit g, n_g its tokens, f the frequency in both texts together, T+ and T- the
tokens of the texts and G+ and G- their units. (It is exact for units of equal length; the sum is the same for
every permutation, and the factors are the same for every neuron.) Dims: G units, S layers, D neurons per
layer, M neurons that are active at all.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
import math

import numpy as np

from topklm.errors import ArgumentError

PERMUTATIONS = 10_000
ORDERS = ("difference", "score")

_CHUNK = 2**22  # differences that are in memory at once
_ROUNDING = 1e-9  # relative: two ways to deal the units that are equally extreme shall count as that


@dataclasses.dataclass(frozen=True, eq=False)
class Contrast:
    """How the neurons of all layers differ between two texts; a neuron active in neither was not tested."""

    n_units: tuple[int, int]  # of the positive text, and of the negative one
    n_tokens: tuple[int, int]  # likewise
    n_permutations: int  # ways to deal the units that were looked at
    is_exact: bool  # whether these are all there are
    # int64[2, S, D], tokens at which a neuron is active in the positive and the negative text.
    n_active: np.ndarray
    # float64[S, D], in standard deviations; 0 where no permutation changes the difference, NaN where a
    # neuron was not tested.
    score: np.ndarray
    p_value: np.ndarray  # float64[S, D], of one neuron alone, two-sided; NaN where it was not tested
    q_value: np.ndarray  # float64[S, D], likewise, corrected for the number of neurons: false discovery rate
    family_p_value: np.ndarray  # float64[S, D], likewise: family-wise error rate

    @property
    def frequency(self) -> np.ndarray:
        """float64[2, S, D], in the positive and the negative text."""
        return self.n_active / np.array(self.n_tokens)[:, None, None]

    @property
    def difference(self) -> np.ndarray:
        """float64[S, D], frequency in the positive text less that in the negative one."""
        return np.subtract(*self.frequency)

    @property
    def n_tested(self) -> int:
        """Neurons that are active in one of the texts."""
        return int(np.count_nonzero(np.isfinite(self.p_value)))

    @property
    def lowest_p_value(self) -> float:
        """No p-value can be lower, whatever the activations are."""
        if not self.is_exact:
            return 1 / (1 + self.n_permutations)
        # With texts of as many units, exchanging the two is as extreme.
        return (2 if self.n_units[0] == self.n_units[1] else 1) / self.n_permutations


@dataclasses.dataclass(frozen=True)
class ContrastedNeuron:
    """A neuron in a ranking, and its figures of a `Contrast`."""

    layer: int
    neuron: int
    frequency_positive: float
    frequency_negative: float
    difference: float
    score: float
    p_value: float
    q_value: float
    family_p_value: float


def contrast(
    active: np.ndarray,
    n_tokens: np.ndarray,
    is_positive: np.ndarray,
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Contrast:
    """Compares two texts, of G units with n_tokens int[G], 1 or more; is_positive, bool[G], parts them.

    `active`, int[G, S, D], is at how many tokens of a unit a neuron is active. Units are dealt again in so
    many ways, or all. ValueError if a text has no unit, a unit no token, or `permutations` is below 1.
    """
    import scipy.stats  # noqa: PLC0415  (half a second, which no other verb shall take)

    n_positive, n_units = int(np.count_nonzero(is_positive)), len(is_positive)
    if not 0 < n_positive < n_units:
        raise ValueError(f"is_positive: {n_positive} of {n_units} units: both texts must have one at least")
    if np.min(n_tokens) < 1:
        raise ValueError("n_tokens: every unit must have one at least")
    if permutations < 1:
        raise ValueError(f"permutations = {permutations}: must be 1 or more")
    n_active = np.stack([active[is_positive].sum(axis=0), active[~is_positive].sum(axis=0)]).astype(np.int64)
    tested = n_active.sum(axis=0) > 0
    counts, tokens = active[:, tested].astype(np.float64), np.asarray(n_tokens, np.float64)
    scale = np.sqrt(((counts - tokens[:, None] * (counts.sum(axis=0) / tokens.sum())) ** 2).sum(axis=0))
    # A neuron with the same share in every unit differs by nothing but rounding.
    scale = np.where(scale > _ROUNDING * counts.max(axis=0, initial=1), scale, np.inf)

    observed = _differences(np.asarray(is_positive)[None], counts, tokens)[0]
    bound = np.abs(observed) * (1 - _ROUNDING) - np.finfo(np.float64).eps
    sorted_bound = np.sort(bound / scale)
    order = np.argsort(np.argsort(bound / scale, kind="stable"), kind="stable")
    beyond, beyond_all = np.zeros(len(observed), np.int64), np.zeros(len(observed) + 1, np.int64)
    is_exact = math.comb(n_units, n_positive) <= permutations
    n_looked_at = 0
    for dealt in _dealings(n_units, n_positive, permutations, seed, max(1, _CHUNK // max(len(observed), 1))):
        sizes = np.abs(_differences(dealt, counts, tokens))
        n_looked_at += len(dealt)
        beyond += (sizes >= bound).sum(axis=0)
        if len(observed):
            # The largest of a permutation comes as far as all neurons up to this place.
            reached = np.searchsorted(sorted_bound, (sizes / scale).max(axis=1), side="right")
            beyond_all += np.bincount(reached, minlength=len(beyond_all))
    # Neuron number j in the order is reached by those that reach j + 1 or more.
    family = np.cumsum(beyond_all[::-1])[::-1][1:][order]
    added = 0 if is_exact else 1
    p_value, family_p_value = ((added + n) / (added + n_looked_at) for n in (beyond, family))

    def everywhere(figures: np.ndarray) -> np.ndarray:
        whole = np.full(tested.shape, np.nan)
        whole[tested] = figures
        return whole

    positive_tokens = int(np.sum(n_tokens, where=is_positive))
    both_tokens = positive_tokens, int(np.sum(n_tokens)) - positive_tokens
    return Contrast(
        n_units=(n_positive, n_units - n_positive),
        n_tokens=both_tokens,
        n_permutations=n_looked_at,
        is_exact=is_exact,
        n_active=n_active,
        score=everywhere(observed / scale / _spread(n_positive, n_units, both_tokens)),
        p_value=everywhere(p_value),
        q_value=everywhere(scipy.stats.false_discovery_control(p_value)),
        family_p_value=everywhere(family_p_value),
    )


def ranked(
    found: Contrast,
    layers: Sequence[int],
    *,
    only: Sequence[int] | None = None,
    top: int | None = None,
    by: str = "difference",
) -> list[ContrastedNeuron]:
    """Returns the neurons of each layer, those most typical of the positive text first, layer after layer.

    Neurons that are active in neither text are left out; of equal ones the lowest number comes first. They
    are sorted by falling "difference" or "score", at most `top` of a layer. ValueError if `only` names
    another layer than the S there are, or `by` none of these.
    """
    if by not in ORDERS:
        raise ValueError(f"by = {by!r}: must be one of {', '.join(ORDERS)}")
    for layer in set(only or ()) - set(layers):
        raise ValueError(f"layer = {layer}: must be one of {', '.join(map(str, layers))}")
    of_texts = (found.difference, found.score, found.p_value, found.q_value, found.family_p_value)
    figures = np.stack([*found.frequency, *of_texts])
    rows = []
    for number, of_model in enumerate(layers):
        if only is not None and of_model not in only:
            continue
        tested = np.flatnonzero(np.isfinite(found.p_value[number]))
        order = tested[np.argsort(-getattr(found, by)[number, tested], kind="stable")]
        for neuron in order[:top].tolist():
            rows.append(ContrastedNeuron(of_model, neuron, *figures[:, number, neuron].tolist()))
    return rows


def more_activated(
    activation: np.ndarray, frequency: np.ndarray, layers: Sequence[int], n_neurons: int, most: float
) -> tuple[tuple[int, int], ...]:
    """Returns the neurons of each layer whose mean activation in the first text is above that in the other.

    The `n_neurons` with the largest difference of each layer, (layer, number), among neurons active at no
    more than the share `most` of the other text's tokens, as SAEBench chooses latents to unlearn (Karvonen
    et al. 2025, arXiv 2503.09532). Activation and frequency are float64[2, S, D]. ArgumentError for fewer.
    """
    chosen = list[tuple[int, int]]()
    rise = np.where(frequency[1] <= most, activation[0] - activation[1], -np.inf)
    for layer, of_layer in zip(layers, rise, strict=True):
        if (n := int(np.count_nonzero(of_layer > 0))) < n_neurons:
            text = f"layer {layer} has {n} neurons that are more active in the text to be forgotten and at "
            text += f"no more than {most:.0%} of the other one's tokens; choose fewer, or allow more"
            raise ArgumentError(text, field="count", value=n_neurons)
        order = np.argsort(-of_layer, kind="stable")[:n_neurons]
        chosen += [(layer, number) for number in sorted(order.tolist())]
    return tuple(chosen)


def _differences(dealt_PG: np.ndarray, counts_GM: np.ndarray, tokens_G: np.ndarray) -> np.ndarray:
    """Returns float64[P, M], of each of P ways to deal the units, bool[P, G]."""
    dealt = dealt_PG.astype(np.float64)
    # Sums of whole numbers are exact, so that what is equal gets the same bits.
    positive, tokens = dealt @ counts_GM, dealt @ tokens_G
    negative = counts_GM.sum(axis=0) - positive
    return positive / tokens[:, None] - negative / (tokens_G.sum() - tokens)[:, None]


def _spread(n_positive: int, n_units: int, n_tokens: tuple[int, int]) -> float:
    """Computes the factor that all standard deviations share; see the module's description."""
    n_pairs = n_positive * (n_units - n_positive)
    return (1 / n_tokens[0] + 1 / n_tokens[1]) * math.sqrt(n_pairs / (n_units * (n_units - 1)))


def _dealings(
    n_units: int, n_positive: int, permutations: int, seed: int, together: int
) -> Iterator[np.ndarray]:
    """Yields bool[P, G], P at most `together`: all ways to choose the positive units, or some drawn."""
    if math.comb(n_units, n_positive) <= permutations:
        ways = itertools.combinations(range(n_units), n_positive)
        while part := list(itertools.islice(ways, together)):
            dealt = np.zeros((len(part), n_units), bool)
            np.put_along_axis(dealt, np.array(part), True, axis=1)
            yield dealt
        return
    rng = np.random.default_rng(seed)
    first = np.arange(n_units) < n_positive
    for begin in range(0, permutations, together):
        size = min(together, permutations - begin)
        yield rng.permuted(np.broadcast_to(first, (size, n_units)), axis=1)
