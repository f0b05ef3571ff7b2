"""Keys and values of the tokens that a text holds already: filled by whole prompts, then token by token.

Texts stand at the left of their rows, so a token's place in the cache is its position, and what stands to
the right of a text is never looked at. Sizes are rounded up to a few, so that few programs are compiled.
Inside `jax.jit`, but for `bucket` and `by_layer`. Dims: L layers, B rows, P places of prompts, C places of
the cache, D d_model, K key heads of width d.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.model import decode, transformer
from topklm.model.attention import Rotation, rotation_angles
from topklm.model.decode import KeysAndValues
from topklm.model.parallel import ALONE
from topklm.model.topk import topk
from topklm.model.transformer import Edit

SMALLEST_BUCKET = 32

# Of every layer: one array with a leading layer axis where layers are scanned, else a tuple of L.
Layers = Any
Cache = Any  # `KeysAndValues` of each layer, [B, C, K, d] each, in the same form


def bucket(length: int, context_length: int) -> int:
    """The power of two from 32 up that holds a length, but never more than the context."""
    size = SMALLEST_BUCKET
    while size < length:
        size *= 2
    return min(size, context_length)


@functools.partial(jax.jit, static_argnums=0)
def by_layer(config: ModelConfig, params: transformer.Parameters) -> Layers:
    """The parameters of the blocks in the form in which `step` reads them fastest.

    Where layers are not scanned that is a copy for each layer: to be made once for a text, not once a token.
    """
    _, stacked = nnx.split(transformer.bind(config, params).blocks)
    return jax.tree.leaves(stacked) if _scans(config) else _unstack(jax.tree.leaves(stacked))


def prefill(
    model: transformer.Transformer, tokens_BP: jax.Array, lengths_B: jax.Array, edit: Edit | None
) -> tuple[jax.Array, Cache]:
    """Runs whole texts.

    Args:
        model: As `transformer.bind` gives it.
        tokens_BP: int32[B, P], each text at the left; what is to its right does not matter.
        lengths_B: int32[B], tokens of each text, at least 1.
        edit: As in `Transformer.hidden`, called with the number of the layer.

    Returns:
        Of each row's last token the normed hidden state, [B, D]; and the cache, with C = P.
    """
    config = model.config

    def keep(h: jax.Array, _u: jax.Array, _h_next: jax.Array) -> jax.Array:
        return h

    h_BPD, entering_LBPD = model.hidden(tokens_BP, tap=keep, edit=edit, edits=jnp.arange(config.n_layers))
    h_BD = jnp.take_along_axis(h_BPD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    block_def, stacked = nnx.split(model.blocks)
    rotation = _rotation(config, jnp.broadcast_to(jnp.arange(tokens_BP.shape[1]), tokens_BP.shape))

    def layer(carry: None, inputs: tuple) -> tuple[None, KeysAndValues]:
        block_params, h_BPD = inputs
        return carry, decode.keys_and_values(nnx.merge(block_def, block_params), h_BPD, rotation)

    if _scans(config):
        return h_BD, jax.lax.scan(layer, None, (stacked, entering_LBPD))[1]
    leaves, treedef = jax.tree.flatten((stacked, entering_LBPD))
    each = (jax.tree.unflatten(treedef, of_layer) for of_layer in _unstack(leaves))
    return h_BD, tuple(layer(None, inputs)[1] for inputs in each)


def with_room(cache: Cache, size: int) -> Cache:
    """A cache of so many places, at least those that it has."""

    def pad(x: jax.Array) -> jax.Array:
        before_places = x.ndim - 3  # whether there is a layer axis
        widths = [(0, 0)] * x.ndim
        widths[before_places] = (0, size - x.shape[before_places])
        return jnp.pad(x, widths)

    return jax.tree.map(pad, cache)


def step(
    model: transformer.Transformer,
    layers: Layers,
    cache: Cache,
    tokens_B: jax.Array,
    places_B: jax.Array,
    writes_B: jax.Array,
    edit: Edit | None,
) -> tuple[jax.Array, Cache]:
    """Runs one token of each row behind those in the cache, and adds it to the cache.

    Args:
        model: As `transformer.bind` gives it; of its blocks only the structure is looked at.
        layers: Their parameters, from `by_layer`.
        cache: Of the tokens before.
        tokens_B: int32[B].
        places_B: int32[B], the token's position, which is its place in the cache.
        writes_B: bool[B], rows whose cache changes; what the others compute means nothing.
        edit: As in `prefill`.

    Returns:
        The normed hidden state, [B, D], and the cache.
    """
    config = model.config
    block_def, stacked = nnx.split(model.blocks)
    treedef = jax.tree.structure(stacked)
    rotation = _rotation(config, places_B[:, None])
    selection = config.topk_k, config.topk_activation, config.topk_backend

    def layer(
        h_B1D: jax.Array, leaves: Any, past: KeysAndValues, number: Any, sparse: Any
    ) -> tuple[jax.Array, KeysAndValues]:
        block = nnx.merge(block_def, jax.tree.unflatten(treedef, leaves))
        seen_B1C = (jnp.arange(past.keys.shape[1]) < places_B[:, None])[:, None]
        a_B1D, written_B1D, own = decode.step(block, h_B1D, rotation, past, seen_B1C)
        if isinstance(sparse, bool):
            h_B1D = topk(written_B1D, *selection, residual=a_B1D) if sparse else a_B1D + written_B1D
        else:
            h_B1D = topk(written_B1D, *selection, residual=a_B1D, applies=sparse)
        return h_B1D if edit is None else edit(h_B1D, number), own

    # Outside of the cache where nothing is to be written.
    rows, n_places = jnp.arange(len(tokens_B)), jax.tree.leaves(cache)[0].shape[-3]
    targets_B = jnp.where(writes_B, places_B, n_places)
    h_B1D = model.embed(tokens_B[:, None], jnp.dtype(config.dtype))
    if _scans(config):

        def scanned(h_B1D: jax.Array, inputs: tuple) -> tuple[jax.Array, KeysAndValues]:
            return layer(h_B1D, *inputs)

        numbers = np.arange(config.n_layers)
        inputs = layers, cache, numbers, numbers < config.n_topk_layers
        h_B1D, own = jax.lax.scan(scanned, h_B1D, inputs)
        cache = _written(cache, own, lambda x, new: x.at[:, rows, targets_B].set(new[:, :, 0], mode="drop"))
    else:
        cache = list(cache)
        for number, leaves in enumerate(layers):
            sparse = number < config.n_topk_layers
            h_B1D, own = layer(h_B1D, leaves, cache[number], number, sparse)
            cache[number] = _written(
                cache[number], own, lambda x, new: x.at[rows, targets_B].set(new[:, 0], mode="drop")
            )
        cache = tuple(cache)
    return model.final_norm(h_B1D)[:, 0], cache


def _written(
    cache: KeysAndValues, own: KeysAndValues, write: Callable[[jax.Array, jax.Array], jax.Array]
) -> KeysAndValues:
    return jax.tree.map(write, cache, own)


def _scans(config: ModelConfig) -> bool:
    """As `Transformer.hidden` decides it on one device."""
    return ALONE.scan_layers if config.layer_stack == "auto" else config.layer_stack == "scanned"


def _unstack(leaves: list[jax.Array]) -> list[list[jax.Array]]:
    return [list(of_layer) for of_layer in zip(*map(jnp.unstack, leaves), strict=True)]


def _rotation(config: ModelConfig, positions_BT: jax.Array) -> Rotation:
    return rotation_angles(positions_BT, config.head_dim, config.rope_theta, jnp.dtype(config.dtype))
