"""Two neurons on the same tokens: correlation, overlap, the best partner. Pure NumPy, sums in float64.

    r(x, y)        Pearson correlation of two neurons' activations over all N tokens, zeros included
    jaccard(x, y)  tokens at which both are active, over tokens at which one of them is

Both follow from events, so neurons are never made dense, but for the correlations of all pairs of two layers:
these go through pieces of 4,096 tokens in float32, whose products are added up in float64. Dims: n neurons of
a layer, E events, N tokens.
"""

from typing import NamedTuple

import numpy as np

from topklm.neurons.flows import pearson
from topklm.neurons.statistics import activity
from topklm.neurons.store import NeuronBlock

_CELLS = 2**22  # neurons x tokens that are looked up at once
_PIECE = 4096  # tokens of a dense piece


class Sums(NamedTuple):
    """Sums of each neuron's activations and of their squares, float64[n]."""

    total: np.ndarray
    squares: np.ndarray


def sums(block: NeuronBlock) -> Sums:
    """Computes the sums of a block's neurons."""
    squares = np.square(block.values.astype(np.float64))
    reduced = (activity.reduced(np.add, x, block.offsets) for x in (block.values, squares))
    return Sums(*reduced)


def joint(x: NeuronBlock, y: NeuronBlock, n_tokens: int, shift: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sums of products of neuron j of two blocks, and at how many tokens both are active.

    float64[n] and int64[n]; x's tokens are moved by `shift`, from the end to the beginning.
    """
    n = len(x.offsets) - 1
    products, both = np.zeros(n), np.zeros(n, np.int64)
    width = max(1, _CELLS // n_tokens)
    looked_up = np.zeros(width * n_tokens, np.float32)
    for begin in range(0, n, width):
        end = min(begin + width, n)
        of_x, of_y = x.part(begin, end), y.part(begin, end)
        at = activity.owners(of_y) * n_tokens + of_y.tokens
        looked_up[at] = of_y.values
        owners = activity.owners(of_x)
        found = looked_up[owners * n_tokens + (of_x.tokens + shift) % n_tokens].astype(np.float64)
        products[begin:end] = np.bincount(owners, of_x.values * found, end - begin)
        both[begin:end] = np.bincount(owners, found != 0, end - begin)
        looked_up[at] = 0
    return products, both


def shifted(block: NeuronBlock, n_tokens: int, shift: int) -> NeuronBlock:
    """Returns a layer whose activations lie `shift` tokens later, those of the end at the beginning."""
    tokens = (block.tokens + shift) % n_tokens
    order = np.lexsort((tokens, activity.owners(block)))
    return NeuronBlock(block.offsets, tokens[order], block.values[order])


def correlation(n_tokens: int, x: Sums, y: Sums, products: np.ndarray) -> np.ndarray:
    """Returns r of neuron j of two blocks, float64[n], by `joint`; NaN where one does not vary."""
    return pearson(n_tokens, *x, *y, products)


def jaccard(both: np.ndarray, x: NeuronBlock, y: NeuronBlock) -> np.ndarray:
    """Returns the overlap of active tokens, float64[n]; NaN where both neurons are dead."""
    either = activity.n_active(x) + activity.n_active(y) - both
    return np.where(either > 0, both / np.maximum(either, 1), np.nan)


def correlations(x: NeuronBlock, y: NeuronBlock, n_tokens: int) -> np.ndarray:
    """Returns r of every neuron of x, a row, with every one of y, float64[n, m]; NaN as `correlation`."""
    products = np.zeros((len(x.offsets) - 1, len(y.offsets) - 1))
    dense_x, dense_y = _by_token(x, n_tokens), _by_token(y, n_tokens)
    for begin in range(0, n_tokens, _PIECE):
        piece = slice(begin, begin + _PIECE)
        products += dense_x[piece].toarray().T @ dense_y[piece].toarray()
    (a, aa), (b, bb) = sums(x), sums(y)
    return pearson(n_tokens, a[:, None], aa[:, None], b[None], bb[None], products)


def _by_token(block: NeuronBlock, n_tokens: int):  # type: ignore[no-untyped-def]  # SciPy has no types
    import scipy.sparse  # noqa: PLC0415 - of the extra, and half a second

    shape = len(block.offsets) - 1, n_tokens
    values = block.values.astype(np.float32)
    return scipy.sparse.csr_array((values, block.tokens, block.offsets), shape).T.tocsr()


class Partners(NamedTuple):
    """Of each neuron of a layer, which of another it is most like; -1 and NaN where there is none."""

    best: np.ndarray  # int[n], the one with the largest r, on a tie the lowest index
    r_best: np.ndarray  # float64[n]
    r_other: np.ndarray  # float64[n], the largest r of any index but its own
    matched: np.ndarray  # int[n], of the one-to-one match with the largest sum of r (Hungarian)
    r_matched: np.ndarray  # float64[n]


def partners(r: np.ndarray) -> Partners:
    """Finds the partners by the correlations of all pairs, float64[n, n]."""
    from scipy.optimize import linear_sum_assignment  # noqa: PLC0415 - of the extra, and half a second

    known, first = np.where(np.isnan(r), -np.inf, r), best(r)
    r_best = _at(known, first)
    others = known.copy()
    np.fill_diagonal(others, -np.inf)
    # A neuron that varies nowhere costs as much with every partner.
    rows, columns = linear_sum_assignment(np.where(np.isnan(r), -1.0, r), maximize=True)
    matched = np.empty(len(r), np.int64)
    matched[rows] = columns
    r_matched = _at(known, matched)
    return Partners(
        np.where(np.isfinite(r_best), first, -1),
        _finite(r_best),
        _finite(others.max(axis=1)),
        np.where(np.isfinite(r_matched), matched, -1),
        _finite(r_matched),
    )


def best(r: np.ndarray) -> np.ndarray:
    """Returns which column of correlations [n, m] is the largest of each row, int[n]; 0 where all are NaN."""
    return np.where(np.isnan(r), -np.inf, r).argmax(axis=1)


def _at(r: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return np.take_along_axis(r, columns[:, None], axis=1)[:, 0]


def _finite(x: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(x), x, np.nan)


def overlap(these: list[list[int] | None], those: list[list[int] | None]) -> np.ndarray:
    """Returns the Jaccard index of two sets of ids of each neuron, float64[n]; NaN where one is None."""
    found = np.full(len(these), np.nan)
    for number, (one, other) in enumerate(zip(these, those, strict=True)):
        if one is not None and other is not None:
            found[number] = len({*one} & {*other}) / len({*one} | {*other})
    return found
