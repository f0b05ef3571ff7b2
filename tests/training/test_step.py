"""The train step: one gradient however it is computed, on one device or on eight.

Run as a program, this file compares meshes of eight virtual CPU devices and prints what it found.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from topklm import sharding
from topklm.config import Config, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from topklm.model import transformer
from topklm.training.optimizer import learning_rate_schedule, make_optimizer
from topklm.training.step import TrainState, init_state, make_train_step

TOPK = Config(
    # The vocabulary is divided by no mesh axis; every dim of a block matrix by all.
    model=ModelConfig(
        d_model=16,
        n_layers=2,
        n_heads=2,
        n_kv_heads=2,
        d_mlp=32,
        vocab_size=41,
        context_length=8,
        topk_k=4,
        vocab_multiple=1,
    ),
    train=TrainConfig(batch_size=8, steps=10),
    optim=OptimConfig(z_loss=1e-3, warmup_steps=4),
)
BASE = dataclasses.replace(TOPK, model=dataclasses.replace(TOPK.model, n_nontopk=2))
# With this optimizer a step moves the parameters by minus the gradient.
PLAIN_GRADIENT = optax.sgd(1.0)


def make_batch(batch_size=8, length=8, vocab_size=41):
    """Two documents a row; rows differ much in how many tokens count."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab_size, (batch_size, length + 1))
    counted = rng.random((batch_size, length)) < np.linspace(0.1, 1.0, batch_size)[:, None]
    return {
        "inputs": jnp.asarray(tokens[:, :-1], jnp.int32),
        "targets": jnp.asarray(tokens[:, 1:], jnp.int32),
        "segment_ids": jnp.asarray(np.broadcast_to(1 + (np.arange(length) > 2), counted.shape), jnp.int32),
        "positions": jnp.asarray(np.broadcast_to(np.arange(length), counted.shape), jnp.int32),
        "loss_weights": jnp.asarray(counted, jnp.float32),
    }


def one_device():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


@functools.cache
def initial_params():
    """Those of seed 0, which the Base LM and the TopK LM share, as NumPy arrays."""
    return jax.device_get(jax.jit(transformer.create, static_argnums=(0, 1))(BASE.model, 0))


def fresh_state(optimizer, mesh):
    """What `init_state` gives, without compiling it."""
    state = TrainState(jnp.zeros((), jnp.int32), initial_params(), optimizer.init(initial_params()))
    # Copied, because a step reuses the memory.
    return jax.device_put(state, sharding.parameter_shardings(state, mesh), may_alias=False)


@functools.cache
def gradient_step(config, mesh):
    return make_train_step(config, PLAIN_GRADIENT, mesh)


def gradient_and_metrics(config, mesh, batch=None):
    batch = jax.device_put(make_batch() if batch is None else batch, sharding.batch_sharding(mesh))
    after, metrics = gradient_step(config, mesh)(fresh_state(PLAIN_GRADIENT, mesh), batch)
    return jax.tree.map(lambda a, b: a - np.asarray(b), initial_params(), after.params), metrics


@pytest.fixture(scope="module")
def base_gradient():
    return gradient_and_metrics(BASE, one_device())


def assert_trees_close(got, want, tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), path


@pytest.mark.parametrize("scanned", [False, True])
def test_bfloat16_computes_nearly_the_same_over_float32_parameters(base_gradient, scanned):
    model = dataclasses.replace(BASE.model, dtype="bfloat16", scan_layers=scanned)
    gradient, metrics = gradient_and_metrics(dataclasses.replace(BASE, model=model), one_device())
    assert float(metrics["loss"]) == pytest.approx(float(base_gradient[1]["loss"]), rel=0.01)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {np.dtype(np.float32)}
    assert_trees_close(gradient, base_gradient[0], tolerance=0.1)


def test_the_gradient_is_that_of_the_weighted_mean_loss(base_gradient):
    batch = make_batch()

    def loss(p):
        logits = transformer.bind(BASE.model, p)(batch["inputs"], batch["segment_ids"], batch["positions"])
        log_z = jax.nn.logsumexp(logits, axis=-1)
        nll = log_z - jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        w = batch["loss_weights"] / batch["loss_weights"].sum()
        return jnp.sum(w * (nll + 1e-3 * log_z**2)), jnp.sum(w * nll)

    (_, nll), want = jax.jit(jax.value_and_grad(loss, has_aux=True))(initial_params())
    got, metrics = base_gradient
    assert float(metrics["loss"]) == pytest.approx(float(nll), rel=1e-5)
    assert_trees_close(got, want, 1e-5)


