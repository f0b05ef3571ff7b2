"""Texts that come and go while others are being continued: rows of one batch, taken and given back.

A text that comes is run whole, beside others that wait, and its keys and values are put into a free row; the
other rows go on with theirs. Each gets the tokens that it would get alone. Programs are compiled for few
sizes, `Sizes`; which texts there are, and what they ask for, is data. Not to be used by two threads at once.
Dims: B rows, N texts run together, P places of what is run, C places of the cache, V vocabulary, E entries.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from topklm.config import ModelConfig
from topklm.inference import cache as cache_lib
from topklm.inference import programs, slot_programs
from topklm.inference.programs import NOTHING, STEPS, Plan, Rows, State
from topklm.inference.sampling import RowSampling, Sampling, held
from topklm.inference.scores import Scores, before_drawing, chosen
from topklm.inference.sizes import Sizes, of_rows
from topklm.inference.text import Text, Token
from topklm.model import transformer


class Slots:
    """Rows of a batch that texts are put into.

    Attributes:
        texts: Those that are in rows now.
    """

    def __init__(self, config: ModelConfig, params: transformer.Parameters, stop_token: int, sizes: Sizes):
        """Takes a model; nothing is computed yet.

        Args:
            config: The model's shape.
            params: Its parameters, on one device or a mesh.
            stop_token: A text ends when it is drawn; it is told of, and is no part of the text.
            sizes: Of the batch and so on.
        """
        self.texts: list[Text] = []
        self._config, self._params, self._stop = config, params, np.int32(stop_token)
        self._plan = Plan.of(config, params)
        self._layers: Any = None
        self._sizes = sizes
        self._at: list[Text | None] = []  # the text in each row
        self._state: State | None = None
        self._rows: Rows | None = None  # made anew when texts come or go

    @property
    def n_free(self) -> int:
        """Texts that can still be put in."""
        return self._sizes.most_rows - len(self.texts)

    @property
    def n_rows(self) -> int:
        """Rows of the batch now, with those that are free."""
        return len(self._at)

    def clear(self) -> None:
        """Forgets all texts, and what has been computed."""
        self.texts, self._at, self._state, self._rows = [], [], None, None

    def put(self, texts: Sequence[Text]) -> None:
        """Takes texts in: runs them whole, so that `advance` continues them.

        Args:
            texts: At most `n_free`, and as many as `Sizes.together` allows for the longest.
        """
        n_places = max(self._sizes.room(text.room(self._config)) for text in [*self.texts, *texts])
        self.texts += texts
        self.hold(max(len(self._at), self._sizes.rows(len(self.texts))), n_places)
        for text in texts:
            self._at[self._at.index(None)] = text
        self._run(texts)

    def take_out(self, text: Text) -> None:
        """Frees the row of a text; it may have gone already."""
        if text in self.texts:
            self.texts.remove(text)
            self._at[self._at.index(text)] = None
            self._rows = None

    def shrink(self) -> None:
        """Goes on with as few rows as there are texts; what is smaller is faster."""
        if self._state is not None:
            self.hold(self._sizes.rows(len(self.texts)), 0)

    def advance(self, steps: int = STEPS) -> list[tuple[Text, list[Token]]]:
        """Up to so many new tokens of each text, at most `STEPS`; 1 where one asks for probabilities.

        Texts that have ended are taken out; of one that the stop token ended, that is the last.
        """
        context = self._config.context_length
        full = [text for text in self.texts if len(text.tokens) - text.first > context]
        for text in full:
            text.first = len(text.tokens) - (max(1, context // 2) if text.when_full == "halve" else context)
        for group in _groups(full, self._sizes.together(context)):
            self._run(group)
        if not self.texts:
            return []
        assert self._state is not None
        scored = any(text.n_alternatives is not None for text in self.texts)
        before = before_drawing(self._plan, self._state.logits) if scored else None
        left = [0 if text is None else text.limit - len(text.tokens) for text in self._at]
        new_BN, self._state = programs.run_steps(
            self._plan,
            self._params,
            self._all_layers(),
            self._rows_now(),
            self._state._replace(remaining=np.array(left, np.int32)),
            np.int32(1 if scored else min(steps, STEPS)),
        )
        new = np.asarray(new_BN)
        scores = None if before is None else chosen(before, np.maximum(new[:, 0], 0))
        return self._taken(new.tolist(), scores)

    def hold(self, n_rows: int, n_places: int) -> None:
        """Has so many rows, with the texts in the first of them, and at least so many places."""
        n_rows = max(n_rows, self._sizes.rows(len(self.texts)))
        if self._state is None:
            # Made of a program's results, so that what comes later has their layout on devices.
            rows = self._rows_of([None])
            tokens = np.zeros((1, self._sizes.lengths[0]), np.int32)
            filled, logits = programs.run_whole(self._plan, self._params, rows, tokens, np.ones(1, np.int32))
            filled = programs.with_room(self._plan, filled, self._sizes.rooms[0])
            zero = np.zeros(1, np.int32)
            present = np.zeros((1, self._config.vocab_size), bool)
            self._state, self._at = State(filled, logits, zero, zero, zero, present), [None]
        held = cache_lib.room(self._state.cache)
        n_places = max(n_places, held if self.texts else self._sizes.rooms[0])
        # One after the other: of both at once, there would be more programs.
        if n_rows != len(self._at):
            self._rearrange(n_rows, held)
        if n_places != held:
            self._rearrange(n_rows, n_places)

    def _all_layers(self) -> Any:
        if self._layers is None:
            self._layers = cache_lib.by_layer(self._config, self._params)
        return self._layers

    def _rearrange(self, n_rows: int, n_places: int) -> None:
        assert self._state is not None
        occupied = [row for row, text in enumerate(self._at) if text is not None]
        order = np.zeros(n_rows, np.int32)
        order[: len(occupied)] = occupied
        self._state = slot_programs.rearranged(self._plan, self._state, order, n_places)
        self._at = [self._at[row] for row in occupied] + [None] * (n_rows - len(occupied))
        self._rows = None

    def _run(self, texts: Sequence[Text]) -> None:
        """Runs what the model sees of some texts, and puts it into their rows."""
        assert self._state is not None
        windows = [text.tokens[text.first :][: self._config.context_length] for text in texts]
        size = self._sizes.length(max(map(len, windows)))
        n = 1 if len(texts) == 1 else self._sizes.together(size)
        # What only fills up stands behind the last row, where nothing is written.
        targets, made = np.full(n, len(self._at), np.int32), np.zeros(n, np.int32)
        tokens, lengths = np.zeros((n, size), np.int32), np.ones(n, np.int32)
        for place, (text, window) in enumerate(zip(texts, windows, strict=True)):
            targets[place] = self._at.index(text)
            tokens[place, : len(window)], lengths[place] = window, len(window)
            made[place] = len(text.tokens) - text.n_prompt
        rows = self._rows_of([*texts, *[None] * (n - len(texts))])
        filled, logits = programs.run_whole(self._plan, self._params, rows, tokens, lengths)
        filled = programs.with_room(self._plan, filled, cache_lib.room(self._state.cache))
        zero = np.zeros(n, np.int32)
        held_by = [*(text.tokens for text in texts), *[[]] * (n - len(texts))]
        present = held(held_by, self._config.vocab_size, int(self._stop))
        new = State(filled, logits, lengths, made, zero, present)
        self._state = slot_programs.put(self._plan, self._state, new, targets)
        self._rows = None

    def _rows_now(self) -> Rows:
        if self._rows is None:
            self._rows = self._rows_of(self._at)
        return self._rows

    def _rows_of(self, texts: Sequence[Text | None]) -> Rows:
        steered = [(row, text.steer) for row, text in enumerate(texts) if text and text.steer is not None]
        return Rows(
            RowSampling.of([text.sampling if text else _NO_SAMPLING for text in texts]),
            np.array([text.first if text else 0 for text in texts], np.int32),
            np.array([text.n_prompt if text else 0 for text in texts], np.int32),
            self._stop,
            of_rows(self._config, steered, len(texts)),
        )

    def _taken(self, new: list[list[int]], scores: Scores | None) -> list[tuple[Text, list[Token]]]:
        """Adds what was drawn to the texts."""
        found = []
        for row, text in enumerate(self._at):
            if text is None:
                continue
            tokens: list[Token] = []
            for drawn in new[row]:
                if drawn == NOTHING or text.finished:
                    break
                if scores is None or text.n_alternatives is None:
                    tokens.append(Token(drawn))
                else:
                    tokens.append(Token(drawn, *scores.row(row, text.n_alternatives)))
                if drawn == self._stop:
                    text.finished = "stop"
                    break
                text.tokens.append(drawn)
                if len(text.tokens) >= text.limit:
                    text.finished = "length"
            found.append((text, tokens))
        for text, _ in found:
            if text.finished:
                self.take_out(text)
        return found


_NO_SAMPLING = Sampling(temperature=0.0)


def _groups(texts: Sequence[Text], size: int) -> Iterator[Sequence[Text]]:
    return (texts[begin : begin + size] for begin in range(0, len(texts), size))
