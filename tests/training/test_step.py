"""The train step: one gradient however it is computed, on one device or on eight.

Run as a program, this file compares meshes of eight virtual CPU devices and prints what it found.
"""

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

from helpers import ROOT, devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from topklm.config import Config, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from topklm.errors import UserError
from topklm.layout import Layout, make_layout, one_device
from topklm.model import transformer
from topklm.training import step as step_lib
from topklm.training.step import (
    TrainState,
    abstract_state,
    empty_window,
    init_state,
    learning_rate_schedule,
    make_loss_and_gradient,
    make_optimizer,
    make_train_step,
)

TOPK = Config(
    # The vocabulary is padded for the mesh; every dim of a block matrix is divided by all axes.
    model=ModelConfig(
        d_model=16,
        n_layers=3,
        n_heads=2,
        n_kv_heads=2,
        d_mlp=32,
        vocab_size=41,
        context_length=8,
        topk_k=4,
        qk_norm=True,
        token_input="every",
        topk_centred=True,
        vocab_multiple=16,
    ),
    train=TrainConfig(batch_size=8, steps=20),
    optim=OptimConfig(z_loss=1e-3, warmup_steps=4),
)
BASE = dataclasses.replace(TOPK, model=dataclasses.replace(TOPK.model, n_nontopk=3))
# All neurons are one group, so its first holds them all.
TOPICS = dataclasses.replace(TOPK, optim=dataclasses.replace(TOPK.optim, topic_weight=0.7, topic_tokens=3))
# With this optimizer a step moves the parameters by minus the gradient.
PLAIN_GRADIENT = optax.sgd(1.0)


