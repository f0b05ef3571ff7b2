"""The KV cache: keys and values of the tokens of sequences, filled by prefill, then token by token.

Sequences stand at the left of their rows, so a token's index in the cache is its position, and nothing to the
right of a sequence is ever looked at. Capacities are rounded up to a few, so that few programs are compiled.

New tokens first go to a small buffer of their own, where all rows write at one index. So the cache itself is
only read while a program makes tokens, and nothing of it is copied; `append_buffer` takes the buffer in.

Where layers are unrolled, the cache is in blocks, and attention reads only those that some sequence has
reached: a product with the first tokens of one array would copy them first, but it reads blocks where they
are. They hold 32 tokens, as many again, twice as many, and so on: the longest sequence leaves less than half
of what is read unused, and a program holds attention over few blocks.

Inside `jax.jit`, but for `by_layer`. Functions of blocks take arrays with a leading layer axis too. Dims: L
layers, B rows, P tokens of prompts, C capacity of the cache, S of a block, N of the buffer, D d_model, K key
heads of width d.
"""

from collections.abc import Callable, Sequence
import functools
import itertools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.model import transformer
from topklm.model.block import LayerHooks, TokenInput, end_layer
from topklm.model.cached_attention import (
    FusedWeights,
    KeysAndValues,
    KVBlock,
    attend_over,
    decode_step,
    keys_and_values,
)
from topklm.parallel import ALONE

STEPS = 16  # N
_SHORTEST_BLOCK = 32  # tokens

# Of the rows of the matrices after a TopK, tokens together read at most this share, or else all of them.
SPARSE_SHARE = 0.5

_JOINED = ("query", "key", "value", "gate", "up")  # modules whose matrices stand side by side

Blocks = tuple[KeysAndValues, ...]  # [..., B, K, S, d] each
# Of every layer: one array with a leading layer axis where layers are scanned, else a tuple of L.
Layers = Any
Filled = Any  # `KeysAndValues` of each layer, [B, K, P, d] each, in the same form
Buffer = Any  # the same with N tokens
Cache = Any  # `Blocks` of each layer in the same form, C tokens together


@functools.partial(jax.jit, static_argnums=0)
def by_layer(config: ModelConfig, params: transformer.Parameters) -> Layers:
    """Returns the parameters of the layers in the form that `step` reads fastest.

    That is a copy of them, to be made once for a model, not once a token: matrices in the compute dtype, to
    which each product would cast them, and one array for each layer where layers are not scanned.
    """
    blocks = transformer.bind(config, params).blocks
    attention, mlp = blocks.attention, blocks.mlp
    linears = (attention.query, attention.key, attention.value), (mlp.gate, mlp.up)
    side_by_side = [jnp.concatenate([linear.kernel[...] for linear in some], -1) for some in linears]
    leaves = [
        # Those in the joined ones are not kept twice. A path ends in the module and its parameter.
        jnp.zeros((config.n_layers, 0)) if path[-2].key in _JOINED else leaf
        for path, leaf in jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(blocks)))
    ]
    dtype = jnp.dtype(config.dtype)
    # Norms have one axis besides that of the layers, and stay as they are: they multiply in float32.
    leaves = [leaf.astype(dtype) if leaf.ndim > 2 else leaf for leaf in (*leaves, *side_by_side)]
    if _scans(config):
        return leaves
    return [list(of_layer) for of_layer in zip(*map(jnp.unstack, leaves), strict=True)]


