"""Losses, gradients and adaptation of each kind of autoencoder, against PyTorch or NumPy in float64."""

import os
import statistics
import sys

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topklm.errors import UserError
from topklm.sae import kinds
from topklm.sae.devices import Devices
from topklm.sae.kinds import SaeConfig

D, M, N, K = 12, 70, 96, 4


def made(kind, n_dead=0, **options):
    """A config, parameters and memory with `n_dead` dead codes, hidden states; all parameters at random."""
    config = SaeConfig(kind, M, K, **options)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(M, D)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    x = rng.normal(size=(N, D)).astype(np.float32)
    params, memory = kinds.begin(config, jnp.asarray(rows), jnp.full(D, 0.1), jnp.asarray(x), 100)
    params = {
        name: array + 0.05 * rng.normal(size=array.shape).astype(np.float32) for name, array in params.items()
    }
    memory["idle"] = memory["idle"].at[rng.permutation(M)[:n_dead]].set(100)
    return config, params, memory, jnp.asarray(x)


def their_loss(torch, config, w, memory, x, coefficient=1.0):
    """The formulas of the papers, with operations of PyTorch."""
    relu = torch.relu
    if config.kind == "gba":
        alone = (x - w["centre"]) @ w["encoder"].T
        codes = torch.where(alone + torch.tensor(np.asarray(memory["bias"])).double() > 0, alone, 0.0)
        back = (codes * w["scale"]) @ w["encoder"] + w["centre"]
        return 0.5 * ((x - back) ** 2).mean()
    pre = (x - w["centre"]) @ w["encoder"].T + w["bias"]
    if config.kind == "topk":
        at = pre.topk(config.k, dim=1).indices
        codes = torch.zeros_like(pre).scatter(1, at, relu(pre.gather(1, at)))
    elif config.kind == "jumprelu":
        return jumprelu_in_torch(torch, config, w, pre, x, coefficient)
    else:
        at = relu(pre).flatten().topk(config.k * len(x)).indices
        codes = torch.zeros(pre.numel()).double().scatter(0, at, relu(pre).flatten()[at]).reshape(pre.shape)
    levels = config.prefixes() if config.kind == "matryoshka" else [(config.width, 1.0)]
    back = [codes[:, :end] @ w["decoder"][:end] + w["centre"] for end, _ in levels]
    loss = sum(weight * ((x - one) ** 2).mean() for (_, weight), one in zip(levels, back, strict=True))
    dead = torch.tensor(np.asarray(memory["idle"] >= memory["dead_after"]))
    n_aux = min(D // 2, int(dead.sum()))
    if n_aux:
        error = (x - back[-1]).detach()
        of_dead = torch.where(dead, pre, -torch.inf)
        at = of_dead.topk(n_aux, dim=1).indices
        aux = torch.zeros_like(pre).scatter(1, at, pre.gather(1, at))
        loss = loss + config.aux_coefficient * ((aux @ w["decoder"] - error) ** 2).mean()
    return loss


def jumprelu_in_torch(torch, config, w, pre, x, coefficient):
    class Jump(torch.autograd.Function):
        @staticmethod
        def forward(ctx, pre, threshold, is_step):
            ctx.save_for_backward(pre, threshold)
            ctx.is_step = is_step
            above = (pre > threshold).double()
            return above if is_step else pre * above

        @staticmethod
        def backward(ctx, gradient):
            pre, threshold = ctx.saved_tensors
            box = ((pre - threshold).abs() < config.bandwidth / 2).double() / config.bandwidth
            of_pre = None if ctx.is_step else gradient * (pre > threshold)
            return of_pre, -(gradient * box * (1 if ctx.is_step else threshold)).sum(0), None

    codes = Jump.apply(pre, w["threshold"], False)
    error = ((codes @ w["decoder"] + w["centre"] - x) ** 2).mean()
    if config.sparsity == "tanh":
        return error + coefficient * torch.tanh(4 * codes).sum(1).mean() / config.k
    l0 = Jump.apply(pre, w["threshold"], True).sum(1)
    return error + coefficient * ((l0 / config.k - 1) ** 2).mean()


CASES = [
    ("topk", 0, {}),
    ("topk", 3, {}),
    ("topk", 30, {}),
    ("batchtopk", 3, {}),
    ("matryoshka", 30, {}),
    ("jumprelu", 0, {}),
    ("jumprelu", 0, {"sparsity": "tanh"}),
    ("gba", 0, {}),
]


@pytest.mark.parametrize(("kind", "n_dead", "options"), CASES, ids=str)
def test_loss_and_gradients_are_those_of_the_papers(kind, n_dead, options):
    torch = pytest.importorskip("torch")
    config, params, memory, x = made(kind, n_dead, **options)
    exact = {name: torch.tensor(np.asarray(a)).double().requires_grad_() for name, a in params.items()}
    wanted = their_loss(torch, config, exact, memory, torch.tensor(np.asarray(x)).double(), 0.7)
    wanted.backward()
    for is_sparse in (False, True) if kind == "topk" else (False,):

        def loss(params, is_sparse=is_sparse):
            on = Devices(is_sparse)
            return kinds.KINDS[kind].loss(config, params, memory, x, jnp.asarray(0.7), on)

        (found, _), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        assert float(found) == pytest.approx(wanted.item(), rel=1e-5)
        assert gradients.keys() == exact.keys()
        for name, gradient in gradients.items():
            theirs = exact[name].grad.numpy()
            scale = np.abs(theirs).max()
            assert scale > 0, name
            np.testing.assert_allclose(gradient, theirs, atol=2e-5 * scale, err_msg=f"{name} {is_sparse}")


ON_FOUR_DEVICES = """
import functools
import jax, jax.numpy as jnp, numpy as np
from topklm.config import MeshConfig
from topklm.layout import make_layout
from topklm.sae.devices import Devices

four, one = Devices(mesh=make_layout(MeshConfig(data=2, fsdp=2)).mesh), Devices()
x = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
weights = np.cos(np.arange(x.size)).reshape(x.shape)

@functools.partial(jax.jit, static_argnums=(0, 1))
def kept(on, k, pre):
    return on.batch_topk(pre, k), on.topk(pre, k, "identity")

@functools.partial(jax.jit, static_argnums=(0, 1))
def gradient(on, k, pre):
    return jax.grad(lambda pre: jnp.sum(weights * (on.batch_topk(pre, k) + 2 * on.topk(pre, k))))(pre)

for k in (3, 24):
    for pre in (x, np.round(x), np.round(x / 2), x - 2.5, -np.abs(x)):  # ties; few above 0; none
        for a, b in zip(kept(four, k, pre), kept(one, k, pre), strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(gradient(four, k, pre), gradient(one, k, pre))
print("the same")
"""


def test_four_devices_keep_the_codes_that_one_keeps():
    environment = {**os.environ, "PYTHONPATH": str(helpers.ROOT), **helpers.devices(4)}
    ended = helpers.Process([sys.executable, "-c", ON_FOUR_DEVICES], env=environment)
    assert ended.finish() == 0, ended.errors
    assert "the same" in ended.output


def test_sparse_products_see_the_same_codes():
    config, params, memory, x = made("topk")
    dense, sparse = (
        kinds.KINDS["topk"].loss(config, params, memory, x, jnp.ones(()), Devices(is_sparse))[1]
        for is_sparse in (False, True)
    )
    for a, b in zip(dense[:4], sparse[:4], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert float(dense.l0) == pytest.approx(K)


@pytest.mark.parametrize(("kind", "name"), [("jumprelu", "threshold"), ("gba", "bias")])
def test_codes_begin_with_their_frequencies(kind, name):
    config = SaeConfig(kind, 40, 4, groups=4)
    rng = np.random.default_rng(5)
    rows, x = rng.normal(size=(40, D)), rng.normal(size=(300, D))
    rows[7], x[:, 0] = -np.eye(D)[0], np.abs(x[:, 0])  # never above 0
    centre = np.zeros(D, np.float32)
    found = kinds.begin(config, *(jnp.asarray(a, jnp.float32) for a in (rows, centre, x)), 100)
    found = {**found[0], **found[1]}[name]
    shares = config.frequencies() if kind == "gba" else np.full(40, 0.1)
    ranked = np.sort(x @ rows.T, axis=0)[::-1]
    wanted = np.maximum([ranked[round(300 * share), m] for m, share in enumerate(shares)], 0)
    np.testing.assert_allclose(found if kind == "jumprelu" else -found, wanted, rtol=1e-4)
    assert wanted[7] == 0 and np.sum(wanted > 0) > 30


def test_a_step_has_no_gradient_for_codes_that_are_far_from_their_threshold():
    gradient = jax.grad(lambda t: kinds.step(jnp.array([[5.0, 1.04]]), t, 0.1).sum())(jnp.ones(2))
    np.testing.assert_allclose(gradient, [0, -10])


@pytest.mark.parametrize("wanted", [0.0, 0.7, 2.0])
def test_the_gradient_of_a_threshold_is_that_of_the_mean_loss_of_normal_codes(wanted):
    """By Leibniz' rule, of density phi: of E[z > t] it is -phi(t), of E[(z - y)^2] phi(t) (2 t y - t^2)."""
    normal = statistics.NormalDist()
    pre = jnp.asarray([normal.inv_cdf((i + 0.5) / 100_000) for i in range(100_000)])[:, None]
    for t in (0.4, 1.3):
        active = jax.grad(lambda t: kinds.step(pre, t, 0.01).mean())(jnp.asarray([t]))
        assert float(active[0]) == pytest.approx(-normal.pdf(t), rel=0.01)
        error = jax.grad(lambda t: jnp.mean((kinds.jump(pre, t, 0.01) - wanted) ** 2))(jnp.asarray([t]))
        assert float(error[0]) == pytest.approx(normal.pdf(t) * (2 * t * wanted - t**2), abs=5e-3)


def test_prefixes_weigh_three_quarters_of_the_next():
    assert SaeConfig("matryoshka", 4096, 8).prefixes() == [
        (16, 0.75**4),
        (64, 0.75**3),
        (256, 0.75**2),
        (1024, 0.75),
        (4096, 1.0),
    ]
    assert SaeConfig("matryoshka", 20, 8).prefixes() == [(20, 1.0)]


def test_target_frequencies_are_geometric_and_sum_to_k():
    found = SaeConfig("gba", 1000, 20).frequencies()
    assert found.sum() == pytest.approx(20)
    of_groups = found.reshape(10, 100)
    assert (of_groups == of_groups[:, :1]).all()
    np.testing.assert_allclose(np.diff(np.log(of_groups[:, 0])), np.log(of_groups[1, 0] / of_groups[0, 0]))
    assert of_groups[-1, 0] == pytest.approx(1e-3)


def test_biases_adapt_as_the_algorithm_says():
    config = SaeConfig("gba", 40, 4, groups=4)
    rng = np.random.default_rng(1)
    pre = rng.normal(size=(500, 40)) - rng.uniform(0, 4, 40)
    pre[:, ::5] = -rng.random((500, 8))  # never active
    bias = -rng.uniform(0, 0.02, 40)
    targets = config.frequencies()
    wanted = bias.copy()
    for m in range(40):
        group = m * 4 // 40
        r = np.maximum(pre.max(axis=0), 0)[np.arange(40) * 4 // 40 == group]
        p = (pre[:, m] > 0).mean()
        if p > targets[m]:
            wanted[m] = max(bias[m] - 0.01 * max(pre[:, m].max(), 0), -np.sqrt(D))
        elif p < 1e-6:
            wanted[m] = min(bias[m] + 0.01 * r[r > 0].mean(), 0)
    counts, largest = (pre > 0).sum(axis=0), pre.max(axis=0)
    found = kinds.adapt_biases(config, *map(jnp.asarray, (bias, counts, largest)), jnp.asarray(500.0), D)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert len({*np.sign(np.round(wanted - bias, 9))}) == 3  # some fall, some rise, some stay


def test_biases_adapt_after_so_many_steps_and_count_again():
    config, params, memory, x = made("gba", adapt_steps=3)
    before = memory["bias"]
    for number in range(3):
        np.testing.assert_array_equal(memory["bias"], before)
        _, seen = kinds.gba_loss(config, params, memory, x, jnp.ones(()), Devices())
        counts = memory["counts"] + seen.counts
        memory = kinds.remember(config, memory, seen, N, D)
        assert number == 2 or float(memory["read"]) == N * (number + 1)
    assert float(memory["read"]) == 0 and not memory["counts"].any()
    wanted = kinds.adapt_biases(config, before, counts, seen.largest, jnp.asarray(3.0 * N), D)
    np.testing.assert_array_equal(memory["bias"], wanted)
    assert not np.array_equal(memory["bias"], before)


def test_the_threshold_is_the_average_of_the_smallest_kept_codes():
    config, _, memory, _ = made("batchtopk")
    wanted = None
    for least in (2.0, 3.0, np.inf, 1.0):
        seen = kinds.Seen(jnp.zeros(()), jnp.zeros(()), jnp.zeros(M, bool), jnp.asarray(least))
        memory = kinds.remember(config, memory, seen, N, D)
        if np.isfinite(least):
            wanted = least if wanted is None else 0.99 * wanted + 0.01 * least
        assert float(memory["least"]) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "gated"}, "--kind = gated: must be one of topk, batchtopk"),
        ({"k": 71}, "--k = 71: must be from 1 to the width, 70"),
        ({"k": 0}, "--k = 0"),
        ({"width": 0}, "--width = 0"),
        ({"kind": "jumprelu", "sparsity": "l1"}, "--sparsity = l1: must be one of quadratic, tanh"),
        ({"learning_rate": float("nan")}, "--learning-rate = nan"),
        ({"kind": "gba", "k": 69}, "--k = 69: gba's 10 groups reach at most"),
    ],
)
def test_values_that_fit_no_autoencoder_are_refused_in_a_line(options, said):
    with pytest.raises(UserError, match=said) as refused:
        SaeConfig(**{"kind": "topk", "width": M, "k": K, **options})
    assert "\n" not in str(refused.value)
