"""The TopK activation against an independent NumPy reference, bit for bit."""

import dataclasses
import functools

from helpers import tries
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import ml_dtypes
import numpy as np
import pytest
from references import active_mask

from topklm.config import ModelConfig
from topklm.errors import UserError
from topklm.model.backends import TOPK
from topklm.model.topk import APPROX_RECALL, model_topk, topk

BACKENDS = ("lax", "threshold")  # on CPUs "auto" is the second: see the test of that
ACTIVATIONS = ("relu", "identity", "abs")
DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
# Few shapes, so that few programs are compiled; one has more rows than a block, and rows left over.
SHAPES = {np.float32: ((3, 8), (130, 12)), ml_dtypes.bfloat16: ((2, 3, 5),), np.float16: ((4, 6),)}

compiled = jax.jit(topk, static_argnums=(1, 2, 3))


def unsigned(dtype):
    return np.uint32 if np.dtype(dtype).itemsize == 4 else np.uint16


def total_order(value):
    """An integer that sorts as IEEE total order, from the bits, one value at a time."""
    bits = int(value.view(unsigned(value.dtype)))
    sign = 1 << (8 * value.dtype.itemsize - 1)
    return -(bits ^ sign) - 1 if bits & sign else bits


def reference_row(row, k, activation):
    """Which entries of a row are active, and the row that comes out: a loop over sorted Python tuples."""
    magnitude = ~np.array(0, unsigned(row.dtype)) >> 1
    judged = (row.view(unsigned(row.dtype)) & magnitude).view(row.dtype) if activation == "abs" else row
    ranked = sorted(range(row.size), key=lambda j: (-total_order(judged[j]), j))
    active = np.zeros(row.size, bool)
    for j in ranked[:k]:
        active[j] = activation != "relu" or total_order(row[j]) > 0
    out = np.zeros_like(row)
    out[active] = row[active]
    if any(value != value for value in row):
        out[:] = np.nan
    return active, out


def reference(x, k, activation):
    rows = [reference_row(row, k, activation) for row in x.reshape(-1, x.shape[-1])]
    return tuple(np.stack(part).reshape(x.shape) for part in zip(*rows, strict=True))


