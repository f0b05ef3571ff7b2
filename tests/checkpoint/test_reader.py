"""Reading arrays chunk by chunk: the same bits whatever the chunks and the layouts, and little memory."""

import itertools

from etils import epath
import helpers
from helpers import assert_same_bits, devices
import jax
from jax.sharding import SingleDeviceSharding
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from topklm.checkpoint import step_folder
from topklm.checkpoint.step_folder import open_arrays

ON_ONE_DEVICE = SingleDeviceSharding(jax.local_devices()[0])


def arrays_of(seed):
    draw = np.random.default_rng(seed).standard_normal
    return {
        "matrix": draw((37, 20), dtype=np.float32),
        "stack": {"kernel": draw((3, 17, 11), dtype=np.float32)},
        "scalar": np.float32(seed),
        "half": draw(300).astype(ml_dtypes.bfloat16),
        "count": np.arange(7, dtype=np.int32),
    }


def save(folder, tree, chunk_byte_size=None):
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk_byte_size), tree)
    ocp.PyTreeCheckpointer().save(folder, jax.tree.map(jax.numpy.asarray, tree), save_args=save_args)
    return epath.Path(folder)


def read_arrays(folder, target):
    return step_folder.read_arrays(open_arrays(folder), target)


def target_of(tree, sharding=ON_ONE_DEVICE):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


@pytest.mark.parametrize("chunk_byte_size", [None, 64, 1000])
@pytest.mark.parametrize("in_flight", [1, 500, 2**20])
def test_what_was_saved_is_read_whatever_the_chunks(tmp_path, monkeypatch, chunk_byte_size, in_flight):
    monkeypatch.setattr(step_folder, "_BYTES_IN_FLIGHT", in_flight)
    tree = arrays_of(1)
    folder = save(tmp_path / "params", tree, chunk_byte_size)
    assert_same_bits(read_arrays(folder, target_of(tree)), tree)


def test_the_chunks_of_a_box_cover_it_once():
    box, chunk = ((2, 9), (0, 5)), (4, 3)
    counted = np.zeros((10, 6), int)
    for part in step_folder._chunks(box, chunk):
        rows, columns = (slice(a, b) for a, b in zip(part.inclusive_min, part.exclusive_max, strict=True))
        counted[rows, columns] += 1
        assert {(r // 4, c // 3) for r, c in itertools.product(range(10)[rows], range(6)[columns])} == {
            (part.inclusive_min[0] // 4, part.inclusive_min[1] // 3)
        }
    assert (counted[2:9, 0:5] == 1).all()
    assert counted.sum() == 7 * 5


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (jax.ShapeDtypeStruct((20, 37), np.float32), r"matrix is float32\[37, 20\], not float32\[20, 37\]"),
        (jax.ShapeDtypeStruct((37, 20), np.int32), r"matrix is float32\[37, 20\], not int32\[37, 20\]"),
    ],
)
def test_another_shape_or_dtype_is_refused(tmp_path, wanted, message):
    folder = save(tmp_path / "params", arrays_of(1))
    with pytest.raises(ValueError, match=message):
        read_arrays(folder, {"matrix": wanted.update(sharding=ON_ONE_DEVICE)})


def test_all_arrays_are_found_with_their_shapes(tmp_path):
    folder = save(tmp_path / "params", arrays_of(1), chunk_byte_size=64)
    shapes = {name: store.shape for name, store in open_arrays(folder).items()}
    assert shapes == {
        "matrix": (37, 20),
        "stack.kernel": (3, 17, 11),
        "scalar": (),
        "half": (300,),
        "count": (7,),
    }


def test_a_folder_without_arrays_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no arrays in"):
        open_arrays(epath.Path(tmp_path))


def test_on_the_cpu_the_array_is_the_memory_that_was_read_into(tmp_path):
    tree = {"matrix": np.ones((1000, 10), np.float32)}
    read = read_arrays(save(tmp_path / "params", tree), target_of(tree))
    # A copy would lie where the C library put it: beside its own 16 bytes, or on JAX's 64.
    assert read["matrix"].unsafe_buffer_pointer() % 4096 == 0


ON_EIGHT_DEVICES = """
import pathlib, sys
import jax
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np

sys.path[:0] = sys.argv[2:]
from test_reader import arrays_of, read_arrays, save, target_of

here = pathlib.Path(sys.argv[1])
mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
tree = {"matrix": np.random.default_rng(0).standard_normal((16, 24), dtype=np.float32)}
for number, saved in enumerate([P("a", "b"), P(("a", "b")), P(None, "a"), P()]):
    on_mesh = {"matrix": jax.device_put(tree["matrix"], NamedSharding(mesh, saved))}
    folder = save(here / str(number), on_mesh, chunk_byte_size=200)
    for wanted in [P("a", "b"), P("b", "a"), P(None, ("a", "b")), P("b"), P()]:
        read = read_arrays(folder, target_of(tree, NamedSharding(mesh, wanted)))["matrix"]
        assert read.sharding.spec == wanted
        for shard in read.addressable_shards:
            np.testing.assert_array_equal(shard.data, tree["matrix"][shard.index])
"""


def test_any_layout_is_read_from_any_other(tmp_path, trainer):
    folders = [str(helpers.ROOT / "tests"), str(helpers.ROOT / "tests" / "checkpoint")]
    run = trainer.start_python("-c", ON_EIGHT_DEVICES, str(tmp_path), *folders, environment=devices(8))
    assert run.finish() == 0, run.errors
    tree = {"matrix": np.random.default_rng(0).standard_normal((16, 24), dtype=np.float32)}
    for number in range(4):
        assert_same_bits(read_arrays(epath.Path(tmp_path / str(number)), target_of(tree)), tree)