def prefill(
    model: transformer.Transformer, tokens_BP: jax.Array, lengths_B: jax.Array, hooks: LayerHooks
) -> tuple[jax.Array, Filled]:
    """Runs prompts int32[B, P] at the left of their rows; tokens to their right do not matter.

    A prompt has at least one token. The hooks are called with the number of the layer. Returns the last
    tokens' normed hidden state, [B, D], and all keys and values for `with_capacity`.
    """
    numbers = jnp.arange(model.config.n_layers)
    h_BPD, entering_LBPD = model.hidden(
        tokens_BP, capture=lambda h, _u, _h_next: h, hooks=hooks, hook_inputs=numbers
    )
    h_BD = jnp.take_along_axis(h_BPD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    rotation = model.rotation(jnp.broadcast_to(jnp.arange(tokens_BP.shape[1]), tokens_BP.shape))

    _, token_BPD = model.embedded(tokens_BP)

    # Attention has made them of the same states, but hands nothing on.
    def of_layer(number: int | jax.Array) -> KeysAndValues:
        token = TokenInput.of_layer(token_BPD, *model.topk_around(number))
        return keys_and_values(model.block(number), entering_LBPD[number], rotation, token)

    if _scans(model.config):
        return h_BD, jax.lax.map(of_layer, numbers)
    return h_BD, tuple(map(of_layer, range(model.config.n_layers)))


def with_capacity(config: ModelConfig, filled: Filled, capacity: int) -> Cache:
    """Makes a cache of prefilled keys and values, for sequences of so many tokens."""
    sizes = (capacity,) if _scans(config) else block_sizes(capacity)
    return _of_layers(lambda layer: split_blocks(layer, sizes), filled)


def resize(config: ModelConfig, cache: Cache, capacity: int) -> Cache:
    """Gives a cache another capacity."""
    return with_capacity(config, _of_layers(join_blocks, cache), capacity)


def capacity(cache: Cache) -> int:
    """Returns C, the tokens of each sequence that the cache can hold."""
    return sum(map(block_size, _any_layer(cache)))


def empty_buffer(cache: Cache) -> Buffer:
    """Makes an empty buffer for N new tokens."""

    def of_layer(blocks: Blocks) -> KeysAndValues:
        return jax.tree.map(lambda x: jnp.zeros((*x.shape[:-2], STEPS, x.shape[-1]), x.dtype), blocks[0])

    return _of_layers(of_layer, cache)


def step(
    model: transformer.Transformer,
    layers: Layers,
    cache: Cache,
    new: Buffer,
    tokens_B: jax.Array,
    lengths_B: jax.Array,
    number: jax.Array,
    hooks: LayerHooks,
    n_active: int,
) -> tuple[jax.Array, Buffer]:
    """Runs one token of each row, int32[B], after those in the cache and buffer, and adds it to the buffer.

    Of the model's blocks only the structure is looked at; `layers` are their parameters, from `by_layer`. The
    cache holds `lengths_B` tokens of each row, int32[B], the buffer `number` of all, less than N. A TopK
    layer's output has at most `n_active` entries that are not zero. Returns the normed hidden state, [B, D],
    and the buffer.
    """
    config = model.config
    # Reading some rows of the weights costs more for each token than reading all of them once for all.
    few = len(tokens_B) * n_active <= SPARSE_SHARE * config.d_model and not _scans(config)
    block_def, stacked = nnx.split(model.blocks)
    treedef = jax.tree.structure(stacked)
    rotation = model.rotation((lengths_B + number)[:, None])
    masks = block_masks(_any_layer(cache), lengths_B)
    seen_11N = (jnp.arange(STEPS) <= number)[None, None]

    def layer(
        h_B1D: jax.Array, leaves: Any, past: Blocks, new: KeysAndValues, layer: Any, sparse: Any
    ) -> tuple[jax.Array, KeysAndValues]:
        def attend(q_BKG1d: jax.Array, own: KeysAndValues) -> tuple[jax.Array, KeysAndValues]:
            def put(x: jax.Array, one: jax.Array) -> jax.Array:
                return jax.lax.dynamic_update_slice_in_dim(x, one, number, axis=-2)

            with_own = jax.tree.map(put, new, own)
            kept_blocks = [KVBlock(kept, *mask) for kept, mask in zip(past, masks, strict=True)]
            return attend_over(q_BKG1d, [*kept_blocks, KVBlock(with_own, seen_11N)]), with_own

        *parameters, query_key_value, gate_up = leaves
        block = nnx.merge(block_def, jax.tree.unflatten(treedef, parameters))
        after_topk = few and token_B1D is None and 0 < layer <= config.n_topk_layers
        entries = n_active if after_topk else None
        token = TokenInput.of_layer(token_B1D, *model.topk_around(layer))
        a_B1D, written_B1D, with_own = decode_step(
            block, h_B1D, rotation, attend, entries, FusedWeights(query_key_value, gate_up), token
        )
        return end_layer(config, a_B1D, written_B1D, sparse, hooks, layer, sum_first=True), with_own

    h_B1D, token_B1D = model.embedded(tokens_B[:, None])
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


def append_buffer(cache: Cache, new: Buffer, lengths_B: jax.Array) -> Cache:
    """Writes the buffer after the tokens of each row; entries that a row does not use lie after its end."""
    return _of_layers(lambda blocks, new: append_tokens(blocks, new, lengths_B), cache, new)


def block_sizes(capacity: int) -> tuple[int, ...]:
    """Returns the sizes of the blocks of a cache for sequences of so many tokens."""
    ends = [0]
    while ends[-1] < capacity:
        ends.append(min(capacity, max(_SHORTEST_BLOCK, 2 * ends[-1])))
    return tuple(end - begin for begin, end in itertools.pairwise(ends))


def block_size(block: KeysAndValues) -> int:
    """Returns S."""
    return block.keys.shape[-2]


def split_blocks(whole: KeysAndValues, sizes: Sequence[int]) -> Blocks:
    """Splits keys and values [..., B, K, T, d] into blocks; missing tokens are zeros, more are left out."""

    def split(x: jax.Array) -> list[jax.Array]:
        widths = [(0, 0)] * x.ndim
        widths[-2] = (0, max(0, sum(sizes) - x.shape[-2]))
        return jnp.split(jnp.pad(x, widths)[..., : sum(sizes), :], np.cumsum(sizes)[:-1], axis=-2)

    return tuple(map(KeysAndValues, *map(split, whole)))


def join_blocks(blocks: Blocks) -> KeysAndValues:
    """Returns the blocks as one, [..., B, K, C, d]."""
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=-2), *blocks)


