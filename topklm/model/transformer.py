"""The TopK language model: a Llama-style stack of `Block`s whose residual stream passes through TopK.

Nothing bypasses the sparse vector and no norm stands before it. With `n_nontopk = n_layers` the same code
is the Base LM. Dims: B batch, T tokens, D d_model, L layers, S TopK layers, V vocabulary.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple, TypeVar

from flax import nnx
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.model import attention
from topklm.model.attention import Rotation, attention_weights, rotation_angles
from topklm.model.block import (
    NO_HOOKS,
    Block,
    CaptureFn,
    LayerHooks,
    TokenInput,
    end_layer,
    mask_gradient_by_output,
    topk_input,
    topk_masked_by_next,
)
from topklm.model.layers import Embedding, Linear, RMSNorm
from topklm.model.topk import MASK_NAME, topk
from topklm.parallel import ALONE, Parallel

Parameters = dict[str, Any]

WIDENED_WRITE = 0.1  # of the initial size, for parameters that write new coordinates

_Result = TypeVar("_Result")


class _LayerInputs(NamedTuple):
    """Everything that differs from layer to layer; of all layers, with a leading layer axis."""

    params: nnx.State
    follows_topk: jax.Array | np.ndarray  # bool, whether the layer before ends in a TopK
    ends_in_topk: jax.Array | np.ndarray  # bool, whether this one does
    hook_inputs: Any  # any pytree


class Transformer(nnx.Module):
    """Decoder-only language model with TopK on the residual stream.

    The parameters of all blocks are stacked on a leading layer axis, whether the stack is scanned or
    unrolled (`config.layer_stack`), so a checkpoint does not depend on that choice.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        if config.vocab_size < 1:
            raise ValueError(f"vocab_size = {config.vocab_size}: must be set before the model is built")

        @nnx.split_rngs(splits=config.n_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        d, v = config.d_model, config.vocab_size
        self.config = config
        rows = config.padded_vocab_size
        self.embed = Embedding(v, d, rows=rows, std=config.init_embed_std, rngs=rngs)
        self.blocks = stacked_blocks(rngs)
        self.final_norm = RMSNorm(d, epsilon=config.norm_eps)
        self.unembed = None if config.tie_embeddings else Linear(d, v, std=d**-0.5, rngs=rngs, columns=rows)

    def __call__(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Computes next-token logits, float32[B, T, V], of tokens int32[B, T].

        Segment ids, int32[B, T], say which document each token belongs to, default one; positions count
        inside it.
        """
        return self.logits(self.hidden(tokens_BT, segment_ids_BT, positions_BT)[0])

    def hidden(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        *,
        capture: CaptureFn | None = None,
        hooks: LayerHooks = NO_HOOKS,
        hook_inputs: Any = None,
        parallel: Parallel = ALONE,
    ) -> tuple[jax.Array, Any]:
        """Runs the stack, up to and with the final norm, on tokens as `__call__` does.

        In every layer `capture` is called, which sees h and h' as the hooks leave them, and the hooks, with
        `hook_inputs`: any pytree of arrays with a leading layer axis [L, ...]. Other values of the same
        shapes need no other program. Inside `jax.shard_map`, `parallel` has the axes to communicate over; B
        and T are then this device's.

        Returns the normed hidden state [B, T, D] in the compute dtype, ready for `unembedding`, of the
        residual tokens (`Parallel`); and the results of `capture`, each leaf stacked to [L, ...] (or None).
        """
        config = self.config
        segment_ids_BT, positions_BT = self._filled(tokens_BT, segment_ids_BT, positions_BT)
        rotation = self.rotation(positions_BT)
        block_def, stacked = nnx.split(self.blocks)
        h_BTD, token_BTD = self.embedded(tokens_BT, parallel)

        # Only where the input of a layer is kept in any case, and nobody looks between two layers.
        masked_by_next = config.remat != "none" and config.topk_activation == "relu"
        masked_by_next &= capture is None and hooks == NO_HOOKS and config.n_topk_layers > 0
        masked_by_next &= not config.topk_centred
        topk_fn = topk_masked_by_next if masked_by_next else topk

        def layer(sparse: bool | None, h: jax.Array, inputs: _LayerInputs) -> tuple[jax.Array, Any]:
            """Ends in a TopK if sparse; None: if its inputs say so, which are known when the program runs."""
            if hooks.input is not None:
                h = hooks.input(h, inputs.hook_inputs)
            if masked_by_next:
                h = mask_gradient_by_output(h, inputs.follows_topk)
            block = nnx.merge(block_def, parallel.gather(inputs.params))
            ends_in_topk = inputs.ends_in_topk if sparse is None else sparse
            token = TokenInput.of_layer(token_BTD, ends_in_topk, inputs.follows_topk)
            a, written = block(h, rotation, segment_ids_BT, parallel, token)
            h_next = end_layer(config, a, written, ends_in_topk, hooks, inputs.hook_inputs, topk=topk_fn)
            if capture is None:
                return h_next, None
            return h_next, capture(h, topk_input(config, a, written, ends_in_topk), h_next)

        scanned = parallel.scan_layers if config.layer_stack == "auto" else config.layer_stack == "scanned"
        run = _scan_layers if scanned else _unroll_layers
        ends_in_topk, follows_topk = self.topk_around(np.arange(config.n_layers))
        inputs = _LayerInputs(stacked, follows_topk, ends_in_topk, hook_inputs)

        def layer_of_kind(sparse: bool | None) -> Callable:
            return _rematerialized(functools.partial(layer, sparse), config, parallel, scanned)

        h_BTD, captured = run(layer_of_kind, h_BTD, inputs)
        return self.final_norm(h_BTD), captured

    def map_attention(
        self,
        function: Callable[[jax.Array], Any],
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
    ) -> Any:
        """Applies a function to the attention weights of each layer, float32[B, H, T, T]: query, then key.

        Arguments are those of `__call__`. The weights of one layer are in memory at a time. Returns the
        function's results, each leaf stacked to [L, ...].
        """
        segment_ids_BT, positions_BT = self._filled(tokens_BT, segment_ids_BT, positions_BT)
        h_LBTD = self.hidden(tokens_BT, segment_ids_BT, positions_BT, capture=lambda h, u, h_next: h)[1]
        rotation, (_, token_BTD) = self.rotation(positions_BT), self.embedded(tokens_BT)
        block_def, stacked = nnx.split(self.blocks)

        def of_layer(inputs: tuple) -> Any:
            params, h_BTD, ends_in_topk, follows_topk = inputs
            block = nnx.merge(block_def, params)
            x_BTD = block.normed_input(h_BTD, TokenInput.of_layer(token_BTD, ends_in_topk, follows_topk))
            q, k, _ = block.attention.project(x_BTD, rotation)
            return function(attention_weights(q, k, segment_ids_BT))

        return jax.lax.map(of_layer, (stacked, h_LBTD, *self.topk_around(jnp.arange(self.config.n_layers))))

    def _filled(
        self, tokens_BT: jax.Array, segment_ids_BT: jax.Array | None, positions_BT: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns segment ids and positions, those of rows that are one document where they are None."""
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        return segment_ids_BT, positions_BT

    def embedded(
        self, tokens_BT: jax.Array, parallel: Parallel = ALONE
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns the stream that enters the first layer, [B, T, D], and the token of `TokenInput`."""
        token_BTD = self.embed(tokens_BT, jnp.dtype(self.config.dtype), parallel)
        if self.config.token_input == "first" or not self.config.n_topk_layers:
            return token_BTD, None
        return jnp.zeros_like(token_BTD), token_BTD

    def block(self, layer: int | jax.Array) -> Block:
        """Returns one layer of the stack; its number may be known only when the program runs."""
        definition, stacked = nnx.split(self.blocks)
        return nnx.merge(definition, jax.tree.map(lambda leaf: leaf[layer], stacked))

    def topk_around(self, layer: int | jax.Array | np.ndarray) -> tuple[Any, Any]:
        """Tells whether a layer ends in a TopK, and whether the layer before does; of numbers, arrays."""
        s = self.config.n_topk_layers
        return layer < s, (layer > 0) & (layer <= s)

    def rotation(self, positions_BT: jax.Array) -> Rotation:
        """Returns the rotary embedding of positions int32[B, T], in the compute dtype."""
        return rotation_angles(positions_BT, self.config, jnp.dtype(self.config.dtype))

    def logits(self, h: jax.Array) -> jax.Array:
        """Maps normed hidden states from `hidden`, [..., D], to logits float32[..., V]."""
        logits = jnp.matmul(h, self.unembedding().astype(h.dtype), preferred_element_type=jnp.float32)
        return logits[..., : self.config.vocab_size]

    def unembedding(self) -> jax.Array:
        """Returns float32[D, padded_vocab_size]; columns past V stand for no token."""
        return self.embed.embedding[...].T if self.unembed is None else self.unembed.kernel[...]


def create(config: ModelConfig, seed: int) -> Parameters:
    """Initialises parameters, a plain nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(params=seed))))