def make_batch(batch_size=8, length=8, vocab_size=41, seed=0):
    """Makes two documents a row; rows differ much in how many tokens count."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size, (batch_size, length + 1))
    counted = rng.random((batch_size, length)) < np.linspace(0.1, 1.0, batch_size)[:, None]
    return {
        "inputs": jnp.asarray(tokens[:, :-1], jnp.int32),
        "targets": jnp.asarray(tokens[:, 1:], jnp.int32),
        "segment_ids": jnp.asarray(np.broadcast_to(1 + (np.arange(length) > 2), counted.shape), jnp.int32),
        "positions": jnp.asarray(np.broadcast_to(np.arange(length), counted.shape), jnp.int32),
        "loss_weights": jnp.asarray(counted, jnp.float32),
    }


@functools.cache
def initial_params():
    """Returns the parameters of seed 0, which the Base LM and the TopK LM share, as NumPy arrays."""
    return jax.device_get(jax.jit(transformer.create, static_argnums=(0, 1))(BASE.model, 0))


def fresh_state(optimizer, layout):
    """Makes the state that `init_state` gives, without compiling it."""
    params = initial_params()
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), empty_window())
    # Copied, because a step reuses the memory.
    return jax.device_put(state, layout.shardings(state), may_alias=False)


@functools.cache
def gradient_step(config, layout):
    return make_train_step(config, PLAIN_GRADIENT, layout)


def gradient_and_metrics(config, layout, batch=None):
    batch = jax.device_put(make_batch() if batch is None else batch, layout.batch)
    after, metrics = gradient_step(config, layout)(fresh_state(PLAIN_GRADIENT, layout), batch)
    return jax.tree.map(lambda a, b: a - np.asarray(b), initial_params(), after.params), metrics


def random_sets():
    """Returns bool[B, T, D]: k entries a token, whatever their values."""
    places = np.argsort(np.random.default_rng(1).random((8, 8, 16)), axis=-1)
    return places < TOPK.model.topk_k


def topk_with_fixed_sets(layout):
    """Stands in for `topk`: a rounding difference cannot change what is active."""

    def fixed(u_BTD, *_, residual=None, applies=None):
        assert applies is None  # layers are unrolled
        x_BTD = u_BTD if residual is None else u_BTD + residual
        active = random_sets()
        if layout.size == 1:
            return jnp.where(active, x_BTD, 0.0)
        # The tokens in the order in which the devices hold them.
        n = layout.mesh.shape["context"]
        chunks = np.split(active, 2 * n, axis=1)
        active = np.concatenate([chunks[m] for i in range(n) for m in (i, 2 * n - 1 - i)], axis=1)
        places = jax.lax.axis_index(("data", "fsdp")), jax.lax.axis_index(("context", "tensor"))
        first = (places[0] * x_BTD.shape[0], places[1] * x_BTD.shape[1], 0)
        return jnp.where(jax.lax.dynamic_slice(active, first, x_BTD.shape), x_BTD, 0.0)

    return fixed


def topk_gradient_with_fixed_sets(layout, config=TOPK):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "topk", topk_with_fixed_sets(layout))
        patch.setattr(step_lib, "_BAG_STRIDE", 2)
        batch = jax.device_put(make_batch(), layout.batch)
        step = make_train_step(config, PLAIN_GRADIENT, layout)
        after, metrics = step(fresh_state(PLAIN_GRADIENT, layout), batch)
    gradient = jax.tree.map(lambda a, b: a - np.asarray(b), initial_params(), after.params)
    return gradient, float(metrics.get("topic_loss", metrics["loss"]))


@pytest.fixture(scope="module")
def base_gradient():
    return gradient_and_metrics(BASE, one_device())


def assert_trees_close(got, want, tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), path


@pytest.mark.parametrize("layer_stack", [pytest.param("unrolled", marks=pytest.mark.slow), "scanned"])
def test_bfloat16_computes_nearly_the_same_over_float32_parameters(base_gradient, layer_stack):
    model = dataclasses.replace(BASE.model, dtype="bfloat16", layer_stack=layer_stack)
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


def following_tokens_reference(config, params, batch, places):
    """Computes the loss of the tokens that follow by plain loops, float32; `places` are those scored."""
    model, n_topics, n_following = (
        transformer.bind(config.model, params),
        config.model.groups[0][0],
        config.optim.topic_tokens,
    )
    inputs = batch["inputs"], batch["segment_ids"], batch["positions"]
    layers = model.hidden(*inputs, capture=lambda h, u, h_next: h_next)[1][: config.model.n_topk_layers]
    tokens, segments = np.asarray(batch["inputs"]), np.asarray(batch["segment_ids"])
    counts = np.bincount(tokens.reshape(-1), minlength=41)
    known = jnp.asarray(np.flatnonzero(counts))
    log_counts = jnp.log(jnp.asarray(counts[np.asarray(known)], jnp.float32))
    losses = []
    for h_BTD in layers:
        z_BTG = model.final_norm(h_BTD)[..., :n_topics]
        log_p = jax.nn.log_softmax(z_BTG @ model.unembedding()[:n_topics, known] + log_counts)
        for row, at in itertools.product(range(len(tokens)), places):
            following = range(at + 1, min(at + 1 + n_following, tokens.shape[1]))
            bag = [tokens[row, t] for t in following if segments[row, t] == segments[row, at]]
            if len(bag) >= min(8, n_following):
                columns = np.searchsorted(np.asarray(known), bag)
                losses.append(-log_p[row, at, columns].mean())
    assert losses
    return jnp.mean(jnp.stack(losses))


@pytest.mark.parametrize("accumulated", [1, 4])
def test_the_loss_of_following_tokens_is_of_the_first_group_alone(monkeypatch, accumulated):
    monkeypatch.setattr(step_lib, "_BAG_STRIDE", 2)
    model = dataclasses.replace(TOPICS.model, topk_groups="6:2,10:2")
    train = dataclasses.replace(TOPICS.train, grad_accumulation=accumulated)
    config = dataclasses.replace(TOPICS, model=model, train=train)
    batch = make_batch() | {"loss_weights": jnp.zeros((8, 8))}  # nothing else has a gradient
    found, got = jax.jit(make_loss_and_gradient(config, one_device()))(initial_params(), batch)
    value, want = jax.value_and_grad(
        lambda params: following_tokens_reference(config, params, batch, places=(1, 3, 5, 7))
    )(initial_params())
    assert float(found["topic_loss"]) == pytest.approx(float(value), rel=1e-5)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(a / 0.7 - b) <= 1e-5 * np.linalg.norm(b) + 1e-7, path


@pytest.mark.parametrize("length", [2, 3, 8])
def test_windows_shorter_than_the_stride_have_a_loss_too(length):
    _, bags, shares = step_lib._following_tokens(make_batch(length=length), 1)
    assert bags.shape[1] >= 1
    config = dataclasses.replace(
        TOPICS,
        model=dataclasses.replace(TOPICS.model, context_length=length),
        optim=dataclasses.replace(TOPICS.optim, topic_tokens=1),
    )
    found, _ = jax.jit(make_loss_and_gradient(config, one_device()))(
        initial_params(), make_batch(length=length)
    )
    assert np.isfinite(float(found["topic_loss"]))
    assert (np.asarray(shares).sum(axis=-1) <= 1 + 1e-6).all()


def test_the_loss_of_following_tokens_falls(monkeypatch):
    monkeypatch.setattr(step_lib, "_BAG_STRIDE", 2)
    optimizer, layout = make_optimizer(TOPICS.optim, TOPICS.train.steps), one_device()
    train_step = make_train_step(TOPICS, optimizer, layout)
    state, losses = fresh_state(optimizer, layout), []
    for _ in range(TOPICS.train.steps):
        state, metrics = train_step(state, make_batch())
        losses.append(float(metrics["topic_loss"]))
    assert losses[-1] < losses[0] - 0.1


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
    """Returns the state handed over, the state after two clipped AdamW steps, and the metrics of each."""
    optim = dataclasses.replace(BASE.optim, clip_norm=1e-3)
    optimizer, layout = make_optimizer(optim, BASE.train.steps), one_device()
    train_step = make_train_step(dataclasses.replace(BASE, optim=optim), optimizer, layout)
    first = fresh_state(optimizer, layout)
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


@pytest.mark.parametrize(
    ("policy", "learns"),
    [("skip", False), ("stop", True)],  # a run that stops never saves what the step has done
)
def test_a_step_that_is_not_finite_is_reported_and_changes_nothing_if_skipped(policy, learns):
    train = dataclasses.replace(BASE.train, on_bad_step=policy)
    step = make_train_step(dataclasses.replace(BASE, train=train), PLAIN_GRADIENT, one_device())
    first = fresh_state(PLAIN_GRADIENT, one_device())
    poisoned = first._replace(recent=first.recent | {"count": first.recent["count"] + 3})
    weights = make_batch()["loss_weights"] * jnp.inf
    after, metrics = step(poisoned, make_batch() | {"loss_weights": weights})
    assert float(metrics["bad"]) == 1.0
    assert int(after.step) == 1
    assert int(after.recent["count"]) == 3
    same = jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), after.params, initial_params())
    assert all(jax.tree.leaves(same)) is not learns


def test_a_spike_is_skipped_and_a_good_step_is_learned_from():
    train = dataclasses.replace(BASE.train, on_bad_step="skip", spike_sigmas=4.0)
    step = make_train_step(dataclasses.replace(BASE, train=train), PLAIN_GRADIENT, one_device())
    usual = {"loss": jnp.linspace(1.0, 1.1, 128), "gradient_norm": jnp.linspace(90.0, 110.0, 128)}
    for recent, bad in [(usual, 1.0), (usual | {"loss": usual["loss"] + 3.1}, 0.0)]:
        state = fresh_state(PLAIN_GRADIENT, one_device())._replace(recent=recent | {"count": jnp.int32(128)})
        after, metrics = step(jax.tree.map(jnp.array, state), make_batch())
        assert float(metrics["bad"]) == bad, float(metrics["loss"])
        moved = not np.array_equal(after.params["embed"]["embedding"], initial_params()["embed"]["embedding"])
        assert moved is (bad == 0.0)


MESHES = {
    "8x1": MeshConfig(data=8),
    "1x8": MeshConfig(data=1, fsdp=8),
    "4x2": MeshConfig(data=1, fsdp=4, tensor=2),
    "2x2x2": MeshConfig(data=2, fsdp=2, tensor=2),
    "2x2x2 with context": MeshConfig(data=1, fsdp=2, context=2, tensor=2),
    "context of 4": MeshConfig(data=2, context=4),
}


# Where nothing is split that is not split on the others too.
AT_NIGHT = ("8x1", "1x8", "4x2", "context of 4")
each_mesh = pytest.mark.parametrize(
    "mesh", [pytest.param(name, marks=pytest.mark.slow) if name in AT_NIGHT else name for name in MESHES]
)


@functools.cache
def compared(*names):
    """Returns the output of `compare_meshes` in a new process: JAX fixes its devices when it starts."""
    environment = {
        **os.environ,
        **devices(8),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    command = [sys.executable, __file__, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def mesh():
    """Of a test that does not compare meshes: one that is compared by day."""
    return "2x2x2"


@pytest.fixture
def eight_devices(mesh):
    """The figures of the test's mesh, beside those of one device."""
    return compared(*(name for name in MESHES if (name in AT_NIGHT) == (mesh in AT_NIGHT)))


