"""Functions called while a model runs, as in TransformerLens: slow, and free to do anything."""

from collections.abc import Callable, Sequence
import dataclasses
import reprlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.model import transformer
from topklm.model.block import LayerHooks
from topklm.model.topk import topk
from topklm.neurons import hook_names

# (array [B, T, D], name) -> what takes its place, or None.
Hook = Callable[[jax.Array, hook_names.HookName], jax.Array | None]
# Of each hook its name, or a function that says of each name whether it is meant.
ForwardHooks = Sequence[tuple[str | Callable[[str], bool], Hook]]


def run_with_hooks(
    config: ModelConfig,
    params: transformer.Parameters,
    tokens_BT: jax.Array,
    fwd_hooks: ForwardHooks,
    changes: LayerHooks,
    segment_ids_BT: jax.Array | None,
    positions_BT: jax.Array | None,
) -> jax.Array:
    """Runs a model with functions called on the way; see `LanguageModel.run_with_hooks`.

    Args:
        config: The model's shape.
        params: Its parameters.
        tokens_BT: int32[B, T].
        fwd_hooks: (name, function) each.
        changes: What else is done to layers; of one array, before the functions see it. Only bids inside of
            the TopK come after those at its entry.
        segment_ids_BT: As in `Transformer.__call__`.
        positions_BT: As in `Transformer.__call__`.

    Returns:
        Next-token logits, float32[B, T, V].

    Raises:
        ValueError: For a name that the model does not have, what is no pair, or a result of another shape.
    """
    pairs = _pairs(config, fwd_hooks)
    # Unrolled and kept whole, so that layers are run one after another, each once, and can be counted.
    config = dataclasses.replace(config, layer_stack="unrolled", remat="none")
    layer = -1

    def called(array_BTD: jax.Array, hook: str) -> jax.Array:
        here = hook_names.HookName(hook_names.name(layer, hook))
        for name, function in pairs:
            if name == here:
                array_BTD = _replaced(array_BTD, function(array_BTD, here), here)
        return array_BTD

    def enter(h_BTD: jax.Array, _: Any) -> jax.Array:
        nonlocal layer
        layer += 1
        return called(h_BTD, hook_names.RESID_PRE)

    def select(u_BTD: jax.Array, number: jax.Array) -> jax.Array:
        u_BTD = called(u_BTD, hook_names.TOPK_PRE)
        if changes.topk is not None:
            return changes.topk(u_BTD, number)
        return topk(u_BTD, config.topk_k, config.topk_activation, config.topk_backend)

    def edit(h_BTD: jax.Array, number: jax.Array) -> jax.Array:
        h_BTD = h_BTD if changes.output is None else changes.output(h_BTD, number)
        return called(called(h_BTD, hook_names.TOPK), hook_names.RESID_POST)

    model = transformer.bind(config, params)
    h_BTD, _ = model.hidden(
        tokens_BT,
        segment_ids_BT,
        positions_BT,
        hooks=LayerHooks(topk=select, output=edit, input=enter),
        hook_inputs=np.arange(config.n_layers),
    )
    return model.logits(h_BTD)


def _pairs(config: ModelConfig, fwd_hooks: ForwardHooks) -> list[tuple[str, Hook]]:
    """Makes a pair for each name that is meant."""
    if isinstance(fwd_hooks, str | dict) or not hasattr(fwd_hooks, "__iter__"):
        raise ValueError(f"fwd_hooks = {reprlib.repr(fwd_hooks)}: must be a list of (name, function)")
    found: list[tuple[str, Hook]] = []
    for pair in fwd_hooks:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not callable(pair[1]):
            raise ValueError(f"fwd_hooks: {reprlib.repr(pair)} is no (name, function)")
        meant, function = pair
        if not callable(meant):
            hook_names.check(config, meant, "fwd_hooks")
            found.append((meant, function))
            continue
        several = [name for name in hook_names.all_names(config) if meant(name)]
        if not several:
            raise ValueError("fwd_hooks: a function of names chooses none of those in model.hook_names")
        found += [(name, function) for name in several]
    return found


def _replaced(h_BTD: jax.Array, result: jax.Array | None, name: str) -> jax.Array:
    """Puts the result of a function in the array's place."""
    if result is None:
        return h_BTD
    try:
        result = jnp.asarray(result, h_BTD.dtype)
    except (TypeError, ValueError):
        raise ValueError(
            f"fwd_hooks: the function of {name} gave a {type(result).__name__}: must give an array, or None"
        ) from None
    if result.shape != h_BTD.shape:
        raise ValueError(
            f"fwd_hooks: the function of {name} gave {result.shape}: must be {h_BTD.shape}, or None"
        )
    return result
