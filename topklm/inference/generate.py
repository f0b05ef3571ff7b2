"""Tokens from a model: a prompt is run once, then each new token alone, with keys and values kept.

Many tokens are made by one call of a program. Programs are compiled for sizes (`cache.bucket`), not for
lengths; sampling and interventions are data. Dims: B rows, C places of the cache, V vocabulary.
"""

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.inference import cache as cache_lib
from topklm.inference.interventions import Interventions
from topklm.inference.sampling import draw, RowSampling, Sampling
from topklm.model import transformer

# What happens to a text that has filled the model's context. "slide": each further token is predicted from the
# last `context_length` tokens, which are run anew for it. "halve": the last half of them is run anew, and the
# rest forgotten, so many tokens follow before that happens again. "stop": the text ends.
WHEN_FULL = ("slide", "halve", "stop")
STEPS = 16  # tokens that one call of the program makes

_NOTHING = np.iinfo(np.int32).min  # in place of a token, in rows that are done


class _Plan(NamedTuple):
    """What a program is compiled for, besides shapes."""

    config: ModelConfig
    replicated: jax.sharding.NamedSharding | None  # of results, where parameters are on several devices


class _State(NamedTuple):
    """What one call hands to the next. Positions count from the first token that the cache holds."""

    cache: Any
    last_B: jax.Array  # int32, the newest token, which is not in the cache
    place_B: jax.Array  # int32, its position
    made_B: jax.Array  # int32, tokens drawn so far
    remaining_B: jax.Array  # int32, tokens still to be drawn; 0: the row is done
    present_BV: jax.Array  # bool, tokens that the text holds


class _Rows(NamedTuple):
    """What stays the same during a text."""

    sampling: RowSampling
    first_B: Any  # int32, position in the text of the first token that the cache holds
    prompt_lengths_B: Any  # int32, in the text
    stop_token: Any  # int32
    interventions: Interventions | None


