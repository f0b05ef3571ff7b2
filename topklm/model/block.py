"""One layer: attention, MLP, and the one function that ends a layer with its TopK and hooks.

    a  = h + Attention(Norm(h))
    u  = a + MLP(Norm(a))
    h' = TopK_k(u), or u in the last n_nontopk layers

With `topk_centred`, u is less its mean over the neurons that compete, in layers with TopK.
With `token_input = "every"` the token's embedding e is not in h, which is 0 at first. Layers with TopK read
it beside the stream, and the first dense layer adds it after its attention, so that of other tokens this
layer sees their neurons alone. Without a TopK layer, both are the same Base LM.

    a  = h + Attention(Norm(h + e)),   u = a + MLP(Norm(a + e))       in layers with TopK
    a  = h + Attention(Norm(h)) + e                                   in the first dense layer

Training, prefill, decoding, the steering survey, ablation and the Jacobian all run layers through `Block` and
`end_layer`. Dims: B batch, T tokens, D d_model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.model.attention import Attention, Rotation
from topklm.model.layers import RMSNorm, SwiGLU
from topklm.model.topk import centred, model_topk, topk
from topklm.model.topk_threshold import order_key
from topklm.parallel import ALONE, Parallel

# Reads a layer while it runs: (h before, u before TopK, h' after), each [B, T, D] -> any pytree of arrays.
CaptureFn = Callable[[jax.Array, jax.Array, jax.Array], Any]
# Changes a residual state: (h [B, T, D], the layer's part of `hook_inputs`) -> h.
HookFn = Callable[[jax.Array, Any], jax.Array]
# Takes the place of a layer's TopK: (u [B, T, D], the layer's part of `hook_inputs`) -> h'.
TopKOverride = Callable[[jax.Array, Any], jax.Array]


class LayerHooks(NamedTuple):
    """Functions that change what layers compute, called in every layer while it runs; None: none."""

    topk: TopKOverride | None = None
    output: HookFn | None = None  # of the state after its TopK
    input: HookFn | None = None  # of the state that enters the layer; decoding does not call it


NO_HOOKS = LayerHooks()


class TokenInput(NamedTuple):
    """The token's embedding in a layer of a model with `token_input = "every"`; [..., D], or 0."""

    beside: jax.Array | int  # read by attention and MLP beside the stream: in a layer with TopK
    added: jax.Array | int  # to the stream after the attention of the first dense layer

    @classmethod
    def of_layer(
        cls,
        token: jax.Array | None,
        ends_in_topk: bool | jax.Array | np.ndarray,
        follows_topk: bool | jax.Array | np.ndarray,
    ) -> "TokenInput | None":
        """Returns that of a layer, of [..., D] from `Transformer.embedded`; None in models with "first".

        Whether the layer ends in a TopK, or the one before, may be an array, known only when the program
        runs.
        """
        if token is None:
            return None
        if ends_in_topk is True:
            return cls(token, 0)
        if ends_in_topk is False:
            return cls(0, jnp.where(follows_topk, token, 0))
        ends_in_topk = jnp.asarray(ends_in_topk)
        return cls(jnp.where(ends_in_topk, token, 0), jnp.where(follows_topk & ~ends_in_topk, token, 0))


