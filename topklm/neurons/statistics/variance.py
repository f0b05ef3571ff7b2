"""How much of a neuron's activation the tokens explain that stand at a place of the text.

One-way analysis of variance over the tokens of the vocabulary: at token n of the store the group is the token
that is read there (`by_token`), or the one before it in the same document (`by_context`). With N tokens in G
groups, `within` the sum of squares about the groups' means and `total` that about the mean of all,

    share = 1 - (within / (N - G)) / (total / (N - 1))

which is 1 for a lookup table of tokens, and 0 on average for activations that do not depend on the group:
both mean squares are without bias then. Only groups of `LEAST_IN_GROUP` tokens or more take part; tokens at
which the neuron is not active do, with 0. Values count with their signs.

Everything follows from sums over the active tokens, for the others add nothing to a sum: no dense [N, D] is
made. Dims: n neurons of a block, E events, V tokens.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from topklm.neurons.statistics import activity
from topklm.neurons.store import NeuronBlock

LEAST_IN_GROUP = 5
LEAST_ACTIVE = 30  # tokens of the groups; of fewer, a share says little
NO_TOKEN = -1


def columns(
    block: NeuronBlock, token_ids: np.ndarray, previous_ids: np.ndarray, vocab_size: int
) -> Mapping[str, np.ndarray]:
    """Returns `by_token` and `by_context`, float64[n] each; NaN where there is none.

    Ids, int[N], are of the whole store, those before from `previous`, below V.
    """
    keys = {"by_token": token_ids, "by_context": previous_ids}
    return {name: explained(block, ids, vocab_size) for name, ids in keys.items()}


def previous(token_ids: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Returns int64[N], the token before each; `NO_TOKEN` where documents begin, at bounds int64[n + 1]."""
    before = np.concatenate([[NO_TOKEN], token_ids[:-1].astype(np.int64)])
    before[bounds[:-1]] = NO_TOKEN
    return before


def group_sizes(keys: np.ndarray, n_groups: int) -> np.ndarray:
    """Returns int64[n_groups], how many of int[N] keys each group has; 0 for groups that take no part."""
    sizes = np.bincount(keys[keys >= 0], minlength=n_groups)
    return np.where(sizes >= LEAST_IN_GROUP, sizes, 0)


def explained(block: NeuronBlock, keys: np.ndarray, n_groups: int) -> np.ndarray:
    """Returns float64[n], the share that int[N] groups explain; NaN where a neuron is seldom active.

    Keys are below `n_groups`; a token of a key below 0 takes no part. Takes 8 bytes a neuron and group.
    """
    sizes = group_sizes(keys, n_groups)
    n_neurons = len(block.offsets) - 1
    counted = np.where(keys >= 0, sizes[keys], 0)[block.tokens] > 0
    owners, groups = activity.owners(block)[counted], keys[block.tokens[counted]].astype(np.int64)
    values = block.values[counted].astype(np.float64)
    sums = np.bincount(owners * n_groups + groups, values, n_neurons * n_groups)
    squares = np.bincount(owners, np.square(values), n_neurons)
    totals = sizes.sum(), np.count_nonzero(sizes)
    shares = share(sums.reshape(n_neurons, n_groups).T, sizes[:, None], squares, *totals)
    return np.where(np.bincount(owners, minlength=n_neurons) >= LEAST_ACTIVE, shares, np.nan)


def share(
    sums: np.ndarray, sizes: np.ndarray, squares: np.ndarray, n_tokens: Any, n_groups: Any
) -> np.ndarray:
    """Computes the share from sums over groups, of those alone that have active tokens; NaN for a constant.

    Sums of the values are float64[some groups, n]; sizes, as many or [some groups, 1], tokens of each, 0 for
    groups that take no part; squares float64[n], sums of the values' squares. N and G, of all groups, are one
    number or [n].
    """
    n_tokens, n_groups = np.asarray(n_tokens, np.float64), np.asarray(n_groups, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = np.where(sizes > 0, np.square(sums) / sizes, 0).sum(axis=0)
        total = squares - np.square(sums.sum(axis=0)) / n_tokens
        shares = 1 - ((squares - between) / (n_tokens - n_groups)) / (total / (n_tokens - 1))
    # Of a constant, rounding leaves something that is no variance.
    varies = (total > 1e-12 * squares) & (n_tokens > n_groups)
    return np.where(varies, shares, np.nan)
