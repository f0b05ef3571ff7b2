"""Log probabilities of tokens: of the model's own distribution, the logarithm of the softmax of its logits.

Neither repetition penalty nor temperature nor limits of sampling play a part; interventions do. In nats.
Dims: B rows, P places of a prompt, V vocabulary, A the most alternatives that can be asked for.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topklm.inference.programs import Plan, Rows
from topklm.model import transformer
from topklm.model.block import LayerHooks

MOST_ALTERNATIVES = 20  # A
_PIECE = 32  # places whose logits are there at one time


class Scores(NamedTuple):
    """Of one token in each row, or at each place.

    Attributes:
        own: float32[B], of the tokens themselves.
        tokens: int32[B, A], the most likely ones, the likeliest first.
        values: float32[B, A], of those.
    """

    own: np.ndarray
    tokens: np.ndarray
    values: np.ndarray

    def row(self, row: int, n: int) -> tuple[float, tuple[tuple[int, float], ...]]:
        """Of one token, and of so many alternatives."""
        alternatives = zip(self.tokens[row, :n].tolist(), self.values[row, :n].tolist(), strict=True)
        return float(self.own[row]), tuple(alternatives)


@functools.partial(jax.jit, static_argnums=0)
def before_drawing(plan: Plan, logits_BV: jax.Array) -> jax.Array:
    """All log probabilities, float32[B, V], kept while the logits make way for those of the next token."""
    del plan
    return jax.nn.log_softmax(logits_BV, axis=-1)


def chosen(before_BV: jax.Array, tokens_B: np.ndarray) -> Scores:
    """Of tokens that were drawn, int32[B]."""
    return Scores(*map(np.asarray, _picked(before_BV, tokens_B)))


def of_prompt(
    plan: Plan, params: transformer.Parameters, rows: Rows, tokens_1P: np.ndarray, length: int
) -> Scores:
    """Of the tokens of one prompt but the first, each given those before it.

    Args:
        plan: Of the model.
        params: Its parameters.
        rows: One row.
        tokens_1P: int32[1, P], the text at the left.
        length: Tokens of the text.
    """
    found = _of_prompt(plan, params, rows, tokens_1P)
    return Scores(*(np.asarray(x)[: length - 1] for x in found))


@functools.partial(jax.jit, static_argnums=0)
def _of_prompt(plan: Plan, params: transformer.Parameters, rows: Rows, tokens_1P: jax.Array) -> Any:
    model = transformer.bind(plan.config, params)
    changes = LayerHooks()
    if rows.interventions is not None:
        positions_1P = jnp.arange(tokens_1P.shape[1])[None]
        changes = rows.interventions.changes(plan.config, positions_1P, rows.prompt_lengths)
    numbers = jnp.arange(plan.config.n_layers)
    h_1PD, _ = model.hidden(tokens_1P, hooks=changes, hook_inputs=numbers)
    size, d = h_1PD.shape[1:]
    filled = -size % _PIECE
    pieces = jnp.pad(h_1PD[0], ((0, filled), (0, 0))).reshape(-1, _PIECE, d)
    following = jnp.pad(tokens_1P[0, 1:], (0, filled + 1)).reshape(-1, _PIECE)

    def of_piece(piece: tuple[jax.Array, jax.Array]) -> Any:
        h, tokens = piece
        return _picked(jax.nn.log_softmax(model.logits(h), axis=-1), tokens)

    found = jax.lax.map(of_piece, (pieces, following))
    found = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:size], found)
    return found if plan.replicated is None else jax.lax.with_sharding_constraint(found, plan.replicated)


@jax.jit
def _picked(all_BV: jax.Array, tokens_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    own_B = jnp.take_along_axis(all_BV, tokens_B[:, None], axis=-1)[:, 0]
    values, tokens = jax.lax.top_k(all_BV, min(MOST_ALTERNATIVES, all_BV.shape[-1]))
    return own_B, tokens, values
