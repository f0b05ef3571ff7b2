"""The TopK language model: a Llama-style stack whose residual stream passes through TopK.

    a  = h + Attention(Norm(h))
    u  = a + MLP(Norm(a))
    h' = TopK_k(u)   in the first L - n_nontopk layers
    h' = u           in the last n_nontopk layers

Nothing bypasses the sparse vector and no norm stands before it. With `n_nontopk = n_layers` the same code
is the Base LM. Dims: B batch, T tokens, D d_model, L layers, S TopK layers, V vocabulary.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.model import attention_backends
from topklm.model.attention import Attention, Rotation, rotation_angles
from topklm.model.layers import Embedding, Linear, RMSNorm, SwiGLU
from topklm.model.topk import MASK_NAME, topk
from topklm.model.topk_gate import gate, relu_topk
from topklm.parallel import ALONE, Parallel

# Reads a layer while it runs: (h before, u before TopK, h' after), each [B, T, D] -> any pytree of arrays.
Tap = Callable[[jax.Array, jax.Array, jax.Array], Any]
# Changes what a layer hands on: (h' [B, T, D], the layer's part of `edits`) -> h'.
Edit = Callable[[jax.Array, Any], jax.Array]
# In place of a layer's TopK: (u [B, T, D], the layer's part of `edits`) -> h'.
Select = Callable[[jax.Array, Any], jax.Array]
Parameters = dict[str, Any]


class Changes(NamedTuple):
    """What is done to layers while they run, as `Transformer.hidden` takes it; None: nothing."""

    select: Select | None = None
    edit: Edit | None = None


class Block(nnx.Module):
    """One layer up to the point where TopK is applied: `h -> a, MLP(Norm(a))`, whose sum is u."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        write_scale = config.init_residual_scale * (2 * config.n_layers) ** -0.5
        self.attention_norm = RMSNorm(config.d_model, epsilon=config.norm_eps)
        self.attention = Attention(config, out_std=write_scale * config.d_model**-0.5, rngs=rngs)
        self.mlp_norm = RMSNorm(config.d_model, epsilon=config.norm_eps)
        self.mlp = SwiGLU(config.d_model, config.d_mlp, down_std=write_scale * config.d_mlp**-0.5, rngs=rngs)

    def __call__(
        self, h_BTD: jax.Array, rotation: Rotation, segment_ids_BT: jax.Array, parallel: Parallel = ALONE
    ) -> tuple[jax.Array, jax.Array]:
        """[B, T, D] -> two of them, which a TopK kernel adds up by itself."""
        x_BTD = parallel.gather_tokens(self.attention_norm(h_BTD))
        mixed_BTD = self.attention(x_BTD, rotation, segment_ids_BT, parallel)
        a_BTD = h_BTD + parallel.scatter_tokens(mixed_BTD)
        x_BTD = parallel.gather_tokens(self.mlp_norm(a_BTD))
        return a_BTD, parallel.scatter_tokens(self.mlp(x_BTD))


class _LayerInputs(NamedTuple):
    """What differs from layer to layer; of all layers, with a leading layer axis."""

    params: nnx.State
    behind_topk: jax.Array | np.ndarray  # bool, whether the layer before ends in a TopK
    ends_in_topk: jax.Array | np.ndarray  # bool, whether this one does
    edits: Any = None  # any pytree


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
        """Next-token logits.

        Args:
            tokens_BT: int32[B, T].
            segment_ids_BT: int32[B, T], which document each token belongs to; default: one document.
            positions_BT: int32[B, T], position inside its document; default: 0, 1, 2, ...

        Returns:
            float32[B, T, V].
        """
        return self.logits(self.hidden(tokens_BT, segment_ids_BT, positions_BT)[0])

    def hidden(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        *,
        tap: Tap | None = None,
        select: Select | None = None,
        edit: Edit | None = None,
        enter: Edit | None = None,
        edits: Any = None,
        parallel: Parallel = ALONE,
    ) -> tuple[jax.Array, Any]:
        """The stack up to and with the final norm.

        Args:
            tokens_BT: int32[B, T].
            segment_ids_BT: As in `__call__`.
            positions_BT: As in `__call__`.
            tap: Called in every layer with (h, u, h'); see `Tap`. It sees h' as `edit` leaves it.
            select: Called in place of each layer's TopK; see `Select`.
            edit: Called in every layer, behind its TopK; see `Edit`.
            enter: Called in every layer with what enters it; as `edit`.
            edits: What they are called with: any pytree of arrays with a leading layer axis [L, ...]. Other
                values of the same shapes need no other program.
            parallel: Inside `jax.shard_map`, the axes to communicate over; B and T are then this device's.

        Returns:
            The normed hidden state [B, T, D] in the compute dtype, ready for `unembedding`, of the residual
            tokens (`Parallel`); and what `tap` returned, each leaf stacked to [L, ...] (None without a tap).
        """
        config = self.config
        dtype = jnp.dtype(config.dtype)
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        rotation = rotation_angles(positions_BT, config.head_dim, config.rope_theta, dtype)
        block_def, stacked = nnx.split(self.blocks)

        # In halves where the input of a layer is kept in any case; a tap would see what is between them.
        in_halves = config.remat != "none" and config.topk_activation == "relu"
        in_halves &= tap is None and select is None and edit is None and enter is None
        in_halves &= config.n_topk_layers > 0

        def layer(sparse: bool | None, h: jax.Array, inputs: _LayerInputs) -> tuple[jax.Array, Any]:
            """Ends in a TopK if sparse; None: if its inputs say so, which are known when the program runs."""
            if enter is not None:
                h = enter(h, inputs.edits)
            if in_halves:
                h = gate(h, inputs.behind_topk)
            block = nnx.merge(block_def, parallel.gather(inputs.params))
            a, written = block(h, rotation, segment_ids_BT, parallel)
            applies = jnp.asarray(inputs.ends_in_topk) if sparse is None else None
            if sparse is False:
                h_next = a + written
            elif select is not None:
                u = a + written
                selected = select(u, inputs.edits)
                h_next = selected if applies is None else jnp.where(applies, selected, u)
            elif in_halves:
                h_next = relu_topk(written, a, applies, config.topk_k, config.topk_backend)
            else:
                keep = topk if applies is None else functools.partial(topk, applies=applies)
                selection = config.topk_k, config.topk_activation, config.topk_backend
                h_next = keep(written, *selection, residual=a)
            if edit is not None:
                h_next = edit(h_next, inputs.edits)
            return h_next, tap(h, a + written, h_next) if tap else None

        scanned = parallel.scan_layers if config.layer_stack == "auto" else config.layer_stack == "scanned"
        run = _scan_layers if scanned else _unroll_layers
        index = np.arange(config.n_layers)
        behind_topk = (index > 0) & (index <= config.n_topk_layers)
        inputs = _LayerInputs(stacked, behind_topk, ends_in_topk=index < config.n_topk_layers, edits=edits)

        def layer_of_kind(sparse: bool | None) -> Callable:
            return _rematerialized(functools.partial(layer, sparse), config, parallel, scanned)

        h_BTD = self.embed(tokens_BT, dtype, parallel)
        h_BTD, taps = run(layer_of_kind, h_BTD, inputs)
        return self.final_norm(h_BTD), taps

    def logits(self, h: jax.Array) -> jax.Array:
        """Of normed hidden states from `hidden`, [..., D] -> float32[..., V]."""
        logits = jnp.matmul(h, self.unembedding().astype(h.dtype), preferred_element_type=jnp.float32)
        return logits[..., : self.config.vocab_size]

    def unembedding(self) -> jax.Array:
        """float32[D, padded_vocab_size]; columns past V stand for no token."""
        return self.embed.embedding[...].T if self.unembed is None else self.unembed.kernel[...]


