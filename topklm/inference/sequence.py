"""One sequence that is decoded beside others: its request, its tokens so far, and updates on it."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from topklm.config import ModelConfig
from topklm.errors import ArgumentError
from topklm.inference.intervention_batch import InterventionBatch
from topklm.inference.sampling import Sampling
from topklm.inference.token_rows import row_of

# The ways to go on in a full context. "slide": each further token is predicted from the last `context_length`
# tokens, which are prefilled again for it. "halve": the last half of them is prefilled again, and the rest
# forgotten, so many tokens follow before that happens again. "stop": the sequence ends.
WHEN_FULL = ("slide", "halve", "stop")


@dataclasses.dataclass(frozen=True)
class Token:
    """One new token.

    Attributes:
        id: In the vocabulary.
        log_probability: In nats, of the model's own distribution, before penalty, temperature and limits;
            None if nobody asked for it.
        alternatives: (token, its log probability) of the most likely ones, the likeliest first.
    """

    id: int
    log_probability: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(eq=False)
class Sequence:
    """A sequence; its scheduler changes it.

    Attributes:
        tokens: Ids, prompt and new ones.
        n_prompt: How many of them are the prompt.
        limit: Ends at so many tokens.
        sampling: How tokens are drawn.
        steer: Interventions on it alone; their rows are ignored.
        when_full: One of `WHEN_FULL`.
        n_alternatives: Number of likely tokens whose probabilities are reported beside the one that was
            drawn; None: report none at all.
        first: Position of the first token that the model sees.
        finished: Why it has ended: "stop" (the stop token), "length"; None while it goes on.
    """

    tokens: list[int]
    n_prompt: int
    limit: int
    sampling: Sampling
    steer: InterventionBatch | None = None
    when_full: str = "stop"
    n_alternatives: int | None = None
    first: int = 0
    finished: str | None = None

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        prompt: Any,
        sampling: Sampling,
        max_new_tokens: int,
        *,
        steer: InterventionBatch | None = None,
        when_full: str = "stop",
        n_alternatives: int | None = None,
    ) -> "Sequence":
        """Makes a sequence that has not begun.

        Args:
            config: The model's shape.
            prompt: Token ids, at least one; the model sees the last `context_length` of them.
            sampling: How tokens are drawn.
            max_new_tokens: Upper bound on the new tokens.
            steer: See `Sequence`.
            when_full: See `WHEN_FULL`.
            n_alternatives: See `Sequence`.

        Raises:
            ValueError: For a value that is not allowed, in one line.
        """
        tokens, context = row_of(prompt, config.vocab_size, "prompt").tolist(), config.context_length
        if when_full not in WHEN_FULL:
            raise ArgumentError(
                field="when_full", value=repr(when_full), allowed=f"one of {', '.join(WHEN_FULL)}"
            )
        whole = isinstance(max_new_tokens, int | np.integer) and not isinstance(max_new_tokens, bool)
        if not whole or max_new_tokens < 0:
            raise ArgumentError(
                field="max_new_tokens", value=repr(max_new_tokens), allowed="an integer, 0 or more"
            )
        if when_full == "stop" and len(tokens) > context:
            raise ArgumentError(
                f"has {len(tokens)} tokens: must be at most {context}, the model's context; "
                "shorten it, or choose when_full = 'slide' or 'halve'",
                field="prompt",
            )
        limit = len(tokens) + int(max_new_tokens)
        limit = min(limit, context) if when_full == "stop" else limit
        return cls(
            tokens,
            len(tokens),
            limit,
            sampling.check(),
            steer,
            when_full,
            n_alternatives,
            first=max(0, len(tokens) - context),
            finished="length" if limit <= len(tokens) else None,
        )

    def visible(self, config: ModelConfig) -> list[int]:
        """Returns the tokens that the model sees."""
        return self.tokens[self.first :][: config.context_length]

    def is_full(self, config: ModelConfig) -> bool:
        """Returns whether there are more tokens than the context holds."""
        return len(self.tokens) - self.first > config.context_length

    def forget(self, config: ModelConfig) -> None:
        """Drops tokens from the beginning of a full context, as `when_full` says."""
        kept = max(1, config.context_length // 2) if self.when_full == "halve" else config.context_length
        self.first = len(self.tokens) - kept

    def capacity(self, config: ModelConfig) -> int:
        """Returns how many tokens its KV cache may come to hold."""
        return min(max(self.limit, len(self.tokens)) - self.first, config.context_length)


class SequenceUpdate(NamedTuple):
    """New tokens of a sequence, or its end.

    `finished` is "stop" (the last of `tokens` is the stop token), "length", "failed" (a fault of ours, which
    is in the log), "closed"; None while the sequence goes on.
    """

    sequence: Sequence
    tokens: list[Token]
    finished: str | None


OnUpdate = Callable[[list[SequenceUpdate]], None]
