"""Functions called while a model runs, as in TransformerLens: slow, and free to do anything."""

from collections.abc import Callable, Sequence
import dataclasses
import itertools

import jax
import jax.numpy as jnp

from topklm.config import ModelConfig
from topklm.model import transformer
from topklm.neurons import names

# (array [B, T, D], name) -> what takes its place, or None.
Hook = Callable[[jax.Array, str], jax.Array | None]


def run_with_hooks(
    config: ModelConfig,
    params: transformer.Parameters,
    tokens_BT: jax.Array,
    fwd_hooks: Sequence[tuple[str, Hook]],
) -> jax.Array:
    """Next-token logits, float32[B, T, V]; see `LanguageModel.run_with_hooks`.

    Raises:
        ValueError: For a name that cannot be hooked, or a result of another shape.
    """
    usable = [
        name for name in names.there_are(config) if names.parse(name)[1] in (names.TOPK, names.RESID_POST)
    ]
    for name, _ in fwd_hooks:
        if name not in usable:
            raise ValueError(
                f"fwd_hooks: {name!r} cannot be hooked; must be hook_topk or hook_resid_post of a layer that "
                f"has it, from {usable[0]} to {usable[-1]}"
            )
    # Unrolled and kept whole, so that layers are run one after another, each once, and a count numbers them.
    config = dataclasses.replace(config, layer_stack="unrolled", remat="none")
    numbers = itertools.count()

    def edit(h_BTD: jax.Array, _: None) -> jax.Array:
        layer = next(numbers)
        for hook in (names.TOPK, names.RESID_POST):
            for name, function in fwd_hooks:
                if name == names.of(layer, hook):
                    h_BTD = _replaced(h_BTD, function(h_BTD, name), name)
        return h_BTD

    model = transformer.bind(config, params)
    h_BTD, _ = model.hidden(tokens_BT, edit=edit)
    return model.logits(h_BTD)


def _replaced(h_BTD: jax.Array, result: jax.Array | None, name: str) -> jax.Array:
    if result is None:
        return h_BTD
    result = jnp.asarray(result, h_BTD.dtype)
    if result.shape != h_BTD.shape:
        raise ValueError(
            f"fwd_hooks: the function of {name} gave {result.shape}: must be {h_BTD.shape}, or None"
        )
    return result
