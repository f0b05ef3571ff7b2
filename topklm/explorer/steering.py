"""The Steer box of a neuron's page, and its two texts from one prompt: with the neuron set, and without."""

from collections.abc import Iterable, Mapping
import dataclasses
import itertools
import math
import re
from typing import Any

import numpy as np

from topklm.errors import UserError, visible
from topklm.explorer import markup
from topklm.explorer.live_model import LiveModel
from topklm.explorer.neuron_data import LISTED_TOKENS, NeuronData
from topklm.inference.interventions import (
    DEFAULT_MODE,
    MODES,
    Intervention,
    in_activations,
    needs_value,
    times_of,
)
from topklm.inference.sampling import Sampling
from topklm.inference.tokens import TextStream

COLUMNS = ("unsteered", "steered")  # in the order of the rows that are generated
MOST_NEW_TOKENS = 200
POSITIONS = {"all": "the whole text", "prompt": "the prompt", "generated": "only what is written"}

_NOT_SPELLED = "\n\N{NO-BREAK SPACE}"
_STEPS = 4  # tokens between pieces; the first comes alone, so that nobody has to wait for the others
_LONGEST_SHOWN = 60  # characters of a wrong value
_BEGINS_AT = 0.7  # of the highest activation: little is readable above it, little happens far below
_MULTIPLES = 4  # the slider ends at so many times the highest activation
_SLIDER_STEPS = 100  # or more
_PROMPT_TOKENS, _PROMPT_WORDS = 24, 4  # at most, and at least
_SENTENCE_END = re.compile(r"[.!?][\"')\u201d\u2019]*\s+")
_EXAMPLES = 5  # that are looked at for a prompt

# Types in which a field may be sent, by its own: forms send texts.
_ALLOWED: dict[Any, tuple[Any, str]] = {
    str: (str, "text"),
    int: (int | str, "a whole number"),
    float: (int | float | str, "a number"),
    float | str: (int | float | str, "a number, or times the largest activation, e.g. 0.7x"),
}


@dataclasses.dataclass(frozen=True)
class SteerSettings:
    """Settings of a Steer box; names and meanings are as in `Intervention` and `LanguageModel.generate`."""

    prompt: str
    mode: str = DEFAULT_MODE
    value: float | str = 0.0  # or a text such as 0.7x
    positions: str = "all"
    temperature: float = 0.7
    max_new_tokens: int = 60
    seed: int = 0

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "SteerSettings":
        """Reads a form, where all values are texts, or JSON; `LiveModel.generation` checks them later."""
        if unknown := sorted(set(content) - set(NAMES)):
            raise UserError(f"{_short(unknown[0])} is no field: there are {', '.join(NAMES)}")
        given = dict(content)
        if not needs_value(given.get("mode", DEFAULT_MODE)):
            given.setdefault("value", 0.0)
        for name in ("prompt", "value"):
            if name not in given:
                raise UserError(f"{name} is missing: send it as {'text' if name == 'prompt' else 'a number'}")
        settings = cls(**{name: _as(_KINDS[name], name, given[name]) for name in NAMES if name in given})
        if not 1 <= settings.max_new_tokens <= MOST_NEW_TOKENS:
            raise UserError(
                f"max_new_tokens = {settings.max_new_tokens}: must be from 1 to {MOST_NEW_TOKENS}"
            )
        return settings


_KINDS: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(SteerSettings)}
NAMES = tuple(_KINDS)


class Writing:
    """The two texts, which have one seed; `more` is called until they are `done`."""

    def __init__(
        self, source: NeuronData, reader: LiveModel, layer: int, neuron: int, settings: SteerSettings
    ):
        row = source.row(source.number(layer, neuron), ["top_tokens"])
        self._reader, self._neuron = reader, (layer, neuron)
        self._input_tokens = frozenset((row["top_tokens"] or ())[:LISTED_TOKENS])
        ids = reader.ids(settings.prompt, "prompt")
        sampling = Sampling(temperature=settings.temperature, seed=settings.seed)
        given = Intervention(layer, neuron, settings.value, settings.mode, settings.positions)
        one = in_activations(given, source.store.largest_activation)
        self._generation = reader.generation(ids, sampling, settings.max_new_tokens, [[], [one]])
        self._begin = len(self._generation.texts[0])
        tokenizer = reader.model.tokenizer
        self._streams = [TextStream(tokenizer, text) for text in self._generation.texts]
        self.prompt = spelled(tokenizer.decode(ids))

    @property
    def done(self) -> bool:
        """Whether both texts have ended."""
        return self._generation.done

    def more(self) -> list[dict[str, Any]]:
        """Decodes more of both texts, in as few pieces as can be.

        Of each piece it gives its `column`, one of `COLUMNS`; its `text`, see `spelled`; `input_token`,
        whether it is one of the neuron's input tokens, those that its page lists.
        """
        is_first = all(len(text) == self._begin for text in self._generation.texts)
        new = self._reader.advance(self._generation, 1 if is_first else _STEPS)
        found = []
        for column, stream, tokens in zip(COLUMNS, self._streams, new, strict=True):
            parts = [(stream.add([token]), token in self._input_tokens) for token in tokens]
            if self.done:
                parts.append((stream.end(), False))
            joined = _joined(parts)
            found += [{"column": column, "text": text, "input_token": marked} for text, marked in joined]
        return found

    def ends(self) -> dict[str, dict[str, Any]]:
        """Describes the end of each column; runs the model over it once.

        `why`: "length", or "stop": the model ended the document. `tokens`: how many are new. `input_tokens`:
        how many of them are among the neuron's input tokens. `active`: the share of new tokens at which the
        neuron is active when the model reads the text, with the prompt and nothing set from outside; None if
        they are none, or too many to be read at once. `summary`: all in words.
        """
        whys = zip(COLUMNS, self._generation.texts, self._generation.finished, strict=True)
        return {column: self._end(text, str(why)) for column, text, why in whys}

    def _end(self, text: list[int], why: str) -> dict[str, Any]:
        n = len(text) - self._begin
        counted = sum(token in self._input_tokens for token in text[self._begin :])
        said = [
            f"{n} token{'s' if n > 1 else ''}{', then the document ends' if why == 'stop' else ''}",
            f"{counted} highlighted",
        ]
        active = None
        if n and len(text) - 1 <= self._reader.most_tokens:
            values = self._reader.activations(np.array(text[1:]), *self._neuron)
            active = float(np.count_nonzero(values[-n:]) / n)
            said.append(f"active at {markup.write_as('share', active)}")
        summary = " · ".join(said) if n else "The document ends here."
        return {"why": why, "tokens": n, "input_tokens": counted, "active": active, "summary": summary}


