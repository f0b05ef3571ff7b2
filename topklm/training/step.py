"""The train step and the evaluation step: pure functions of pytrees, each one `jax.jit` over a mesh.

Loss and gradient are one program for every device (`jax.shard_map`) whose communication is written out, here
and in `model.parallel`; the optimizer works on each array as it lies.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import optax

from topklm import sharding
from topklm.config import Config
from topklm.model import backends, losses, transformer
from topklm.model.block import CaptureFn
from topklm.model.parallel import Parallel
from topklm.training import bad_steps, topk_health
from topklm.training.optimizer import learning_rate_schedule

Batch = Mapping[str, jax.Array]

_EVERYWHERE = PartitionSpec()
_OF_TOKENS = PartitionSpec(sharding.BATCH_AXES, "context")  # arrays [B, T] in a device's program
_OF_ROWS = PartitionSpec(sharding.BATCH_AXES)


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: jax.Array  # int32 scalar, optimizer steps done
    params: transformer.Parameters
    opt_state: optax.OptState
    recent: bad_steps.Recent  # what the last good steps were like


def init_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A fresh state, every array created where it lives on the mesh."""
    shapes = abstract_state(config, optimizer)
    shardings = sharding.parameter_shardings(shapes, mesh)
    return jax.jit(functools.partial(_init, config, optimizer), out_shardings=shardings)()


def abstract_state(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of a state, with nothing allocated."""
    return jax.eval_shape(functools.partial(_init, config, optimizer))


def _init(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    params = transformer.create(config.model, config.train.seed)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), bad_steps.fresh())


def abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and layout of a training batch, with nothing allocated."""
    shape = (config.train.batch_size, config.model.context_length)
    place = sharding.batch_sharding(mesh)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
    batch = dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), tokens)
    return {**batch, "loss_weights": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)}


