"""The train step in pieces: each part's forward and backward pass, compiled alone at the real shapes."""

from collections.abc import Callable, Mapping
from typing import Any, cast

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from benchmarks.harness.worker import Prepared
from benchmarks.subjects import blocking
from benchmarks.subjects.train_step import random_batch
from topklm import config as config_lib
from topklm.config import Config
from topklm.data.stream import Batch as HostBatch
from topklm.errors import UserError
from topklm.layout import make_layout
from topklm.model import backends, losses
from topklm.model.attention import Attention, rotation_angles
from topklm.model.layers import RMSNorm, SwiGLU
from topklm.model.topk import topk
from topklm.parallel import Parallel
from topklm.training.step import TrainState, init_state, make_optimizer

Subject = Callable[[], Any]


def prepare(spec: Mapping[str, Any]) -> Prepared:
    """Prepares a subject for every part of `roofline.parts_of_step`, of one layer where layers have it.

    Args:
        spec: `config`, with its vocabulary.

    Raises:
        UserError: On several devices, whose parts also wait for each other.
    """
    config = config_lib.resolve(spec["config"])
    layout = make_layout(config.mesh)
    if layout.size > 1:
        raise UserError(f"--explain: takes one device apart, there are {layout.size}; make one visible")
    state = init_state(config, make_optimizer(config.optim, config.train.steps), layout)
    host_batch = cast(HostBatch, random_batch(config))
    batch = layout.put_batch(host_batch, config.train.batch_size)

    def transfer() -> None:
        jax.block_until_ready(layout.put_batch(host_batch, config.train.batch_size))

    subjects = {
        "input": transfer,
        "embedding": _embedding(config, state, batch),
        "attention": _attention(config, state, batch),
        "MLP": _mlp(config, state),
        "head and loss": _head(config, state, batch),
        "host": _host(state, batch),
        "optimizer": _optimizer(config, state),
    }
    if config.model.n_topk_layers:
        subjects["TopK"] = _topk(config)
    return Prepared(subjects, {"platform": jax.default_backend()})


def _embedding(config: Config, state: TrainState, batch: Mapping[str, jax.Array]) -> Subject:
    @jax.jit
    def both(table_VD: jax.Array, tokens_BT: jax.Array, g_BTD: jax.Array) -> Any:
        h_BTD, gradient = jax.vjp(lambda table: table.astype(g_BTD.dtype)[tokens_BT], table_VD)
        return h_BTD, gradient(g_BTD)

    return blocking(both, state.params["embed"]["embedding"], batch["inputs"], _stream(config, 1))


