"""One pass over whole sequences: logits, losses, captured activations, and functions called on the way.

Programs are compiled for shapes and the model; rows are padded to a few lengths before, and results cut
after. `run_with_hooks`, as in TransformerLens, compiles nothing: slow, and free to do anything. Dims: B rows,
T tokens of the longest, P tokens it is padded to, V vocabulary.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import reprlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.errors import ArgumentError
from topklm.inference.intervention_batch import InterventionBatch
from topklm.inference.tokens import positions_in
from topklm.model import transformer
from topklm.model.block import NO_HOOKS, LayerHooks
from topklm.model.losses import token_losses
from topklm.model.topk import model_topk
from topklm.neurons.capture import (
    RESID_POST,
    RESID_PRE,
    TOPK,
    TOPK_PRE,
    HookName,
    SparseActivations,
    all_hook_names,
    capture,
    check_hook_name,
    hook_name,
)


class Input(NamedTuple):
    """The input of a pass: tokens, int32[B, P], and what may go with them."""

    tokens: Any
    segment_ids: Any = None  # int32[B, P], which document each token belongs to; None: a row is one
    interventions: InterventionBatch | None = None


@functools.partial(jax.jit, static_argnums=0)
def logits(config: ModelConfig, params: transformer.Parameters, given: Input) -> jax.Array:
    """Gives next-token logits, float32[B, P, V]."""
    model = transformer.bind(config, params)
    return model.logits(_hidden(model, given))


@functools.partial(jax.jit, static_argnums=0)
def losses(
    config: ModelConfig, params: transformer.Parameters, given: Input, lengths_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gives next-token losses in nats of rows of `lengths_B` tokens.

    They are the mean over tokens that are scored, all but the first of each document; and float32[B, P], at t
    the loss of token t + 1, NaN where that is not scored.
    """
    model = transformer.bind(config, params)
    h_BPD = _hidden(model, given)
    found_BP = token_losses(h_BPD, model.unembedding(), _next(given.tokens), config.vocab_size)
    scored_BP = jnp.arange(1, found_BP.shape[1] + 1)[None] < lengths_B[:, None]
    if given.segment_ids is not None:
        scored_BP &= given.segment_ids == _next(given.segment_ids)
    mean = jnp.sum(jnp.where(scored_BP, found_BP, 0.0)) / jnp.sum(scored_BP)
    return mean, jnp.where(scored_BP, found_BP, jnp.nan)


@functools.partial(jax.jit, static_argnums=(0, 1))
def logits_and_activations(
    config: ModelConfig, wanted: tuple[str, ...], params: transformer.Parameters, given: Input
) -> tuple[jax.Array, SparseActivations, dict[str, jax.Array]]:
    """Gives next-token logits, float32[B, P, V], and what has one of these names, see `capture`."""
    model = transformer.bind(config, params)
    segments, positions, hooks = _inputs_of(config, given)
    more_active = 0 if given.interventions is None else len(given.interventions.layer)
    h_BPD, neurons, others = capture(model, given.tokens, wanted, hooks, more_active, segments, positions)
    return model.logits(h_BPD), neurons, others


@functools.partial(jax.jit, static_argnums=0)
def hidden(config: ModelConfig, params: transformer.Parameters, given: Input) -> jax.Array:
    """Gives normed hidden states, [B, P, D], for `topklm.eval.scoring`, which unembeds some of them."""
    return _hidden(transformer.bind(config, params), given)


def _inputs_of(config: ModelConfig, given: Input) -> tuple[Any, Any, LayerHooks]:
    """Gives segments and positions of tokens, None where a row is one document, and hooks of layers."""
    positions = None if given.segment_ids is None else positions_in(given.segment_ids)
    hooks = NO_HOOKS if given.interventions is None else given.interventions.layer_hooks(config, positions)
    return given.segment_ids, positions, hooks


def _hidden(model: transformer.Transformer, given: Input) -> jax.Array:
    """Gives normed hidden states, [B, P, D]."""
    segments, positions, hooks = _inputs_of(model.config, given)
    numbers = jnp.arange(model.config.n_layers)
    return model.hidden(given.tokens, segments, positions, hooks=hooks, hook_inputs=numbers)[0]


def padded(x_BT: Any, added: int, fill: int) -> Any:
    """Puts so many more tokens at the right of each row."""
    pad = np.pad if isinstance(x_BT, np.ndarray) else jnp.pad
    return pad(x_BT, ((0, 0), (0, added)), constant_values=fill) if added else x_BT