class Generation:
    """Texts being continued together; each gets the tokens that it would get alone.

    Attributes:
        texts: Token ids of each row so far, prompt and new ones.
        finished: Why each row has ended: "stop" (the stop token, or `end`), "length"; None while it goes on.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: transformer.Parameters,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[Sampling],
        *,
        max_new_tokens: Sequence[int],
        stop_token: int,
        interventions: Interventions | None = None,
        when_full: str = "slide",
    ):
        """Checks what is asked for; nothing is computed yet.

        Args:
            config: The model's shape.
            params: Its parameters, on one device or a mesh.
            prompts: Token ids of each row, at least one; the model sees the last `context_length` of them.
            sampling: Of each row.
            max_new_tokens: Of each row.
            stop_token: A row ends when it is drawn; it is not returned.
            interventions: On the model's neurons, in all rows or some.
            when_full: One of `WHEN_FULL`.

        Raises:
            ValueError: For what is not allowed, in one line.
        """
        _check(config, prompts, max_new_tokens, when_full)
        self.texts = [[int(token) for token in prompt] for prompt in prompts]
        self._limits = [len(prompt) + n for prompt, n in zip(prompts, max_new_tokens, strict=True)]
        if when_full == "stop":
            self._limits = [min(limit, config.context_length) for limit in self._limits]
        self.finished: list[str | None] = [None] * len(prompts)
        self._plan = _Plan(config, _replicated(params))
        self._params = params
        self._layers: Any = None
        self._kept_when_full = max(1, config.context_length // 2) if when_full == "halve" else None
        self._rows = _Rows(
            RowSampling.of([one.check() for one in sampling]),
            np.zeros(len(prompts), np.int32),
            np.array([len(prompt) for prompt in prompts], np.int32),
            np.int32(stop_token),
            interventions,
        )
        self._firsts = [max(0, len(prompt) - config.context_length) for prompt in prompts]
        self._state: _State | None = None
        self._end_what_is_long_enough()

    @property
    def done(self) -> bool:
        """Whether all rows have ended."""
        return all(self.finished)

    def end(self, row: int) -> None:
        """Ends a row from outside, e.g. at a stop string."""
        self.finished[row] = self.finished[row] or "stop"

    def advance(self, steps: int = STEPS) -> list[list[int]]:
        """New tokens of each row: one where a text is run whole, as at the beginning; else at most `steps`."""
        if self.done:
            return [[] for _ in self.texts]
        context = self._plan.config.context_length
        live = [row for row, why in enumerate(self.finished) if why is None]
        full = [row for row in live if len(self.texts[row]) - self._firsts[row] > context]
        if self._state is None or full:
            for row in full:
                self._firsts[row] = len(self.texts[row]) - (self._kept_when_full or context)
            new_BN = self._run_whole()
        else:
            new_BN = self._run_steps(min(steps, STEPS))
        return self._take(np.asarray(new_BN))

    def _run_whole(self) -> jax.Array:
        plan = self._plan
        if self._layers is None:
            self._layers = cache_lib.by_layer(plan.config, self._params)
        context = plan.config.context_length
        windows = [
            text[first : first + context] for text, first in zip(self.texts, self._firsts, strict=True)
        ]
        lengths = np.array([len(window) for window in windows], np.int32)
        tokens = np.zeros((len(windows), cache_lib.bucket(int(lengths.max()), context)), np.int32)
        present = np.zeros((len(windows), plan.config.vocab_size), bool)
        for row, window in enumerate(windows):
            tokens[row, : len(window)] = window
            present[row, self.texts[row]] = True
        self._rows = self._rows._replace(first_B=np.array(self._firsts, np.int32))
        need = max(limit - first for limit, first in zip(self._limits, self._firsts, strict=True))
        size = max(cache_lib.bucket(min(need, context), context), tokens.shape[1])
        made = np.array([len(text) for text in self.texts], np.int32) - self._rows.prompt_lengths_B
        filled, first_new_B, self._state = _prefill(
            plan, self._params, self._rows, tokens, lengths, present, made, self._remaining()
        )
        if size > tokens.shape[1]:
            filled = _with_room(plan, filled, size)
        self._state = self._state._replace(cache=filled)
        return first_new_B[:, None]

    def _run_steps(self, steps: int) -> jax.Array:
        assert self._state is not None
        # Rows may have been ended from outside.
        state = self._state._replace(remaining_B=self._remaining())
        new_BN, self._state = _steps(
            self._plan, self._params, self._layers, self._rows, state, np.int32(steps)
        )
        return new_BN

    def _remaining(self) -> np.ndarray:
        left = [limit - len(text) for limit, text in zip(self._limits, self.texts, strict=True)]
        return np.array([0 if why else n for n, why in zip(left, self.finished, strict=True)], np.int32)

    def _take(self, new_BN: np.ndarray) -> list[list[int]]:
        """Adds what was drawn to the texts."""
        taken: list[list[int]] = []
        for row, new in enumerate(new_BN.tolist()):
            taken.append([])
            for token in new:
                if self.finished[row] or token == _NOTHING:
                    break
                if token == self._rows.stop_token:
                    self.finished[row] = "stop"
                    break
                taken[row].append(token)
            self.texts[row] += taken[row]
        self._end_what_is_long_enough()
        return taken

    def _end_what_is_long_enough(self) -> None:
        for row, (text, limit) in enumerate(zip(self.texts, self._limits, strict=True)):
            if len(text) >= limit:
                self.finished[row] = self.finished[row] or "length"


def generate_tokens(
    config: ModelConfig,
    params: transformer.Parameters,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    stop_token: int,
) -> list[int]:
    """Continues a prompt.

    Beyond the context the model sees the last `context_length` tokens.

    Args:
        config: The model's shape.
        params: Its parameters.
        prompt: Token ids, at least one; the model sees the last `context_length` of them.
        max_new_tokens: Upper bound on the length of the continuation, tokens.
        temperature: Divides the logits; 0 takes the most likely token.
        seed: Of the samples; the same seed gives the same tokens.
        stop_token: Generation ends when this token is drawn; it is not returned.

    Returns:
        The new token ids.

    Raises:
        ValueError: For an empty prompt, a token that is not in the vocabulary, or a temperature below 0.
    """
    sampling = Sampling(temperature=temperature, seed=seed)
    generation = Generation(
        config, params, [prompt], [sampling], max_new_tokens=[max_new_tokens], stop_token=stop_token
    )
    while not generation.done:
        generation.advance()
    return generation.texts[0][len(prompt) :]


@functools.partial(jax.jit, static_argnums=0)
def _prefill(
    plan: _Plan,
    params: transformer.Parameters,
    rows: _Rows,
    tokens_BP: jax.Array,
    lengths_B: jax.Array,
    present_BV: jax.Array,
    made_B: jax.Array,
    remaining_B: jax.Array,
) -> tuple[Any, jax.Array, _State]:
    """Runs whole texts; returns the cache, the first new token of each, and the state without the cache."""
    model = transformer.bind(plan.config, params)
    edit = None
    if rows.interventions is not None:
        positions_BP = rows.first_B[:, None] + jnp.arange(tokens_BP.shape[1])
        edit = rows.interventions.edit(positions_BP, rows.prompt_lengths_B)
    h_BD, filled = cache_lib.prefill(model, tokens_BP, lengths_B, edit)
    state = _State(None, lengths_B, lengths_B - 1, made_B, remaining_B, present_BV)
    new_B, state = _drawn(model.logits(h_BD), rows, rows.sampling.keys(), state, remaining_B > 0)
    return _whole(plan, (filled, new_B, state))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _with_room(plan: _Plan, filled: Any, size: int) -> Any:
    return _whole(plan, cache_lib.with_room(filled, size))


@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def _steps(
    plan: _Plan,
    params: transformer.Parameters,
    layers: Any,
    rows: _Rows,
    state: _State,
    steps: jax.Array,
) -> tuple[jax.Array, _State]:
    """At most so many tokens of each row, int32[B, STEPS], fewer where all rows are done or the cache is full."""
    model = transformer.bind(plan.config, params)
    keys_B = rows.sampling.keys()
    n_places = jax.tree.leaves(state.cache)[0].shape[-3]

    def goes_on(state: _State) -> jax.Array:
        return (state.remaining_B > 0) & (state.place_B < n_places)

    def more(carry: tuple) -> jax.Array:
        number, _, state = carry
        return (number < steps) & jnp.any(goes_on(state))

    def one_token(carry: tuple) -> tuple:
        number, new_BN, state = carry
        edit = None
        if rows.interventions is not None:
            positions_B1 = (rows.first_B + state.place_B)[:, None]
            edit = rows.interventions.edit(positions_B1, rows.prompt_lengths_B)
        active_B = goes_on(state)
        h_BD, cache = cache_lib.step(model, layers, state.cache, state.last_B, state.place_B, active_B, edit)
        new_B, state = _drawn(model.logits(h_BD), rows, keys_B, state._replace(cache=cache), active_B)
        return number + 1, new_BN.at[:, number].set(new_B), state

    nothing_BN = jnp.full((len(state.last_B), STEPS), _NOTHING, jnp.int32)
    _, new_BN, state = jax.lax.while_loop(more, one_token, (jnp.int32(0), nothing_BN, state))
    return _whole(plan, (new_BN, state))


def _drawn(
    logits_BV: jax.Array, rows: _Rows, keys_B: jax.Array, state: _State, active_B: jax.Array
) -> tuple[jax.Array, _State]:
    """The next token of each active row, and the state behind it."""
    new_B = draw(logits_BV, state.present_BV, rows.sampling, keys_B, state.made_B)
    row = jnp.arange(len(new_B))
    left_B = jnp.where(new_B == rows.stop_token, 0, state.remaining_B - 1)
    one_B = active_B.astype(jnp.int32)
    state = _State(
        state.cache,
        jnp.where(active_B, new_B, state.last_B),
        state.place_B + one_B,
        state.made_B + one_B,
        jnp.where(active_B, left_B, state.remaining_B),
        state.present_BV.at[row, new_B].max(active_B),
    )
    return jnp.where(active_B, new_B, _NOTHING), state


def _whole(plan: _Plan, tree: Any) -> Any:
    """Results whole on every device, so that each process can read them, and programs see one layout."""
    return tree if plan.replicated is None else jax.lax.with_sharding_constraint(tree, plan.replicated)


def _replicated(params: transformer.Parameters) -> jax.sharding.NamedSharding | None:
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding) or sharding.mesh.size == 1:
        return None
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())


def _check(
    config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], when_full: str
) -> None:
    if when_full not in WHEN_FULL:
        raise ValueError(f"when_full = {when_full!r}: must be one of {', '.join(WHEN_FULL)}")
    for number in max_new_tokens:
        whole = isinstance(number, int | np.integer) and not isinstance(number, bool)
        if not whole or number < 0:
            raise ValueError(f"max_new_tokens = {number!r}: must be an integer, 0 or more")
    for prompt in prompts:
        if not len(prompt):
            raise ValueError("prompt is empty: it must hold at least one token")
        outside = [token for token in prompt if not 0 <= token < config.vocab_size]
        if outside:
            raise ValueError(f"prompt: token {outside[0]} must be from 0 to {config.vocab_size - 1}")
        if when_full == "stop" and len(prompt) > config.context_length:
            raise ValueError(
                f"prompt has {len(prompt)} tokens: must be at most {config.context_length}, the model's "
                "context, with when_full = 'stop'; shorten it, or choose 'slide'"
            )
