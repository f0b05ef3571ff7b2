"""The jitted steps of generation: prefill, decode, log probabilities, and those that move rows of a batch.

Compiled for shapes and `StaticArgs`; all else is data. Dims: B rows, P tokens of prompts, C tokens of the KV
cache, V vocabulary, D d_model, N tokens of a call, R rows that join a batch, A the most alternatives that can
be asked for.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.inference import kv_cache
from topklm.inference.intervention_batch import InterventionBatch, on_rows
from topklm.inference.kv_cache import STEPS
from topklm.inference.sequence import RowSampling, Sequence, draw
from topklm.model import topk, transformer
from topklm.model.block import NO_HOOKS, LayerHooks

MOST_ALTERNATIVES = 20  # A
_PIECE = 32  # tokens of a prompt whose logits are computed at one time
NOTHING = np.iinfo(np.int32).min  # instead of a token, in rows that are done


class RequestBatch(NamedTuple):
    """The part of a batch that stays the same while its rows are decoded, [B]."""

    sampling: RowSampling
    first: Any  # int32, position in the sequence of the first token that the cache holds
    prompt_lengths: Any  # int32, in the sequence
    stop_token: Any  # int32
    interventions: InterventionBatch | None
    step_inputs: Any = None  # of a `TokenStep` that needs some


class CacheInputs(NamedTuple):
    """The arguments of `kv_cache.step` that say where the newest tokens belong."""

    layers: Any
    cache: Any
    buffer: Any
    tokens: Any
    lengths: Any
    number: Any


# Runs the last token of each row: logits of the next token, float32[B, V], the buffer with this token in it,
# and more, which is left out. Hashable, for programs are compiled for it.
TokenStep = Callable[[ModelConfig, transformer.Parameters, RequestBatch, CacheInputs], tuple]


def one_pass(
    config: ModelConfig, params: transformer.Parameters, batch: RequestBatch, at: CacheInputs
) -> tuple[jax.Array, kv_cache.Buffer]:
    """Runs the model once, with its own k: the `TokenStep` of nearly all generation."""
    model = transformer.bind(config, params)
    hooks = hooks_of(config, batch, (batch.first + at.lengths + at.number)[:, None])
    # Each intervention may make one neuron active beside those that TopK keeps.
    n_extra = 0 if batch.interventions is None else len(batch.interventions.layer)
    n_active = min(config.topk_k + n_extra, config.d_model)
    h_BD, buffer = kv_cache.step(model, *at, hooks, n_active)
    return model.logits(h_BD), buffer


class StaticArgs(NamedTuple):
    """The part of a program's arguments that it is compiled for, besides shapes."""

    config: ModelConfig
    replicated: jax.sharding.NamedSharding | None  # of results, where parameters are on several devices
    token_step: TokenStep = one_pass

    @classmethod
    def of(
        cls, config: ModelConfig, params: transformer.Parameters, token_step: TokenStep = one_pass
    ) -> "StaticArgs":
        """Makes those for parameters on their devices."""
        config = topk.for_parameters(config, params)
        sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
        if not isinstance(sharding, jax.sharding.NamedSharding) or sharding.mesh.size == 1:
            return cls(config, None, token_step)
        everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        return cls(config, everywhere, token_step)


class DecodeState(NamedTuple):
    """The part of a batch that each call changes, [B, ...]; positions count from the cache's first token."""

    cache: Any
    logits: Any  # float32[B, V], of the next token
    position: Any  # int32, its position
    n_drawn: Any  # int32, tokens drawn so far
    n_left: Any  # int32, tokens still to be drawn; 0: the row is done
    present: Any  # bool[B, V], tokens that the sequence holds