def make_train_step(
    config: Config, optimizer: optax.GradientTransformation, mesh: Mesh
) -> jax.stages.Wrapped:
    """Builds `(state, batch) -> (state, metrics)`; the state's memory is reused.

    The gradient is that of the weighted mean loss over all tokens of the batch, also when it is accumulated
    over microbatches that hold different numbers of weighted tokens. A bad step (`bad_steps.is_bad`) counts,
    but with `train.on_bad_step = "skip"` changes neither parameters nor optimizer.

    Metrics are float32 scalars: `loss` (nats per token, without z-loss), `gradient_norm` (before clipping),
    `learning_rate`, and `bad`, 1 for a bad step.
    """
    schedule = learning_rate_schedule(config.optim, config.train.steps)
    loss_and_gradient = _make_loss_and_gradient(config, mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        loss, grads = loss_and_gradient(state.params, batch)
        norm = optax.tree.norm(grads)
        bad = bad_steps.is_bad(state.recent, loss, norm, config.train.spike_sigmas)
        recent = bad_steps.remember(state.recent, loss, norm, bad)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        learned = optax.apply_updates(state.params, updates), opt_state
        if config.train.on_bad_step == "skip":
            before = state.params, state.opt_state
            learned = jax.tree.map(lambda old, new: jnp.where(bad, old, new), before, learned)
        metrics = {
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "bad": bad.astype(jnp.float32),
        }
        return TrainState(state.step + 1, *learned, recent), metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(config: Config, mesh: Mesh) -> Callable[[transformer.Parameters, Batch], dict[str, Any]]:
    """Builds `(params, batch) -> sums` over the batch's weighted tokens, the same on every device.

    Returns of the built function: `nll_nats` float32[B] (one sum a row, to be added up in float64), `tokens`
    int32[B], how many a row has, and `topk_health`, see `topk_health.measure`.
    """
    specs, parallel = _layout(config, mesh)

    def of_device(params: transformer.Parameters, batch: Batch) -> dict[str, Any]:
        tap = topk_health.tap(parallel.residual_tokens(batch["loss_weights"]))
        model, h, health = _hidden(config, params, batch, parallel, tap)
        nll = losses.token_losses(
            parallel.gather_tokens(h),
            model.unembedding(),
            batch["targets"],
            config.model.vocab_size,
            parallel.tensor,
        )
        sums = (nll * batch["loss_weights"]).sum(axis=-1), (batch["loss_weights"] > 0).sum(axis=-1)
        nll_nats, tokens = (_sum_over(mesh, x, keep=_OF_ROWS, leave_out="tensor") for x in sums)
        return {
            "nll_nats": nll_nats,
            "tokens": tokens,
            "topk_health": jax.tree.map(lambda x: _sum_over(mesh, x, keep=_EVERYWHERE), health),
        }

    out = {"nll_nats": _OF_ROWS, "tokens": _OF_ROWS, "topk_health": _EVERYWHERE}
    eval_step = _on_every_device(of_device, mesh, specs, out)
    # Every process reads the sums, those of other processes' rows too.
    return jax.jit(eval_step, out_shardings=NamedSharding(mesh, _EVERYWHERE))


def _make_loss_and_gradient(config: Config, mesh: Mesh) -> Callable:
    """Builds `(params, batch) -> (mean loss in nats, its gradient with z-loss)`."""
    specs, parallel = _layout(config, mesh)

    def loss_of_device(params: transformer.Parameters, batch: Batch) -> tuple[jax.Array, jax.Array]:
        model, h, _ = _hidden(config, params, batch, parallel)
        return losses.cross_entropy(
            parallel.gather_tokens(h),
            model.unembedding(),
            batch["targets"],
            batch["loss_weights"],
            config.optim.z_loss,
            config.model.vocab_size,
            parallel.tensor,
        )

    gradient = jax.value_and_grad(loss_of_device, has_aux=True)

    def of_device(params: transformer.Parameters, batch: Batch) -> tuple[jax.Array, Any]:
        total = _sum_over(mesh, batch["loss_weights"].sum(), keep=_EVERYWHERE, leave_out="tensor")
        batch = {**batch, "loss_weights": batch["loss_weights"] / jnp.maximum(total, 1.0)}
        (_, nll), grads = _accumulate(gradient, params, batch, config.train.grad_accumulation)
        # Along the axes that split a parameter its gradient has been summed where it was gathered.
        grads = jax.tree.map(lambda g, spec: _sum_over(mesh, g, keep=spec), grads, specs)
        return _sum_over(mesh, nll, keep=_EVERYWHERE, leave_out="tensor"), grads

    return _on_every_device(of_device, mesh, specs, (_EVERYWHERE, specs))


def _layout(config: Config, mesh: Mesh) -> tuple[Any, Parallel]:
    shapes = jax.eval_shape(functools.partial(transformer.create, config.model, config.train.seed))
    parallel = sharding.parallel(mesh, shapes, jnp.dtype(config.model.dtype))
    platform = mesh.devices.flat[0].platform
    backends.TOPK.check_platform(config.model.topk_backend, platform)
    attention = backends.ATTENTION.choose(
        config.model.attention, platform, config.model.dtype, config.model
    ).name
    return sharding.parameter_specs(shapes, mesh), dataclasses.replace(
        parallel, attention=attention, scan_layers=sharding.scans_layers(platform)
    )


def _hidden(
    config: Config,
    params: transformer.Parameters,
    batch: Batch,
    parallel: Parallel,
    tap: CaptureFn | None = None,
) -> tuple[transformer.Transformer, jax.Array, Any]:
    def gathered() -> transformer.Transformer:
        # The blocks are gathered one at a time, where they are used.
        outside_blocks = parallel.gather({name: part for name, part in params.items() if name != "blocks"})
        return transformer.bind(config.model, {**params, **outside_blocks})

    model = gathered()
    h, seen = model.hidden(
        batch["inputs"], batch["segment_ids"], batch["positions"], capture=tap, parallel=parallel
    )
    # A tied table's two gradients differ in dtype: the loss's is float32 in bfloat16 models too. Each goes
    # through a gather of its own, which sums in float32; XLA makes one of the two gathers forward.
    tied = config.model.tie_embeddings and config.model.dtype != "float32"
    return gathered() if tied else model, h, seen


def _on_every_device(program: Callable, mesh: Mesh, params: Any, out: Any) -> Callable:
    """`program(params, batch)` on each device's parts; the program itself where there is one device."""
    if mesh.size == 1:
        return program
    # What is replicated is so by the sums we write; the TopK search's carry could not be checked.
    return jax.shard_map(program, mesh=mesh, in_specs=(params, _OF_TOKENS), out_specs=out, check_vma=False)


def _sum_over(mesh: Mesh, x: jax.Array, *, keep: PartitionSpec, leave_out: str | None = None) -> jax.Array:
    """The sum over all devices but those along the axes of `keep`, and along one where all have the same."""
    axes = tuple(axis for axis in sharding.other_axes(mesh, keep) if axis != leave_out)
    return jax.lax.psum(x, axes) if axes else x


def _accumulate(gradient: Callable, params: Any, batch: Batch, n: int) -> Any:
    """`gradient(params, batch)` summed over n microbatches; the loss weights already sum to 1."""
    if n == 1:
        return gradient(params, batch)

    def microbatches(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 1, 0)

    def add(total: Any, microbatch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, microbatch)), None

    shape = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[: x.shape[0] // n], batch))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
    return jax.lax.scan(add, zeros, jax.tree.map(microbatches, batch))[0]
