"""One text that is being continued beside others: what was asked for, and how far it has come."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from topklm.config import ModelConfig
from topklm.inference.generate import WHEN_FULL
from topklm.inference.intervention_batch import InterventionBatch
from topklm.inference.sampling import Sampling


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
class Text:
    """A text; changed by what continues it.

    Attributes:
        tokens: Ids, prompt and new ones.
        n_prompt: How many of them are the prompt.
        limit: As many tokens as it may come to have.
        sampling: How tokens are drawn.
        steer: Interventions on it alone; what they say of rows does not matter.
        when_full: One of `generate.WHEN_FULL`.
        n_alternatives: How many of the most likely tokens to tell the probabilities of, beside the one that
            was drawn; None: of none.
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
        prompt: Sequence[int],
        sampling: Sampling,
        max_new_tokens: int,
        *,
        steer: InterventionBatch | None = None,
        when_full: str = "stop",
        n_alternatives: int | None = None,
    ) -> "Text":
        """A text that has not begun.

        Args:
            config: The model's shape.
            prompt: Token ids.
            sampling: How tokens are drawn.
            max_new_tokens: As many may be added.
            steer: See `Text`.
            when_full: See `generate.WHEN_FULL`.
            n_alternatives: See `Text`.

        Raises:
            ValueError: For what is not allowed, in one line.
        """
        context = config.context_length
        if when_full not in WHEN_FULL:
            raise ValueError(f"when_full = {when_full!r}: must be one of {', '.join(WHEN_FULL)}")
        if not len(prompt):
            raise ValueError("prompt is empty: it must hold at least one token")
        ids = np.asarray(prompt)
        outside = ids[(ids < 0) | (ids >= config.vocab_size)]
        if len(outside):
            raise ValueError(f"prompt: token {outside[0]} must be from 0 to {config.vocab_size - 1}")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens = {max_new_tokens}: must be 0 or more")
        if when_full == "stop" and len(prompt) > context:
            raise ValueError(
                f"prompt has {len(prompt)} tokens: must be at most {context}, the model's context; shorten "
                "it, or choose when_full = 'slide' or 'halve'"
            )
        limit = len(prompt) + max_new_tokens
        limit = min(limit, context) if when_full == "stop" else limit
        return cls(
            [int(token) for token in prompt],
            len(prompt),
            limit,
            sampling.check(),
            steer,
            when_full,
            n_alternatives,
            first=max(0, len(prompt) - context),
            finished="length" if limit <= len(prompt) else None,
        )

    def room(self, config: ModelConfig) -> int:
        """Places of the cache that it may come to take."""
        return min(max(self.limit, len(self.tokens)) - self.first, config.context_length)