def spelled(text: str) -> str:
    """Returns prose as a page shows it: characters that are not printed, or turn text around, spelled out.

    Line breaks and spaces that do not break stay; of the two characters of a longer line break, the last.
    """
    kept = text.replace("\r", "")
    return "".join(c if c in _NOT_SPELLED else visible(c) for c in kept)


def _joined(parts: Iterable[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Joins text; the space before a marked word stands outside of it, for it would be where lines break."""
    split: list[tuple[str, bool]] = []
    for text, marked in parts:
        word = text.lstrip(" ")
        split += [(text[: len(text) - len(word)], False), (word, True)] if marked else [(text, False)]
    groups = itertools.groupby((part for part in split if part[0]), key=lambda part: part[1])
    return [(spelled("".join(text for text, _ in group)), marked) for marked, group in groups]


def _as(kind: Any, name: str, value: Any) -> Any:
    types, allowed = _ALLOWED[kind]
    try:
        if isinstance(value, bool) or not isinstance(value, types):
            raise ValueError
        if kind == float | str:
            return float(value) if times_of(value) is None else value
        return kind(value)
    except (ValueError, OverflowError) as e:
        raise UserError(f"{name} = {_short(value)}: must be {allowed}") from e


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


@dataclasses.dataclass(frozen=True)
class Strengths:
    """The scale of the slider, in units of the neuron's activation."""

    highest: float  # activation seen; of a dead neuron, the median of those of its layer
    mean: float | None  # over the tokens at which the neuron is active; None for a dead one
    step: float  # a power of ten
    end: float  # a multiple of the step

    @classmethod
    def of(cls, highest: float, mean: float | None) -> "Strengths":
        """Makes the scale from 0 to `_MULTIPLES` times the highest activation."""
        step = 10.0 ** math.floor(math.log10(_MULTIPLES * highest / _SLIDER_STEPS))
        # Not further for what is only rounding.
        steps = math.ceil(_MULTIPLES * highest / step * (1 - 1e-9))
        return cls(highest, mean, step, steps * step)

    def marks(self) -> list[tuple[float, float, str]]:
        """Returns the marks under the slider: value, position in percent, and name."""
        names = ["0", "highest", *(f"{n}\N{MULTIPLICATION SIGN}" for n in range(2, _MULTIPLES + 1))]
        values = [n * self.highest for n in range(len(names))]
        return [(value, 100 * value / self.end, name) for value, name in zip(values, names, strict=True)]


def box(source: NeuronData, layer: int, neuron: int) -> dict[str, Any]:
    """Returns a neuron's box and the settings it begins with; UserError if there is no such neuron."""
    number = source.number(layer, neuron)
    row = source.row(number, ["max_activation", "mean_activation"])
    strengths = Strengths.of(row["max_activation"] or _usual(source, layer), row["mean_activation"])
    prompts = (_before(source, at) for at in source.strongest_examples(number)[:_EXAMPLES])
    value = round(_BEGINS_AT * strengths.highest / strengths.step) * strengths.step
    settings = SteerSettings(next(filter(None, prompts), ""), value=value)
    has_topk = source.measured.kind == "topk"
    return {
        "strengths": strengths,
        "modes": {name: mode for name, mode in MODES.items() if has_topk or not mode.competes},
        "default_mode": DEFAULT_MODE,
        "positions": POSITIONS,
        "most_new_tokens": MOST_NEW_TOKENS,
        "chosen": {
            name: f"{setting:.6g}" if isinstance(setting, float) else str(setting)
            for name, setting in dataclasses.asdict(settings).items()
        },
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
