"""Derivatives of the model's last hidden state by the output of an earlier layer, averaged over contexts.

J_l = mean over contexts of d(normed final hidden state at the last position) / d(h_l at the last position),
where h_l is the output of layer l, after its TopK. The masks of later TopK layers are held fixed. The
definition is ours; that of the lens made of it stands in `topklm.neurons.statistics.lenses`.

No other token attends to the last one, so the last position alone carries the derivative, and nothing else
is differentiated. One pass back from a coordinate of the final state gives its row of J_l of every layer.

Contexts are excerpts of stored text that end at drawn tokens, as the model is given them.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.errors import UserError
from topklm.model import transformer
from topklm.model.block import LayerHooks, end_layer
from topklm.model.cached_attention import attend_to_past, decode_step, keys_and_values
from topklm.neurons.statistics import MeasureSettings
from topklm.neurons.store import Store

N_CONTEXTS, CONTEXT_TOKENS, SEED = MeasureSettings.lens_contexts, 32, MeasureSettings.seed

_BATCH = 32  # contexts in one program, which holds D x D numbers for each
NO_TOKEN = -1

# Tokens of the store that are read at once.
_STRIP = 1 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class Excerpts:
    """N excerpts of T tokens. A shorter one stands to the right, so all of them end in the last column.

    Attributes:
        tokens: int32[N, T].
        segments: int32[N, T], 1; 0 where nothing stands, which no token of the excerpt attends to.
        positions: int32[N, T], 0 for an excerpt's first token.
        following: int32[N], the token that follows in the document; `NO_TOKEN` where the document ends.
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    following: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | np.ndarray) -> "Excerpts":
        """Returns some of them, by a slice, a mask or their numbers."""
        return Excerpts(self.tokens[rows], self.segments[rows], self.positions[rows], self.following[rows])


def averaged_jacobians(
    config: ModelConfig,
    params: transformer.Parameters,
    separator_id: int,
    store: Store,
    *,
    n_contexts: int = N_CONTEXTS,
    context_tokens: int = CONTEXT_TOKENS,
    seed: int = SEED,
) -> jax.Array:
    """Computes J_l of every layer, over contexts that end at tokens drawn evenly over a store.

    It is computed in float32, whatever the dtype of the model.

    Args:
        config: The model's shape.
        params: Its parameters, on one device or a mesh.
        separator_id: Of the tokenizer.
        store: Of text that contexts are taken from: see `ending_at`.
        n_contexts: How many; fewer where the store has fewer tokens.
        context_tokens: Of each, at most.
        seed: Of the draw.

    Returns:
        float32[L, D, D]: of layer l, output coordinate i and neuron j at [l, i, j].

    Raises:
        UserError: If the store is empty.
    """
    if store.n_tokens == 0:
        raise UserError(f"{store.folder} holds no tokens: run topklm neurons harvest")
    ends = spread_ends(store.n_tokens, n_contexts, seed)
    length = min(context_tokens, config.context_length)
    contexts = ending_at(store, ends, length, separator_id)
    config = dataclasses.replace(config, dtype="float32")
    total: Any = 0.0
    with jax.default_matmul_precision("float32"):
        for first in range(0, len(contexts), _BATCH):
            # The last batch is filled up with a context of weight 0.
            rows = np.minimum(np.arange(first, first + _BATCH), len(contexts) - 1)
            weights = (np.arange(first, first + _BATCH) < len(contexts)) / np.float32(len(contexts))
            total = total + _weighted_jacobians(config, params, *_arrays(contexts[rows]), weights)
    return total