@pytest.mark.parametrize("model", ["base", "topk_with_fixed_sets", "topics"])
@each_mesh
def test_a_mesh_gives_the_loss_and_the_gradient_of_one_device(eight_devices, mesh, model):
    if model == "topics" and MESHES[mesh].context > 1:
        with pytest.raises(
            UserError, match=r"optim\.topic_weight = 0\.7: must be 0 with mesh\.context above 1"
        ):
            Layout.check(SimpleNamespace(mesh=SimpleNamespace(shape=vars(MESHES[mesh]))), TOPICS)
        return
    found = eight_devices[mesh][model]
    assert found["loss"] == pytest.approx(eight_devices["one device"][model]["loss"], rel=1e-5)
    for name, error in found["relative_gradient_errors"].items():
        assert error < 1e-5, name


@pytest.mark.parametrize("how", ["scanned", "minimal", "full"])
def test_scanning_and_recomputing_change_nothing_on_a_mesh(eight_devices, how):
    found = eight_devices["recomputed"][how]
    assert found["loss"] == pytest.approx(eight_devices["one device"]["base"]["loss"], rel=1e-5)
    assert max(found["relative_gradient_errors"].values()) < 1e-5


@each_mesh
def test_the_loss_curve_of_a_mesh_stays_closer_than_that_of_another_seed(eight_devices, mesh):
    want, other_seed = eight_devices["one device"]["topk_losses"], eight_devices["other seed"]["topk_losses"]
    found = eight_devices[mesh]["topk_losses"]
    assert len(found) == TOPK.train.steps
    assert found[-1] < found[0]
    assert np.abs(np.subtract(found, want)).max() < np.abs(np.subtract(other_seed, want)).max()


