"""The effect of a neuron on the logits, by two linear approximations. The definitions are ours.

- *Identity lens*: as if the neuron were written straight into the final norm, whose division is left out.
  Effect of neuron j: row j of diag(scale of the final norm) @ unembedding; the same in all layers.
- *Averaged Jacobian lens*: the average over contexts of d(logits) / d(neuron), both at the last position;
  column j of J_l (`topklm.neurons.statistics.jacobian`), times the unembedding.

Effects are per unit of activation. Logits are defined up to a constant, so the mean over the vocabulary is
taken off. For a Base LM the positive part of a coordinate counts as the neuron; where it is active, that
is the coordinate itself, so the formulas are the same. Where the hidden state is written in a dictionary
(`topklm.neurons.dictionary`), the neuron is no coordinate, but one unit along its row d of
the decoder: its effects are (d * scale) @ unembedding and (J_l d) @ unembedding.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.model import transformer

N_TOKENS = 10  # listed at each end

_MAX_EFFECTS = 1 << 24  # neurons x V that are held at once


@dataclasses.dataclass(frozen=True, eq=False)
class Lenses:
    """Both lenses of a model; from `make`.

    Attributes:
        scale: float32[D], of the final norm.
        jacobians: float32[L, D, D], from `jacobian.averaged_jacobians`.
        unembedding: float32[D, V], each row less its mean; no padding.
        gram: float32[D, D], unembedding @ unembedding.T: inner products of effects without the effects.
        directions: float32[L, D, D], which direction of the hidden state each neuron is, row by row; None:
            the coordinates.
    """

    scale: jax.Array
    jacobians: jax.Array
    unembedding: jax.Array
    gram: jax.Array
    directions: jax.Array | None = None

    def jacobian_rows(self, layer: int, begin: int, end: int) -> jax.Array:
        """Returns the change of the final state per unit of neurons `begin` to `end` - 1, float32[n, D]."""
        if self.directions is not None:
            with jax.default_matmul_precision("float32"):
                return self.directions[layer, begin:end] @ self.jacobians[layer].T
        return self.jacobians[layer, :, begin:end].T

    def identity_rows(self, begin: int, end: int, layer: int = 0) -> jax.Array:
        """Does the same for the identity lens; for coordinates it is the same in all layers."""
        if self.directions is not None:
            return self.directions[layer, begin:end] * self.scale
        neurons = jnp.arange(begin, end)[:, None] == jnp.arange(len(self.scale))
        return jnp.where(neurons, self.scale, 0.0)


def make(
    config: ModelConfig,
    params: transformer.Parameters,
    jacobians_LDD: jax.Array,
    directions_LDD: np.ndarray | None = None,
) -> Lenses:
    """Makes both lenses.

    Args:
        config: The model's shape.
        params: Its parameters, on one device or a mesh.
        jacobians_LDD: From `jacobian.averaged_jacobians`.
        directions_LDD: Of the neurons, unit rows; None: they are the coordinates.
    """
    with jax.default_matmul_precision("float32"):
        scale_D, centred_DV, gram_DD = _of_parameters(config, params)
    directions = None if directions_LDD is None else jnp.asarray(directions_LDD)
    return Lenses(scale_D, jacobians_LDD, centred_DV, gram_DD, directions)


def columns(lenses: Lenses, layer: int, begin: int, end: int) -> dict[str, list]:
    """Returns the columns `identity_*` and `jacobian_*` of `table.COLUMNS`.

    Args:
        lenses: Of the model.
        layer: Of the model's layers.
        begin: First neuron.
        end: After the last.

    Returns:
        For each column a list with the entry of each neuron. Tokens with equal effects are listed by rising
        id; of a vocabulary below `N_TOKENS`, all are.
    """
    found: dict[str, list] = {}
    for name, rows in (
        ("identity", lenses.identity_rows(begin, end, layer)),
        ("jacobian", lenses.jacobian_rows(layer, begin, end)),
    ):
        with jax.default_matmul_precision("float32"):
            ends = _ends(rows, lenses.unembedding, min(N_TOKENS, lenses.unembedding.shape[1]))
        found |= _as_lists(name, jax.device_get(ends))
    return found


def _as_lists(name: str, ends: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, list]:
    lists: dict[str, list] = {}
    for end, (tokens, effects) in ends.items():
        lists[f"{name}_{end}"] = tokens.tolist()
        lists[f"{name}_{end}_effects"] = effects.astype(np.float64).tolist()
    return lists


@functools.partial(jax.jit, static_argnums=0)
def _of_parameters(
    config: ModelConfig, params: transformer.Parameters
) -> tuple[jax.Array, jax.Array, jax.Array]:
    model = transformer.bind(config, params)
    unembedding_DV = model.unembedding()[:, : config.vocab_size]
    centred_DV = unembedding_DV - unembedding_DV.mean(axis=1, keepdims=True)
    return model.final_norm.scale[...], centred_DV, centred_DV @ centred_DV.T


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
