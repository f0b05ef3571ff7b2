"""The effect of a neuron on the logits, by two linear approximations. The definitions are ours.

- *Identity lens*: as if the neuron were written straight into the final norm, whose division is left out.
  Effect of neuron j: row j of diag(scale of the final norm) @ unembedding; the same in all layers.
- *Averaged Jacobian lens*: the average over contexts of d(logits) / d(neuron), both at the last position;
  column j of J_l, times the unembedding.

    J_l = mean over contexts of d(normed final hidden state at the last position) / d(h_l there)

where h_l is the output of layer l, after its TopK. The masks of later TopK layers are held fixed. No other
token attends to the last one, so the last position alone carries the derivative, and nothing else is
differentiated. Contexts are excerpts of stored text that end at drawn tokens, as the model is given them.

Effects are per unit of activation. Logits are defined up to a constant, so the mean over the vocabulary is
taken off. For a Base LM the positive part of a coordinate counts as the neuron; where it is active, that
is the coordinate itself, so the formulas are the same. Where the hidden state is written in a dictionary
(`topklm.neurons.dictionary`), the neuron is no coordinate, but one unit along its row d of
the decoder: its effects are (d * scale) @ unembedding and (J_l d) @ unembedding.

Two neurons are alike by the cosine of their effects by the Jacobian lens. Inner products of effects follow
from the Gram matrix of the unembedding, so no effect is computed for that.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.model import transformer
from topklm.model.block import LayerHooks, TokenInput, end_layer
from topklm.model.cached_attention import attend_to_past, decode_step, keys_and_values
from topklm.neurons.statistics.activity import NEAREST

CONTEXT_TOKENS = 32
N_TOKENS = 10  # listed at each end

_BATCH = 32  # contexts in one program, which holds D x D numbers for each
_MAX_EFFECTS = 1 << 24  # neurons x V that are held at once


class Excerpts(NamedTuple):
    """N excerpts of T tokens. A shorter one stands to the right, so all of them end in the last column."""

    tokens: np.ndarray  # int32[N, T]
    segments: np.ndarray  # int32[N, T], 1; 0 where nothing stands, which no token of the excerpt attends to
    positions: np.ndarray  # int32[N, T], 0 for an excerpt's first token


def averaged_jacobians(
    config: ModelConfig,
    params: transformer.Parameters,
    token_ids: np.ndarray,
    bounds: np.ndarray,
    *,
    separator_id: int,
    n_contexts: int,
    context_tokens: int = CONTEXT_TOKENS,
    seed: int,
) -> jax.Array:
    """Computes J_l of every layer, over contexts that end at tokens drawn evenly over a store.

    Ids are uint[N] of the whole store, one or more, bounds as `Store.document_bounds` gives them, parameters
    on one device or a mesh. There is at most one context for each token. Returns float32[L, D, D]: of layer
    l, output coordinate i and neuron j at [l, i, j].
    """
    ends = spread_ends(len(token_ids), n_contexts, seed)
    length = min(context_tokens, config.context_length)
    contexts = excerpts(token_ids, bounds, ends, length, separator_id)
    total: Any = 0.0
    for first in range(0, len(ends), _BATCH):
        # The last batch is filled up with a context of weight 0.
        numbers = np.arange(first, first + _BATCH)
        batch = (array[np.minimum(numbers, len(ends) - 1)] for array in contexts)
        weights = (numbers < len(ends)) / np.float32(len(ends))
        total = total + _weighted_jacobians(config, params, *batch, weights)
    return total


def excerpts(
    token_ids: np.ndarray, bounds: np.ndarray, ends: np.ndarray, length: int, separator_id: int
) -> Excerpts:
    """Returns the last T tokens of: the separator, then the document up to and with a token.

    Ids are uint[N], of the whole store, bounds int64[documents + 1], and ends int64[n], tokens in any order.
    """
    begins = bounds[np.searchsorted(bounds, ends, side="right") - 1][:, None]
    at = ends[:, None] + np.arange(1 - length, 1)
    tokens = np.where(at >= begins, token_ids[np.maximum(at, 0)], separator_id)
    # The position before a document's first token is the separator's.
    positions = at - np.maximum(begins - 1, at[:, :1])
    segments = (at >= begins - 1).astype(np.int32)
    return Excerpts(tokens.astype(np.int32), segments, np.maximum(positions, 0).astype(np.int32))


def spread_ends(n_tokens: int, n: int, seed: int) -> np.ndarray:
    """Returns numbers of tokens, int64[min(n, n_tokens)], rising: one drawn from each n-th of a store."""
    n = min(n, n_tokens)
    shares = np.arange(n) + np.random.default_rng(seed).random(n)
    return np.minimum((shares * n_tokens / max(n, 1)).astype(np.int64), n_tokens - 1)


@transformer.jit_in_float32
def _weighted_jacobians(
    config: ModelConfig,
    params: transformer.Parameters,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    positions_BT: jax.Array,
    weights_B: jax.Array,
) -> jax.Array:
    """Computes the sum over contexts of their weights times their Jacobians, float32[L, D, D]."""
    model = transformer.bind(config, params)
    # The input of each layer, and its output at the last position.
    _, (entering_LBTD, leaving_LBD) = model.hidden(
        tokens_BT, segment_ids_BT, positions_BT, capture=lambda h, _u, h_next: (h, h_next[:, -1])
    )
    rotation = model.rotation(positions_BT)
    of_last = rotation[0][:, -1:], rotation[1][:, -1:]
    seen_BT = (segment_ids_BT == segment_ids_BT[:, -1:]).at[:, -1].set(False)
    block_def, stacked = nnx.split(model.blocks)
    (_, token_BTD), (_, token_B1D) = model.embedded(tokens_BT), model.embedded(tokens_BT[:, -1:])
    # The winners of each TopK are held where they are, so it is linear.
    hooks = LayerHooks(topk=lambda u_BD, active_BD: jnp.where(active_BD, u_BD, 0.0))
    _, back_through_norm = jax.vjp(model.final_norm, leaving_LBD[-1])

    def back_through_layer(g_DBD: jax.Array, layer: tuple) -> tuple[jax.Array, jax.Array]:
        """Goes back from the output of the layer to its input."""
        block_params, entering_BTD, leaving_BD, ends_in_topk, follows_topk = layer

        def run(h_BD: jax.Array) -> jax.Array:
            block = nnx.merge(block_def, block_params)
            token, of_last_token = (
                TokenInput.of_layer(x, ends_in_topk, follows_topk) for x in (token_BTD, token_B1D)
            )
            past = keys_and_values(block, entering_BTD, rotation, token)
            attend = attend_to_past(past, seen_BT[:, None])
            a_B1D, written_B1D, _ = decode_step(block, h_BD[:, None], of_last, attend, token=of_last_token)
            return end_layer(config, a_B1D[:, 0], written_B1D[:, 0], ends_in_topk, hooks, leaving_BD != 0)

        _, back = jax.vjp(run, entering_BTD[:, -1])
        return _one_by_one(back, g_DBD), g_DBD.sum(axis=1)

    # The first axis is the coordinate of the final state, each with its weight in all contexts.
    one_hot_DBD = jnp.eye(config.d_model)[:, None] * weights_B[:, None]
    g_DBD = _one_by_one(back_through_norm, one_hot_DBD)
    layers = stacked, entering_LBTD, leaving_LBD, *model.topk_around(np.arange(config.n_layers))
    return jax.lax.scan(back_through_layer, g_DBD, layers, reverse=True)[1]


def _one_by_one(back: Callable[[jax.Array], tuple[jax.Array]], g_DBD: jax.Array) -> jax.Array:
    """Runs the pass back of each coordinate, not vectorised over them.

    XLA for CPUs (0.10.2) gets `vmap` of it wrong at some shapes, [256, 16, 256] among them: sums over the
    last axis of a product with an array that has no first axis.
    """
    return jax.lax.map(lambda g_BD: back(g_BD)[0], g_DBD)


class Lenses(NamedTuple):
    """Both lenses of a model; from `make`."""

    scale: jax.Array  # float32[D], of the final norm
    jacobians: jax.Array  # float32[L, D, D], from `averaged_jacobians`
    unembedding: jax.Array  # float32[D, V], each row less its mean; no padding
    # float32[D, D], unembedding @ unembedding.T: inner products of effects without the effects
    gram: jax.Array
    # float32[L, D, D], which direction of the hidden state each neuron is, row by row; None: the coordinates
    directions: jax.Array | None = None

    def jacobian_rows(self, layer: int, begin: int, end: int) -> jax.Array:
        """Returns the change of the final state per unit of neurons `begin` to `end` - 1, float32[n, D]."""
        if self.directions is not None:
            return self.directions[layer, begin:end] @ self.jacobians[layer].T
        return self.jacobians[layer, :, begin:end].T

    def identity_rows(self, layer: int, begin: int, end: int) -> jax.Array:
        """Does the same for the identity lens; for coordinates it is the same in all layers."""
        if self.directions is not None:
            return self.directions[layer, begin:end] * self.scale
        neurons = jnp.arange(begin, end)[:, None] == jnp.arange(len(self.scale))
        return jnp.where(neurons, self.scale, 0.0)


@transformer.jit_in_float32
def make(
    config: ModelConfig,
    params: transformer.Parameters,
    jacobians_LDD: jax.Array,
    directions_LMD: jax.Array | None = None,
) -> Lenses:
    """Makes both lenses; see `Lenses` for the arguments."""
    model = transformer.bind(config, params)
    unembedding_DV = model.unembedding()[:, : config.vocab_size]
    centred_DV = unembedding_DV - unembedding_DV.mean(axis=1, keepdims=True)
    scale_D = model.final_norm.scale[...]
    return Lenses(scale_D, jacobians_LDD, centred_DV, centred_DV @ centred_DV.T, directions_LMD)


def columns(
    lenses: Lenses, layer: int, begin: int, end: int, common: np.ndarray | None = None
) -> dict[str, list]:
    """Returns the columns `identity_*` and `jacobian_*`, for the neurons from `begin` to `end` - 1.

    Tokens with equal effects are listed by rising id; of a vocabulary below `N_TOKENS`, all are. With
    `common`, rising ids int[M], only these are, in columns `identity_common_*` and `jacobian_common_*`.
    """
    found: dict[str, list] = {}
    unembedding, more = lenses.unembedding, ""
    if common is not None:
        unembedding, more = unembedding[:, common], "common_"
    n_tokens = min(N_TOKENS, unembedding.shape[1])
    for name, rows in (("identity", lenses.identity_rows), ("jacobian", lenses.jacobian_rows)):
        if not n_tokens:
            sides = (f"{name}_{more}{side}{kind}" for side in ("top", "bottom") for kind in ("", "_effects"))
            found |= {column: [[]] * (end - begin) for column in sides}
            continue
        with jax.default_matmul_precision("float32"):
            ends = jax.device_get(_ends(rows(layer, begin, end), unembedding, n_tokens))
        for side, (tokens, effects) in ends.items():
            ids = tokens if common is None else common[tokens]
            found[f"{name}_{more}{side}"] = ids.tolist()
            found[f"{name}_{more}{side}_effects"] = effects.astype(np.float64).tolist()
    return found


@functools.partial(jax.jit, static_argnums=2)
def _ends(rows_ND: jax.Array, unembedding_DV: jax.Array, n: int) -> dict[str, tuple[Any, Any]]:
    """Finds the n largest and smallest effects of each row, and their tokens, [N, n] each."""

    def of_neuron(row_D: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        effects_V = row_D @ unembedding_DV
        highest, top = jax.lax.top_k(effects_V, n)
        lowest, bottom = jax.lax.top_k(-effects_V, n)
        return {"top": (top, highest), "bottom": (bottom, -lowest)}

    at_once = max(1, min(len(rows_ND), _MAX_EFFECTS // unembedding_DV.shape[1]))
    return jax.lax.map(of_neuron, rows_ND, batch_size=at_once)


def similar_columns(lenses: Lenses, layer: int, begin: int, end: int) -> dict[str, list]:
    """Returns the columns `similar_effect*`, for the neurons from `begin` to `end` - 1.

    Of each neuron the `NEAREST` others of the layer (all, where there are fewer) by falling cosine, on a tie
    by rising number. The cosine with a neuron of no effect at all is 0.
    """
    d = len(lenses.scale)
    with jax.default_matmul_precision("float32"):
        cosines, neurons = jax.device_get(
            _nearest_effects(
                lenses.jacobian_rows(layer, begin, end),
                lenses.jacobian_rows(layer, 0, d),
                lenses.gram,
                jnp.arange(begin, end),
                min(NEAREST, d - 1),
            )
        )
    similarity = np.clip(cosines.astype(np.float64), -1.0, 1.0)
    return {"similar_effect": neurons.tolist(), "similar_effect_similarity": similarity.tolist()}


@functools.partial(jax.jit, static_argnums=4)
def _nearest_effects(
    rows_ND: jax.Array, all_rows_DD: jax.Array, gram_DD: jax.Array, own_N: jax.Array, n: int
) -> tuple[jax.Array, jax.Array]:
    """Cosines and neurons, [N, n] each."""
    unit_ND, unit_DD = (_unit(rows, gram_DD) for rows in (rows_ND, all_rows_DD))
    cosines_ND = (unit_ND @ gram_DD) @ unit_DD.T
    is_own = own_N[:, None] == jnp.arange(len(all_rows_DD))
    return jax.lax.top_k(jnp.where(is_own, -jnp.inf, cosines_ND), n)


def _unit(rows_ND: jax.Array, gram_DD: jax.Array) -> jax.Array:
    """Rows whose effects have length 1; those without effect become 0."""
    squares_N1 = jnp.sum((rows_ND @ gram_DD) * rows_ND, axis=1, keepdims=True)
    has_effect = squares_N1 > 0
    return jnp.where(has_effect, rows_ND * jax.lax.rsqrt(jnp.where(has_effect, squares_N1, 1.0)), 0.0)
