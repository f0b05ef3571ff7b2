"""How the TopK layers of a model are doing on held-out text.

`tap` measures while the model runs, batch by batch; `summarize` turns the added-up sums into three numbers
per TopK layer. Only weighted tokens count: padding and separators that are never scored are left out.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topklm.model.block import CaptureFn


def tap(weights_BT: jax.Array) -> CaptureFn:
    """A tap that measures one layer.

    Args:
        weights_BT: float32[B, T]; tokens with weight 0 are left out.

    Returns:
        A tap giving float32 sums over the batch: `active_tokens` [D], tokens on which the neuron is not
        zero; `kept_square_share`, sum over tokens of |h'|^2 / |u|^2; `active` and `also_active_below`,
        active neurons, and those of them that are active in the layer's input too.
    """
    counted_BT1 = (weights_BT > 0)[..., None]

    def measure(h: jax.Array, u: jax.Array, h_next: jax.Array) -> dict[str, jax.Array]:
        active = (h_next != 0) & counted_BT1
        squares = [jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1) for x in (u, h_next)]
        share = jnp.where(squares[0] > 0, squares[1] / squares[0], 1.0)
        return {
            "active_tokens": active.sum(axis=(0, 1)).astype(jnp.float32),
            "kept_square_share": jnp.sum(share * counted_BT1[..., 0]),
            "active": active.sum().astype(jnp.float32),
            "also_active_below": (active & (h != 0)).sum().astype(jnp.float32),
        }

    return measure


def summarize(sums: Mapping[str, Any], n_tokens: int, n_topk_layers: int) -> dict[str, list[float]]:
    """Three figures per TopK layer, in layer order (empty lists for the Base LM).

    Args:
        sums: What `tap` gave, stacked to [L, ...] and added up over batches, float64.
        n_tokens: Tokens counted.
        n_topk_layers: S.

    Returns:
        `dead_neurons`: share of neurons never active on these tokens. `norm_kept`: mean over tokens of
        the share of the squared norm that TopK keeps. `overlap_below`: share of active neurons that are
        active in the layer below too; from the second layer on, so it has S - 1 entries.
    """
    s = slice(0, n_topk_layers)
    active_tokens = np.asarray(sums["active_tokens"])[s]
    active, below = np.asarray(sums["active"])[s], np.asarray(sums["also_active_below"])[s]
    return {
        "dead_neurons": (active_tokens == 0).mean(axis=-1).tolist(),
        "norm_kept": (np.asarray(sums["kept_square_share"])[s] / max(n_tokens, 1)).tolist(),
        "overlap_below": (below / np.maximum(active, 1))[1:].tolist(),
    }