def create(config: ModelConfig, seed: int) -> Parameters:
    """Freshly initialised parameters as a plain nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(params=seed))))


def bind(config: ModelConfig, params: Parameters) -> Transformer:
    """The model that these parameters make; cheap, meant to be called inside `jax.jit`."""
    return nnx.merge(_definition(config), params)


@functools.cache
def _definition(config: ModelConfig) -> nnx.GraphDef:
    """The static part of a model; its parameters are never allocated."""
    return nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(params=0))))


def _rematerialized(layer: Callable, config: ModelConfig, parallel: Parallel, scanned: bool) -> Callable:
    """The layer with less kept for its backward pass (`config.remat`), to be computed again."""
    policies = jax.checkpoint_policies
    # The mask of a TopK that is not in halves is one byte an entry; without it the search, and the product
    # before it, would run again.
    policy = {
        "none": _all_but_gathered,
        "minimal": policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable,
            policies.save_only_these_names(MASK_NAME, attention_backends.CHECKPOINT_NAME),
        ),
        "full": policies.save_only_these_names(MASK_NAME),
    }[config.remat]
    if config.remat == "none" and parallel.gather is ALONE.gather:
        return layer
    # A scan keeps XLA from merging the two computations by itself, unless it is a scan over one layer.
    prevent_cse = not scanned or config.n_layers == 1
    return jax.checkpoint(layer, policy=policy, prevent_cse=prevent_cse)


def _all_but_gathered(primitive: jax.extend.core.Primitive, *_: Any, **__: Any) -> bool:
    """Whole parameters are gathered again: kept from every layer, they would be what fsdp is to avoid."""
    return primitive.name != "all_gather"


def _unroll_layers(
    layer_of_kind: Callable[[bool], Callable], h: jax.Array, inputs: _LayerInputs
) -> tuple[jax.Array, Any]:
    # unstack, not indexing: its gradient is one concatenation instead of n_layers padded sums.
    leaves, treedef = jax.tree.flatten(inputs)
    by_layer = zip(*[jnp.unstack(leaf) for leaf in leaves], strict=True)
    sparse_layer, dense_layer = layer_of_kind(True), layer_of_kind(False)
    taps = []
    for sparse, layer_leaves in zip(inputs.ends_in_topk, by_layer, strict=True):
        layer = sparse_layer if sparse else dense_layer
        h, seen = layer(h, jax.tree.unflatten(treedef, layer_leaves))
        taps.append(seen)
    return h, jax.tree.map(lambda *per_layer: jnp.stack(per_layer), *taps)


def _scan_layers(
    layer_of_kind: Callable[[bool | None], Callable], h: jax.Array, inputs: _LayerInputs
) -> tuple[jax.Array, Any]:
    # One scan over both kinds: of two, each would take its part out of the stacked parameters by a copy, and
    # their gradients would be put together by another.
    kinds = {bool(sparse) for sparse in inputs.ends_in_topk}
    return jax.lax.scan(layer_of_kind(kinds.pop() if len(kinds) == 1 else None), h, inputs)