def block_masks(blocks: Blocks, lengths_B: jax.Array) -> list[tuple[jax.Array, jax.Array | bool]]:
    """Returns for each block which of it are tokens, bool[B, 1, S], and whether any are; in the first always.

    `lengths_B`, int32[B], are the tokens of each row.
    """
    longest = lengths_B.max()

    def of_block(begin: int, block: KeysAndValues) -> tuple[jax.Array, jax.Array | bool]:
        mask_B1S = (begin + jnp.arange(block_size(block)) < lengths_B[:, None])[:, None]
        return mask_B1S, longest > begin if begin else True

    return [of_block(begin, block) for begin, block in zip(_begins(blocks), blocks, strict=True)]


def append_tokens(blocks: Blocks, new: KeysAndValues, lengths_B: jax.Array) -> Blocks:
    """Writes new tokens [..., B, K, N, d] after those of each row; those past the capacity are left out."""
    return tuple(
        jax.tree.map(lambda x, more, begin=begin: _append(x, more, lengths_B - begin), block, new)
        for begin, block in zip(_begins(blocks), blocks, strict=True)
    )


def _begins(blocks: Blocks) -> list[int]:
    """Returns the position at which each block begins."""
    return [0, *itertools.accumulate(block_size(block) for block in blocks[:-1])]


def _append(x: jax.Array, new: jax.Array, begins_B: jax.Array) -> jax.Array:
    """Writes new tokens into a block, from a position on that may lie outside of it."""

    def of_row(x_KSd: jax.Array, new_KNd: jax.Array, begin: jax.Array) -> jax.Array:
        # Each position is chosen from two: XLA is slow on CPUs at writing where the new ones belong.
        which_S = jnp.arange(x_KSd.shape[1]) - begin
        n = new_KNd.shape[1]
        moved_KSd = jnp.take(new_KNd, jnp.clip(which_S, 0, n - 1), axis=1)
        return jnp.where(((which_S >= 0) & (which_S < n))[:, None], moved_KSd, x_KSd)

    of_rows = jax.vmap(of_row)
    return (jax.vmap(of_rows, in_axes=(0, 0, None)) if x.ndim == 5 else of_rows)(x, new, begins_B)


def _of_layers(function: Callable[..., Any], *trees: Any) -> Any:
    """Calls a function with each layer, or with all at once where they are in the same arrays."""
    if _one_for_all_layers(trees[0]):
        return function(*trees)
    return tuple(map(function, *trees))


def _any_layer(cache: Cache) -> Blocks:
    """Returns the blocks of one layer; their number and sizes are those of all."""
    return cache if _one_for_all_layers(cache) else cache[0]


def _one_for_all_layers(tree: Any) -> bool:
    return jax.tree.leaves(tree)[0].ndim == 5


def _scans(config: ModelConfig) -> bool:
    """Returns whether layers are scanned, as `Transformer.hidden` decides it on one device."""
    return ALONE.scan_layers if config.layer_stack == "auto" else config.layer_stack == "scanned"