def _attention(config: Config, state: TrainState, batch: Mapping[str, jax.Array]) -> Subject:
    """Makes the subject of `h + Attention(Norm(h))`."""
    model = config.model
    chosen = backends.ATTENTION.choose(model.attention, jax.default_backend(), model.dtype, model)
    parallel = Parallel(attention=chosen.name)
    norm = _definition(_make_norm(config))
    attention = _definition(lambda rngs: Attention(model, out_std=1.0, rngs=rngs))

    def part(params: Any, h_BTD: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        rotation = rotation_angles(positions, model, h_BTD.dtype)
        x_BTD = nnx.merge(norm, params["attention_norm"])(h_BTD)
        return h_BTD + nnx.merge(attention, params["attention"])(x_BTD, rotation, segment_ids, parallel)

    params = _of_first_layer(state, "attention_norm", "attention")
    return _forward_and_backward(config, part, params, batch["positions"], batch["segment_ids"])


def _mlp(config: Config, state: TrainState) -> Subject:
    """Makes the subject of `a + MLP(Norm(a))`."""
    model = config.model
    norm = _definition(_make_norm(config))
    mlp = _definition(lambda rngs: SwiGLU(model.d_model, model.d_mlp, down_std=1.0, rngs=rngs))

    def part(params: Any, a_BTD: jax.Array) -> jax.Array:
        x_BTD = nnx.merge(norm, params["mlp_norm"])(a_BTD)
        return a_BTD + nnx.merge(mlp, params["mlp"])(x_BTD)

    return _forward_and_backward(config, part, _of_first_layer(state, "mlp_norm", "mlp"))


def _topk(config: Config) -> Subject:
    model = config.model

    def part(params: Any, u_BTD: jax.Array) -> jax.Array:
        del params
        return topk(u_BTD, model.topk_k, model.topk_activation, model.topk_backend)

    return _forward_and_backward(config, part, {})


def _head(config: Config, state: TrainState, batch: Mapping[str, jax.Array]) -> Subject:
    """Makes the subject of the final norm, the unembedding and the loss."""
    norm = _definition(_make_norm(config))
    embed, unembed = state.params["embed"]["embedding"], state.params.get("unembed")
    params = {"norm": state.params["final_norm"], "w": embed.T if unembed is None else unembed["kernel"]}
    weights_BT = batch["loss_weights"] / batch["loss_weights"].size

    @jax.jit
    def both(params: Any, h_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> Any:
        def loss(params: Any, h_BTD: jax.Array) -> jax.Array:
            x_BTD = nnx.merge(norm, params["norm"])(h_BTD)
            return losses.cross_entropy(
                x_BTD, params["w"], targets_BT, weights_BT, config.optim.z_loss, config.model.vocab_size
            )[0]

        return jax.value_and_grad(loss, argnums=(0, 1))(params, h_BTD)

    return blocking(both, params, _stream(config, 0), batch["targets"], weights_BT)


def _optimizer(config: Config, state: TrainState) -> Subject:
    """Makes the subject of the gradient's norm and the update, which takes the state's memory."""
    optimizer = make_optimizer(config.optim, config.train.steps)

    def update(params: Any, opt_state: Any, grads: Any) -> Any:
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, optax.tree.norm(grads)

    compiled = jax.jit(update, donate_argnums=(0, 1))
    # Copies: the other parts keep reading the parameters.
    held = [jax.tree.map(jnp.copy, (state.params, state.opt_state))]
    grads = jax.tree.map(lambda p: jnp.full_like(p, 1e-3), state.params)

    def subject() -> None:
        params, opt_state, norm = compiled(*held[0], grads)
        held[0] = jax.block_until_ready((params, opt_state))
        norm.block_until_ready()

    return subject


def _host(state: TrainState, batch: Any) -> Subject:
    """Makes the subject of starting a step in Python: a program of the same arrays that does nothing."""
    same = jax.jit(
        lambda state, batch: (state, batch["loss_weights"][0, 0]), donate_argnums=0, keep_unused=True
    )
    held = [jax.tree.map(jnp.copy, state)]

    def subject() -> None:
        held[0], seen = same(held[0], batch)
        seen.block_until_ready()

    return subject


def _forward_and_backward(config: Config, part: Callable, params: Any, *others: jax.Array) -> Subject:
    """Makes the subject of `part(params, h, *others)` and the gradients of params and h."""

    @jax.jit
    def both(params: Any, h_BTD: jax.Array, g_BTD: jax.Array, *others: jax.Array) -> Any:
        y_BTD, gradient = jax.vjp(lambda params, h: part(params, h, *others), params, h_BTD)
        return y_BTD, gradient(g_BTD)

    return blocking(both, params, _stream(config, 0), _stream(config, 1), *others)


def _stream(config: Config, seed: int) -> jax.Array:
    """Draws a residual stream, or a gradient of it: [B, T, D], normal."""
    shape = (config.train.batch_size, config.model.context_length, config.model.d_model)
    return jax.random.normal(jax.random.key(seed), shape, jnp.dtype(config.model.dtype))


def _make_norm(config: Config) -> Callable[[nnx.Rngs], nnx.Module]:
    return lambda rngs: RMSNorm(config.model.d_model, epsilon=config.model.norm_eps)


def _definition(make: Callable[[nnx.Rngs], nnx.Module]) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(params=0))))


def _of_first_layer(state: TrainState, *names: str) -> dict[str, Any]:
    blocks = state.params["blocks"]
    return {name: jax.tree.map(lambda stacked: stacked[0], blocks[name]) for name in names}
