"""The Pallas TopK kernel: interpreted against NumPy and the lax backend, compiled for machines not here."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
import ml_dtypes
import numpy as np
import pytest
from references import active_mask

from benchmarks.topk_and_norm import select_and_norm
from topklm.compile_check import check, cost
from topklm.model import topk_pallas
from topklm.model.topk import topk

F32, BF16, F16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
# Together every platform, dtype, activation and kind of D and k: each of them is a compilation.
CASES = [
    ("gpu", BF16, 130, 16, "relu"),
    ("gpu", F16, 1, 1, "identity"),
    ("tpu", F32, 128, 1, "relu"),
]
MORE_CASES = [
    ("gpu", F32, 5, 2, "abs"),
    ("tpu", BF16, 1000, 77, "abs"),
    ("gpu", BF16, 2048, 128, "relu"),
    ("gpu", BF16, 5, 2, "identity"),
    ("gpu", F32, 1000, 77, "identity"),
    ("gpu", F32, 128, 1, "relu"),
    ("gpu", F16, 256, 32, "abs"),
    ("gpu", F32, 5, 9, "abs"),
    ("gpu", BF16, 4100, 64, "abs"),
    ("tpu", BF16, 2048, 128, "relu"),
    ("tpu", F32, 130, 129, "identity"),
    ("tpu", F32, 5, 1, "relu"),
    ("tpu", BF16, 1, 1, "abs"),
    ("tpu", F32, 5000, 300, "identity"),
]
# The transpose is a network of operations that are used twice each: where XLA fuses them, it computes them
# again at every use, and compiles for minutes.
interpreted = functools.partial(
    jax.jit, compiler_options={"xla_disable_hlo_passes": "fusion", "xla_backend_optimization_level": 0}
)


def named(cases, *, slow=False):
    marks = [pytest.mark.slow] if slow else []
    return [
        pytest.param(*case, marks=marks, id="-".join(str(part) for part in case if part is not None))
        for case in cases
    ]


def unsigned(dtype):
    return {2: np.uint16, 4: np.uint32}[dtype.itemsize]


def total_order(x):
    """int64 that sorts as the IEEE total order of x."""
    values = x.view(unsigned(x.dtype)).astype(np.int64)
    sign = np.int64(1) << (8 * x.dtype.itemsize - 1)
    return np.where(values & sign, -(values ^ sign) - 1, values)


def reference(x, k, activation):
    """What comes out, and which entries are active: a stable sort of every row."""
    key, judged = total_order(x), total_order(np.abs(x) if activation == "abs" else x)
    ranked = np.argsort(-judged, axis=-1, kind="stable")[:, :k]
    active = np.zeros(x.shape, bool)
    np.put_along_axis(active, ranked, True, axis=-1)
    if activation == "relu":
        active &= key > 0
    y = np.where(active, x, np.zeros_like(x))
    return np.where(np.isnan(x).any(axis=-1, keepdims=True), np.full_like(x, np.nan), y), active


def rows_of_all_kinds(dtype, d, seed=0):
    """19 rows: random bits, normal, full of ties, special values, all equal; some with NaNs of both signs."""
    rng = np.random.default_rng(seed)
    tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    special = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, tiny, -tiny]
    finite = rng.integers(0, int(unsigned(dtype)(np.array(np.inf, dtype).view(unsigned(dtype)))), (4, d))
    random_bits = finite.astype(unsigned(dtype)).view(dtype) * rng.choice([-1, 1], (4, d)).astype(dtype)
    normal = rng.normal(size=(4, d)).astype(dtype)
    ties = rng.choice([0.0, -0.0, 0.5, 1.0, -1.0], (4, d)).astype(dtype)
    extremes = rng.choice(special, (4, d)).astype(dtype)
    equal = np.repeat(np.array([[1.0], [-2.0], [-0.0]], dtype), d, axis=1)
    x = np.concatenate([random_bits, normal, ties, extremes, equal])
    for row, sign in ((3, 1), (7, -1), (11, 1), (15, -1)):
        x[row, rng.integers(d, size=2)] = np.copysign(np.array(np.nan, dtype), np.array(sign, dtype))
    return x


def assert_same_bits(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype and got.shape == want.shape
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))  # any NaN will do
    there = ~np.isnan(want)
    np.testing.assert_array_equal(*(a.view(unsigned(want.dtype))[there] for a in (got, want)))


@pytest.mark.parametrize(
    ("platform", "dtype", "d", "k", "activation"),
    named(CASES) + named(MORE_CASES, slow=True),
)
def test_the_kernel_gives_the_bits_of_a_stable_sort_and_of_the_lax_backend(platform, dtype, d, k, activation):
    x = rows_of_all_kinds(dtype, d)
    run = interpreted(
        lambda x: topk_pallas.select(x, k, activation, platform, with_mask=True, interpret=True)
    )
    y, mask = run(x)
    want_y, want_mask = reference(x, k, activation)
    assert_same_bits(y, want_y)
    np.testing.assert_array_equal(mask, want_mask)
    assert_same_bits(y, topk(jnp.asarray(x), k, activation, "lax"))
    np.testing.assert_array_equal(mask, active_mask(jnp.asarray(x), k, activation, "lax"))


@pytest.mark.parametrize(
    ("platform", "dtype"), named([("gpu", F32)]) + named([("gpu", BF16), ("tpu", F32)], slow=True)
)
@pytest.mark.slow
def test_residual_topk_and_norm_in_one_are_the_three_one_after_the_other(platform, dtype):
    rng = np.random.default_rng(2)
    x, residual = (rng.normal(size=(5, 200)).astype(dtype) for _ in range(2))
    scale = rng.normal(size=200).astype(np.float32)
    x[1], residual[1], x[3, 17] = 0.0, 0.0, np.nan
    fused = functools.partial(select_and_norm, k=20, activation="relu", platform=platform, epsilon=1e-5)
    run = interpreted(
        lambda x, residual, scale: fused(x, scale_D=scale, residual=residual, with_mask=True, interpret=True)
    )
    y, normed, inverse_rms, mask = map(np.asarray, run(x, residual, scale))
    want_y, want_mask = reference(np.asarray(jnp.asarray(x) + jnp.asarray(residual)), 20, "relu")
    assert_same_bits(y, want_y)
    np.testing.assert_array_equal(mask, want_mask)
    wide = want_y.astype(np.float64)
    want_inverse = 1 / np.sqrt((wide * wide).mean(axis=-1, keepdims=True) + 1e-5)
    precision = float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(inverse_rms, want_inverse, rtol=1e-6)
    np.testing.assert_allclose(normed.astype(np.float64), wide * want_inverse * scale, rtol=2 * precision)
    assert np.isnan(normed[3].astype(np.float32)).all() and not normed[1].any()


@pytest.mark.parametrize(
    ("platform", "dtype", "d", "k", "activation"),
    named([("gpu", BF16, 130, 16, "relu")])
    + named([("tpu", BF16, 1000, 77, "abs"), ("tpu", F32, 5, 9, "identity")], slow=True),
)
def test_a_kernel_that_is_told_not_to_apply_passes_the_sum_on(platform, dtype, d, k, activation):
    x, residual = (jnp.asarray(rows_of_all_kinds(dtype, d, seed)) for seed in (0, 1))
    select = functools.partial(topk_pallas.select, platform=platform, with_mask=True, interpret=True)
    run = interpreted(lambda x, r, applies: select(x, k, activation, residual=r, applies=applies))
    y, mask = run(x, residual, False)
    assert_same_bits(y, x + residual)
    assert mask.all()
    want_y, want_mask = reference(np.asarray(x + residual), k, activation)
    y, mask = run(x, residual, True)
    assert_same_bits(y, want_y)
    np.testing.assert_array_equal(mask, want_mask)


def test_for_cuda_a_flag_does_not_split_the_kernel():
    x, flag = jax.ShapeDtypeStruct((13, 2048), BF16), jax.ShapeDtypeStruct((), bool)
    text = lowered_for_cuda(lambda x, flag: topk_pallas.select(x, 3, "relu", "gpu", applies=flag)[0], x, flag)
    assert text.count("stablehlo.custom_call") == 1
    assert "stablehlo.case" not in text and "stablehlo.if" not in text


def test_it_runs_inside_shard_map_scan_checkpoint_and_vmap():
    x = rows_of_all_kinds(BF16, 40)[:18].reshape(3, 2, 3, 40)
    want, _ = reference(x.reshape(18, 40), 5, "relu")

    def kernel(rows):
        return topk_pallas.select(rows, 5, "relu", "gpu", interpret=True)[0]

    def scanned(x):
        return jax.lax.scan(lambda none, part: (none, jax.checkpoint(jax.vmap(kernel))(part)), None, x)[1]

    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec(None, "data")
    run = interpreted(jax.shard_map(scanned, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False))
    assert_same_bits(run(x), want.reshape(x.shape))


def words_of(bit_RD, width):
    """int32[R, width]: entry c * width + j of a row is bit c of its word j."""
    bits_R32W = np.pad(bit_RD, ((0, 0), (0, 32 * width - bit_RD.shape[1]))).reshape(-1, 32, width)
    return (bits_R32W.astype(np.uint32) << np.arange(32, dtype=np.uint32)[:, None]).sum(1).astype(np.uint32)


def test_the_search_on_planes_finds_the_k_largest_for_every_d_and_k():
    width = 4

    @interpreted
    def search(planes, k, among):
        return topk_pallas.largest(list(planes.view(jnp.int32)), k, among.view(jnp.int32))

    rng = np.random.default_rng(4)
    for d in (2, 5, 31, 32, 33, 100, 128):
        key = rng.integers(0, 2**16, (19, d)) >> rng.integers(0, 16, (19, 1))  # from no ties to all the same
        planes = np.stack([words_of(key >> b & 1, width) for b in reversed(range(16))])
        valid = topk_pallas.valid(d, (19, width))
        np.testing.assert_array_equal(np.asarray(valid).view(np.uint32), words_of(np.ones((19, d)), width))
        for k in {1, 2, d // 2, d - 1, d}:
            want = np.zeros(key.shape, bool)
            np.put_along_axis(want, np.argsort(-key, axis=-1, kind="stable")[:, :k], True, axis=-1)
            got = search(jnp.asarray(planes), k, valid)
            np.testing.assert_array_equal(np.asarray(got).view(np.uint32), words_of(want, width))


@pytest.mark.parametrize("n_bits", [16, 32])
def test_plane_b_holds_bit_b_of_every_number(n_bits):
    rng = np.random.default_rng(3)
    numbers = rng.integers(0, 2**n_bits, (32, 2, 3), dtype=np.uint64)
    planes = topk_pallas.bit_planes(list(jnp.asarray(numbers.astype(np.uint32)).view(jnp.int32)), n_bits)
    got = np.stack(planes).view(np.uint32)
    for b in range(n_bits):
        want = sum(((numbers[c] >> np.uint64(b)) & np.uint64(1)) << np.uint64(c) for c in range(32))
        np.testing.assert_array_equal(got[b], want)


@pytest.mark.parametrize(
    ("shape", "dtype", "platform", "can"),
    [
        ((8, 16_384), BF16, "gpu", True),
        ((8, 16_385), BF16, "gpu", False),
        ((1,), F16, "gpu", True),
        ((8, 64), F16, "tpu", False),
        ((8, 64), F32, "tpu", True),
        ((0, 64), F32, "tpu", False),
        ((8, 64), F32, "cpu", False),
        ((8, 64), np.dtype(np.float64), "gpu", False),
    ],
)
def test_what_the_kernel_can_do_is_known_beforehand(shape, dtype, platform, can):
    assert (topk_pallas.limits(shape, dtype, platform) == "") is can


def lowered_for_cuda(function, *arguments):
    """The program's text; traced as if on an H200, since newer versions of JAX look the chip up."""
    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=h200)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("dtype", "d"), named([(BF16, 2048), (BF16, 1000), (F32, 5), (F32, 16_384), (F16, 128)])
)
def test_for_cuda_it_is_one_triton_kernel_that_touches_nothing_but_its_arrays(dtype, d):
    x = jax.ShapeDtypeStruct((13, 7, d), dtype)
    text = lowered_for_cuda(lambda x, r: topk_pallas.select(x, 3, "relu", "gpu", residual=r)[0], x, x)
    assert text.count("stablehlo.custom_call") == 1
    assert "__gpu$xla.gpu.triton" in text
    operations = set(re.findall(r"stablehlo\.(\w+)", text))
    assert operations == {"custom_call", "reshape"}


