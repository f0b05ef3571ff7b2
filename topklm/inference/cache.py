"""Keys and values of the tokens that a text holds already: filled by whole prompts, then token by token.

Texts stand at the left of their rows, so a token's place in the cache is its position, and what stands to
the right of a text is never looked at. Sizes are rounded up to a few, so that few programs are compiled.

New tokens first go to a small buffer of their own, where all rows write at one index. So the cache itself
is only read while a program makes tokens, and nothing of it is copied; `merged` takes the buffer in. Where
layers are unrolled, the cache is in `parts`, and attention reads only those that are in use.

Inside `jax.jit`, but for `bucket` and `by_layer`. Dims: L layers, B rows, P places of prompts, C places of
the cache, N of the buffer, D d_model, K key heads of width d.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.inference import parts as parts_lib
from topklm.inference.parts import Parts
from topklm.model import decode, transformer
from topklm.model.attention import Rotation, rotation_angles
from topklm.model.decode import Joined, KeysAndValues
from topklm.model.topk import topk
from topklm.model.transformer import Changes
from topklm.parallel import ALONE

SMALLEST_BUCKET = 16
STEPS = 16  # N

# Of the rows of the matrices behind a TopK, tokens together read at most this share, or else all of them.
SPARSE_SHARE = 0.5

_JOINED = ("query", "key", "value", "gate", "up")  # modules whose matrices stand side by side

# Of every layer: one array with a leading layer axis where layers are scanned, else a tuple of L.
Layers = Any
Filled = Any  # `KeysAndValues` of each layer, [B, K, P, d] each, in the same form
Buffer = Any  # the same with N places
Cache = Any  # `Parts` of each layer in the same form, C places together


def bucket(length: int, context_length: int) -> int:
    """The power of two from 16 up that holds a length, but never more than the context."""
    size = SMALLEST_BUCKET
    while size < length:
        size *= 2
    return min(size, context_length)


def room_for(length: int, context_length: int) -> int:
    """The power of two from 16 up, or one and a half times one, that holds a text; at most the context.

    Finer than `bucket`, for places take memory, and some are read though no text has come to them.
    """
    size = bucket(length, context_length)
    return size * 3 // 4 if size > SMALLEST_BUCKET and length <= size * 3 // 4 else size


@functools.partial(jax.jit, static_argnums=0)
def by_layer(config: ModelConfig, params: transformer.Parameters) -> Layers:
    """The parameters of the blocks in the form in which `step` reads them fastest.

    That is a copy of them, to be made once for a model, not once a token: matrices in the compute dtype, to
    which each product would cast them, and one array for each layer where layers are not scanned.
    """
    blocks = transformer.bind(config, params).blocks
    attention, mlp = blocks.attention, blocks.mlp
    side_by_side = Joined(
        jnp.concatenate(
            [linear.kernel[...] for linear in (attention.query, attention.key, attention.value)], -1
        ),
        jnp.concatenate([mlp.gate.kernel[...], mlp.up.kernel[...]], -1),
    )
    leaves = [
        # What stands in the joined ones is not kept twice.
        jnp.zeros((config.n_layers, 0)) if _module(path) in _JOINED else leaf
        for path, leaf in jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(blocks)))
    ]
    dtype = jnp.dtype(config.dtype)
    # Norms have one axis besides that of the layers, and stay as they are: they multiply in float32.
    leaves = [leaf.astype(dtype) if leaf.ndim > 2 else leaf for leaf in (*leaves, *side_by_side)]
    return leaves if _scans(config) else _unstack(leaves)


def _module(path: tuple) -> str:
    """The name of the module that a parameter belongs to."""
    return path[-2].key


def prefill(
    model: transformer.Transformer, tokens_BP: jax.Array, lengths_B: jax.Array, changes: Changes
) -> tuple[jax.Array, Filled]:
    """Runs whole texts.

    Args:
        model: As `transformer.bind` gives it.
        tokens_BP: int32[B, P], each text at the left; what is to its right does not matter.
        lengths_B: int32[B], tokens of each text, at least 1.
        changes: As in `Transformer.hidden`, called with the number of the layer.

    Returns:
        Of each row's last token the normed hidden state, [B, D]; and keys and values of all, for `with_room`.
    """
    config = model.config

    def keep(h: jax.Array, _u: jax.Array, _h_next: jax.Array) -> jax.Array:
        return h

    numbers = jnp.arange(config.n_layers)
    h_BPD, entering_LBPD = model.hidden(tokens_BP, tap=keep, **changes._asdict(), edits=numbers)
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


def with_room(config: ModelConfig, filled: Filled, size: int) -> Cache:
    """A cache of so many places for texts that have been run."""
    sizes = (size,) if _scans(config) else parts_lib.sizes(size)
    return _of_layers(lambda layer: parts_lib.cut(layer, sizes), filled)


def resized(config: ModelConfig, cache: Cache, size: int) -> Cache:
    """A cache with so many places in place of those that it has."""
    return with_room(config, _of_layers(parts_lib.joined, cache), size)


def room(cache: Cache) -> int:
    """C: tokens that a text may have whose keys and values are in the cache."""
    return sum(map(parts_lib.size, _any_layer(cache)))


def buffer(cache: Cache) -> Buffer:
    """An empty buffer for new tokens, N places."""

    def of_layer(parts: Parts) -> KeysAndValues:
        return jax.tree.map(lambda x: jnp.zeros((*x.shape[:-2], STEPS, x.shape[-1]), x.dtype), parts[0])

    return _of_layers(of_layer, cache)


def step(
    model: transformer.Transformer,
    layers: Layers,
    cache: Cache,
    new: Buffer,
    tokens_B: jax.Array,
    lengths_B: jax.Array,
    number: jax.Array,
    changes: Changes,
    n_active: int,
) -> tuple[jax.Array, Buffer]:
    """Runs one token of each row behind those in the cache and the buffer, and adds it to the buffer.

    Args:
        model: As `transformer.bind` gives it; of its blocks only the structure is looked at.
        layers: Their parameters, from `by_layer`.
        cache: Of the tokens before those in the buffer.
        new: The buffer.
        tokens_B: int32[B].
        lengths_B: int32[B], tokens of each row that are in the cache.
        number: int32, how many are in the buffer, less than N.
        changes: As in `prefill`.
        n_active: Entries that are not zero in what a layer with TopK hands on, at most.

    Returns:
        The normed hidden state, [B, D], and the buffer.
    """
    config = model.config
    # Reading some rows of the weights costs more for each token than reading all of them once for all.
    few = len(tokens_B) * n_active <= SPARSE_SHARE * config.d_model and not _scans(config)
    block_def, stacked = nnx.split(model.blocks)
    treedef = jax.tree.structure(stacked)
    rotation = _rotation(config, (lengths_B + number)[:, None])
    seen = parts_lib.seen(_any_layer(cache), lengths_B)
    seen_11N = (jnp.arange(STEPS) <= number)[None, None]

    def layer(
        h_B1D: jax.Array, leaves: Any, past: Parts, new: KeysAndValues, layer: Any, sparse: Any
    ) -> tuple[jax.Array, KeysAndValues]:
        def attend(q_BKG1d: jax.Array, own: KeysAndValues) -> tuple[jax.Array, KeysAndValues]:
            def put(x: jax.Array, one: jax.Array) -> jax.Array:
                return jax.lax.dynamic_update_slice_in_dim(x, one, number, axis=-2)

            with_own = jax.tree.map(put, new, own)
            parts = [decode.Part(kept, *of_part) for kept, of_part in zip(past, seen, strict=True)]
            return decode.over(q_BKG1d, [*parts, decode.Part(with_own, seen_11N)]), with_own

        *parameters, query_key_value, gate_up = leaves
        block = nnx.merge(block_def, jax.tree.unflatten(treedef, parameters))
        behind_topk = few and 0 < layer <= config.n_topk_layers
        entries = n_active if behind_topk else None
        a_B1D, written_B1D, with_own = decode.step(
            block, h_B1D, rotation, attend, entries, Joined(query_key_value, gate_up)
        )
        h_B1D = _ended(config, a_B1D, written_B1D, layer, sparse, changes)
        return h_B1D, with_own

    h_B1D = model.embed(tokens_B[:, None], jnp.dtype(config.dtype))
    if _scans(config):
        numbers = np.arange(config.n_layers)
        inputs = layers, cache, new, numbers, numbers < config.n_topk_layers
        h_B1D, new = jax.lax.scan(lambda h, inputs: layer(h, *inputs), h_B1D, inputs)
    else:
        of_layers = []
        for i, (leaves, past, of_layer) in enumerate(zip(layers, cache, new, strict=True)):
            h_B1D, with_own = layer(h_B1D, leaves, past, of_layer, i, i < config.n_topk_layers)
            of_layers.append(with_own)
        new = tuple(of_layers)
    return model.final_norm(h_B1D)[:, 0], new


def merged(cache: Cache, new: Buffer, lengths_B: jax.Array) -> Cache:
    """The cache with the buffer behind each row's text; what a row has no use for lies behind its end."""
    return _of_layers(lambda parts, new: parts_lib.put(parts, new, lengths_B), cache, new)


