"""Assigns sequences to the slots of a batch, prefills new ones, and decodes all together.

A sequence that comes is prefilled beside others that came with it, and its keys and values are written into
a free slot; the other slots go on with theirs. Each gets the tokens that it would get alone. Programs are
compiled for a few sizes, see `sequence`; which sequences there are, and their requests, is data. `Generation`
is the scheduler with nobody arriving. Not to be used by two threads at once. Dims: B slots, R rows of a
prefill, P tokens of prompts, V vocabulary.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
import functools
import itertools
from typing import Any

import jax
import numpy as np

from topklm.config import ModelConfig
from topklm.inference import kv_cache
from topklm.inference import steps as steps_lib
from topklm.inference.adaptive import AdaptiveK
from topklm.inference.intervention_batch import InterventionBatch
from topklm.inference.sequence import (
    BatchBuckets,
    Buckets,
    Row,
    RowSampling,
    Sampling,
    Sequence,
    ServingBuckets,
    Token,
    held,
)
from topklm.inference.steps import NOTHING, STEPS, DecodeState, RequestBatch, Scores, StaticArgs, TokenStep
from topklm.model import transformer

_NO_SAMPLING = Sampling(temperature=0.0)


class Scheduler:
    """A batch of sequences."""

    def __init__(
        self,
        config: ModelConfig,
        params: transformer.Parameters,
        stop_token: int,
        buckets: Buckets,
        *,
        layers: kv_cache.Layers = None,
        token_step: TokenStep = steps_lib.one_pass,
        step_inputs: Any = None,
    ):
        """Takes a model, on one device or a mesh; nothing is computed yet.

        A sequence ends when the stop token is drawn, which is reported, and is no part of the sequence.
        `layers` is `kv_cache.by_layer` of the model, if it has been made already. `token_step` runs the
        newest tokens, with `step_inputs`.
        """
        self.sequences: list[Sequence] = []  # that are in slots now
        self._config, self._params, self._stop = config, params, np.int32(stop_token)
        self._static = StaticArgs.of(config, params, token_step)
        self._step_inputs, self._buckets, self._layers = step_inputs, buckets, layers
        self._slots: list[Row] = []  # the sequence in each
        self._state: DecodeState | None = None
        self._batch: RequestBatch | None = None  # made again when sequences come or go

    @property
    def n_slots(self) -> int:
        """Slots of the batch now, with those that are free."""
        return len(self._slots)

    def clear(self) -> None:
        """Forgets all sequences, and everything that has been computed."""
        self.sequences, self._slots, self._state, self._batch = [], [], None, None

    def add(self, sequences: list[Sequence]) -> None:
        """Puts sequences into free slots and prefills them, so that `decode` continues them.

        When serving, at most as many as slots are free, and as `ServingBuckets.together` allows for the
        longest.
        """
        self.sequences += sequences
        if isinstance(self._buckets, ServingBuckets):
            n_slots = max(len(self._slots), self._buckets.batch(len(self.sequences)))
            self.resize(n_slots, self._capacity())
            for one in sequences:
                self._slots[self._slots.index(None)] = one
        else:
            self._slots = [*sequences]
        self._prefill(sequences)

    def remove(self, sequence: Sequence) -> None:
        """Frees the slot of a sequence; it may have been freed already."""
        if sequence in self.sequences:
            self.sequences.remove(sequence)
            self._slots[self._slots.index(sequence)] = None
            self._batch = None

    def shrink(self) -> None:
        """Goes on with as few slots as there are sequences: a smaller batch is faster."""
        if self._state is not None:
            self.resize(len(self.sequences), 0)

    def resize(self, n_slots: int, capacity: int) -> None:
        """Makes a batch of at least so many slots, and a cache of so many tokens, which shrinks if empty."""
        assert isinstance(self._buckets, ServingBuckets)
        n_slots = self._buckets.batch(max(n_slots, len(self.sequences)))
        if self._state is None:
            self._state, self._slots = self._empty_state(), [None]
        current = kv_cache.capacity(self._state.cache)
        capacity = max(capacity, current if self.sequences else self._buckets.caches[0])
        # One after the other: of both at once, there would be more programs.
        if n_slots != len(self._slots):
            self._rearrange(n_slots, current)
        if capacity != current:
            self._rearrange(n_slots, capacity)

    def decode(self, steps: int = STEPS) -> list[tuple[Sequence, list[Token]]]:
        """Draws tokens of each sequence: up to so many, at most `STEPS`; one if probabilities are wanted.

        Sequences that have ended are removed; the stop token is the last token of one that it ended.
        """
        full = [one for one in self.sequences if one.forget(self._config)]
        for group in self._buckets.groups(full, self.sequences):
            self._prefill(group)
        if not self.sequences:
            return []
        assert self._state is not None
        scored = any(one.n_alternatives is not None for one in self.sequences)
        # Kept while the state goes on to the next token.
        before = jax.nn.log_softmax(self._state.logits, axis=-1) if scored else None
        n_left = [0 if one is None else one.limit - len(one.tokens) for one in self._slots]
        if self._batch is None:
            self._batch = self._batch_of(self._slots)
        if self._layers is None:
            self._layers = kv_cache.by_layer(self._config, self._params)
        new_BN, self._state = steps_lib.decode(
            self._static,
            self._params,
            self._layers,
            self._batch,
            self._state._replace(n_left=np.array(n_left, np.int32)),
            np.int32(1 if scored else min(steps, STEPS)),
        )
        new = np.asarray(new_BN)
        scores = None if before is None else steps_lib.scores_of_drawn(before, np.maximum(new[:, 0], 0))
        return self._taken(new.tolist(), scores)

    def _capacity(self) -> int:
        """Returns the bucket of a cache that holds each sequence until its end."""
        return max(self._buckets.cache(one.capacity(self._config)) for one in self.sequences)

    def _empty_state(self) -> DecodeState:
        """Makes the state of one free slot, from a program's results: so later states have their layout."""
        assert isinstance(self._buckets, ServingBuckets)
        tokens, zero = np.zeros((1, self._buckets.prompts[0]), np.int32), np.zeros(1, np.int32)
        batch = self._batch_of([None])
        filled, logits = steps_lib.prefill(self._static, self._params, batch, tokens, np.ones(1, np.int32))
        cache = steps_lib.with_capacity(self._static, filled, self._buckets.caches[0])
        present = np.zeros((1, self._config.vocab_size), bool)
        return DecodeState(cache, logits, zero, zero, zero, present)

    def _rearrange(self, n_slots: int, capacity: int) -> None:
        assert self._state is not None
        occupied = [slot for slot, one in enumerate(self._slots) if one is not None]
        order = np.zeros(n_slots, np.int32)
        order[: len(occupied)] = occupied
        self._state = steps_lib.rearrange(self._static, self._state, order, capacity)
        self._slots = [self._slots[slot] for slot in occupied] + [None] * (n_slots - len(occupied))
        self._batch = None

    def _prefill(self, sequences: list[Sequence]) -> None:
        """Runs the model on everything that it sees of some sequences, and writes that into their slots."""
        longest = max(len(one.visible(self._config)) for one in sequences)
        size = self._buckets.prompt(longest)
        rows = self._buckets.prefill_rows(sequences, self._slots, longest)
        # Rows that only fill up have a slot past the last one, where nothing is written.
        slots, n_drawn = np.full(len(rows), len(self._slots), np.int32), np.zeros(len(rows), np.int32)
        tokens, lengths = np.zeros((len(rows), size), np.int32), np.ones(len(rows), np.int32)
        for row, one in enumerate(rows):
            if one is not None:
                visible = one.visible(self._config)
                slots[row] = self._slots.index(one)
                tokens[row, : len(visible)], lengths[row] = visible, len(visible)
                n_drawn[row] = len(one.tokens) - one.n_prompt
        batch = self._batch_of(rows)
        filled, logits = steps_lib.prefill(self._static, self._params, batch, tokens, lengths)
        present = held([one.tokens if one else [] for one in rows], self._config.vocab_size, int(self._stop))
        serving = self._state if isinstance(self._buckets, ServingBuckets) else None
        capacity = max(self._capacity(), size) if serving is None else kv_cache.capacity(serving.cache)
        cache = steps_lib.with_capacity(self._static, filled, capacity)
        new = DecodeState(cache, logits, lengths, n_drawn, np.zeros(len(rows), np.int32), present)
        self._state = new if serving is None else steps_lib.insert(self._static, serving, new, slots)
        self._batch = None

    def _batch_of(self, rows: list[Row]) -> RequestBatch:
        return RequestBatch(
            RowSampling.of([one.sampling if one else _NO_SAMPLING for one in rows]),
            np.array([one.first if one else 0 for one in rows], np.int32),
            np.array([one.n_prompt if one else 0 for one in rows], np.int32),
            self._stop,
            self._buckets.interventions(self._config, rows),
            self._step_inputs,
        )

    def _taken(self, new: list[list[int]], scores: Scores | None) -> list[tuple[Sequence, list[Token]]]:
        """Adds the tokens that were drawn to their sequences."""
        found = []
        for slot, one in enumerate(self._slots):
            if one is None:
                continue
            tokens: list[Token] = []
            for drawn in new[slot]:
                if drawn == NOTHING or one.finished:
                    break
                if scores is None or one.n_alternatives is None:
                    tokens.append(Token(drawn))
                else:
                    tokens.append(Token(drawn, *scores.row(slot, one.n_alternatives)))
                if drawn == self._stop:
                    one.finished = "stop"
                    break
                one.tokens.append(drawn)
                if len(one.tokens) >= one.limit:
                    one.finished = "length"
            found.append((one, tokens))
        for one, _ in found:
            if one.finished:
                self.remove(one)
        return found


