import math

from helpers import devices
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from topklm.checkpoint.checksums import changed, checksums, fetch, start

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16, np.int32, np.uint8, np.bool_)
SHAPES = ((), (1,), (5,), (16,), (3, 7), (40, 9), (2, 33, 5), (0, 4))

# Prints the checksums of one tree laid out over meshes of 8 devices: `SCRIPT`.
ON_EIGHT_DEVICES = """
import json
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from topklm.checkpoint.checksums import checksums

tree = {
    "a": np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32),
    "b": np.arange(48, dtype=np.int32).reshape(2, 8, 3),
    "c": np.float32(3.5),
}
layouts = [
    ((8, 1), {"a": P("x", "y"), "b": P(), "c": P()}),
    ((2, 4), {"a": P("x", "y"), "b": P(None, "y"), "c": P()}),
    ((4, 2), {"a": P(("x", "y")), "b": P("y", "x"), "c": P()}),
    ((2, 4), {"a": P(("y", "x")), "b": P(None, ("x", "y")), "c": P()}),
    ((2, 4), {"a": P(None, "x"), "b": P("x"), "c": P()}),
]
for shape, specs in layouts:
    mesh = jax.make_mesh(shape, ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    placed = {name: jax.device_put(tree[name], NamedSharding(mesh, specs[name])) for name in tree}
    print(json.dumps(checksums(placed)))
print(json.dumps(checksums(tree)))
"""


def reference(array):
    """Follows the definition, element by element in Python's integers."""
    array = np.asarray(array)
    words = array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.itemsize])
    total = 0
    for i, word in enumerate(words.ravel().tolist()):
        x = word ^ (i * 0x9E3779B1 & 0xFFFFFFFF)
        x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
        x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
        total += x ^ (x >> 16)
    return total % 2**32


def some(shape, dtype, seed=0):
    bits = np.random.default_rng(seed).integers(0, 2, (math.prod(shape), 8 * np.dtype(dtype).itemsize))
    if dtype == np.bool_:
        return bits[:, 0].astype(bool).reshape(shape)
    return np.packbits(bits.astype(np.uint8)).view(dtype).reshape(shape)


def by_a_program(tree):
    return fetch(start(tree))


def checksum(array):
    return by_a_program({"x": jnp.asarray(array)})["x"]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_checksums_are_those_of_the_definition(dtype):
    tree = {"shapes": {str(i): some(shape, dtype, i) for i, shape in enumerate(SHAPES)}}
    expected = {f"shapes.{i}": reference(array) for i, array in tree["shapes"].items()}
    assert by_a_program(jax.tree.map(jnp.asarray, tree)) == expected
    assert by_a_program(tree) == expected
    assert checksums(jax.tree.map(jnp.asarray, tree)) == expected  # by NumPy, for they are few


@given(st.data())
def test_any_flipped_bit_changes_the_checksum(data):
    dtype = data.draw(st.sampled_from([np.float32, ml_dtypes.bfloat16, np.int32]))
    array = some((6, 11), dtype, data.draw(st.integers(0, 99)))
    flipped = array.copy()
    flipped.view(np.uint8).reshape(-1)[data.draw(st.integers(0, array.nbytes - 1))] ^= 1 << data.draw(
        st.integers(0, 7)
    )
    assert checksum(flipped) != checksum(array)


@given(st.permutations(range(66)))
def test_elements_in_another_order_change_the_checksum(order):
    array = some((6, 11), np.float32)
    moved = array.reshape(-1)[order].reshape(array.shape)
    assert (checksum(moved) == checksum(array)) == (moved.tobytes() == array.tobytes())


def test_zeros_and_nans_count_by_their_bits():
    assert checksum(np.zeros(4, np.float32)) != checksum(np.array([0, 0, -0.0, 0], np.float32))
    quiet, other = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)[:, None]
    assert checksum(quiet) != checksum(other)


def test_the_layout_over_devices_does_not_matter(trainer):
    process = trainer.start_python("-c", ON_EIGHT_DEVICES, environment=devices(8))
    assert process.finish() == 0, process.errors
    *laid_out, whole = process.output.splitlines()
    assert laid_out == [whole] * 5


def test_elements_of_eight_bytes_are_refused():
    with jax.enable_x64(True), pytest.raises(KeyError):
        checksum(np.zeros(3, np.float64))


# Arrays that were read, against checksums that were saved.


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


def test_numpy_computes_the_same_checksums_as_the_program():
    tree = tree_of(1)
    assert changed(tree, by_a_program(tree)) == []
    assert changed(tree, {}) == ["params.bytes", "params.count", "params.half", "params.large"]


@pytest.mark.parametrize("place", [(0, 0, 0), (1, 2, 3), (2, 69, 330)])
def test_one_changed_bit_names_the_array(place):
    tree = tree_of(1)
    saved = by_a_program(tree)
    content = np.array(tree["params"]["large"])
    content.view(np.uint32)[place] ^= 1
    tree["params"]["large"] = jnp.asarray(content)
    assert changed(tree, saved) == ["params.large"]


def test_what_else_was_saved_does_not_matter():
    tree = tree_of(1)
    assert changed(tree, {**by_a_program(tree), "optimizer.step": 5}) == []