@functools.partial(jax.jit, static_argnums=0)
def prefill(
    static: StaticArgs,
    params: transformer.Parameters,
    batch: RequestBatch,
    tokens_BP: jax.Array,
    lengths_B: jax.Array,
) -> tuple[Any, jax.Array]:
    """Runs prompts; returns their keys and values, and the logits of the next token, float32[B, V]."""
    model = transformer.bind(static.config, params)
    positions_BP = batch.first[:, None] + jnp.arange(tokens_BP.shape[1])
    hooks = hooks_of(static.config, batch, positions_BP)
    h_BD, filled = kv_cache.prefill(model, tokens_BP, lengths_B, hooks)
    return _replicated(static, (filled, model.logits(h_BD)))


@functools.partial(jax.jit, static_argnums=(0, 2))
def with_capacity(static: StaticArgs, filled: Any, capacity: int) -> Any:
    """Returns the KV cache of prefilled rows, for sequences of so many tokens."""
    return _replicated(static, kv_cache.with_capacity(static.config, filled, capacity))


@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def decode(
    static: StaticArgs,
    params: transformer.Parameters,
    layers: Any,
    batch: RequestBatch,
    state: DecodeState,
    steps: jax.Array,
) -> tuple[jax.Array, DecodeState]:
    """Draws so many tokens of each row, int32[B, N]; fewer once all rows are done or the cache is full."""
    keys_B = batch.sampling.keys()
    cache = state.cache
    # Of rows that are done nothing is looked at; their length is not to be read for.
    lengths_B = jnp.where(state.n_left > 0, state.position, 0)
    capacity = kv_cache.capacity(cache)

    def goes_on(state: DecodeState) -> jax.Array:
        # The token that no longer fits the cache is the last one whose logits are known.
        return (state.n_left > 0) & (state.position <= capacity)

    def more(carry: tuple) -> jax.Array:
        number, _, state = carry
        return (number < steps) & jnp.any(goes_on(state))

    def one_token(carry: tuple) -> tuple:
        number, new_BN, state = carry
        active_B = goes_on(state)
        new_B = draw(state.logits, state.present, batch.sampling, keys_B, state.n_drawn)
        at = CacheInputs(layers, cache, state.cache, new_B, lengths_B, number)
        # The last token of all is run for nothing; to skip it would take a copy of the buffer.
        logits_BV, buffer, *_ = static.token_step(static.config, params, batch, at)
        n_left_B = jnp.where(new_B == batch.stop_token, 0, state.n_left - 1)
        state = DecodeState(
            buffer,
            jnp.where(active_B[:, None], logits_BV, state.logits),
            state.position + active_B,
            state.n_drawn + active_B,
            jnp.where(active_B, n_left_B, state.n_left),
            state.present.at[jnp.arange(len(new_B)), new_B].max(active_B),
        )
        return number + 1, new_BN.at[:, number].set(jnp.where(active_B, new_B, NOTHING)), state

    nothing_BN = jnp.full((len(state.position), STEPS), NOTHING, jnp.int32)
    # Inside the loop, the state holds the buffer instead of the cache, which does not change there.
    start = jnp.int32(0), nothing_BN, state._replace(cache=kv_cache.empty_buffer(cache))
    _, new_BN, state = jax.lax.while_loop(more, one_token, start)
    state = state._replace(cache=kv_cache.append_buffer(cache, state.cache, lengths_B))
    return _replicated(static, (new_BN, state))


@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def insert(static: StaticArgs, state: DecodeState, new: DecodeState, slots_R: jax.Array) -> DecodeState:
    """Writes the rows of `new` into these slots of a batch; those past its last slot are dropped."""

    def set_rows(x: jax.Array, rows: jax.Array) -> jax.Array:
        return x.at[slots_R].set(rows, mode="drop")

    def set_cache(x: jax.Array, rows: jax.Array) -> jax.Array:
        return set_rows(x, rows) if x.ndim == 4 else x.at[:, slots_R].set(rows, mode="drop")

    rest = jax.tree.map(set_rows, state._replace(cache=None), new._replace(cache=None))
    return _replicated(static, rest._replace(cache=jax.tree.map(set_cache, state.cache, new.cache)))


