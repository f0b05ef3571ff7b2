"""Two texts written side by side from one prompt: one with a neuron set from outside, and one without."""

from collections.abc import Iterable, Mapping
import dataclasses
import itertools
from typing import Any

import numpy as np

from topklm.errors import UserError, visible
from topklm.explorer import formatting
from topklm.explorer.live_model import LiveModel
from topklm.explorer.neuron_data import LISTED_TOKENS, NeuronData
from topklm.inference.interventions import DEFAULT_MODE, Intervention, needs_value
from topklm.inference.sampling import Sampling
from topklm.inference.tokens import TextStream

COLUMNS = ("unsteered", "steered")  # in the order of the rows that are generated
MOST_NEW_TOKENS = 200

_NOT_SPELLED = "\n\N{NO-BREAK SPACE}"
_STEPS = 4  # tokens between pieces; the first comes alone, so that nobody has to wait for the others
_LONGEST_SHOWN = 60  # characters of a wrong value


@dataclasses.dataclass(frozen=True)
class SteerSettings:
    """Settings of a Steer box; names and meanings are as in `Intervention` and `LanguageModel.generate`."""

    prompt: str
    mode: str = DEFAULT_MODE
    value: float = 0.0
    positions: str = "all"
    temperature: float = 0.7
    max_new_tokens: int = 60
    seed: int = 0

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "SteerSettings":
        """Reads a form, where all values are texts, or JSON.

        Raises:
            UserError: If something is missing or of another kind. `LiveModel.generation` refuses settings
                that the model cannot have.
        """
        if unknown := sorted(set(content) - set(NAMES)):
            raise UserError(f"{_short(unknown[0])} is no field: there are {', '.join(NAMES)}")
        given = dict(content)
        if not needs_value(given.get("mode", DEFAULT_MODE)):
            given.setdefault("value", 0.0)
        for name in ("prompt", "value"):
            if name not in given:
                raise UserError(f"{name} is missing: send it as {'text' if name == 'prompt' else 'a number'}")
        found = {
            field.name: _as(field.type, field.name, given[field.name])
            for field in _FIELDS
            if field.name in given
        }
        settings = cls(**found)
        if not 1 <= settings.max_new_tokens <= MOST_NEW_TOKENS:
            raise UserError(
                f"max_new_tokens = {settings.max_new_tokens}: must be from 1 to {MOST_NEW_TOKENS}"
            )
        return settings


_FIELDS = dataclasses.fields(SteerSettings)
NAMES = tuple(field.name for field in _FIELDS)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of new text.

    Attributes:
        column: One of `COLUMNS`.
        text: As it is shown, see `spelled`.
        input_token: Whether it is one of the neuron's input tokens, those that its page lists.
    """

    column: str
    text: str
    input_token: bool


@dataclasses.dataclass(frozen=True)
class End:
    """The end of a text.

    Attributes:
        why: "length", or "stop": the model ended the document.
        tokens: New ones.
        input_tokens: How many of them are among the neuron's input tokens.
        active: Share of the new tokens at which the neuron is active when the model reads the text, with the
            prompt and nothing set from outside; None if they are none, or too many to be read at once.
        summary: All that in words.
    """

    why: str
    tokens: int
    input_tokens: int
    active: float | None
    summary: str


class Writing:
    """The two texts, which have one seed; `more` is called until they are `done`.

    Args:
        source: Of the neurons.
        reader: Of the model.
        layer: Of the neuron.
        neuron: Its number in the layer.
        settings: Of the box.

    Raises:
        UserError: If there is no such neuron, or the model cannot have these settings.
    """

    def __init__(
        self, source: NeuronData, reader: LiveModel, layer: int, neuron: int, settings: SteerSettings
    ):
        row = source.row(source.number(layer, neuron), ["top_tokens"])
        self._reader, self._neuron = reader, (layer, neuron)
        self._input_tokens = frozenset((row["top_tokens"] or ())[:LISTED_TOKENS])
        ids = reader.ids(settings.prompt, "prompt")
        sampling = Sampling(temperature=settings.temperature, seed=settings.seed)
        one = Intervention(layer, neuron, settings.value, settings.mode, settings.positions)
        self._generation = reader.generation(ids, sampling, settings.max_new_tokens, [[], [one]])
        self._begin = len(self._generation.texts[0])
        tokenizer = reader.model.tokenizer
        self._streams = [TextStream(tokenizer, text) for text in self._generation.texts]
        self.prompt = spelled(tokenizer.decode(ids))

    @property
    def done(self) -> bool:
        """Whether both texts have ended."""
        return self._generation.done

    def more(self) -> list[Piece]:
        """Decodes more of both texts, in as few pieces as can be."""
        is_first = all(len(text) == self._begin for text in self._generation.texts)
        new = self._reader.advance(self._generation, 1 if is_first else _STEPS)
        found: list[Piece] = []
        for column, stream, tokens in zip(COLUMNS, self._streams, new, strict=True):
            parts = [(stream.add([token]), token in self._input_tokens) for token in tokens]
            if self.done:
                parts.append((stream.end(), False))
            found += _joined(column, parts)
        return found

    def ends(self) -> dict[str, End]:
        """Describes the end of each column; runs the model over it once."""
        whys = zip(COLUMNS, self._generation.texts, self._generation.finished, strict=True)
        return {column: self._end(text, str(why)) for column, text, why in whys}

    def _end(self, text: list[int], why: str) -> End:
        new = text[self._begin :]
        counted = sum(token in self._input_tokens for token in new)
        active = None
        if new and len(text) - 1 <= self._reader.most_tokens:
            values = self._reader.activations(np.array(text[1:]), *self._neuron)
            active = float(np.count_nonzero(values[-len(new) :]) / len(new))
        return End(why, len(new), counted, active, _summary(why, len(new), counted, active))


def spelled(text: str) -> str:
    """Returns prose as a page shows it: characters that are not printed, or turn text around, spelled out.

    Line breaks and spaces that do not break stay; of the two characters of a longer line break, the last.
    """
    kept = text.replace("\r", "")
    return "".join(c if c in _NOT_SPELLED else visible(c) for c in kept)


def _joined(column: str, parts: Iterable[tuple[str, bool]]) -> list[Piece]:
    """Pieces; the space before a marked word stands outside of it, for it would be where lines break."""
    split: list[tuple[str, bool]] = []
    for text, marked in parts:
        word = text.lstrip(" ")
        split += [(text[: len(text) - len(word)], False), (word, True)] if marked else [(text, False)]
    groups = itertools.groupby((part for part in split if part[0]), key=lambda part: part[1])
    return [Piece(column, spelled("".join(text for text, _ in group)), marked) for marked, group in groups]


def _summary(why: str, tokens: int, input_tokens: int, active: float | None) -> str:
    if not tokens:
        return "The document ends here."
    said = [
        f"{tokens} token{'s' if tokens > 1 else ''}{', then the document ends' if why == 'stop' else ''}",
        f"{input_tokens} highlighted",
    ]
    if active is not None:
        said.append(f"active at {formatting.percent(active)}")
    return " · ".join(said)


def _as(kind: Any, name: str, value: Any) -> Any:
    if kind is str:
        if not isinstance(value, str):
            raise UserError(f"{name} = {_short(value)}: must be text")
        return value
    what = "a whole number" if kind is int else "a number"
    try:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float | str)
            or (kind is int and isinstance(value, float))
        ):
            raise ValueError
        return kind(value)
    except (ValueError, OverflowError) as e:
        raise UserError(f"{name} = {_short(value)}: must be {what}") from e


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