def _of_layers(function: Callable[..., Any], *trees: Any) -> Any:
    """What a function makes of each layer, or of all at once where they are in the same arrays."""
    if _one_for_all_layers(trees[0]):
        return function(*trees)
    return tuple(map(function, *trees))


def _any_layer(cache: Cache) -> Parts:
    """Of which the number and sizes of parts are those of all."""
    return cache if _one_for_all_layers(cache) else cache[0]


def _one_for_all_layers(tree: Any) -> bool:
    return jax.tree.leaves(tree)[0].ndim == 5


def _ended(
    config: ModelConfig,
    a_B1D: jax.Array,
    written_B1D: jax.Array,
    layer: Any,
    sparse: Any,
    changes: Changes,
) -> jax.Array:
    """What a layer hands on; `sparse`, whether it ends in a TopK, may be known only when the program runs."""
    known = isinstance(sparse, bool)
    if known and not sparse:
        h_B1D = a_B1D + written_B1D
    else:
        # Made once: fused into the search, it would be made again for each pass.
        u_B1D = jax.lax.optimization_barrier(a_B1D + written_B1D)
        if changes.select is not None:
            h_B1D = changes.select(u_B1D, layer)
        else:
            h_B1D = topk(u_B1D, config.topk_k, config.topk_activation, config.topk_backend)
        h_B1D = h_B1D if known else jnp.where(sparse, h_B1D, u_B1D)
    return h_B1D if changes.edit is None else changes.edit(h_B1D, layer)


def _scans(config: ModelConfig) -> bool:
    """As `Transformer.hidden` decides it on one device."""
    return ALONE.scan_layers if config.layer_stack == "auto" else config.layer_stack == "scanned"


def _unstack(leaves: list[jax.Array]) -> list[list[jax.Array]]:
    return [list(of_layer) for of_layer in zip(*map(jnp.unstack, leaves), strict=True)]


def _rotation(config: ModelConfig, positions_BT: jax.Array) -> Rotation:
    return rotation_angles(positions_BT, config.head_dim, config.rope_theta, jnp.dtype(config.dtype))
