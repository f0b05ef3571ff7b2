"""The model of a run, live: texts that it reads, and the Steer box with its two texts from one prompt."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import itertools
import math
from pathlib import Path
import re
import threading
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from topklm.errors import UserError, visible
from topklm.explorer import markup
from topklm.explorer.neuron_data import LISTED_TOKENS, NeuronData
from topklm.inference.intervention_batch import InterventionBatch
from topklm.inference.interventions import (
    DEFAULT_MODE,
    MODES,
    Intervention,
    in_activations,
    needs_value,
    times_of,
)
from topklm.inference.language_model import LanguageModel
from topklm.inference.load import load
from topklm.inference.scheduler import Generation
from topklm.inference.sequence import Sampling
from topklm.inference.tokens import TextStream
from topklm.neurons import NeuronsFolder
from topklm.neurons.capture import RESID_POST, SparseActivations, hook_name
from topklm.neurons.dictionary import Dictionary, check_coordinates
from topklm.neurons.store import Metadata

EXPECTED = 5  # next tokens
# Of a Base LM, whose neurons are nearly all active, only the strongest are told.
DENSE_KEPT = 32


class Reading(NamedTuple):
    """A text as the model reads it; dims: S layers, T tokens, k neurons, n predictions."""

    indices: np.ndarray  # int32[S, T, k], active neurons, the strongest first
    values: np.ndarray  # float32[S, T, k], activations, 0 where none is
    losses: np.ndarray  # float32[T], of each token, after those before it, nats
    next_ids: np.ndarray  # int[T, n], the tokens most expected after each, the likeliest first
    next_probabilities: np.ndarray  # float32[T, n]


class LiveModel:
    """Loads the model that a store is of, when the first text comes."""

    def __init__(self, run: str, metadata: Metadata):
        self._run, self._metadata = run, metadata
        self._lock = threading.Lock()

    @functools.cached_property
    def model(self) -> LanguageModel:
        """The model of the store's checkpoint; raises UserError if it cannot be loaded."""
        return load(self._run, step=self._metadata.step)

    @property
    def most_tokens(self) -> int:
        """How many tokens a text may have: the window that the model was trained on, less its separator."""
        return self._metadata.context_length - 1

    def ids(self, text: str, name: str = "text") -> np.ndarray:
        """Returns the tokens of typed text, int32[T]; UserError if empty, too long, or without a model."""
        # JSON may hold halves of surrogate pairs, which are no text.
        text = text.encode("utf-8", "replace").decode()
        if not text.strip():
            raise UserError(f"{name} is empty: type a few words")
        ids = self.model.tokenizer.encode(text)
        if len(ids) > self.most_tokens:
            raise UserError(
                f"{name} has {len(ids):,} tokens: at most {self.most_tokens:,}, the model's context length "
                "less one; shorten it"
            )
        return ids

    def read(self, ids: np.ndarray) -> Reading:
        """Reads tokens int[T], at most `most_tokens`; neurons are those of the store's layers."""
        with self._lock:
            if self._metadata.kind == "topk":
                logits, cache = self.model.run_with_cache(self._after_separator(ids))
                found = cache.neurons
            else:
                wanted = [hook_name(layer, RESID_POST) for layer in self._metadata.layers]
                logits, cache = self.model.run_with_cache(self._after_separator(ids), wanted)
                hidden = jnp.stack([cache[name] for name in wanted])
                if self._dictionary is None:
                    dense, n_kept = jnp.maximum(hidden, 0), min(DENSE_KEPT, hidden.shape[-1])
                else:
                    dense, n_kept = self._dictionary.encode(hidden), self._dictionary.keep
                    if self._dictionary.threshold is not None:  # which keeps any number
                        n_kept = max(1, int((dense > 0).sum(axis=-1).max()))
                found = SparseActivations.from_dense(dense, n_kept)
            indices, values = (
                np.asarray(array)[:, 0, 1 : len(ids) + 1] for array in (found.indices, found.values)
            )
            predicted = np.asarray(logits[0, : len(ids) + 1, : self.model.tokenizer.vocab_size])
        return Reading(indices, values.astype(np.float32), *predictions(predicted, ids, EXPECTED))

    def activations(self, ids: np.ndarray, layer: int, neuron: int) -> np.ndarray:
        """Returns one neuron at tokens int[T], at most `most_tokens`: float32[T]."""
        if self._metadata.kind != "dense":
            indices, values = (array[self._metadata.layers.index(layer)] for array in self.read(ids)[:2])
            return np.where(indices == neuron, values, 0).sum(axis=-1, dtype=np.float32)
        name = hook_name(layer, RESID_POST)
        with self._lock:
            _, cache = self.model.run_with_cache(self._after_separator(ids), name)
            values = np.asarray(cache[name][0, 1 : len(ids) + 1, neuron]).astype(np.float32)
        return np.maximum(values, 0)

    def generation(
        self,
        ids: np.ndarray,
        sampling: Sampling,
        max_new_tokens: int,
        interventions: Sequence[Sequence[Intervention]],
    ) -> Generation:
        """Starts sequences of one prompt, int[T] after a separator, each with its own interventions."""
        if any(interventions):
            check_coordinates(self._metadata.dictionary, "steering")
        config, separator, n = self.model.config.model, self.model.tokenizer.separator_id, len(interventions)
        rows = [dataclasses.replace(one, row=row) for row, some in enumerate(interventions) for one in some]
        try:
            return Generation(
                config,
                self.model.params,
                [[separator, *ids.tolist()]] * n,
                [sampling.check()] * n,
                max_new_tokens=[max_new_tokens] * n,
                stop_token=separator,
                interventions=InterventionBatch.of(config, rows),
                layers=self.model.decode_layers,
            )
        except ValueError as e:
            raise UserError(str(e)) from e

    def advance(self, generation: Generation, steps: int) -> list[list[int]]:
        """Returns some more tokens of each of its texts; the model is held no longer than they take."""
        with self._lock:
            return generation.advance(steps)

    @functools.cached_property
    def _dictionary(self) -> Dictionary | None:
        """The dictionary of the store's activations, if there is one; raises UserError if it is missing."""
        if not self._metadata.dictionary:
            return None
        found = Dictionary.load(NeuronsFolder(Path(self._run), self._metadata.step).dictionary)
        if found.description != self._metadata.dictionary:
            raise UserError("the store was harvested with another dictionary: delete both, and harvest again")
        return found

    def _after_separator(self, ids: np.ndarray) -> np.ndarray:
        """Returns tokens with the separator before them, int32[1, T + 1]."""
        return np.concatenate([[self.model.tokenizer.separator_id], ids]).astype(np.int32)[None]


def predictions(logits: np.ndarray, ids: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the last three of a `Reading`; logits are float32[T + 1, V], the separator's first."""
    highest = logits.max(axis=1)
    scale = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))  # log of the normaliser
    losses = scale[:-1] - logits[np.arange(len(ids)), ids]
    after, n = logits[1:], min(n, logits.shape[1])
    likeliest = np.argpartition(-after, n - 1, axis=1)[:, :n]
    order = np.argsort(-np.take_along_axis(after, likeliest, axis=1), axis=1, kind="stable")
    likeliest = np.take_along_axis(likeliest, order, axis=1)
    probabilities = np.exp(np.take_along_axis(after, likeliest, axis=1) - scale[1:, None])
    return losses, likeliest, probabilities


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
