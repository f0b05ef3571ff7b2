"""Continues prompts that begin together: the scheduler with nobody arriving."""

from collections.abc import Sequence as SequenceOf
from typing import Any

from topklm.config import ModelConfig
from topklm.inference.adaptive import AdaptiveK
from topklm.inference.bucketing import BatchBuckets
from topklm.inference.intervention_batch import InterventionBatch
from topklm.inference.kv_cache import Layers
from topklm.inference.sampling import Sampling
from topklm.inference.scheduler import Scheduler
from topklm.inference.sequence import Sequence
from topklm.inference.steps import STEPS
from topklm.model import transformer


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
        layers: Layers = None,
    ):
        """Checks the arguments; nothing is computed yet.

        Args:
            config: The model's shape.
            params: Its parameters, on one device or a mesh.
            prompts: Token ids of each row, at least one; the model sees the last `context_length` of them.
            sampling: Of each row.
            max_new_tokens: Of each row.
            stop_token: A row ends when it is drawn; it is not returned.
            interventions: On the model's neurons, in all rows or some.
            adaptive: More neurons at uncertain tokens; tokens that are prefilled, the prompt's and those of a
                full context, have the model's k.
            when_full: One of `sequence.WHEN_FULL`.
            layers: `kv_cache.by_layer` of the model, if it has been made already.

        Raises:
            ValueError: For a value that is not allowed, in one line.
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
    """Continues one prompt.

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