def widened(config: ModelConfig, seed: int, params: Parameters) -> Parameters:
    """Returns the parameters of a model of this config that begins as a narrower one, of fewer coordinates.

    New coordinates are read as at initialisation, by seed, and written a tenth as strongly (so are those of a
    tied embedding, both ways); while they are small, norms give the others what they gave before. They come
    last, so `topk_groups` are to grow at their end.
    """
    d_narrow, d = params["embed"]["embedding"].shape[1], config.d_model

    def of(path: tuple, fresh: jax.Array, old: jax.Array) -> jax.Array:
        module, name = path[-2].key, path[-1].key
        if name == "scale" and fresh.shape != old.shape:
            fresh, old = (x * (d_narrow / d) ** 0.5 for x in (fresh, old))
        if name == "embedding" or module in ("out", "down"):
            fresh = WIDENED_WRITE * fresh
        return fresh.at[tuple(map(slice, old.shape))].set(old)

    return jax.tree_util.tree_map_with_path(of, create(config, seed), params)


def bind(config: ModelConfig, params: Parameters) -> Transformer:
    """Makes a model of parameters; cheap, meant to be called inside `jax.jit`."""
    return nnx.merge(_definition(config), params)


@functools.cache
def _definition(config: ModelConfig) -> nnx.GraphDef:
    """Returns the static part of a model; its parameters are never allocated."""
    return nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(params=0))))