def assert_same_bits(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype and got.shape == want.shape
    is_nan = want != want
    np.testing.assert_array_equal(got != got, is_nan)  # any NaN will do
    unsigned_type = unsigned(want.dtype)
    np.testing.assert_array_equal(got.view(unsigned_type)[~is_nan], want.view(unsigned_type)[~is_nan])


@st.composite
def arrays(draw):
    """Rows full of ties, signed zeros, infinities, denormals; sometimes NaN, sometimes all equal."""
    scalar_type = draw(st.sampled_from(DTYPES))
    dtype, shape = np.dtype(scalar_type), draw(st.sampled_from(SHAPES[scalar_type]))
    tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    special = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, np.inf, -np.inf, tiny, -tiny]
    kind = draw(st.sampled_from(["ties", "special", "normal", "bits", "equal", "nan"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if kind == "normal":
        return rng.normal(size=shape).astype(dtype)
    if kind == "bits":
        return rng.integers(0, 2 ** (8 * dtype.itemsize), shape).astype(unsigned(dtype)).view(dtype)
    if kind == "equal":
        return np.full(shape, rng.choice(special), dtype)
    x = rng.choice(special[:4] if kind == "ties" else special, size=shape).astype(dtype)
    if kind == "nan":
        x.flat[rng.integers(x.size)] = np.nan
    return x


@given(arrays(), st.sampled_from(ACTIVATIONS), st.sampled_from(["one", "some", "d - 1", "d"]))
@tries(100)
def test_every_backend_gives_the_reference_bit_for_bit(x, activation, how_many):
    d = x.shape[-1]
    k = {"one": 1, "some": max(1, d // 3), "d - 1": max(1, d - 1), "d": d}[how_many]
    _, want = reference(x, k, activation)
    for backend in BACKENDS:
        assert_same_bits(compiled(jnp.asarray(x), k, activation, backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: np.dtype(t).name)
def test_wide_rows_of_real_size_agree_with_the_reference(backend, dtype):
    x = np.random.default_rng(0).normal(size=(300, 256)).astype(dtype)  # bfloat16 has many ties here
    _, want = reference(x, 32, "identity")
    assert_same_bits(compiled(jnp.asarray(x), 32, "identity", backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tie_keeps_the_lowest_index(backend):
    x = jnp.array([[2.0, 1.0, 1.0, 1.0, 3.0]])
    np.testing.assert_array_equal(topk(x, 3, "identity", backend), [[2.0, 1.0, 0.0, 0.0, 3.0]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_positive_zero_ranks_above_negative_zero(backend):
    x = jnp.array([[-0.0, 0.0, -1.0]])
    np.testing.assert_array_equal(active_mask(x, 1, "identity", backend), [[False, True, False]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_makes_its_row_nan_and_no_other(backend, activation):
    x = jnp.ones((3, 6)).at[1, 4].set(jnp.nan)
    y = np.asarray(topk(x, 2, activation, backend))
    assert np.isnan(y[1]).all() and np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_relu_clips_winners_below_zero(backend):
    x = jnp.array([[-3.0, -1.0, -2.0, 5.0]])
    np.testing.assert_array_equal(topk(x, 2, "relu", backend), [[0.0, 0.0, 0.0, 5.0]])
    np.testing.assert_array_equal(topk(x, 2, "identity", backend), [[0.0, -1.0, 0.0, 5.0]])
    np.testing.assert_array_equal(topk(x, 2, "abs", backend), [[-3.0, 0.0, 0.0, 5.0]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_one_entry_keeps_it(backend):
    np.testing.assert_array_equal(topk(jnp.array([[2.0], [-2.0]]), 1, "relu", backend), [[2.0], [0.0]])


def test_k_of_the_whole_row_drops_nothing():
    x = jax.random.normal(jax.random.key(0), (4, 7))
    np.testing.assert_array_equal(topk(x, 7, "identity"), x)
    np.testing.assert_array_equal(topk(x, 99, "relu"), jnp.maximum(x, 0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gradient_passes_through_active_entries_only(backend, activation):
    rng = np.random.default_rng(1)
    x, g = rng.choice([-1.0, 0.0, 0.5, 2.0], (2, 5, 9)).astype(np.float32), rng.normal(size=(2, 5, 9))
    active, _ = reference(x, 4, activation)
    _, pull = jax.vjp(lambda v: topk(v, 4, activation, backend), jnp.asarray(x))
    np.testing.assert_array_equal(pull(jnp.float32(g))[0], np.where(active, np.float32(g), 0))
    _, tangent = jax.jvp(lambda v: topk(v, 4, activation, backend), (jnp.asarray(x),), (jnp.float32(g),))
    np.testing.assert_array_equal(tangent, np.where(active, np.float32(g), 0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("activation", "bits", "want"),
    [
        # The row is NaN, 1, 3, 2, -5, and k is 2; without its sign bit a NaN ranks above infinity,
        ("relu", 0x7FC00000, [1, 0, 1, 0, 0]),
        ("identity", 0x7FC00000, [1, 0, 1, 0, 0]),
        ("abs", 0x7FC00000, [1, 0, 0, 0, 1]),
        # with it below minus infinity, unless magnitudes compete.
        ("relu", 0xFFC00000, [0, 0, 1, 1, 0]),
        ("identity", 0xFFC00000, [0, 0, 1, 1, 0]),
        ("abs", 0xFFC00000, [1, 0, 0, 0, 1]),
    ],
)
def test_a_nan_competes_by_its_bits_and_the_gradient_passes_through_what_wins(
    backend, activation, bits, want
):
    row = np.array([0, 1, 3, 2, -5], np.float32)
    row.view(np.uint32)[0] = bits
    x = jnp.asarray(row)[None]
    y, pull = jax.vjp(lambda v: topk(v, 2, activation, backend), x)
    assert np.isnan(y).all()
    np.testing.assert_array_equal(active_mask(x, 2, activation, backend)[0], np.array(want, bool))
    np.testing.assert_array_equal(reference_row(row, 2, activation)[0], np.array(want, bool))
    cotangent = np.float32([[2, 3, 5, 7, 11]])
    np.testing.assert_array_equal(pull(jnp.asarray(cotangent))[0], cotangent * want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gradient_agrees_with_finite_differences(backend, activation):
    x = jnp.asarray(np.random.default_rng(2).permutation(24).reshape(3, 8) - 11.5, jnp.float32)
    check_grads(lambda v: topk(v, 3, activation, backend) ** 2, (x,), 1, ("fwd", "rev"), eps=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_backward_pass_keeps_a_mask_and_no_floats(backend, activation):
    x = jnp.ones((4, 150, 16))
    _, pull = jax.vjp(lambda v: topk(v, 4, activation, backend), x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if hasattr(leaf, "dtype") and leaf.size >= x.size]
    assert [leaf.dtype for leaf in kept] == [bool]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_transformations_change_nothing(backend, activation):
    x = jnp.asarray(np.random.default_rng(3).choice([-1.0, 0.0, 1.0, 2.0], (5, 140, 6)), jnp.float32)
    f = functools.partial(topk, k=2, activation=activation, backend=backend)
    want = f(x)
    assert_same_bits(jax.jit(f)(x), want)
    assert_same_bits(jax.vmap(f)(x), want)
    assert_same_bits(jax.vmap(jax.vmap(f))(x), want)
    assert_same_bits(jax.vmap(f, in_axes=1, out_axes=1)(x), want)
    assert_same_bits(jax.lax.scan(lambda c, row: (c, f(row)), 0, x)[1], want)
    assert_same_bits(jax.checkpoint(f)(x), want)

    def loss(v, through):
        return jnp.sum(jnp.sin(through(v)) * jnp.arange(v.size).reshape(v.shape))

    gradient = jax.grad(loss)(x, f)
    scanned = jax.grad(loss)(x, lambda v: jax.lax.scan(lambda c, row: (c, f(row)), 0, v)[1])
    for other in (jax.checkpoint(f), jax.jit(f), jax.vmap(f)):
        np.testing.assert_array_equal(jax.grad(loss)(x, other), gradient)
    np.testing.assert_array_equal(scanned, gradient)


def test_it_agrees_with_torch_where_there_are_no_ties():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(4).normal(size=(20, 64)).astype(np.float32)
    values, index = torch.topk(torch.tensor(x), 16, dim=-1)
    want = torch.zeros(x.shape).scatter(-1, index, values).numpy()
    for backend in BACKENDS:
        assert_same_bits(compiled(jnp.asarray(x), 16, "identity", backend), want)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, "k = 0"),
        ({"k": -1}, ValueError, "k = -1"),
        ({"k": 1, "activation": "gelu"}, ValueError, "relu, identity, abs"),
        ({"k": 1, "backend": "magic"}, ValueError, "lax, threshold"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        topk(jnp.ones((2, 4)), **arguments)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="int32"):
        topk(jnp.ones((2, 4), jnp.int32), 1)


def test_a_residual_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="residual is bfloat16"):
        topk(jnp.ones((2, 4)), 1, residual=jnp.ones((2, 4), jnp.bfloat16))
    with pytest.raises(ValueError, match="residual is of shape"):
        topk(jnp.ones((2, 4)), 1, residual=jnp.ones(4))


@pytest.mark.parametrize("backend", [*BACKENDS, "approx"])
def test_a_residual_is_added_first_and_shares_the_gradient(backend):
    x, residual, g = jax.random.normal(jax.random.key(5), (3, 6, 20), jnp.bfloat16)
    want, pull = jax.vjp(lambda v: topk(v, 5, backend=backend), x + residual)
    got, pull_both = jax.vjp(lambda v, w: topk(v, 5, backend=backend, residual=w), x, residual)
    assert_same_bits(got, want)
    for gradient in pull_both(g):
        assert_same_bits(gradient, pull(g)[0])
    assert_same_bits(topk(x, 5, backend=backend, residual=residual), want)
    _, tangent = jax.jvp(lambda v, w: topk(v, 5, backend=backend, residual=w), (x, residual), (g, g))
    assert_same_bits(tangent, jnp.where(want != 0, g + g, 0))


@pytest.mark.parametrize("backend", [*BACKENDS, "approx"])
@pytest.mark.parametrize("k", [3, 20])
def test_where_it_does_not_apply_all_passes_and_so_does_the_gradient(backend, k):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 20)), jnp.float32)

    def function(x, residual, **applies):
        return jnp.sin(topk(x, k, "relu", backend, residual=residual, **applies)).sum()

    def plain(x, residual):
        return jnp.sin(x + residual).sum()

    flagged = jax.jit(jax.value_and_grad(lambda x, r, flag: function(x, r, applies=flag), (0, 1)))
    for applies, same in ((False, plain), (True, function)):
        want = jax.value_and_grad(same, (0, 1))(x, x[::-1])
        for a, b in zip(*map(jax.tree.leaves, (flagged(x, x[::-1], applies), want)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
    tangent = jax.jvp(lambda x: topk(x, k, backend=backend, applies=jnp.array(False)), (x,), (x,))[1]
    np.testing.assert_array_equal(tangent, x)


@pytest.mark.parametrize("backend", [*BACKENDS, "approx"])
@pytest.mark.slow
def test_the_second_derivative_sees_the_active_entries(backend):
    x = jnp.asarray([0.5, -1.0, 2.0, 1.5, 0.25])

    def cubes(v):
        return jnp.sum(topk(v, 3, backend=backend) ** 3)

    want = np.diag([6 * 0.5, 0, 6 * 2.0, 6 * 1.5, 0])
    np.testing.assert_array_equal(jax.hessian(cubes)(x), want)
    np.testing.assert_array_equal(jax.jacrev(jax.jacrev(cubes))(x), want)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_approx_keeps_k_entries_and_finds_the_promised_share(activation):
    x = np.random.default_rng(6).normal(size=(400, 512)).astype(np.float32)
    kept = np.asarray(compiled(jnp.asarray(x), 64, activation, "approx"))
    mask = np.asarray(active_mask(jnp.asarray(x), 64, activation, "approx"))
    np.testing.assert_array_equal(kept, np.where(mask, x, 0))
    assert (mask.sum(axis=-1) == 64).all()
    exact = np.asarray(active_mask(jnp.asarray(x), 64, activation, "lax"))
    assert (mask & exact).sum() >= APPROX_RECALL * exact.sum()
    gradient = jax.grad(lambda v: topk(v, 64, activation, "approx").sum())(jnp.asarray(x))
    np.testing.assert_array_equal(gradient, mask)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_on_a_cpu_auto_is_the_very_program_of_threshold(with_gradient):
    def program(backend):
        def layer(x):
            return topk(x, 4, "relu", backend)

        def both(x):
            y, pull = jax.vjp(layer, x)
            return pull(y)

        compiled = jax.jit(both if with_gradient else layer).lower(jnp.ones((6, 40))).compile()
        cost = compiled.cost_analysis()
        return cost["flops"], cost["bytes accessed"], compiled.memory_analysis().temp_size_in_bytes

    assert program("auto") == program("threshold")


@pytest.mark.parametrize(("platform", "call"), [("cuda", "triton"), ("tpu", "tpu_custom_call")])
def test_auto_is_the_kernel_where_the_program_is_lowered_for_it(platform, call):
    traced = jax.jit(topk, static_argnums=1).trace(jnp.ones((256, 256), jnp.bfloat16), 32)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert call in text
    assert call not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_a_kernel_for_other_devices_is_refused():
    for backend, platform in [("pallas_tpu", "tpu"), ("pallas_gpu", "gpu"), ("auto", "cpu"), ("lax", "gpu")]:
        TOPK.check_platform(backend, platform)
    with pytest.raises(UserError, match=r"model.topk_backend = 'pallas_tpu': .* TPUs only, .* CPUs"):
        TOPK.check_platform("pallas_tpu", "cpu")
    with pytest.raises(NotImplementedError, match="cpu"):
        jax.jit(topk, static_argnums=(1, 2, 3)).lower(jnp.ones((2, 4)), 1, "relu", "pallas_tpu")


@pytest.mark.parametrize(
    "activation", [ACTIVATIONS[0], *(pytest.param(a, marks=pytest.mark.slow) for a in ACTIVATIONS[1:])]
)
def test_the_neurons_of_each_group_compete_among_themselves(activation):
    config = ModelConfig(d_model=20, topk_k=7, topk_groups="3:1,12:2,5:4", topk_activation=activation)
    x = np.random.default_rng(0).standard_normal((6, 20)).astype(np.float32)
    expected = [reference(x[:, a:b], k, activation)[1] for a, b, k in [(0, 3, 1), (3, 15, 2), (15, 20, 4)]]
    assert_same_bits(model_topk(config, x), np.concatenate(expected, axis=-1))
    half, other = x / 4, x - x / 4
    assert_same_bits(model_topk(config, half, residual=other), model_topk(config, half + other))
    together = dataclasses.replace(config, topk_groups="")
    assert_same_bits(model_topk(together, x), reference(x, 7, activation)[1])
