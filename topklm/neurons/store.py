"""The store of a run's activations: a folder of segments, appended to one by one, read without loading any.

    store/metadata.json               what the activations are of
    store/segments/0-000000/...       the arrays of one segment (`topklm.neurons.segment`), and segment.json

A segment is written under another name and renamed when it is whole, so that whoever is killed leaves whole
segments; a run continues behind the last. Each part (a host's share of the text) numbers its own segments.
"""

from collections.abc import Sequence
import dataclasses
import json
from pathlib import Path
import re
import shutil
from typing import Any

import numpy as np

from topklm.errors import UserError
from topklm.files import fsync, write_atomically
from topklm.neurons import segment as segment_lib
from topklm.neurons.segment import Segment, SegmentReader

FORMAT = 1

_METADATA, _SEGMENTS, _FACTS = "metadata.json", "segments", "segment.json"
_NAME = re.compile(r"(\d+)-(\d{6,})")


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What the activations of a store are of; all segments share it.

    Attributes:
        run: Name of the run folder.
        step: Of the checkpoint.
        tokenizer_sha256: Of the tokenizer that made the tokens.
        source: What the text is, in words and fingerprints.
        kind: "topk", what TopK layers hand on; "dense", the positive part of what a Base LM's layers do; or
            one of `dictionary.KINDS`, what those do, written in a dictionary.
        layers: The model's layers, rising; S of them.
        d_model: D, neurons per layer.
        topk_k: k; of a Base LM, how many entries or codes of each token were kept, D where all were.
        topk_activation: As in the config.
        context_length: Tokens in a window.
        parts: Into how many shares the documents were dealt.
        dictionary: `Dictionary.description`; empty where there is none.
    """

    run: str
    step: int
    tokenizer_sha256: str
    source: str
    kind: str
    layers: tuple[int, ...]
    d_model: int
    topk_k: int
    topk_activation: str
    context_length: int
    parts: int = 1
    dictionary: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Events:
    """Where one neuron is active.

    Attributes:
        tokens: int64[E], which tokens of the store, rising; `Store.tokens` reads around them.
        values: float32[E].
    """

    tokens: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """All events of neighbouring neurons of a layer, neuron by neuron.

    Attributes:
        offsets: int64[n + 1], where the events of each of the n neurons begin.
        tokens: int64[E], rising for each neuron; as in `Events`.
        values: float32[E].
    """

    offsets: np.ndarray
    tokens: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class EventsByToken:
    """What is active in a stretch of text, token by token.

    Attributes:
        tokens: int64[E], which tokens of the store, rising.
        layers: int32[E], of the model.
        neurons: int32[E], rising for each token and layer.
        values: float32[E].
    """

    tokens: np.ndarray
    layers: np.ndarray
    neurons: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What is known of a segment without opening its arrays."""

    n_tokens: int
    n_events: int
    first_document: int
    last_document: int


class StoreWriter:
    """Appends segments of one part to a store, which it makes if there is none.

    Args:
        folder: Of the store.
        metadata: What is to be stored.
        part: Which share of the text, from 0.

    Raises:
        UserError: If the folder holds activations of something else.
    """

    def __init__(self, folder: Path, metadata: Metadata, part: int = 0):
        self._segments, self._part = folder / _SEGMENTS, part
        self._segments.mkdir(parents=True, exist_ok=True)
        if (folder / _METADATA).exists():
            _check_same(folder, metadata)
        else:
            content = {"format": FORMAT, **dataclasses.asdict(metadata)}
            write_atomically(folder / _METADATA, (json.dumps(content, indent=2) + "\n").encode())
        for left in self._segments.glob(f".{part}-*"):  # by one that was killed
            shutil.rmtree(left)
        self._written = [name for name in _segment_names(folder) if name.startswith(f"{part}-")]
        self.n_tokens = sum(_facts(self._segments / name).n_tokens for name in self._written)

    def append(self, segment: Segment) -> None:
        """Adds a segment; it is on the disk, whole, when this returns."""
        name = f"{self._part}-{len(self._written):06d}"
        temporary = self._segments / f".{name}"
        segment_lib.write(temporary, segment)
        facts = _Facts(
            len(segment.tokens),
            len(segment.places),
            int(segment.documents[0]),
            int(segment.documents[-1]),
        )
        write_atomically(temporary / _FACTS, json.dumps(dataclasses.asdict(facts)).encode())
        temporary.rename(self._segments / name)
        fsync(self._segments)
        self._written.append(name)
        self.n_tokens += facts.n_tokens


