"""Which parameters of a run move: `train.only`.

Neurons, layer:number, name the parameters that write or read a coordinate of the residual stream: columns of
the attention's and the MLP's output projections in their layer, and rows of the projections that read it in
the next one. Or parameters are drawn at each update, after RoAST (Kim et al. 2023, arXiv 2312.04032):

    s = E[g^2] over batches,   r = share of the other parameters with a smaller s,
    p = 1 / (1 + exp(-2 beta (r - alpha))),   m ~ Bernoulli(p)

ranked over the whole model. In both a parameter that is not to move stays as it is to the bit, weight decay
and Adam's averages included. Dims: L layers, D neurons per layer.
"""

from collections.abc import Callable, Iterable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from topklm.checkpoint import run_folder
from topklm.config import Config, ModelConfig, check_only
from topklm.data.stream import train_stream
from topklm.errors import UserError
from topklm.inference.interventions import load_interventions
from topklm.layout import Layout
from topklm.model import transformer
from topklm.storage.files import as_path
from topklm.training.setup import PreparedRun, prepare_data
from topklm.training.step import make_loss_and_gradient

N_BATCHES = 32  # of training text, over which squared gradients are averaged

_FILE = "neurons="
# Projections by their part in a neuron.
_WRITING, _READING = ("out", "down"), ("query", "key", "value", "gate", "up")


def resolved(config: Config) -> Config:
    """Returns the config with neurons in place of the file of `train.only`; UserError for none, or others."""
    only = config.train.only
    if not only.startswith(_FILE):
        return config
    name = only.removeprefix(_FILE)
    found = sorted({(entry.layer, entry.neuron) for entry in load_interventions(name)})
    if not found:
        raise UserError("the file names no neuron: nothing would train", field="train.only", value=only)
    listed = ",".join(f"{layer}:{neuron}" for layer, neuron in found)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, only=listed))
    check_only(config)
    return config


def neuron_mask(config: ModelConfig, neurons: Iterable[tuple[int, int]]) -> transformer.Parameters:
    """Marks the parameters of neurons (layer, number) True: bool arrays that broadcast to the parameters'."""
    written = np.zeros((config.n_layers, config.d_model), bool)
    for layer, neuron in neurons:
        written[layer, neuron] = True
    read = np.roll(written, 1, axis=0)
    read[0] = False

    def of(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        module = path[-2].key
        if module in _WRITING:
            return written[:, None, :]
        return read[:, :, None] if module in _READING else np.zeros((1,) * leaf.ndim, bool)

    shapes = jax.eval_shape(functools.partial(transformer.create, config, 0))
    return jax.tree_util.tree_map_with_path(of, shapes)


def n_marked(mask: Any, params: Any) -> int:
    """Counts the parameters that a mask marks."""
    counts = jax.tree.map(lambda m, x: int(m.sum()) * (x.size // m.size), mask, params)
    return sum(jax.tree.leaves(counts))


def masked_update(
    optimizer: optax.GradientTransformation, mask: Any, grads: Any, state: Any, params: Any
) -> tuple[Any, Any]:
    """Computes an optimizer's update and state, of which nothing moves where the mask is False."""
    grads = jax.tree.map(lambda m, g: jnp.where(m, g, 0), mask, grads)
    updates, after = optimizer.update(grads, state, params)
    # x + -0.0 is x to the bit, also where x is -0.0.
    updates = jax.tree.map(lambda m, u: jnp.where(m, u, -0.0), mask, updates)

    def kept(new: Any, old: Any) -> Any:
        if not isinstance(new, optax.ScaleByAdamState):
            return new
        mu, nu = (
            jax.tree.map(jnp.where, mask, getattr(new, name), getattr(old, name)) for name in ("mu", "nu")
        )
        return new._replace(mu=mu, nu=nu)

    def is_adam(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    return updates, jax.tree.map(kept, after, state, is_leaf=is_adam)


class Drawn(NamedTuple):
    """State of an optimizer whose parameters are drawn."""

    inner: optax.OptState
    n_updates: jax.Array  # int32 scalar
    chances: transformer.Parameters  # float32, p of each parameter


def selective(optimizer: optax.GradientTransformation, config: Config) -> optax.GradientTransformation:
    """Makes an optimizer that moves what `train.only` names; the same one where that is empty.

    Draws depend on `train.seed` and the number of updates. They begin with p = 1, which `chances` replaces.
    """
    if neurons := config.trained_neurons:
        mask = neuron_mask(config.model, neurons)
        return optax.GradientTransformation(optimizer.init, functools.partial(masked_update, optimizer, mask))
    if (draws := config.fisher_draws) is None:
        return optimizer

    def init(params: Any) -> Drawn:
        ones = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float32), params)
        return Drawn(optimizer.init(params), jnp.zeros((), jnp.int32), ones)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Drawn]:
        mask = draw(state.chances, config.train.seed, state.n_updates)
        if draws[2]:
            grads = jax.tree.map(jnp.divide, grads, state.chances)
        updates, inner = masked_update(optimizer, mask, grads, state.inner, params)
        return updates, Drawn(inner, state.n_updates + 1, state.chances)

    return optax.GradientTransformation(init, update)


def draw(chances: transformer.Parameters, seed: int, n_updates: jax.Array | int) -> Any:
    """Draws which parameters move: bool arrays, each entry True with its chance."""
    leaves, treedef = jax.tree.flatten(chances)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), n_updates), len(leaves))
    drawn = [jax.random.uniform(key, p.shape) < p for key, p in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, drawn)


