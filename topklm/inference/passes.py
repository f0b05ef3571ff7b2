"""Programs of one pass over whole texts: logits, losses, and what layers compute on the way.

Compiled for shapes and the model; rows are padded to a few lengths before, and results cut behind. Dims: B
rows, T tokens of the longest, P places it is padded to, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.inference.interventions import Interventions
from topklm.inference.token_rows import positions_in
from topklm.model import transformer
from topklm.model.losses import token_losses
from topklm.model.transformer import Changes
from topklm.neurons.activations import SparseActivations, capture


class Input(NamedTuple):
    """Tokens, int32[B, P], and which document each belongs to, int32[B, P]; None: a row is one."""

    tokens: Any
    segment_ids: Any = None


@functools.partial(jax.jit, static_argnums=0)
def logits(
    config: ModelConfig, params: transformer.Parameters, given: Input, interventions: Interventions | None
) -> jax.Array:
    """Gives next-token logits, float32[B, P, V]."""
    model = transformer.bind(config, params)
    return model.logits(_hidden(model, given, interventions))


@functools.partial(jax.jit, static_argnums=0)
def losses(
    config: ModelConfig,
    params: transformer.Parameters,
    given: Input,
    lengths_B: jax.Array,
    interventions: Interventions | None,
) -> tuple[jax.Array, jax.Array]:
    """Gives next-token losses in nats.

    Args:
        config: The model's shape.
        params: Its parameters.
        given: Rows of tokens.
        lengths_B: int32[B], tokens of each row.
        interventions: On neurons.

    Returns:
        The mean over tokens that are scored, all but the first of each document; and float32[B, P], at t the
        loss of token t + 1, NaN where that is not scored.
    """
    model = transformer.bind(config, params)
    h_BPD = _hidden(model, given, interventions)
    found_BP = token_losses(h_BPD, model.unembedding(), _next(given.tokens), config.vocab_size)
    scored_BP = jnp.arange(1, found_BP.shape[1] + 1)[None] < lengths_B[:, None]
    if given.segment_ids is not None:
        scored_BP &= given.segment_ids == _next(given.segment_ids)
    mean = jnp.sum(jnp.where(scored_BP, found_BP, 0.0)) / jnp.sum(scored_BP)
    return mean, jnp.where(scored_BP, found_BP, jnp.nan)


@functools.partial(jax.jit, static_argnums=(0, 1))
def logits_and_activations(
    config: ModelConfig,
    wanted: tuple[str, ...],
    params: transformer.Parameters,
    given: Input,
    interventions: Interventions | None,
) -> tuple[jax.Array, SparseActivations, dict[str, jax.Array]]:
    """Gives next-token logits, float32[B, P, V], and what has one of these names, see `capture`."""
    model = transformer.bind(config, params)
    segments, positions, changes = how(config, given, interventions)
    more_active = 0 if interventions is None else len(interventions.layer)
    h_BPD, neurons, others = capture(model, given.tokens, wanted, changes, more_active, segments, positions)
    return model.logits(h_BPD), neurons, others


def how(config: ModelConfig, given: Input, interventions: Interventions | None) -> tuple[Any, Any, Changes]:
    """Gives segments and positions of tokens, None where a row is one document, and changes of layers."""
    positions = None if given.segment_ids is None else positions_in(given.segment_ids)
    changes = Changes() if interventions is None else interventions.changes(config, positions)
    return given.segment_ids, positions, changes


def padded(x_BT: Any, added: int, fill: int) -> Any:
    """Puts so many more tokens at the right of each row."""
    pad = np.pad if isinstance(x_BT, np.ndarray) else jnp.pad
    return pad(x_BT, ((0, 0), (0, added)), constant_values=fill) if added else x_BT


def cut(x: jax.Array, length: int, axis: int) -> jax.Array:
    """Takes off the padding of rows."""
    at = (slice(None),) * axis + (slice(length),)
    if x.shape[axis] == length:
        return x
    if isinstance(x, jax.core.Tracer) or [device.platform for device in x.devices()] != ["cpu"]:
        return x[at]
    # A slice would be a program of its own for each length.
    return jax.device_put(np.asarray(x)[at], x.sharding)


def _hidden(model: transformer.Transformer, given: Input, interventions: Interventions | None) -> jax.Array:
    """Gives normed hidden states, [B, P, D]."""
    segments, positions, changes = how(model.config, given, interventions)
    numbers = jnp.arange(model.config.n_layers)
    h_BPD, _ = model.hidden(given.tokens, segments, positions, **changes._asdict(), edits=numbers)
    return h_BPD


def _next(x_BP: jax.Array) -> jax.Array:
    """Gives at each place what stands at the next, [B, P]; at the last one, what does not count."""
    return jnp.roll(x_BP, -1, axis=1)
