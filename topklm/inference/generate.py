"""Tokens from a model: a prompt is run once, then each new token alone, with keys and values kept.

Here is what happens on the host; the programs are in `programs`. They are compiled for sizes
(`cache.bucket`), not for lengths; sampling and interventions are data. Dims: B rows, N tokens of a call.
"""

from collections.abc import Sequence

import numpy as np

from topklm.config import ModelConfig
from topklm.inference import cache as cache_lib
from topklm.inference import programs
from topklm.inference.adaptive import AdaptiveK
from topklm.inference.intervention_batch import InterventionBatch
from topklm.inference.programs import NOTHING, STEPS, Plan, Rows, State
from topklm.inference.sampling import RowSampling, Sampling, held
from topklm.inference.token_rows import row_of
from topklm.model import transformer

# What happens to a text that has filled the model's context. "slide": each further token is predicted from
# the last `context_length` tokens, which are run anew for it. "halve": the last half of them is run anew, and
# the rest forgotten, so many tokens follow before that happens again. "stop": the text ends.
WHEN_FULL = ("slide", "halve", "stop")


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
        interventions: InterventionBatch | None = None,
        adaptive: AdaptiveK | None = None,
        when_full: str = "slide",
        layers: cache_lib.Layers = None,
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
            adaptive: More neurons at uncertain tokens; the prompt, and what is run anew in a full context,
                has the model's k.
            when_full: One of `WHEN_FULL`.
            layers: `cache.by_layer` of the model, where it is there from an earlier text.

        Raises:
            ValueError: For what is not allowed, in one line.
        """
        self.texts = [row_of(prompt, config.vocab_size, "prompt").tolist() for prompt in prompts]
        _check(config, self.texts, max_new_tokens, when_full)
        self._limits = [len(prompt) + n for prompt, n in zip(prompts, max_new_tokens, strict=True)]
        if when_full == "stop":
            self._limits = [min(limit, config.context_length) for limit in self._limits]
        self.finished: list[str | None] = [None] * len(prompts)
        high_k = adaptive.check(config).high_k if adaptive else None
        self._plan = Plan.of(config, params)._replace(high_k=high_k)
        self._params = params
        self._layers = layers
        self._kept_when_full = max(1, config.context_length // 2) if when_full == "halve" else None
        self._rows = Rows(
            RowSampling.of([one.check() for one in sampling]),
            np.zeros(len(prompts), np.int32),
            np.array([len(prompt) for prompt in prompts], np.int32),
            np.int32(stop_token),
            interventions,
            np.float32(adaptive.entropy) if adaptive else None,
        )
        self._firsts = [max(0, len(prompt) - config.context_length) for prompt in prompts]
        self._state: State | None = None
        self._end_what_is_long_enough()

    @property
    def done(self) -> bool:
        """Whether all rows have ended."""
        return all(self.finished)

    def end(self, row: int) -> None:
        """Ends a row from outside, e.g. at a stop string."""
        self.finished[row] = self.finished[row] or "stop"

    def advance(self, steps: int = STEPS) -> list[list[int]]:
        """Up to so many new tokens of each row, at most `STEPS`; beyond a full context, one."""
        if self.done:
            return [[] for _ in self.texts]
        context = self._plan.config.context_length
        live = [row for row, why in enumerate(self.finished) if why is None]
        full = [row for row in live if len(self.texts[row]) - self._firsts[row] > context]
        if self._state is None or full:
            for row in full:
                self._firsts[row] = len(self.texts[row]) - (self._kept_when_full or context)
            self._run_whole()
        assert self._state is not None
        # Rows may have been ended from outside.
        state = self._state._replace(remaining=self._remaining())
        new_BN, self._state = programs.run_steps(
            self._plan, self._params, self._layers, self._rows, state, np.int32(min(steps, STEPS))
        )
        return self._take(np.asarray(new_BN))

    def _run_whole(self) -> None:
        plan = self._plan
        if self._layers is None:
            self._layers = cache_lib.by_layer(plan.config, self._params)
        context = plan.config.context_length
        windows = [
            text[first : first + context] for text, first in zip(self.texts, self._firsts, strict=True)
        ]
        lengths = np.array([len(window) for window in windows], np.int32)
        tokens = np.zeros((len(windows), cache_lib.bucket(int(lengths.max()), context)), np.int32)
        for row, window in enumerate(windows):
            tokens[row, : len(window)] = window
        self._rows = self._rows._replace(first=np.array(self._firsts, np.int32))
        need = max(limit - first for limit, first in zip(self._limits, self._firsts, strict=True))
        size = max(cache_lib.room_for(min(need, context), context), tokens.shape[1])
        made = np.array([len(text) for text in self.texts], np.int32) - self._rows.prompt_lengths
        filled, logits = programs.run_whole(plan, self._params, self._rows, tokens, lengths)
        filled = programs.with_room(plan, filled, size)
        present = held(self.texts, plan.config.vocab_size, int(self._rows.stop_token))
        self._state = State(filled, logits, lengths, made, self._remaining(), present)

    def _remaining(self) -> np.ndarray:
        left = [limit - len(text) for limit, text in zip(self._limits, self.texts, strict=True)]
        return np.array([0 if why else n for n, why in zip(left, self.finished, strict=True)], np.int32)

    def _take(self, new_BN: np.ndarray) -> list[list[int]]:
        """Adds what was drawn to the texts."""
        taken: list[list[int]] = []
        for row, new in enumerate(new_BN.tolist()):
            taken.append([])
            for token in new:
                if self.finished[row] or token == NOTHING:
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
        if when_full == "stop" and len(prompt) > config.context_length:
            raise ValueError(
                f"prompt has {len(prompt)} tokens: must be at most {config.context_length}, the model's "
                "context, with when_full = 'stop'; shorten it, or choose 'slide'"
            )