@functools.partial(jax.jit, static_argnums=(0, 3))
def rearrange(static: StaticArgs, state: DecodeState, order_B: jax.Array, capacity: int) -> DecodeState:
    """Takes these rows of a batch, with so many tokens in the cache, at least those that are in use."""
    cache = jax.tree.map(lambda x: jnp.take(x, order_B, axis=x.ndim - 4), state.cache)
    rest = jax.tree.map(lambda x: jnp.take(x, order_B, axis=0), state._replace(cache=None))
    return _replicated(static, rest._replace(cache=kv_cache.resize(static.config, cache, capacity)))


def hooks_of(config: ModelConfig, batch: RequestBatch, positions_BT: jax.Array) -> LayerHooks:
    """Returns the hooks that make a batch's interventions."""
    if batch.interventions is None:
        return NO_HOOKS
    return batch.interventions.layer_hooks(config, positions_BT, batch.prompt_lengths)


def _replicated(static: StaticArgs, tree: Any) -> Any:
    """Has results whole on every device, so that each process can read them, and programs see one layout."""
    return tree if static.replicated is None else jax.lax.with_sharding_constraint(tree, static.replicated)


class Scores(NamedTuple):
    """Log probabilities, in nats, of one token in each row, or at each position.

    They are of the model's own distribution, the softmax of its logits: before repetition penalty,
    temperature and limits of sampling, after interventions.
    """

    own: Any  # float32[B], of the tokens themselves
    tokens: Any  # int32[B, A], the most likely ones, the likeliest first
    values: Any  # float32[B, A], of those

    def row(self, row: int, n: int) -> tuple[float, tuple[tuple[int, float], ...]]:
        """Returns that of one token, and of so many alternatives."""
        alternatives = zip(self.tokens[row, :n].tolist(), self.values[row, :n].tolist(), strict=True)
        return float(self.own[row]), tuple(alternatives)


def scores_of_drawn(log_p_BV: jax.Array, tokens_B: np.ndarray) -> Scores:
    """Returns those of tokens that were drawn, int32[B], of all log probabilities before them."""
    return jax.tree.map(np.asarray, _scores_of_rows(log_p_BV, tokens_B))


def scores_of_prompt(
    config: ModelConfig, params: transformer.Parameters, sequence: Sequence, size: int
) -> Scores:
    """Returns those of a prompt's tokens but the first, each given those before; `size` is with padding."""
    n = sequence.n_prompt
    tokens_1P = np.zeros((1, size), np.int32)
    tokens_1P[0, :n] = sequence.tokens[:n]
    steer = None if sequence.steer is None else on_rows(config, [(0, sequence.steer)], 1)
    found = _scores_of_prompt(
        StaticArgs.of(config, params), params, steer, tokens_1P, np.array([n], np.int32)
    )
    return jax.tree.map(lambda x: np.asarray(x)[: n - 1], found)


@functools.partial(jax.jit, static_argnums=0)
def _scores_of_prompt(
    static: StaticArgs,
    params: transformer.Parameters,
    steer: InterventionBatch | None,
    tokens_1P: jax.Array,
    lengths_1: jax.Array,
) -> Scores:
    model = transformer.bind(static.config, params)
    hooks = NO_HOOKS if steer is None else steer.layer_hooks(static.config, None, lengths_1)
    numbers = jnp.arange(static.config.n_layers)
    h_1PD, _ = model.hidden(tokens_1P, hooks=hooks, hook_inputs=numbers)

    def of_token(inputs: tuple[jax.Array, jax.Array]) -> Scores:
        h_D, following = inputs
        return _scores(jax.nn.log_softmax(model.logits(h_D)), following)

    following_P = jnp.roll(tokens_1P[0], -1)
    return _replicated(static, jax.lax.map(of_token, (h_1PD[0], following_P), batch_size=_PIECE))


def _scores(log_p_V: jax.Array, token: jax.Array) -> Scores:
    values, tokens = jax.lax.top_k(log_p_V, min(MOST_ALTERNATIVES, len(log_p_V)))
    return Scores(log_p_V[token], tokens, values)


_scores_of_rows = jax.jit(jax.vmap(_scores))
