"""The Steer box of a neuron's page: its choices, and the settings that it begins with."""

import dataclasses
import math
import re
from typing import Any

import numpy as np

from topklm.explorer.neuron_data import NeuronData
from topklm.explorer.steering import MOST_NEW_TOKENS, SteerSettings
from topklm.inference.interventions import DEFAULT_MODE, MODES

_MULTIPLES = 4  # the slider ends at so many times the highest activation
_STEPS = 100  # or more, of the slider
_PROMPT_TOKENS, _PROMPT_WORDS = 24, 4  # at most, and at least
_SENTENCE_END = re.compile(r"[.!?][\"')\u201d\u2019]*\s+")
_EXAMPLES = 5  # that are looked at for a prompt

POSITIONS = {"all": "the whole text", "prompt": "the prompt", "generated": "only what is written"}


@dataclasses.dataclass(frozen=True)
class Strengths:
    """The scale of the slider, in units of the neuron's activation.

    Attributes:
        highest: The highest activation seen; of a dead neuron, the median of those of its layer.
        mean: Over the tokens at which the neuron is active; None for a dead one.
        step: Of the slider, a power of ten.
        end: Where it ends, a multiple of the step.
    """

    highest: float
    mean: float | None
    step: float
    end: float

    @classmethod
    def of(cls, highest: float, mean: float | None) -> "Strengths":
        """Makes the scale from 0 to `_MULTIPLES` times the highest activation."""
        step = 10.0 ** math.floor(math.log10(_MULTIPLES * highest / _STEPS))
        # Not further for what is only rounding.
        steps = math.ceil(_MULTIPLES * highest / step * (1 - 1e-9))
        return cls(highest, mean, step, steps * step)

    def rounded(self, multiple: float) -> float:
        """Returns so many times the highest activation, on a step of the slider."""
        return round(multiple * self.highest / self.step) * self.step

    def marks(self) -> list[tuple[float, float, str]]:
        """Returns the marks under the slider: value, position in percent, and name."""
        named = [(0.0, "0"), (self.highest, "highest")]
        named += [(n * self.highest, f"{n}\N{MULTIPLICATION SIGN}") for n in range(2, _MULTIPLES + 1)]
        return [(value, 100 * value / self.end, name) for value, name in named]


def box(source: NeuronData, layer: int, neuron: int) -> dict[str, Any]:
    """Returns the content of the box.

    Raises:
        UserError: If there is no such neuron.
    """
    row = source.row(
        source.number(layer, neuron), ["max_activation", "mean_activation", "examples", "example_parts"]
    )
    strengths = Strengths.of(row["max_activation"] or _usual(source, layer), row["mean_activation"])
    strongest = [
        at for at, part in zip(row["examples"] or (), row["example_parts"] or (), strict=True) if part == 0
    ]
    prompts = (_before(source, at) for at in strongest[:_EXAMPLES])
    settings = SteerSettings(next(filter(None, prompts), ""), value=strengths.rounded(1))
    has_topk = source.measured.kind == "topk"
    return {
        "strengths": strengths,
        "modes": {name: mode for name, mode in MODES.items() if has_topk or not mode.competes},
        "default_mode": DEFAULT_MODE,
        "positions": POSITIONS,
        "most_new_tokens": MOST_NEW_TOKENS,
        "chosen": {name: _written(value) for name, value in dataclasses.asdict(settings).items()},
        "written": None,
        "problem": "",
    }


def _before(source: NeuronData, at: int) -> str:
    """Returns the words before a token, from the beginning of a sentence if there is one among them."""
    begin = max(source.window(at, 2 * _PROMPT_TOKENS).begin, at - _PROMPT_TOKENS)
    text = source.plain_text(begin, at).strip("\N{REPLACEMENT CHARACTER}")
    if begin not in source.documents[0]:
        text = text.partition(" ")[2]  # it may have begun inside of a word
    sentences = [text[end.end() :] for end in _SENTENCE_END.finditer(text)]
    long_enough = [rest for rest in sentences if len(rest.split()) >= _PROMPT_WORDS]
    return " ".join((long_enough or [text])[-1].split())


def _usual(source: NeuronData, layer: int) -> float:
    first = source.number(layer, 0)
    highest = source.column("max_activation")[first : first + source.measured.d_model]
    seen = highest[np.isfinite(highest) & (highest > 0)]
    return float(np.median(seen)) if len(seen) else 1.0


def _written(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