def test_every_kind_of_model_has_a_step_on_every_mesh(eight_devices):
    assert [kind for kind, same in eight_devices["kinds"].items() if not same] == []


def test_a_vocabulary_padded_to_fit_the_mesh_is_split_and_its_padding_stays_zero(eight_devices):
    found = eight_devices["padding"]
    assert found["vocabulary_on_a_device"] == {"embed": 24, "unembed": 24}
    assert found["padding_stays_zero"]


def test_a_fresh_state_is_the_same_on_a_mesh_as_on_one_device(eight_devices):
    assert eight_devices["init_state"] == {"differs": [], "misplaced": []}


@each_mesh
def test_a_step_leaves_every_array_where_the_rules_put_it(eight_devices, mesh):
    assert eight_devices[mesh]["misplaced"] == []


@pytest.mark.parametrize(
    ("mesh", "share"),
    [("2x2x2", 1 / 4), pytest.param("1x8", 1 / 8, marks=pytest.mark.slow)],  # fsdp 2 and tensor 2; fsdp 8
)
def test_a_device_holds_its_share_of_every_block_matrix_and_of_its_moments(eight_devices, mesh, share):
    shares = eight_devices[mesh]["share_on_a_device"]
    of_matrices = [held for name, held in shares.items() if ".blocks." in name and "kernel" in name]
    assert len(of_matrices) == 7 * 3
    assert set(of_matrices) == {share}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["8x1"])
def test_data_parallelism_repeats_every_parameter(eight_devices, mesh):
    assert set(eight_devices[mesh]["share_on_a_device"].values()) == {1.0}


