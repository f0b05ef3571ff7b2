"""The train step and the evaluation step: pure functions of pytrees, each one `jax.jit` over a mesh."""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from topklm import sharding
from topklm.config import Config
from topklm.model import transformer
from topklm.training import losses, topk_health
from topklm.training.optimizer import learning_rate_schedule

Batch = Mapping[str, jax.Array]


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: jax.Array  # int32 scalar, optimizer steps done
    params: transformer.Parameters
    opt_state: optax.OptState


def init_state(
    config: Config, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """A fresh state, every array created where it lives on the mesh."""
    shapes = abstract_state(config, optimizer)
    shardings = sharding.parameter_shardings(shapes, mesh)
    return jax.jit(functools.partial(_init, config, optimizer), out_shardings=shardings)()


def abstract_state(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of a state, with nothing allocated."""
    return jax.eval_shape(functools.partial(_init, config, optimizer))


def _init(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    params = transformer.create(config.model, config.train.seed)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def make_train_step(
    config: Config, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> jax.stages.Wrapped:
    """Builds `(state, batch) -> (state, metrics)`; the state's memory is reused.

    The gradient is that of the weighted mean loss over all tokens of the batch, also when it is accumulated
    over microbatches that hold different numbers of weighted tokens.

    Metrics are float32 scalars: `loss` (nats per token, without z-loss), `gradient_norm` (before clipping)
    and `learning_rate`.
    """
    schedule = learning_rate_schedule(config.optim, config.train.steps)
    hidden = sharding.hidden_sharding(mesh)

    def loss(params: transformer.Parameters, batch: Batch) -> tuple[jax.Array, jax.Array]:
        model = transformer.bind(config.model, params)
        h, _ = model.hidden(batch["inputs"], batch["segment_ids"], batch["positions"], sharding=hidden)
        return losses.cross_entropy(
            h,
            model.unembedding(),
            batch["targets"],
            batch["loss_weights"],
            config.optim.z_loss,
            config.model.vocab_size,
        )

    gradient = jax.value_and_grad(loss, has_aux=True)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        total = jnp.maximum(batch["loss_weights"].sum(), 1.0)
        batch = {**batch, "loss_weights": batch["loss_weights"] / total}
        (_, nll), grads = _accumulate(gradient, state.params, batch, config.train.grad_accumulation)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": nll,
            "gradient_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(
    config: Config, mesh: jax.sharding.Mesh
) -> Callable[[transformer.Parameters, Batch], dict[str, Any]]:
    """Builds `(params, batch) -> sums` over the batch's weighted tokens.

    Returns of the built function: `nll_nats` float32[B] (one sum a row, to be added up in float64) and
    `topk_health`, see `topk_health.measure`.
    """
    hidden = sharding.hidden_sharding(mesh)

    def eval_step(params: transformer.Parameters, batch: Batch) -> dict[str, Any]:
        model = transformer.bind(config.model, params)
        tap = topk_health.tap(batch["loss_weights"])
        h, health = model.hidden(
            batch["inputs"], batch["segment_ids"], batch["positions"], tap=tap, sharding=hidden
        )
        nll = losses.token_losses(h, model.unembedding(), batch["targets"], config.model.vocab_size)
        nll = nll * batch["loss_weights"]
        return {"nll_nats": nll.sum(axis=-1), "topk_health": health}

    return jax.jit(eval_step)


def _accumulate(gradient: Callable, params: Any, batch: Batch, n: int) -> Any:
    """`gradient(params, batch)` summed over n microbatches; the loss weights already sum to 1."""
    if n == 1:
        return gradient(params, batch)

    def microbatches(x: jax.Array) -> jax.Array:
        # Row i goes to microbatch i % n, so each device keeps the rows it holds.
        return jnp.moveaxis(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 1, 0)

    def add(total: Any, microbatch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, microbatch)), None

    shape = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[: x.shape[0] // n], batch))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
    return jax.lax.scan(add, zeros, jax.tree.map(microbatches, batch))[0]