def warm_up(scheduler: Scheduler, config: ModelConfig, buckets: ServingBuckets) -> list[Callable[[], None]]:
    """Returns functions that compile what most traffic needs, the programs of the smallest batches first.

    Each runs them in the scheduler, which must hold no sequence, and leaves it as a new one is.
    """
    # Whether steered, slots, sequences prefilled together, their length, capacity of the cache.
    parts: set[tuple[bool, int, int, int, int]] = set()
    lengths = (1, *buckets.prompts[1:])
    for steered, length in itertools.product((False, True), lengths):
        for n in buckets.prefill_batches(length):
            n_slots = buckets.most_slots if n > 1 else buckets.slots[0]
            parts.add((steered, n_slots, n, length, buckets.cache(length)))
    for steered, n_slots, capacity in itertools.product((False, True), buckets.slots, buckets.caches):
        batches = buckets.prefill_batches(1)
        parts |= {(steered, n_slots, n, 1, capacity) for n in batches if n_slots > 1 or n == 1}
    steer = InterventionBatch.of(config, {(0, 0): 0.0})

    def generate(steered: bool, n_slots: int, n: int, length: int, capacity: int) -> None:
        scheduler.resize(n_slots, capacity)
        sequences = [
            Sequence.of(config, [0] * length, Sampling(), 1, steer=steer if steered else None)
            for _ in range(min(n, n_slots))
        ]
        scheduler.add(sequences)
        sequences[0].n_alternatives = 0 if n == 1 else None
        scheduler.decode(1)
        scheduler.clear()

    def move(capacity: int, before: int, after: int) -> None:
        scheduler.resize(before, capacity)
        scheduler.resize(after, capacity)
        scheduler.clear()

    return [
        *(functools.partial(generate, *part) for part in sorted(parts)),
        *(
            functools.partial(move, capacity, before, after)
            for capacity in buckets.caches
            for before, after in itertools.permutations(buckets.slots, 2)
        ),
    ]