def jit_in_float32(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Compiles a function of (config, ...) in float32, for small effects, whatever the model's dtype."""

    @functools.partial(jax.jit, static_argnums=0)
    @functools.wraps(function)
    def run(config: ModelConfig, *arguments: Any) -> _Result:
        with jax.default_matmul_precision("float32"):
            return function(dataclasses.replace(config, dtype="float32"), *arguments)

    return run


def _rematerialized(layer: Callable, config: ModelConfig, parallel: Parallel, scanned: bool) -> Callable:
    """Wraps a layer so that less is kept for its backward pass, and computed again (`config.remat`)."""
    policies = jax.checkpoint_policies
    # The mask of a TopK whose gradient the next layer does not mask is one byte an entry; without it the
    # search, and the product before it, would run again.
    policy = {
        "none": _all_but_gathered,
        "minimal": policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable,
            policies.save_only_these_names(MASK_NAME, attention.CHECKPOINT_NAME),
        ),
        "full": policies.save_only_these_names(MASK_NAME),
    }[config.remat]
    if config.remat == "none" and parallel.gather is ALONE.gather:
        return layer
    # A scan keeps XLA from merging the two computations by itself, unless it is a scan over one layer.
    prevent_cse = not scanned or config.n_layers == 1
    return jax.checkpoint(layer, policy=policy, prevent_cse=prevent_cse)


def _all_but_gathered(primitive: jax.extend.core.Primitive, *_: Any, **__: Any) -> bool:
    """Keeps all but gathered parameters: kept from every layer, they would be what fsdp is to avoid."""
    return primitive.name != "all_gather"


def _unroll_layers(
    layer_of_kind: Callable[[bool], Callable], h: jax.Array, inputs: _LayerInputs
) -> tuple[jax.Array, Any]:
    # unstack, not indexing: its gradient is one concatenation instead of n_layers padded sums.
    leaves, treedef = jax.tree.flatten(inputs)
    by_layer = zip(*[jnp.unstack(leaf) for leaf in leaves], strict=True)
    sparse_layer, dense_layer = layer_of_kind(True), layer_of_kind(False)
    captured = []
    for sparse, layer_leaves in zip(inputs.ends_in_topk, by_layer, strict=True):
        layer = sparse_layer if sparse else dense_layer
        h, seen = layer(h, jax.tree.unflatten(treedef, layer_leaves))
        captured.append(seen)
    return h, jax.tree.map(lambda *per_layer: jnp.stack(per_layer), *captured)


def _scan_layers(
    layer_of_kind: Callable[[bool | None], Callable], h: jax.Array, inputs: _LayerInputs
) -> tuple[jax.Array, Any]:
    # One scan over both kinds: of two, each would take its part out of the stacked parameters by a copy, and
    # their gradients would be put together by another.
    kinds = {bool(sparse) for sparse in inputs.ends_in_topk}
    return jax.lax.scan(layer_of_kind(kinds.pop() if len(kinds) == 1 else None), h, inputs)