def compare_meshes(names):
    """Returns {mesh: figures}: gradients of Base LM and of TopK with fixed sets, and a TopK loss curve."""
    adamw = make_optimizer(TOPK.optim, TOPK.train.steps)
    want = {
        "base": gradient_and_metrics(BASE, one_device())[0],
        "topk_with_fixed_sets": topk_gradient_with_fixed_sets(one_device())[0],
        "topics": topk_gradient_with_fixed_sets(one_device(), TOPICS)[0],
    }
    fsdp = make_layout(MESHES["1x8"])
    report = {"init_state": inspect_init_state(adamw, fsdp), "recomputed": {}}
    report["kinds"] = shapes_of_gradients()
    report["other seed"] = {"topk_losses": train_some_steps(adamw, one_device(), seed=1)[1]}
    for how in ("scanned", "minimal", "full"):
        changed = {
            "scanned": {"layer_stack": "scanned"},
            "minimal": {"remat": "minimal"},
            "full": {"layer_stack": "scanned", "remat": "full"},
        }[how]
        config = dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, **changed))
        layout = make_layout(MESHES["2x2x2 with context"])
        gradient, metrics = gradient_and_metrics(config, layout)
        report["recomputed"][how] = figures(gradient, metrics["loss"], want["base"])
    for name in ("one device", *names):
        layout = make_layout(MESHES[name]) if name in MESHES else one_device()
        base, metrics = gradient_and_metrics(BASE, layout)
        fixed, fixed_loss = topk_gradient_with_fixed_sets(layout)
        if name not in MESHES or MESHES[name].context == 1:
            topics, topic_loss = topk_gradient_with_fixed_sets(layout, TOPICS)
            report[name] = {"topics": figures(topics, topic_loss, want["topics"])}
        state, losses = train_some_steps(adamw, layout)
        shares = {name: x.addressable_shards[0].data.size / x.size for name, x in by_name(state).items()}
        report[name] = report.get(name, {}) | {
            "base": figures(base, metrics["loss"], want["base"]),
            "topk_with_fixed_sets": figures(fixed, fixed_loss, want["topk_with_fixed_sets"]),
            "topk_losses": losses,
            "share_on_a_device": shares,
            "misplaced": misplaced(state, layout),
        }
        if name == "2x2x2":
            report["padding"] = inspect_padding(state.params)
    return report


def figures(gradient, loss, want):
    errors = jax.tree.map(lambda g, w: float(np.linalg.norm(g - w) / np.linalg.norm(w)), gradient, want)
    return {"loss": float(loss), "relative_gradient_errors": by_name(errors)}


def train_some_steps(optimizer, layout, seed=0):
    """Returns the state and the losses of TopK training on the same batches."""
    config = dataclasses.replace(TOPK, train=dataclasses.replace(TOPK.train, seed=seed))
    state, losses = init_state(config, optimizer, layout), []
    train_step = make_train_step(config, optimizer, layout)
    for number in range(TOPK.train.steps):
        batch = jax.device_put(make_batch(seed=number % 4), layout.batch)
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))
    return state, losses


def inspect_padding(params):
    embed, unembed = params["embed"]["embedding"], params["unembed"]["kernel"]
    return {
        "vocabulary_on_a_device": {
            "embed": embed.addressable_shards[0].data.shape[0],
            "unembed": unembed.addressable_shards[0].data.shape[1],
        },
        "padding_stays_zero": not (np.asarray(embed)[41:].any() or np.asarray(unembed)[:, 41:].any()),
    }


def shapes_of_gradients():
    """Tells for each kind of model on a mesh whether its traced step keeps the state's shapes and dtypes."""
    found = {}
    kinds = itertools.product([False, True], ["bfloat16", "float32"], ["1x8", "2x2x2 with context"])
    for tied, dtype, name in kinds:
        model = dataclasses.replace(BASE.model, tie_embeddings=tied, dtype=dtype)
        config, optimizer = dataclasses.replace(BASE, model=model), make_optimizer(BASE.optim, 20)
        step = make_train_step(config, optimizer, make_layout(MESHES[name]))
        state = abstract_state(config, optimizer)
        after, _ = jax.eval_shape(step, state, make_batch())
        same = jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), state, after)
        found[f"{name}, tied {tied}, {dtype}"] = all(jax.tree.leaves(same))
    return found


def inspect_init_state(optimizer, layout):
    state = init_state(TOPK, optimizer, layout)
    want = by_name(initial_params())
    differs = [name for name, x in by_name(state.params).items() if not np.allclose(x, want[name], rtol=1e-5)]
    return {"differs": differs, "misplaced": misplaced(state, layout)}


def misplaced(tree, layout):
    """Names of arrays that are not laid out as the rules say."""
    rules = by_name(layout.shardings(tree))
    arrays = by_name(tree)
    return [name for name, x in arrays.items() if not x.sharding.is_equivalent_to(rules[name], x.ndim)]


def by_name(tree):
    """Returns {".blocks.mlp.up.kernel": leaf}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"".join("." + str(getattr(e, "key", e)).strip(".") for e in path): leaf for path, leaf in leaves}


if __name__ == "__main__":
    print(json.dumps(compare_meshes(sys.argv[1:])))
