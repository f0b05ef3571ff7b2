"""Clusters of tokens: groups that anyone sees, odd vocabularies, and SciPy's own k-means beside them."""

import warnings

import numpy as np
import pytest
from scipy.cluster import vq

from topklm.errors import UserError
from topklm.neurons.statistics import embeddings


def groups_of_tokens(n_groups, size, d=24, spread=0.03, seed=0):
    """Returns an unembedding [D, V] of groups of alike directions and unlike lengths; and the groups, [V]."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(n_groups), size))
    rows = np.linalg.qr(rng.normal(size=(d, d)))[0][group] + spread * rng.normal(size=(len(group), d))
    return (rows * rng.uniform(0.1, 9, (len(group), 1))).T.astype(np.float32), group


def test_groups_that_anyone_sees_are_found():
    unembedding, group = groups_of_tokens(8, 30)
    found = embeddings.cluster_tokens(unembedding, 8)
    assert found.dtype == np.int32
    assert len(set(zip(found.tolist(), group.tolist(), strict=True))) == 8
    assert sorted(set(found.tolist())) == list(range(8))


def test_the_same_seed_gives_the_same_clusters_and_another_others():
    unembedding = np.random.default_rng(1).normal(size=(16, 400)).astype(np.float32)
    first = embeddings.cluster_tokens(unembedding, seed=5)
    np.testing.assert_array_equal(first, embeddings.cluster_tokens(unembedding, seed=5))
    assert not np.array_equal(first, embeddings.cluster_tokens(unembedding, seed=6))


def test_no_cluster_is_empty_where_tokens_share_an_embedding_or_have_none():
    rng = np.random.default_rng(2)
    unembedding = np.zeros((8, 60), np.float32)  # of 6 kinds: the last 10 stay 0
    unembedding[:, :50] = np.repeat(rng.normal(size=(8, 5)), 10, axis=1) * rng.uniform(0.1, 9, 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = embeddings.cluster_tokens(unembedding, 20)
    assert np.unique(found).tolist() == list(range(6))
    assert len({tuple(found[a : a + 10]) for a in range(0, 60, 10)}) == 6
    assert all(len(set(found[a : a + 10])) == 1 for a in range(0, 60, 10))


def test_a_cluster_that_k_means_leaves_empty_is_not_counted(monkeypatch):
    unembedding, group = groups_of_tokens(3, 20)
    rows = embeddings.unit_rows(unembedding)
    start = np.concatenate([np.full((1, 24), 9, np.float32), *(rows[group == g][:1] for g in range(3))])
    monkeypatch.setattr(embeddings, "_spread", lambda *_: start)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(embeddings.cluster_tokens(unembedding, 4), group)


def test_it_is_as_good_as_scipys_own_start():
    unembedding = np.random.default_rng(3).normal(size=(12, 1500)).astype(np.float32)
    rows = embeddings.unit_rows(unembedding).astype(np.float64)

    def spread(labels):
        return sum(
            ((rows[labels == c] - rows[labels == c].mean(axis=0)) ** 2).sum() for c in set(labels.tolist())
        )

    peers = [vq.kmeans2(rows, 40, iter=25, minit="++", rng=np.random.default_rng(s))[1] for s in range(4)]
    found = [embeddings.cluster_tokens(unembedding, 40, seed=s) for s in range(4)]
    assert np.mean([spread(labels) for labels in found]) < 1.01 * np.mean(
        [spread(labels) for labels in peers]
    )


@pytest.mark.parametrize(("vocab_size", "count"), [(20, 2), (257, 16), (4096, 256), (50_000, 1024)])
def test_how_many_there_are_by_default(vocab_size, count):
    assert embeddings.default_count(vocab_size) == count


@pytest.mark.parametrize("count", [0, -3, 61])
def test_a_number_that_cannot_be_is_refused(count):
    with pytest.raises(UserError, match=f"n_clusters = {count}: must be from 1 to 60"):
        embeddings.cluster_tokens(np.ones((4, 60), np.float32), count)


def test_every_token_may_be_its_own_cluster_and_all_may_be_one():
    unembedding = np.random.default_rng(4).normal(size=(16, 30)).astype(np.float32)
    assert len(set(embeddings.cluster_tokens(unembedding, 30).tolist())) == 30
    assert set(embeddings.cluster_tokens(unembedding, 1).tolist()) == {0}