class Store:
    """Reads a store; opening it reads a small file of facts for each segment, and no activations.

    Args:
        folder: Of the store.

    Raises:
        UserError: If it is none, or damaged.
    """

    def __init__(self, folder: Path):
        self.folder, self.metadata = folder, _read_metadata(folder)
        names = _segment_names(folder)
        self._facts = [_facts(folder / _SEGMENTS / name) for name in names]
        self.segments = [SegmentReader(folder / _SEGMENTS / name) for name in names]
        self._starts = np.concatenate([[0], np.cumsum([f.n_tokens for f in self._facts], dtype=np.int64)])

    @property
    def n_tokens(self) -> int:
        """How many tokens have been stored."""
        return int(self._starts[-1])

    @property
    def n_events(self) -> int:
        """How many activations have been stored, of all layers."""
        return sum(facts.n_events for facts in self._facts)

    def neuron(self, layer: int, neuron: int) -> Events:
        """All events of a neuron.

        Args:
            layer: One of `metadata.layers`.
            neuron: From 0 to D - 1.

        Raises:
            UserError: If there is no such neuron.
        """
        number = self._number(layer, neuron)
        reading = [segment.start_reading(number, number + 1) for segment in self.segments]
        tokens, values = [], []
        for start, segment, (gaps, found) in zip(self._starts, self.segments, reading, strict=False):
            tokens.append(start + segment_lib.places_of(segment.result(gaps)))
            values.append(segment.result(found).astype(np.float32))
        return Events(
            np.concatenate(tokens) if tokens else np.zeros(0, np.int64),
            np.concatenate(values) if values else np.zeros(0, np.float32),
        )

    def block(self, layer: int, begin: int, end: int) -> Block:
        """All events of the neurons from `begin` to `end` - 1 of a layer; memory grows with their number.

        Raises:
            UserError: If there are no such neurons.
        """
        first, behind = self._number(layer, begin), self._number(layer, end - 1) + 1
        starts = [segment.offsets[first : behind + 1] for segment in self.segments]
        reading = [segment.start_reading(first, behind) for segment in self.segments]
        counts = np.zeros((len(self.segments), end - begin), np.int64)
        tokens, values = [], []
        for n, (segment, (gaps, found)) in enumerate(zip(self.segments, reading, strict=True)):
            counts[n] = np.diff(starts[n])
            places = segment_lib.places_of(segment.result(gaps), starts[n] - starts[n][0])
            tokens.append(self._starts[n] + places)
            values.append(segment.result(found).astype(np.float32))
        offsets = np.concatenate([[0], np.cumsum(counts.sum(axis=0))])
        # A segment's events go behind those of the same neuron from the segments before.
        all_tokens, all_values = np.empty(offsets[-1], np.int64), np.empty(offsets[-1], np.float32)
        before = np.cumsum(counts, axis=0) - counts
        for n in range(len(self.segments)):
            shift = offsets[:-1] + before[n] - (starts[n][:-1] - starts[n][0])
            at = np.arange(len(tokens[n])) + np.repeat(shift, counts[n])
            all_tokens[at], all_values[at] = tokens[n], values[n]
        return Block(offsets, all_tokens, all_values)

    def active(self, begin: int, end: int) -> EventsByToken:
        """All events of the tokens from `begin` to `end` - 1, of a document say; whole segments are read."""
        layers, d = np.asarray(self.metadata.layers, np.int32), self.metadata.d_model
        parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))]
        for start, reader, facts in zip(self._starts, self.segments, self._facts, strict=False):
            if start < end and begin < start + facts.n_tokens:
                segment = reader.read()
                inside = np.flatnonzero((segment.places >= begin - start) & (segment.places < end - start))
                numbers = np.searchsorted(segment.offsets, inside, side="right") - 1
                order = np.argsort(segment.places[inside], kind="stable")
                found = inside[order]
                values = segment.values[found].astype(np.float32)
                parts.append((start + segment.places[found], numbers[order], values))
        tokens, numbers, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return EventsByToken(tokens, layers[numbers // d], (numbers % d).astype(np.int32), values)

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """int[end - begin], ids of the store's tokens; what lies outside of the store is left out."""
        return self._stretch("tokens", begin, end)

    def losses(self, begin: int, end: int) -> np.ndarray:
        """float32, as `tokens`: the loss of each token, nats."""
        return self._stretch("losses", begin, end).astype(np.float32)

    def documents(self, begin: int, end: int) -> np.ndarray:
        """int, as `tokens`: the document of each token."""
        return self._stretch("documents", begin, end)

    def document(self, number: int) -> tuple[int, int]:
        """Which tokens a document has: the first, and the one behind its last.

        Raises:
            UserError: If the store does not hold it.
        """
        found = [
            start + np.searchsorted(segment.result(segment.array("documents").read()), [number, number + 1])
            for start, segment, facts in zip(self._starts, self.segments, self._facts, strict=False)
            if facts.first_document <= number <= facts.last_document
        ]
        found = [(begin, end) for begin, end in found if begin < end]
        if not found:
            raise UserError(f"document {number}: {self.folder} does not hold it")
        return int(found[0][0]), int(found[-1][1])

    def _number(self, layer: int, neuron: int) -> int:
        layers, d = self.metadata.layers, self.metadata.d_model
        if layer not in layers:
            raise UserError(f"layer {layer}: must be one of {', '.join(map(str, layers))}")
        if not 0 <= neuron < d:
            raise UserError(f"neuron {neuron}: must be from 0 to {d - 1}")
        return layers.index(layer) * d + neuron

    def _stretch(self, name: str, begin: int, end: int) -> np.ndarray:
        begin, end = max(begin, 0), min(end, self.n_tokens)
        first = int(np.searchsorted(self._starts, begin, side="right")) - 1
        parts = []
        for start, segment, facts in zip(
            self._starts[first:], self.segments[first:], self._facts[first:], strict=False
        ):
            if start >= end:
                break
            inside = slice(max(begin - start, 0), min(end - start, facts.n_tokens))
            parts.append((segment, segment.array(name)[inside].read()))
        arrays = [segment.result(part) for segment, part in parts]
        return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)


def _segment_names(folder: Path) -> Sequence[str]:
    """Of whole segments: by part, then as they were written."""
    names = [path.name for path in (folder / _SEGMENTS).iterdir() if _NAME.fullmatch(path.name)]
    return sorted(names, key=lambda name: tuple(map(int, name.split("-"))))


def _facts(folder: Path) -> _Facts:
    try:
        return _Facts(**json.loads((folder / _FACTS).read_text()))
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"{folder} is damaged ({e}): delete it, and harvest again") from e


def _read_metadata(folder: Path) -> Metadata:
    try:
        content: dict[str, Any] = json.loads((folder / _METADATA).read_text())
        version = content.pop("format")
        if version != FORMAT:
            raise UserError(
                f"{folder}: a store of format {version}, this topklm reads {FORMAT}: harvest again"
            )
        return Metadata(**{**content, "layers": tuple(content["layers"])})
    except FileNotFoundError as e:
        raise UserError(f"{folder}: there are no activations here; run topklm neurons harvest") from e
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise UserError(f"{folder / _METADATA} is damaged ({e}): delete the folder, and harvest again") from e


def _check_same(folder: Path, metadata: Metadata) -> None:
    there = dataclasses.asdict(_read_metadata(folder))
    for name, value in dataclasses.asdict(metadata).items():
        if there[name] != value:
            raise UserError(
                f"{folder} holds activations of another {name} ({there[name]!r}, not {value!r}): delete it, "
                "or harvest into another folder"
            )
