"""The search behind TopK on CPUs against NumPy's stable sort, on rows made to be hard for it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from topklm.model import topk_threshold
from topklm.model.topk_threshold import order_key, select

KEY_BITS = {np.float32: 32, ml_dtypes.bfloat16: 16, np.float16: 16}


def integers(dtype):
    return np.int32 if np.dtype(dtype).itemsize == 4 else np.int16


def from_keys(key, dtype):
    """The floats of these order keys; no NaN, if the keys are those of no NaN."""
    key = np.asarray(key).astype(integers(dtype))
    return np.where(key < 0, key ^ np.iinfo(key.dtype).max, key).view(dtype)


def expected_mask(x, k):
    """By a stable sort of every row: of equal entries the first ones win."""
    bits = x.view(integers(x.dtype)).astype(np.int64)
    key = np.where(bits < 0, ~(bits & np.iinfo(integers(x.dtype)).max), bits)
    first = np.argsort(-key, axis=-1, kind="stable")[..., :k]
    mask = np.zeros(x.shape, bool)
    np.put_along_axis(mask, first, True, axis=-1)
    return mask


def assert_exact(x, k):
    y, mask = jax.jit(select, static_argnums=(1, 2, 3))(jnp.asarray(x), k, "identity", True)
    want = expected_mask(x, k)
    np.testing.assert_array_equal(mask, want)
    np.testing.assert_array_equal(
        np.asarray(y).view(integers(x.dtype)), np.where(want, x, np.zeros_like(x)).view(integers(x.dtype))
    )


def hard_rows(dtype, d, rng):
    """[rows, d]: evenly and unevenly spread, with outliers, in clusters, with ties, nearly and all equal."""
    top = np.iinfo(integers(dtype)).max
    largest = int(order_key(jnp.asarray(np.inf, dtype)))  # also its negative, less one, is no NaN
    spread = np.linspace(-largest, largest, d).astype(np.int64)
    doubling = np.minimum(2.0 ** (np.arange(d) * KEY_BITS[dtype] / d), largest).astype(np.int64)
    normal = rng.normal(size=(4, d)).astype(dtype)
    outlier = normal[0].copy()
    outlier[rng.integers(d)] = np.inf
    outlier[rng.integers(d)] = -np.inf
    ties = rng.choice([-1.0, -0.0, 0.0, 1.0], d).astype(dtype)
    one_differs = np.full(d, 1.0, dtype)
    one_differs[d // 2] = 1.5
    by_key = [spread, doubling, -doubling, largest - doubling, np.arange(d), np.arange(d) % 3 + top // 3]
    rows = [rng.permutation(from_keys(key, dtype)) for key in by_key]
    return np.stack([*rows, *normal, outlier, ties, one_differs, np.zeros(d, dtype), np.full(d, -2.0, dtype)])


@pytest.mark.parametrize(
    ("dtype", "d", "k"),
    [
        (np.float32, 37, 1),
        (np.float32, 37, 12),
        (np.float32, 37, 36),
        (np.float32, 96, 1),
        (np.float32, 96, 11),
        (np.float32, 96, 48),
        (np.float32, 1040, 16),
        (ml_dtypes.bfloat16, 1040, 5),
        (ml_dtypes.bfloat16, 37, 12),
        (np.float16, 64, 8),
    ],
)
def test_hard_rows_are_searched_exactly(dtype, d, k):
    assert_exact(hard_rows(dtype, d, np.random.default_rng(d)), k)


@pytest.mark.parametrize("n_rows", [0, 1, 8, 9])
def test_any_number_of_rows_is_cut_into_blocks(monkeypatch, n_rows):
    monkeypatch.setattr(topk_threshold, "_BLOCK_ENTRIES", 4 * 24)
    x = np.random.default_rng(n_rows).normal(size=(n_rows, 24)).astype(np.float32)
    assert_exact(x, 5)


def test_a_row_wider_than_a_block_is_a_block(monkeypatch):
    monkeypatch.setattr(topk_threshold, "_BLOCK_ENTRIES", 16)
    assert_exact(np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32), 7)


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(np.float32, marks=pytest.mark.slow), ml_dtypes.bfloat16],
    ids=lambda t: np.dtype(t).name,
)
@pytest.mark.parametrize("k", [11, 20])
def test_the_number_of_passes_is_bounded_by_the_bits_of_a_key(monkeypatch, dtype, k):
    count, passes = topk_threshold._count, []

    def counted(*arguments):
        passes.append(arguments)
        return count(*arguments)

    monkeypatch.setattr(topk_threshold, "_count", counted)
    with jax.disable_jit():
        select(jnp.asarray(hard_rows(dtype, 48, np.random.default_rng(1))), k, "identity", False)
    for_ties = 2 + (48).bit_length()
    assert len(passes) <= KEY_BITS[dtype] + 1 + topk_threshold._LAST_KEYS + for_ties


def test_wide_rows_are_counted_without_overflow():
    x = np.random.default_rng(5).choice([1.0, 2.0], size=(2, 70_000)).astype(ml_dtypes.bfloat16)
    assert_exact(x, 50_000)


def test_keys_sort_as_the_numbers_do():
    x = np.array([-np.inf, -1, -1e-45, -0.0, 0.0, 1e-45, 1, np.inf], np.float32)
    key = np.asarray(order_key(jnp.asarray(x)))
    assert (np.diff(key.astype(np.int64)) > 0).all()
    np.testing.assert_array_equal(key > 0, x > 0)
    np.testing.assert_array_equal(from_keys(key, np.float32).view(np.int32), x.view(np.int32))