def test_for_cuda_a_row_of_2048_belongs_to_one_warp():
    x = jax.ShapeDtypeStruct((65_536, 2048), BF16)
    text = lowered_for_cuda(lambda x: topk_pallas.select(x, 128, "relu", "gpu")[0], x)
    assert re.search(r"num_warps = 1\b", text) and re.search(r"grid_x = 65536\b", text)


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, which compiles for TPUs, is not installed"
)


def compiled_for_v5e(function, *arguments):
    device = check.find("v5e:1x1").devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for a in arguments]
    return jax.jit(function).lower(*placed).compile()


@needs_libtpu
@pytest.mark.parametrize(
    ("dtype", "d"), named([(BF16, 2048)]) + named([(F32, 1000), (BF16, 16_384)], slow=True)
)
def test_on_a_v5e_it_reads_once_and_writes_once_and_needs_no_more_memory(dtype, d):
    x = jax.ShapeDtypeStruct((4100, d), dtype)
    done = compiled_for_v5e(lambda x: topk_pallas.select(x, d // 16, "relu", "tpu")[0], x)
    n_bytes = x.size * dtype.itemsize
    assert cost.main_memory_bytes(cost.parse(done.as_text())) == pytest.approx(2 * n_bytes, rel=0.001)
    assert done.memory_analysis().temp_size_in_bytes < 0.001 * n_bytes


@needs_libtpu
def test_on_a_v5e_residual_topk_and_norm_are_one_kernel():
    x, scale = jax.ShapeDtypeStruct((512, 4096), BF16), jax.ShapeDtypeStruct((4096,), F32)

    def fused(x, residual, scale):
        return select_and_norm(x, 256, "identity", "tpu", scale, 1e-5, residual=residual)[:2]

    done = compiled_for_v5e(fused, x, x, scale)
    assert done.as_text().count('custom_call_target="tpu_custom_call"') == 1
    moved = cost.main_memory_bytes(cost.parse(done.as_text()))
    assert moved == pytest.approx(4 * x.size * BF16.itemsize, rel=0.07)  # the inverse RMS fills 128 lanes


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "d"), [(BF16, 768), (F32, 1000), (BF16, 16_384)])
def test_on_a_v5e_a_flag_and_a_residual_add_one_read_and_no_memory(dtype, d):
    x, flag = jax.ShapeDtypeStruct((4100, d), dtype), jax.ShapeDtypeStruct((), bool)

    def flagged(x, residual, flag):
        return topk_pallas.select(x, d // 16, "relu", "tpu", residual=residual, applies=flag)[0]

    compiled = compiled_for_v5e(flagged, x, x, flag)
    n_bytes = x.size * dtype.itemsize
    touched = cost.main_memory_bytes(cost.parse(compiled.as_text()))
    assert touched == pytest.approx(3 * n_bytes, rel=0.001)
    assert compiled.memory_analysis().temp_size_in_bytes < 0.001 * n_bytes