def test_accumulating_over_microbatches_of_unequal_weight_gives_the_same_gradient(base_gradient):
    train = dataclasses.replace(BASE.train, grad_accumulation=4)
    got, metrics = gradient_and_metrics(dataclasses.replace(BASE, train=train), one_device())
    want, want_metrics = base_gradient
    assert_trees_close(got, want, 1e-5)
    for name, value in want_metrics.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-5)


def test_a_batch_in_which_nothing_counts_gives_zero_and_no_nan():
    nothing = make_batch() | {"loss_weights": jnp.zeros((8, 8))}
    gradient, metrics = gradient_and_metrics(BASE, one_device(), nothing)
    assert (float(metrics["loss"]), float(metrics["gradient_norm"])) == (0.0, 0.0)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


@pytest.fixture(scope="module")
def two_steps():
    """The state handed over, the state after two clipped AdamW steps, and the metrics of each."""
    optim = dataclasses.replace(BASE.optim, clip_norm=1e-3)
    optimizer, mesh = make_optimizer(optim, BASE.train.steps), one_device()
    train_step = make_train_step(dataclasses.replace(BASE, optim=optim), optimizer, mesh)
    first = fresh_state(optimizer, mesh)
    second, metrics_0 = train_step(first, make_batch())
    third, metrics_1 = train_step(second, make_batch())
    return first, third, [metrics_0, metrics_1]


def test_the_gradient_norm_is_reported_before_clipping(base_gradient, two_steps):
    want = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(base_gradient[0])))
    assert want > 0.1
    assert float(two_steps[2][0]["gradient_norm"]) == pytest.approx(want, rel=1e-5)


def test_the_memory_of_the_state_is_reused(two_steps):
    first, third, _ = two_steps
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(third))


def test_steps_are_counted_and_follow_the_schedule(two_steps):
    _, third, metrics = two_steps
    schedule = learning_rate_schedule(BASE.optim, BASE.train.steps)
    assert int(third.step) == 2
    rates = [float(m["learning_rate"]) for m in metrics]
    assert rates == pytest.approx([float(schedule(0)), float(schedule(1))])


def test_the_loss_of_the_same_batch_falls(two_steps):
    losses = [float(m["loss"]) for m in two_steps[2]]
    assert losses[1] < losses[0]


MESHES = {"8x1x1": (8, 1, 1), "2x2x2": (2, 2, 2), "1x8x1": (1, 8, 1)}


