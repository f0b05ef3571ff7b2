"""Log probabilities of tokens: of the model's own distribution, the logarithm of the softmax of its logits.

Neither repetition penalty nor temperature nor limits of sampling play a part; interventions do. In nats.
Dims: B rows, P tokens of a prompt, V vocabulary, A the most alternatives that can be asked for.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.inference.bucketing import on_rows
from topklm.inference.sampling import RowSampling
from topklm.inference.sequence import Sequence
from topklm.inference.steps import RequestBatch, StaticArgs, hooks_of
from topklm.model import transformer

MOST_ALTERNATIVES = 20  # A
_PIECE = 32  # tokens whose logits are computed at one time


class Scores(NamedTuple):
    """Log probabilities of one token in each row, or at each position.

    Attributes:
        own: float32[B], of the tokens themselves.
        tokens: int32[B, A], the most likely ones, the likeliest first.
        values: float32[B, A], of those.
    """

    own: np.ndarray
    tokens: np.ndarray
    values: np.ndarray

    def row(self, row: int, n: int) -> tuple[float, tuple[tuple[int, float], ...]]:
        """Returns that of one token, and of so many alternatives."""
        alternatives = zip(self.tokens[row, :n].tolist(), self.values[row, :n].tolist(), strict=True)
        return float(self.own[row]), tuple(alternatives)


@functools.partial(jax.jit, static_argnums=0)
def before_drawing(static: StaticArgs, logits_BV: jax.Array) -> jax.Array:
    """Returns all log probabilities, float32[B, V], to keep while the state goes on to the next token."""
    del static
    return jax.nn.log_softmax(logits_BV, axis=-1)


def chosen(before_BV: jax.Array, tokens_B: np.ndarray) -> Scores:
    """Returns those of tokens that were drawn, int32[B]."""
    return Scores(*map(np.asarray, _picked(before_BV, tokens_B)))


def of_prompt(
    config: ModelConfig, params: transformer.Parameters, sequence: Sequence, stop_token: int, size: int
) -> Scores:
    """Returns those of the tokens of a sequence's prompt but the first, each given the ones before it.

    Args:
        config: Of the model.
        params: Its parameters.
        sequence: With its prompt and its interventions.
        stop_token: As in `Scheduler`.
        size: To which the prompt is filled up.
    """
    prompt = sequence.tokens[: sequence.n_prompt]
    tokens_1P = np.zeros((1, size), np.int32)
    tokens_1P[0, : len(prompt)] = prompt
    batch = RequestBatch(
        RowSampling.of([sequence.sampling]),
        np.zeros(1, np.int32),
        np.array([len(prompt)], np.int32),
        np.int32(stop_token),
        None if sequence.steer is None else on_rows(config, [(0, sequence.steer)], 1),
    )
    found = _of_prompt(StaticArgs.of(config, params), params, batch, tokens_1P)
    return Scores(*(np.asarray(x)[: len(prompt) - 1] for x in found))


@functools.partial(jax.jit, static_argnums=0)
def _of_prompt(
    static: StaticArgs, params: transformer.Parameters, batch: RequestBatch, tokens_1P: jax.Array
) -> Any:
    model = transformer.bind(static.config, params)
    hooks = hooks_of(static.config, batch, jnp.arange(tokens_1P.shape[1])[None])
    numbers = jnp.arange(static.config.n_layers)
    h_1PD, _ = model.hidden(tokens_1P, hooks=hooks, hook_inputs=numbers)
    size, d = h_1PD.shape[1:]
    filled = -size % _PIECE
    pieces = jnp.pad(h_1PD[0], ((0, filled), (0, 0))).reshape(-1, _PIECE, d)
    following = jnp.pad(tokens_1P[0, 1:], (0, filled + 1)).reshape(-1, _PIECE)

    def of_piece(piece: tuple[jax.Array, jax.Array]) -> Any:
        h, tokens = piece
        return _picked(jax.nn.log_softmax(model.logits(h), axis=-1), tokens)

    found = jax.lax.map(of_piece, (pieces, following))
    found = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:size], found)
    return found if static.replicated is None else jax.lax.with_sharding_constraint(found, static.replicated)


@jax.jit
def _picked(all_BV: jax.Array, tokens_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    own_B = jnp.take_along_axis(all_BV, tokens_B[:, None], axis=-1)[:, 0]
    values, tokens = jax.lax.top_k(all_BV, min(MOST_ALTERNATIVES, all_BV.shape[-1]))
    return own_B, tokens, values
