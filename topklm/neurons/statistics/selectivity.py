"""Over which tokens a neuron is active: token and semantic entropy, variance that tokens explain.

The paper names both entropies; its formulas are unknown to us, and these definitions are ours. Let a[n, j] be
the strength (`activity`) of neuron j at token n of the store, and v(n) the *input* token there.

    p(v | j) = sum of a[n, j] over n with v(n) = v  /  sum of a[n, j] over all n
    token entropy      H_tok(j) = - sum over v of p(v | j) ln p(v | j), in nats
    semantic entropy   H_sem(j): the same of p(c | j) = sum of p(v | j) over the tokens v of cluster c; or, of
                       clusters of places, the share of the activation that falls on the places of c

exp(H_tok) reads as an effective number of tokens. A neuron for a concept has a high token entropy and a low
semantic one. The caller chooses the clusters; see `embeddings`.

Entropies of samples ("plug-in") come out too low where few activations were seen. The Miller-Madow
correction adds (m - 1) / (2 n), where m is the number of distinct tokens (clusters) seen, and n the number of
activations seen, each counted once whatever its strength. For shares weighted by strength that is an
approximation: it is right to first order in 1 / n where all strengths are equal.

Explained variance is a one-way analysis of variance over the tokens of the vocabulary: at token n of the
store the group is the token that is read there (`by_token`), or the one before it in the same document
(`by_context`). With N tokens in G groups, `within` the sum of squares about the groups' means and `total`
that about the mean of all,

    share = 1 - (within / (N - G)) / (total / (N - 1))

which is 1 for a lookup table of tokens, and 0 on average for activations that do not depend on the group:
both mean squares are without bias then. Only groups of `LEAST_IN_GROUP` tokens or more take part; tokens at
which the neuron is not active do, with 0. Values count with their signs.

Everything follows from sums over the active tokens: no dense [N, D] is made. Dims: n neurons of a block,
E events, V tokens, C clusters.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from topklm.neurons.statistics import activity
from topklm.neurons.store import NeuronBlock

TOP_TOKENS = 10


def columns(
    block: NeuronBlock, token_ids: np.ndarray, clusters: np.ndarray, of_places: np.ndarray | None = None
) -> Mapping[str, Any]:
    """Returns the columns about tokens and their clusters, one value for each neuron.

    Ids are uint[N], of the whole store; clusters int[V], of each token, or `of_places`, int[N], of each token
    of the store, instead. Takes 16 V bytes a neuron, beside the events. A dead neuron has no entropies (NaN)
    and no top tokens.
    """
    n_active = activity.n_active(block)
    by_token = by_group(block, token_ids, len(clusters))
    if of_places is None:
        by_cluster = merged(by_token, clusters)
    else:
        by_cluster = by_group(block, of_places, int(of_places.max()) + 1)
    token, semantic = plug_in(by_token), plug_in(by_cluster)
    top = top_tokens(by_token)
    return {
        "n_distinct_tokens": np.count_nonzero(by_token, axis=1),
        "token_entropy": token,
        "token_entropy_corrected": token + miller_madow(by_token, n_active),
        "semantic_entropy": semantic,
        "semantic_entropy_corrected": semantic + miller_madow(by_cluster, n_active),
        "top_tokens": [ids.tolist() if len(ids) else None for ids, _ in top],
        "top_token_shares": [shares.tolist() if len(shares) else None for _, shares in top],
    }


def by_group(block: NeuronBlock, token_ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Returns float64[n, V], the sum of each neuron's strengths where each of the uint[N] tokens stands."""
    n = len(block.offsets) - 1
    cells = activity.owners(block)
    cells *= vocab_size
    cells += token_ids[block.tokens]
    summed = np.bincount(cells, weights=np.abs(block.values), minlength=n * vocab_size)
    return summed.reshape(n, vocab_size)


def merged(strengths: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Returns float64[n, C], strengths [n, V] added up over the tokens of each of the int[V] clusters."""
    n, n_clusters = len(strengths), int(clusters.max()) + 1
    neurons, ids = np.nonzero(strengths)
    cells = neurons * n_clusters + clusters[ids]
    return np.bincount(cells, strengths[neurons, ids], n * n_clusters).reshape(n, n_clusters)


def plug_in(strengths: np.ndarray) -> np.ndarray:
    """Returns float64[n], the entropy of the shares of each row of [n, V], nats; NaN for a row of zeros."""
    totals = strengths.sum(axis=1)
    rows, ids = np.nonzero(strengths)
    shares = strengths[rows, ids] / totals[rows]
    entropies = np.bincount(rows, weights=-shares * np.log(shares), minlength=len(strengths))
    return np.where(totals > 0, np.maximum(entropies, 0.0), np.nan)


def miller_madow(strengths: np.ndarray, n_active: np.ndarray) -> np.ndarray:
    """Returns float64[n], the correction to add to `plug_in`, nats; NaN for a row of zeros.

    Strengths are [n, V], and n_active int64[n], the activations that went into a row.
    """
    m = np.count_nonzero(strengths, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(m > 0, (m - 1) / (2 * n_active), np.nan)


def top_tokens(strengths: np.ndarray, count: int = TOP_TOKENS) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the tokens of each row of [n, V] with the largest shares, falling, ties by rising id.

    n pairs of int64[m] and their shares float64[m], m at most `count`; fewer where fewer are above 0.
    """
    n, vocab_size = strengths.shape
    at = max(vocab_size - count, 0)
    least = np.partition(strengths, at, axis=1)[:, at]
    rows, ids = np.nonzero((strengths >= least[:, None]) & (strengths > 0))
    found = strengths[rows, ids]
    order = np.lexsort((ids, -found, rows))
    shares = found[order] / strengths.sum(axis=1)[rows[order]]
    starts = np.searchsorted(rows, np.arange(n + 1))
    ends = np.minimum(starts[1:], starts[:-1] + count)
    return [(ids[order[a:b]], shares[a:b]) for a, b in zip(starts[:-1], ends, strict=True)]


LEAST_IN_GROUP = 5
LEAST_ACTIVE = 30  # tokens of the groups; of fewer, a share says little
NO_TOKEN = -1


def variance_columns(
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