def cut(x: jax.Array, length: int, axis: int) -> jax.Array:
    """Takes off the padding of rows."""
    at = (slice(None),) * axis + (slice(length),)
    if x.shape[axis] == length:
        return x
    if isinstance(x, jax.core.Tracer) or [device.platform for device in x.devices()] != ["cpu"]:
        return x[at]
    # A slice would be a program of its own for each length.
    return jax.device_put(np.asarray(x)[at], x.sharding)


def _next(x_BP: jax.Array) -> jax.Array:
    """Gives at each position the token of the next, [B, P]; at the last one, one that does not count."""
    return jnp.roll(x_BP, -1, axis=1)


# (array [B, T, D], name) -> the array to go on with, or None.
Hook = Callable[[jax.Array, HookName], jax.Array | None]
# Of each hook its name, or a function that says of each name whether it is meant.
ForwardHooks = Sequence[tuple[str | Callable[[str], bool], Hook]]


def run_with_hooks(
    config: ModelConfig, params: transformer.Parameters, given: Input, fwd_hooks: ForwardHooks
) -> jax.Array:
    """Runs a model with functions called on the way, see `LanguageModel.run_with_hooks`.

    Of one array interventions come before the functions. Only their bids inside of a TopK come after those at
    its entry.
    """
    segments, positions, hooks = _inputs_of(config, given)
    pairs = _pairs(config, fwd_hooks)
    # Unrolled and kept whole, so that layers are run one after another, each once, and can be counted.
    config = dataclasses.replace(config, layer_stack="unrolled", remat="none")
    layer = -1

    def called(array_BTD: jax.Array, hook: str) -> jax.Array:
        here = HookName(hook_name(layer, hook))
        for name, function in pairs:
            if name == here:
                array_BTD = _replaced(array_BTD, function(array_BTD, here), here)
        return array_BTD

    def enter(h_BTD: jax.Array, _: Any) -> jax.Array:
        nonlocal layer
        layer += 1
        return called(h_BTD, RESID_PRE)

    def select(u_BTD: jax.Array, number: jax.Array) -> jax.Array:
        u_BTD = called(u_BTD, TOPK_PRE)
        if hooks.topk is not None:
            return hooks.topk(u_BTD, number)
        return model_topk(config, u_BTD)

    def edit(h_BTD: jax.Array, number: jax.Array) -> jax.Array:
        h_BTD = h_BTD if hooks.output is None else hooks.output(h_BTD, number)
        return called(called(h_BTD, TOPK), RESID_POST)

    model = transformer.bind(config, params)
    h_BTD, _ = model.hidden(
        given.tokens,
        segments,
        positions,
        hooks=LayerHooks(topk=select, output=edit, input=enter),
        hook_inputs=np.arange(config.n_layers),
    )
    return model.logits(h_BTD)


def _pairs(config: ModelConfig, fwd_hooks: ForwardHooks) -> list[tuple[str, Hook]]:
    if isinstance(fwd_hooks, str | dict) or not hasattr(fwd_hooks, "__iter__"):
        allowed = "a list of (name, function)"
        raise ArgumentError(field="fwd_hooks", value=reprlib.repr(fwd_hooks), allowed=allowed)
    found: list[tuple[str, Hook]] = []
    for pair in fwd_hooks:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not callable(pair[1]):
            raise ArgumentError(f"{reprlib.repr(pair)} is no (name, function)", field="fwd_hooks")
        meant, function = pair
        if not callable(meant):
            check_hook_name(config, meant, "fwd_hooks")
            found.append((meant, function))
            continue
        several = [name for name in all_hook_names(config) if meant(name)]
        if not several:
            text = "a function of names chooses none of those in model.hook_names"
            raise ArgumentError(text, field="fwd_hooks")
        found += [(name, function) for name in several]
    return found


def _replaced(h_BTD: jax.Array, result: jax.Array | None, name: str) -> jax.Array:
    """Returns the result of a function instead of the array, if it gave one."""
    if result is None:
        return h_BTD
    try:
        result = jnp.asarray(result, h_BTD.dtype)
    except (TypeError, ValueError):
        text = f"the function of {name} gave a {type(result).__name__}: must give an array, or None"
        raise ArgumentError(text, field="fwd_hooks") from None
    if result.shape != h_BTD.shape:
        text = f"the function of {name} gave {result.shape}: must be {h_BTD.shape}, or None"
        raise ArgumentError(text, field="fwd_hooks")
    return result
