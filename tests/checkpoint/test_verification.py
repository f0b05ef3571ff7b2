import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from topklm.checkpoint import checksums
from topklm.checkpoint.verification import changed


def tree_of(seed):
    draw = np.random.default_rng(seed)
    return {
        "params": {
            "large": jnp.asarray(draw.standard_normal((3, 70, 331), dtype=np.float32)),
            "half": jnp.asarray(draw.standard_normal(1000).astype(ml_dtypes.bfloat16)),
            "bytes": jnp.asarray(draw.integers(0, 255, (7, 5)), jnp.uint8),
            "count": jnp.asarray(seed, jnp.int32),
        }
    }


def test_the_checksums_are_those_computed_on_the_device():
    tree = tree_of(1)
    assert changed(tree, checksums.checksums(tree)) == []
    assert changed(tree, {}) == ["params.bytes", "params.count", "params.half", "params.large"]


@pytest.mark.parametrize("place", [(0, 0, 0), (1, 2, 3), (2, 69, 330)])
def test_one_changed_bit_names_the_array(place):
    tree = tree_of(1)
    saved = checksums.checksums(tree)
    content = np.array(tree["params"]["large"])
    content.view(np.uint32)[place] ^= 1
    tree["params"]["large"] = jnp.asarray(content)
    assert changed(tree, saved) == ["params.large"]


def test_what_else_was_saved_does_not_matter():
    tree = tree_of(1)
    assert changed(tree, {**checksums.checksums(tree), "optimizer.step": 5}) == []