def chances_of(squares: transformer.Parameters, alpha: float, beta: float) -> transformer.Parameters:
    """Computes p of each parameter, float32, of its mean squared gradient; equal ones have one rank."""
    leaves, treedef = jax.tree.flatten(squares)
    flat = jnp.concatenate([leaf.reshape(-1) for leaf in leaves])
    rank = jnp.searchsorted(jnp.sort(flat), flat) / (flat.size - 1)
    parts = jnp.split(jax.nn.sigmoid(2 * beta * (rank - alpha)), np.cumsum([x.size for x in leaves])[:-1])
    shaped = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(treedef, shaped)


def mean_squares(
    config: Config, layout: Layout, params: transformer.Parameters, batches: Iterable[Any]
) -> transformer.Parameters:
    """Computes E[g^2] over `N_BATCHES` batches, of the gradient of each batch's mean loss."""
    loss_and_gradient = make_loss_and_gradient(config, layout)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=layout.shardings(params))
    def add(total: Any, params: Any, batch: Any) -> Any:
        _, grads = loss_and_gradient(params, batch)
        return jax.tree.map(lambda t, g: t + g * g / N_BATCHES, total, grads)

    total = jax.tree.map(jnp.zeros_like, params)
    for batch in batches:
        total = add(total, params, batch)
    return total


def importance(run: PreparedRun, params: transformer.Parameters, say: Callable[[str], None]) -> Any:
    """Computes p of each parameter for a run's `train.only=fisher:...`, laid out as the parameters.

    On the first batches of the training text of the run that `train.init` names, in this run's order and
    sizes. UserError if that text cannot be read, or no parameter would be drawn.
    """
    config, layout = run.config, run.layout
    assert config.fisher_draws is not None
    alpha, beta, _ = config.fisher_draws
    other = run_folder.saved_config(as_path(config.train.init, "train.init"))
    _, mixture = prepare_data(other or config, say)
    if mixture.tokenizer.sha256 != run.mixture.tokenizer.sha256:
        raise UserError(
            f"train.only = {config.train.only}: the data of {config.train.init} have another tokenizer than "
            "its model: train on neurons instead, or begin with a run that was trained here"
        )
    n_rows = config.train.batch_size
    stream = train_stream(
        mixture,
        context_length=config.model.context_length,
        batch_size=n_rows,
        seed=config.train.seed,
        rows=layout.process_rows(n_rows),
    )
    batches = (layout.put_batch(next(stream), n_rows) for _ in range(N_BATCHES))
    squares = mean_squares(config, layout, params, batches)
    shardings = layout.shardings(params)
    program = jax.jit(lambda s: chances_of(s, alpha, beta), out_shardings=shardings)
    chances = program(squares)
    expected = float(sum(jax.tree.leaves(jax.jit(lambda c: jax.tree.map(jnp.sum, c))(chances))))
    if expected < 1:
        raise UserError(
            "draws less than one parameter a step: nothing would train; lower ALPHA or BETA",
            field="train.only",
            value=config.train.only,
        )
    n = sum(x.size for x in jax.tree.leaves(params))
    say(f"train.only = {config.train.only}: {expected:,.0f} of {n:,} parameters move in a step, on average")
    return chances