@pytest.fixture(scope="module")
def eight_devices():
    """What `compare_meshes` prints; the number of devices is fixed when JAX starts, so in a new process."""
    environment = {
        **os.environ,
        # The last two only make XLA compile faster.
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
        " --xla_llvm_disable_expensive_passes=true",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(sharding.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_gives_the_loss_and_the_gradient_of_one_device(eight_devices, mesh):
    found = eight_devices[mesh]
    assert found["base_loss"] == pytest.approx(eight_devices["one device"]["base_loss"], rel=1e-4)
    for name, error in found["relative_gradient_errors"].items():
        assert error < 1e-4, name


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_gives_the_topk_loss_of_one_device(eight_devices, mesh):
    want = eight_devices["one device"]["topk_losses"][0]
    assert eight_devices[mesh]["topk_losses"][0] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("mesh", MESHES)
def test_topk_training_lowers_the_loss_on_every_mesh(eight_devices, mesh):
    first, second = eight_devices[mesh]["topk_losses"]
    assert second < first


def test_a_vocabulary_padded_to_fit_the_mesh_gives_the_gradient_of_one_device_without(eight_devices):
    found = eight_devices["padded"]
    assert found["loss"] == pytest.approx(eight_devices["one device"]["base_loss"], rel=1e-4)
    assert max(found["relative_gradient_errors"].values()) < 1e-4
    assert found["vocabulary_on_a_device"] == {"embed": 64, "unembed": 64}
    assert found["padding_stays_zero"]


def test_a_fresh_state_is_the_same_on_a_mesh_as_on_one_device(eight_devices):
    assert eight_devices["init_state"] == {"differs": [], "misplaced": []}


@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_leaves_every_array_where_the_rules_put_it(eight_devices, mesh):
    assert eight_devices[mesh]["misplaced"] == []


def test_fsdp_holds_one_eighth_of_every_block_matrix_and_of_its_moments_on_each_device(eight_devices):
    shares = eight_devices["1x8x1"]["share_on_a_device"]
    matrices = {name: share for name, share in shares.items() if ".blocks." in name and "kernel" in name}
    assert len(matrices) == 7 * 3
    assert set(matrices.values()) == {1 / 8}


def test_data_parallelism_repeats_every_parameter(eight_devices):
    assert set(eight_devices["8x1x1"]["share_on_a_device"].values()) == {1.0}


def compare_meshes():
    """{mesh: figures}; plain gradients for the Base LM, two steps of AdamW for the TopK LM."""
    want, _ = gradient_and_metrics(BASE, one_device())
    adamw = make_optimizer(TOPK.optim, TOPK.train.steps)
    report = {"init_state": inspect_init_state(adamw, sharding.make_mesh(MeshConfig(*MESHES["1x8x1"])))}
    report["padded"] = inspect_padding(want, sharding.make_mesh(MeshConfig(*MESHES["2x2x2"])))
    for name, sizes in {"one device": None, **MESHES}.items():
        mesh = one_device() if sizes is None else sharding.make_mesh(MeshConfig(*sizes))
        got, base = gradient_and_metrics(BASE, mesh)
        errors = jax.tree.map(lambda g, w: float(np.linalg.norm(g - w) / np.linalg.norm(w)), got, want)
        state, losses = fresh_state(adamw, mesh), []
        batch = jax.device_put(make_batch(), sharding.batch_sharding(mesh))
        train_step = make_train_step(TOPK, adamw, mesh)
        for _ in range(2):
            state, metrics = train_step(state, batch)
            losses.append(float(metrics["loss"]))
        shares = {name: x.addressable_shards[0].data.size / x.size for name, x in by_name(state).items()}
        report[name] = {
            "base_loss": float(base["loss"]),
            "relative_gradient_errors": by_name(errors),
            "topk_losses": losses,
            "share_on_a_device": shares,
            "misplaced": misplaced(state, mesh),
        }
    return report


def inspect_padding(want, mesh):
    """One step of plain gradient with rows of padding, split over the mesh, against `want` without."""
    config = dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, vocab_multiple=128))
    before = init_state(config, PLAIN_GRADIENT, mesh)
    batch = jax.device_put(make_batch(), sharding.batch_sharding(mesh))
    start = jax.device_get(before.params)
    after, metrics = make_train_step(config, PLAIN_GRADIENT, mesh)(before, batch)
    embed, unembed = after.params["embed"]["embedding"], after.params["unembed"]["kernel"]
    got = jax.tree.map(lambda a, b: a - np.asarray(b), start, after.params)
    got["embed"]["embedding"] = got["embed"]["embedding"][:41]
    got["unembed"]["kernel"] = got["unembed"]["kernel"][:, :41]
    errors = jax.tree.map(lambda g, w: float(np.linalg.norm(g - w) / np.linalg.norm(w)), got, want)
    return {
        "loss": float(metrics["loss"]),
        "relative_gradient_errors": by_name(errors),
        "vocabulary_on_a_device": {
            "embed": embed.addressable_shards[0].data.shape[0],
            "unembed": unembed.addressable_shards[0].data.shape[1],
        },
        "padding_stays_zero": not (np.asarray(embed)[41:].any() or np.asarray(unembed)[:, 41:].any()),
    }


def inspect_init_state(optimizer, mesh):
    state = init_state(TOPK, optimizer, mesh)
    want = by_name(initial_params())
    differs = [name for name, x in by_name(state.params).items() if not np.allclose(x, want[name], rtol=1e-5)]
    return {"differs": differs, "misplaced": misplaced(state, mesh)}


def misplaced(tree, mesh):
    """Names of arrays that are not laid out as the rules say."""
    rules = by_name(sharding.parameter_shardings(tree, mesh))
    arrays = by_name(tree)
    return [name for name, x in arrays.items() if not x.sharding.is_equivalent_to(rules[name], x.ndim)]


def by_name(tree):
    """{".blocks.mlp.up.kernel": leaf}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"".join("." + str(getattr(e, "key", e)).strip(".") for e in path): leaf for path, leaf in leaves}


if __name__ == "__main__":
    print(json.dumps(compare_meshes()))