class Block(nnx.Module):
    """One layer up to the point where TopK is applied: `h -> a, MLP(Norm(a))`, whose sum is u."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        write_scale = config.init_residual_scale * (2 * config.n_layers) ** -0.5
        self.attention_norm = RMSNorm(config.d_model, epsilon=config.norm_eps)
        heads_width = config.n_heads * config.head_width
        self.attention = Attention(config, out_std=write_scale * heads_width**-0.5, rngs=rngs)
        self.mlp_norm = RMSNorm(config.d_model, epsilon=config.norm_eps)
        self.mlp = SwiGLU(config.d_model, config.d_mlp, down_std=write_scale * config.d_mlp**-0.5, rngs=rngs)

    def __call__(
        self,
        h_BTD: jax.Array,
        rotation: Rotation,
        segment_ids_BT: jax.Array,
        parallel: Parallel = ALONE,
        token: TokenInput | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Maps [B, T, D] to a and MLP(Norm(a)), which `end_layer` adds up."""
        x_BTD = parallel.gather_tokens(self.normed_input(h_BTD, token))
        mixed_BTD = self.attention(x_BTD, rotation, segment_ids_BT, parallel)
        return self.after_attention(h_BTD, mixed_BTD, parallel, token=token)

    def normed_input(self, h_BTD: jax.Array, token: TokenInput | None = None) -> jax.Array:
        """Returns the states that attention reads, [B, T, D]."""
        return self.attention_norm(h_BTD if token is None else h_BTD + token.beside)

    def after_attention(
        self,
        h_BTD: jax.Array,
        mixed_BTD: jax.Array,
        parallel: Parallel = ALONE,
        gate_up: jax.Array | None = None,
        token: TokenInput | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Does the part of a call that follows attention, whose output is `mixed_BTD`."""
        a_BTD = h_BTD + parallel.scatter_tokens(mixed_BTD)
        read_BTD = a_BTD
        if token is not None:
            a_BTD = a_BTD + token.added
            read_BTD = a_BTD + token.beside
        x_BTD = parallel.gather_tokens(self.mlp_norm(read_BTD))
        return a_BTD, parallel.scatter_tokens(self.mlp(x_BTD, gate_up))


def topk_input(
    config: ModelConfig, a: jax.Array, written: jax.Array, ends_in_topk: bool | jax.Array | np.ndarray
) -> jax.Array:
    """Returns u, the sum of the arguments of `end_layer` as a TopK reads it, [..., D]."""
    u = a + written
    if not config.topk_centred or ends_in_topk is False:
        return u
    return centred(config, u) if ends_in_topk is True else jnp.where(ends_in_topk, centred(config, u), u)


def end_layer(
    config: ModelConfig,
    a: jax.Array,
    written: jax.Array,
    ends_in_topk: bool | jax.Array | np.ndarray,
    hooks: LayerHooks = NO_HOOKS,
    hook_input: Any = None,
    *,
    topk: Callable[..., jax.Array] = topk,
    sum_first: bool = False,
) -> jax.Array:
    """Ends a layer: the residual sum, TopK or its override, and the output hook; returns h', [..., D].

    Of `a`, the residual state after attention, and `written`, the output of the MLP; u is their sum, formed
    before the search with `sum_first`: fused into a search over few tokens, as XLA for CPUs does it, it would
    be formed again at each pass. Whether the layer has a TopK may be an array (bool scalar), known only when
    the program runs. `hooks.input` has been called before the layer. `topk` is the model's TopK, or one of
    the same result with another gradient (`topk_masked_by_next`).
    """
    is_known = isinstance(ends_in_topk, bool)
    if is_known and not ends_in_topk:
        h_next = a + written
    elif hooks.topk is not None or sum_first or config.topk_centred:
        u = topk_input(config, a, written, ends_in_topk)
        u = jax.lax.optimization_barrier(u) if sum_first else u
        kept = model_topk(config, u, topk=topk) if hooks.topk is None else hooks.topk(u, hook_input)
        h_next = kept if is_known else jnp.where(ends_in_topk, kept, u)
    else:
        # A TopK kernel adds the two up by itself.
        applies = None if is_known else jnp.asarray(ends_in_topk)
        h_next = model_topk(config, written, residual=a, applies=applies, topk=topk)
    return h_next if hooks.output is None else hooks.output(h_next, hook_input)


def topk_masked_by_next(
    x: jax.Array, k: int, activation: str, backend: str, residual: jax.Array, applies: jax.Array | None
) -> jax.Array:
    """Computes `topk` with "relu", but with the gradient of `x + residual`.

    `mask_gradient_by_output` of the result must follow. With "relu" the entries that a TopK lets through are
    those above 0 in its result. Where layers are computed again in the backward pass, the next layer keeps
    that result in any case: so no mask is saved, and no search is done twice.
    """
    assert activation == "relu"
    x_alone, residual_alone = jax.lax.stop_gradient((x, residual))
    kept = topk(x_alone, k, activation, backend, residual=residual_alone, applies=applies)
    return _with_gradient_of(kept, x + residual)


@jax.custom_vjp
def _with_gradient_of(value: jax.Array, other: jax.Array) -> jax.Array:
    """Returns the value, and hands its gradient to the other array."""
    del other
    return value


_with_gradient_of.defvjp(lambda value, _: (value, None), lambda _, g: (None, g))


@jax.custom_vjp
def mask_gradient_by_output(h: jax.Array, is_sparse: jax.Array) -> jax.Array:
    """Returns h; its gradient passes through the entries that the `topk_masked_by_next` before kept.

    If that did not apply, `is_sparse` (bool scalar) is False, and all gradient passes.
    """
    del is_sparse
    return h


def _mask_forward(h: jax.Array, is_sparse: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return h, (h, is_sparse)


def _mask_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, None]:
    h, is_sparse = saved
    # Decided on integers, as the TopK itself is: some devices take the smallest floats for 0.
    passes = (order_key(h) > 0) | ~is_sparse
    return jnp.where(passes, g, jnp.zeros((), g.dtype)), None


mask_gradient_by_output.defvjp(_mask_forward, _mask_backward)
