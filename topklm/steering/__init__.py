"""Steering by neurons, measured: the effect of setting one on the text that a model writes."""

import dataclasses

PROMPTS = ("The", "It was", "In the", "There is", "When he", "One of the", "After that,", "She said that")
STRENGTHS = (0.5, 0.75, 1.0, 1.5)


@dataclasses.dataclass(frozen=True)
class Sampled:
    """How texts are generated."""

    prompts: tuple[str, ...] = PROMPTS  # at least one
    samples: int = 4  # of each prompt
    max_new_tokens: int = 40  # of each text
    temperature: float = 0.7  # 0 takes the most likely token each time
    seed: int = 0  # of a prompt's first sample; its others have the numbers that follow


@dataclasses.dataclass(frozen=True)
class SurveySettings:
    """How much is measured."""

    strengths: tuple[float, ...] = STRENGTHS  # in units of the mean length of what the layer hands on, rising
    # of the divergence from the unsteered model, nats a token, within which fluency counts as kept
    bound: float = 1.0
    prompts: int = 24  # C
    prompt_tokens: int = 16  # T, the separator counted
    random_directions: int = 128  # R, of each layer
    neurons: int | None = None  # N, drawn from each layer's living ones; None: all
    layers: tuple[int, ...] | None = None  # None: all that the store has
    seed: int = 0  # of prompts, directions and neurons