class Generation:
    """Sequences being continued together; each gets the tokens that it would get alone."""

    def __init__(
        self,
        config: ModelConfig,
        params: transformer.Parameters,
        prompts: SequenceOf[Any],
        sampling: SequenceOf[Sampling],
        *,
        max_new_tokens: SequenceOf[int],
        stop_token: int,
        interventions: InterventionBatch | None = None,
        adaptive: AdaptiveK | None = None,
        when_full: str = "slide",
        layers: kv_cache.Layers = None,
    ):
        """Checks the arguments; nothing is computed yet.

        Prompts, token ids, at least one, of which the model sees the last `context_length`, sampling and
        numbers of new tokens are of each row, interventions of all or some. Of `adaptive`, tokens that are
        prefilled, the prompt's and those of a full context, have the model's k. The stop token is not
        returned. All else, and errors, are as in `Scheduler` and `Sequence`.
        """
        self._sequences = [
            Sequence.of(config, prompt, one, n, when_full=when_full)
            for prompt, one, n in zip(prompts, sampling, max_new_tokens, strict=True)
        ]
        buckets = BatchBuckets(config.context_length, interventions)
        step = {} if adaptive is None else adaptive.check(config).token_step()
        self._scheduler = Scheduler(config, params, stop_token, buckets, layers=layers, **step)
        self._begun = False

    @property
    def texts(self) -> list[list[int]]:
        """Token ids of each row so far, prompt and new ones."""
        return [one.tokens for one in self._sequences]

    @property
    def finished(self) -> list[str | None]:
        """Why each row has ended: "stop" (the stop token, or `end`), "length"; None while it goes on."""
        return [one.finished for one in self._sequences]

    @property
    def done(self) -> bool:
        """Whether all rows have ended."""
        return all(self.finished)

    def end(self, row: int) -> None:
        """Ends a row from outside, e.g. at a stop string."""
        one = self._sequences[row]
        one.finished = one.finished or "stop"
        self._scheduler.remove(one)

    def advance(self, steps: int = STEPS) -> list[list[int]]:
        """Returns up to so many new tokens of each row, at most `STEPS`; of a row that slides, one."""
        if self.done:
            return [[] for _ in self._sequences]
        if not self._begun:
            self._begun = True
            # Also those that have ended: interventions count rows.
            self._scheduler.add(self._sequences)
            for one in self._sequences:
                if one.finished:
                    self._scheduler.remove(one)
        found = dict(self._scheduler.decode(steps))
        new = [[token.id for token in found.get(one, ())] for one in self._sequences]
        # One that the stop token has ended just now has it for its last.
        return [
            tokens[:-1] if tokens and one.finished == "stop" else tokens
            for tokens, one in zip(new, self._sequences, strict=True)
        ]


def generate_tokens(
    config: ModelConfig,
    params: transformer.Parameters,
    prompt: SequenceOf[int],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    stop_token: int,
) -> list[int]:
    """Returns the new token ids of one prompt; arguments and errors as of `Generation`, which slides."""
    sampling = Sampling(temperature=temperature, seed=seed)
    generation = Generation(
        config, params, [prompt], [sampling], max_new_tokens=[max_new_tokens], stop_token=stop_token
    )
    while not generation.done:
        generation.advance()
    return generation.texts[0][len(prompt) :]
