"""The programs of generation: whole texts run once, then many tokens by one call.

Compiled for shapes and `Plan`; all else is data. Dims: B rows, P places of prompts, C places of the cache, V
vocabulary, D d_model, N tokens of a call.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.inference import adaptive
from topklm.inference import cache as cache_lib
from topklm.inference.cache import STEPS
from topklm.inference.intervention_batch import InterventionBatch
from topklm.inference.sampling import RowSampling, draw
from topklm.model import transformer
from topklm.model.transformer import Changes

_Place = tuple[Any, Any, Any, Any, Any, Any]  # of a step: layers, cache, buffer, tokens, lengths, number

NOTHING = np.iinfo(np.int32).min  # in place of a token, in rows that are done


class Plan(NamedTuple):
    """What a program is compiled for, besides shapes."""

    config: ModelConfig
    replicated: jax.sharding.NamedSharding | None  # of results, where parameters are on several devices
    high_k: int | None = None  # of uncertain tokens; None: all have the model's k

    @classmethod
    def of(cls, config: ModelConfig, params: transformer.Parameters) -> "Plan":
        """For parameters where they are."""
        sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
        if not isinstance(sharding, jax.sharding.NamedSharding) or sharding.mesh.size == 1:
            return cls(config, None)
        return cls(config, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec()))


class State(NamedTuple):
    """What one call hands to the next, [B, ...]. Positions count from the first token in the cache."""

    cache: Any
    logits: Any  # float32[B, V], of the next token
    place: Any  # int32, its position
    made: Any  # int32, tokens drawn so far
    remaining: Any  # int32, tokens still to be drawn; 0: the row is done
    present: Any  # bool, tokens that the text holds


class Rows(NamedTuple):
    """What stays the same during a text, [B]."""

    sampling: RowSampling
    first: Any  # int32, position in the text of the first token that the cache holds
    prompt_lengths: Any  # int32, in the text
    stop_token: Any  # int32
    interventions: InterventionBatch | None
    entropy: Any = None  # float32 scalar, nats above which a token is uncertain


@functools.partial(jax.jit, static_argnums=0)
def run_whole(
    plan: Plan,
    params: transformer.Parameters,
    rows: Rows,
    tokens_BP: jax.Array,
    lengths_B: jax.Array,
) -> tuple[Any, jax.Array]:
    """Runs whole texts; returns the cache, and the logits of what follows each, float32[B, V]."""
    model = transformer.bind(plan.config, params)
    positions_BP = rows.first[:, None] + jnp.arange(tokens_BP.shape[1])
    h_BD, filled = cache_lib.prefill(model, tokens_BP, lengths_B, _changes(plan.config, rows, positions_BP))
    return _whole(plan, (filled, model.logits(h_BD)))


@functools.partial(jax.jit, static_argnums=(0, 2))
def with_room(plan: Plan, filled: Any, size: int) -> Any:
    """The cache of a program, for texts of so many tokens."""
    return _whole(plan, cache_lib.with_room(plan.config, filled, size))


@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def run_steps(
    plan: Plan,
    params: transformer.Parameters,
    layers: Any,
    rows: Rows,
    state: State,
    steps: jax.Array,
) -> tuple[jax.Array, State]:
    """So many tokens of each row, int32[B, N]; fewer where all rows are done or the cache is full."""
    keys_B = rows.sampling.keys()
    cache = state.cache
    # Of rows that are done nothing is looked at; their length is not to be read for.
    lengths_B = jnp.where(state.remaining > 0, state.place, 0)
    room = cache_lib.room(cache)

    def goes_on(state: State) -> jax.Array:
        # The token that no longer fits the cache is the last one whose logits are known.
        return (state.remaining > 0) & (state.place <= room)

    def more(carry: tuple) -> jax.Array:
        number, _, state = carry
        return (number < steps) & jnp.any(goes_on(state))

    def one_token(carry: tuple) -> tuple:
        number, new_BN, state = carry
        active_B = goes_on(state)
        new_B = draw(state.logits, state.present, rows.sampling, keys_B, state.made)
        positions_B1 = (rows.first + lengths_B + number)[:, None]
        place = layers, cache, state.cache, new_B, lengths_B, number
        # The last token of all is run for nothing; to skip it would take a copy of the buffer.
        logits_BV, new = _next(plan, params, rows, place, positions_B1)
        left_B = jnp.where(new_B == rows.stop_token, 0, state.remaining - 1)
        state = State(
            new,
            jnp.where(active_B[:, None], logits_BV, state.logits),
            state.place + active_B,
            state.made + active_B,
            jnp.where(active_B, left_B, state.remaining),
            state.present.at[jnp.arange(len(new_B)), new_B].max(active_B),
        )
        return number + 1, new_BN.at[:, number].set(jnp.where(active_B, new_B, NOTHING)), state

    nothing_BN = jnp.full((len(state.place), STEPS), NOTHING, jnp.int32)
    # Inside the loop, the buffer stands in the cache's place: the cache itself does not change there.
    start = jnp.int32(0), nothing_BN, state._replace(cache=cache_lib.buffer(cache))
    _, new_BN, state = jax.lax.while_loop(more, one_token, start)
    state = state._replace(cache=cache_lib.merged(cache, state.cache, lengths_B))
    return _whole(plan, (new_BN, state))


def _next(
    plan: Plan, params: transformer.Parameters, rows: Rows, place: _Place, positions_B1: jax.Array
) -> tuple[jax.Array, Any]:
    """Runs the newest token of each row: the logits of what follows, and the buffer with it."""
    model = transformer.bind(plan.config, params)
    changes = _changes(plan.config, rows, positions_B1)
    # An intervention may make one more entry active than TopK keeps.
    more_active = 0 if rows.interventions is None else len(rows.interventions.layer)
    if plan.high_k is None:
        n_active = min(plan.config.topk_k + more_active, plan.config.d_model)
        h_BD, new = cache_lib.step(model, *place, changes, n_active)
        return model.logits(h_BD), new
    high_config = dataclasses.replace(plan.config, topk_k=plan.high_k)
    high = transformer.bind(high_config, params)
    both = changes, _changes(high_config, rows, positions_B1)
    return adaptive.step(model, high, rows.entropy, *place, *both, more_active)[:2]


def _changes(config: ModelConfig, rows: Rows, positions_BT: jax.Array) -> Changes:
    if rows.interventions is None:
        return Changes()
    return rows.interventions.changes(config, positions_BT, rows.prompt_lengths)


def _whole(plan: Plan, tree: Any) -> Any:
    """Results whole on every device, so that each process can read them, and programs see one layout."""
    return tree if plan.replicated is None else jax.lax.with_sharding_constraint(tree, plan.replicated)