def _arrays(contexts: Excerpts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return contexts.tokens, contexts.segments, contexts.positions


@functools.partial(jax.jit, static_argnums=0)
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
    ends_in_topk_L = np.arange(config.n_layers) < config.n_topk_layers
    # The winners of each TopK are held where they are, so it is linear.
    hooks = LayerHooks(topk=lambda u_BD, active_BD: jnp.where(active_BD, u_BD, 0.0))
    _, back_through_norm = jax.vjp(model.final_norm, leaving_LBD[-1])

    def back_through_layer(g_DBD: jax.Array, layer: tuple) -> tuple[jax.Array, jax.Array]:
        """Goes back from the output of the layer to its input."""
        block_params, entering_BTD, leaving_BD, ends_in_topk = layer

        def run(h_BD: jax.Array) -> jax.Array:
            block = nnx.merge(block_def, block_params)
            past = keys_and_values(block, entering_BTD, rotation)
            a_B1D, written_B1D, _ = decode_step(
                block, h_BD[:, None], of_last, attend_to_past(past, seen_BT[:, None])
            )
            return end_layer(config, a_B1D[:, 0], written_B1D[:, 0], ends_in_topk, hooks, leaving_BD != 0)

        _, back = jax.vjp(run, entering_BTD[:, -1])
        return _one_by_one(back, g_DBD), g_DBD.sum(axis=1)

    # The first axis is the coordinate of the final state, each with its weight in all contexts.
    one_hot_DBD = jnp.eye(config.d_model)[:, None] * weights_B[:, None]
    g_DBD = _one_by_one(back_through_norm, one_hot_DBD)
    layers = stacked, entering_LBTD, leaving_LBD, ends_in_topk_L
    return jax.lax.scan(back_through_layer, g_DBD, layers, reverse=True)[1]


def _one_by_one(back: Callable[[jax.Array], tuple[jax.Array]], g_DBD: jax.Array) -> jax.Array:
    """Runs the pass back of each coordinate, not vectorised over them.

    XLA for CPUs (0.10.2) gets `vmap` of it wrong at some shapes, [256, 16, 256] among them: sums over the
    last axis of a product with an array that has no first axis.
    """
    return jax.lax.map(lambda g_BD: back(g_BD)[0], g_DBD)


def ending_at(store: Store, ends: np.ndarray, length: int, separator_id: int) -> Excerpts:
    """Returns the last `length` tokens of: the separator, then the document up to and with a token.

    So an excerpt begins with the separator where the document begins in it, and holds one document only.

    Args:
        store: Of the text.
        ends: int64[N], tokens of the store, in any order.
        length: T, 1 or more.
        separator_id: Of the tokenizer.
    """
    tokens = np.full((len(ends), length), separator_id, np.int32)
    segments = np.zeros((len(ends), length), np.int32)
    following = np.full(len(ends), NO_TOKEN, np.int32)
    # Strip by strip, so that a store of any size is read in little memory.
    order = np.argsort(ends, kind="stable")
    borders = np.flatnonzero(np.diff(ends[order] // _STRIP)) + 1
    for rows in np.split(order, borders):
        if len(rows) == 0:
            continue
        first = ends[rows[0]] - length
        ids, documents = _read(store, int(first), int(ends[rows[-1]]) + 2)
        last = ends[rows] - first
        places = last[:, None] + np.arange(1 - length, 1)
        inside = documents[places] == documents[last][:, None]
        tokens[rows] = np.where(inside, ids[places], separator_id)
        # The place before a document's first token is the separator's.
        begins = np.zeros_like(inside)
        begins[:, :-1] = ~inside[:, :-1] & inside[:, 1:]
        segments[rows] = inside | begins
        goes_on = documents[last + 1] == documents[last]
        following[rows] = np.where(goes_on, ids[last + 1], NO_TOKEN)
    n_missing = length - segments.sum(axis=1, keepdims=True)
    positions = np.maximum(np.arange(length) - n_missing, 0).astype(np.int32)
    return Excerpts(tokens, segments, positions, following)


def spread_ends(n_tokens: int, n: int, seed: int) -> np.ndarray:
    """Tokens drawn evenly over a store, one from each n-th of it.

    Returns:
        int64[min(n, n_tokens)], rising.
    """
    n = min(n, n_tokens)
    shares = np.arange(n) + np.random.default_rng(seed).random(n)
    return np.minimum((shares * n_tokens / max(n, 1)).astype(np.int64), n_tokens - 1)


def _read(store: Store, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and documents, int64[end - begin]; outside of the store the document is -1."""
    inside = slice(max(begin, 0) - begin, min(end, store.n_tokens) - begin)
    ids, documents = np.zeros(end - begin, np.int64), np.full(end - begin, -1, np.int64)
    ids[inside] = store.tokens(begin, end)
    documents[inside] = store.documents(begin, end)
    return ids, documents
