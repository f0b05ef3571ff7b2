"""The store of a run's activations: a folder of segments, appended to one by one, read without loading any.

    store/metadata.json               what the activations are of
    store/segments/0-000000/...       the arrays of one segment (`topklm.neurons.segment`), and segment.json
    store/parts/0/part.json           how many segments there are of part 0

A segment is written under another name and renamed when it is whole, so that a killed process leaves whole
segments; a run continues after the last. Each part (a host's share of the text) numbers its own segments,
and one process at a time writes to it.

All JSON carries its own digest, and every segment and array says whose it is, so nothing is read in the place
of something else. Stores of format 1 had none of this; they are read, and nothing is added to them.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import functools
from pathlib import Path
import re
import shutil
from typing import Any

import numpy as np

from topklm.errors import UserError
from topklm.neurons import segment as segment_lib
from topklm.neurons.paths import damage_is_a_user_error
from topklm.neurons.segment import Segment, SegmentReader
from topklm.storage.files import (
    DIGEST,
    folder_lock,
    fsync,
    is_locked,
    read_json,
    sealed_json,
    unsealed,
    write_atomically,
)

FORMAT = 2
_WITHOUT_DIGESTS = 1

_METADATA, _SEGMENTS, _FACTS, _PARTS, _PART = (
    "metadata.json",
    "segments",
    "segment.json",
    "parts",
    "part.json",
)
_NAME = re.compile(r"(\d+)-(\d{6,})")

_AGAIN = "run the same topklm neurons harvest again"


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The origin of a store's activations; all segments share it.

    Attributes:
        run: Name of the run folder.
        step: Of the checkpoint.
        tokenizer_sha256: Of the tokenizer that made the tokens.
        source: Of the text, in words and fingerprints.
        kind: "topk", what TopK layers hand on; "dense", the positive part of what a Base LM's layers do; or
            one of `dictionary.KINDS`, what those do, written in a dictionary.
        layers: The model's layers, rising; S of them.
        d_model: D, neurons per layer.
        topk_k: k; of a Base LM, how many entries or codes of each token were kept, D where all were.
        topk_activation: As in the config.
        context_length: Tokens in a window.
        parts: Into how many shares the documents were dealt.
        dictionary: `Dictionary.description`; empty where there is none.
        parameters: `verification.fingerprint` of the model; empty in stores of earlier versions.
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
    parameters: str = ""


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
class NeuronBlock:
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
    """The active neurons of a stretch of text, token by token.

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
    """The facts of a segment that are known without opening its arrays.

    Attributes:
        n_tokens: N.
        n_events: E.
        first_document: Of its first token.
        last_document: Of its last.
        store: `Store.sha256`, as the rest empty in stores of format 1.
        part: Whose it is.
        number: Which of the part's segments, from 0.
        begin: Tokens of the part that come before it.
        arrays: By name; `segment.Array`.
    """

    n_tokens: int
    n_events: int
    first_document: int
    last_document: int
    store: str = ""
    part: int = 0
    number: int = 0
    begin: int = 0
    arrays: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class StoreWriter(contextlib.AbstractContextManager["StoreWriter"]):
    """Appends segments of one part to a store, which it makes if there is none.

    Nobody else can write to the part until it is closed, or let go of.

    Args:
        folder: Of the store.
        metadata: Of the activations to be stored.
        part: Which share of the text, from 0.
        wait: Told which process writes to the part, if another one does; if it returns, that one's end is
            waited for. None: that is an error.

    Raises:
        UserError: If the folder holds activations of something else, is damaged, or somebody else writes.
    """

    def __init__(
        self,
        folder: Path,
        metadata: Metadata,
        part: int = 0,
        wait: Callable[[str], None] | None = None,
    ):
        self._folder, self._part = folder, part
        self._segments, self._about = folder / _SEGMENTS, folder / _PARTS / str(part)
        if _is_there(folder / _METADATA):
            _check_same(folder, metadata)
        elif _segment_names(folder):
            raise _without_metadata(folder)
        with contextlib.ExitStack() as stack:
            self._about.mkdir(parents=True, exist_ok=True)
            self._segments.mkdir(exist_ok=True)
            stack.enter_context(folder_lock(self._about, wait or functools.partial(_refuse, folder, part)))
            if not _is_there(folder / _METADATA):
                content = {"format": FORMAT, **dataclasses.asdict(metadata)}
                write_atomically(folder / _METADATA, sealed_json(content, indent=2))
            self._store = _check_same(folder, metadata)
            for left in self._segments.glob(f".{part}-*"):  # by one that was killed
                shutil.rmtree(left)
            facts = _of_part(folder, part, _segment_names(folder), self._store)
            self._n_written, self.n_tokens = len(facts), sum(each.n_tokens for each in facts)
            if self._store:
                self._write_part()
            self._closing = stack.pop_all()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets others write to the part."""
        self._closing.close()

    def append(self, segment: Segment) -> None:
        """Adds a segment; it is on the disk, whole, when this returns.

        Raises:
            UserError: If the store was made by an earlier version.
        """
        if not self._store:
            raise UserError(
                f"{self._folder} was made by an earlier version of topklm: it can be read, but nothing can "
                "be added to it; delete it, and harvest again"
            )
        name = f"{self._part}-{self._n_written:06d}"
        temporary = self._segments / f".{name}"
        arrays = segment_lib.write(temporary, segment, _segment_id(self._store, self._part, self._n_written))
        facts = _Facts(
            len(segment.tokens),
            len(segment.token_index),
            int(segment.documents[0]),
            int(segment.documents[-1]),
            self._store,
            self._part,
            self._n_written,
            self.n_tokens,
            arrays,
        )
        write_atomically(temporary / _FACTS, sealed_json(dataclasses.asdict(facts)))
        temporary.rename(self._segments / name)
        fsync(self._segments)
        self._n_written += 1
        self.n_tokens += facts.n_tokens
        self._write_part()

    def _write_part(self) -> None:
        """Counts the segments, last: a kill before that leaves one more than are counted, and it is whole."""
        content = {"store": self._store, "part": self._part, "segments": self._n_written}
        write_atomically(self._about / _PART, sealed_json(content))


class Store:
    """Reads a store; opening it reads a small file of facts for each segment, and no activations.

    Args:
        folder: Of the store.

    Attributes:
        folder: The same.
        metadata: The origin of its activations.
        sha256: Of the metadata; identifies the store in other files. Empty in stores of format 1.
        segments: All of them, part by part.

    Raises:
        UserError: If it is none, or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.metadata, self.sha256 = _read_metadata(folder)
        n_neurons = len(self.metadata.layers) * self.metadata.d_model
        self._facts: list[_Facts] = []
        self.segments: list[SegmentReader] = []
        wanted = _parts(folder, self.sha256)
        names = _segment_names(folder)  # later: somebody may be adding some
        for part, n_segments in wanted.items():
            found = _of_part(folder, part, names, self.sha256)
            if len(found) < n_segments:
                raise UserError(
                    f"{folder}: of {n_segments} segments of part {part} only {len(found)} are there: {_AGAIN}"
                )
            self._facts += found
            for number, facts in enumerate(found):
                reader = SegmentReader(
                    folder / _SEGMENTS / f"{part}-{number:06d}",
                    facts.n_tokens,
                    facts.n_events,
                    n_neurons,
                    _advice(part, number, len(found)),
                    _segment_id(self.sha256, part, number) if self.sha256 else None,
                    {kind: segment_lib.Array(**array) for kind, array in facts.arrays.items()},
                    _may_be_zeros(facts),
                )
                self.segments.append(reader)
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
        """Returns all events of a neuron.

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
            tokens.append(start + segment.token_index(segment.result(gaps)))
            values.append(segment.result(found).astype(np.float32))
        return Events(
            np.concatenate(tokens) if tokens else np.zeros(0, np.int64),
            np.concatenate(values) if values else np.zeros(0, np.float32),
        )

    def block(self, layer: int, begin: int, end: int) -> NeuronBlock:
        """Reads all events of a layer's neurons from `begin` to `end` - 1; memory grows with their number.

        Raises:
            UserError: If there are no such neurons.
        """
        first, stop = self._number(layer, begin), self._number(layer, end - 1) + 1
        starts = [segment.offsets[first : stop + 1] for segment in self.segments]
        reading = [segment.start_reading(first, stop) for segment in self.segments]
        counts = np.zeros((len(self.segments), end - begin), np.int64)
        tokens, values = [], []
        for n, (segment, (gaps, found)) in enumerate(zip(self.segments, reading, strict=True)):
            counts[n] = np.diff(starts[n])
            places = segment.token_index(segment.result(gaps), starts[n] - starts[n][0])
            tokens.append(self._starts[n] + places)
            values.append(segment.result(found).astype(np.float32))
        offsets = np.concatenate([[0], np.cumsum(counts.sum(axis=0))])
        # A segment's events go after those of the same neuron from the segments before.
        all_tokens, all_values = np.empty(offsets[-1], np.int64), np.empty(offsets[-1], np.float32)
        before = np.cumsum(counts, axis=0) - counts
        for n in range(len(self.segments)):
            shift = offsets[:-1] + before[n] - (starts[n][:-1] - starts[n][0])
            at = np.arange(len(tokens[n])) + np.repeat(shift, counts[n])
            all_tokens[at], all_values[at] = tokens[n], values[n]
        return NeuronBlock(offsets, all_tokens, all_values)

    def active(self, begin: int, end: int) -> EventsByToken:
        """Reads all events of the tokens from `begin` to `end` - 1; takes whole segments."""
        layers, d = np.asarray(self.metadata.layers, np.int32), self.metadata.d_model
        parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))]
        for start, reader, facts in zip(self._starts, self.segments, self._facts, strict=False):
            if start < end and begin < start + facts.n_tokens:
                segment = reader.read()
                inside = np.flatnonzero(
                    (segment.token_index >= begin - start) & (segment.token_index < end - start)
                )
                numbers = np.searchsorted(segment.offsets, inside, side="right") - 1
                order = np.argsort(segment.token_index[inside], kind="stable")
                found = inside[order]
                values = segment.values[found].astype(np.float32)
                parts.append((start + segment.token_index[found], numbers[order], values))
        tokens, numbers, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return EventsByToken(tokens, layers[numbers // d], (numbers % d).astype(np.int32), values)

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Returns int[end - begin], ids of tokens; positions outside of the store are left out."""
        return self._stretch("tokens", begin, end)

    def losses(self, begin: int, end: int) -> np.ndarray:
        """Returns float32, as `tokens`: the loss of each token, nats."""
        return self._stretch("losses", begin, end).astype(np.float32)

    def documents(self, begin: int, end: int) -> np.ndarray:
        """Returns int, as `tokens`: the document of each token."""
        return self._stretch("documents", begin, end)

    def document(self, number: int) -> tuple[int, int]:
        """Returns which tokens a document has: the first, and the one after its last.

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


def wait_for_writers(folder: Path, say: Callable[[str], None]) -> None:
    """Returns when nobody writes to a store any more.

    Args:
        folder: Of the store.
        say: Told whom is waited for.
    """

    def wait(owner: str) -> None:
        say(f"process {owner} is harvesting into {folder}: waiting for its end")

    for part in (folder / _PARTS).glob("*"):
        if is_locked(part):
            with folder_lock(part, wait):
                pass


def _refuse(folder: Path, part: int, owner: str) -> None:
    raise UserError(f"{folder}: process {owner} is writing to part {part} of it: wait for its end")


def _is_there(path: Path) -> bool:
    """Does what `Path.exists` does; a UserError if that cannot be looked at."""
    with damage_is_a_user_error(path, "mend it"):
        return path.exists()


def _segment_names(folder: Path) -> Sequence[tuple[int, int]]:
    """Lists part and number of each whole segment, rising."""
    segments = folder / _SEGMENTS
    with damage_is_a_user_error(segments, _AGAIN):
        names = [path.name for path in segments.iterdir()] if segments.exists() else []
    found = [_NAME.fullmatch(name) for name in names]
    return sorted((int(name[1]), int(name[2])) for name in found if name)


def _parts(folder: Path, store: str) -> dict[int, int]:
    """Reads how many segments each part that is there must have; it may have more."""
    counts = {part: 0 for part, _ in _segment_names(folder)}
    if not store:
        return counts
    parts = folder / _PARTS
    with damage_is_a_user_error(parts, _AGAIN):
        counts |= {int(path.name): 0 for path in parts.iterdir() if path.name.isdecimal()}
        if not counts:
            raise ValueError("it holds no part")
    for part in counts:
        path = parts / str(part) / _PART
        with damage_is_a_user_error(path, _AGAIN, KeyError):
            content = read_json(path, f"delete it, and {_AGAIN}", sealed=True)
            if (content["store"], content["part"]) != (store, part):
                raise UserError(f"{path} is of another store, or of another part: delete it, and {_AGAIN}")
            counts[part] = content["segments"]
    return dict(sorted(counts.items()))


def _of_part(folder: Path, part: int, names: Sequence[tuple[int, int]], store: str) -> list[_Facts]:
    """Reads the facts of the part's segments, of all that there are.

    Raises:
        UserError: If one of them is missing, damaged, or not what it must be in its place.
    """
    numbers = [number for of, number in names if of == part]
    found, n_tokens = list[_Facts](), 0
    for number, there in enumerate(numbers):
        path, advice = folder / _SEGMENTS / f"{part}-{number:06d}", _advice(part, number, numbers[-1] + 1)
        if there != number:
            advice = _advice(part, there, numbers[-1] + 1)
            raise UserError(f"{path} is missing, and there are segments stop it: {advice}")
        facts = _facts(path, advice, bool(store))
        place = (store, part, number, n_tokens)
        if store and (facts.store, facts.part, facts.number, facts.begin) != place:
            raise UserError(f"{path} is of another store, or of another place in this one: {advice}")
        found.append(facts)
        n_tokens += facts.n_tokens
    return found


def _advice(part: int, number: int, stop: int) -> str:
    """Advises on a damaged segment; those harvested after it can only be harvested after it."""
    names = f"{part}-{number:06d}"
    if number < stop - 1:
        names += f" to {part}-{stop - 1:06d}"
    return f"delete {names} in {_SEGMENTS}, and {_AGAIN}"


def _segment_id(store: str, part: int, number: int) -> str:
    return f"{store} {part} {number}"


def _may_be_zeros(facts: _Facts) -> set[str]:
    """Arrays of a segment of format 1 that may be 0 throughout, so that no chunk of them was written."""
    zeros = {"gaps"} if facts.n_tokens == 1 else set[str]()
    if facts.last_document == 0:
        zeros.add("documents")
    if facts.n_events == 0:
        zeros.add("offsets")
    return zeros


def _facts(folder: Path, advice: str, sealed: bool) -> _Facts:
    with damage_is_a_user_error(folder, advice, TypeError):
        facts = _Facts(**read_json(folder / _FACTS, advice, sealed=sealed))
        counts = (facts.n_tokens, facts.n_events, facts.first_document, facts.last_document)
        if not all(type(n) is int and n >= 0 for n in counts):
            raise ValueError("counts that are none")
        return facts


def _read_metadata(folder: Path) -> tuple[Metadata, str]:
    """Reads the description of a store, and its digest; that of format 1 has none."""
    path, advice = folder / _METADATA, "delete the folder, and harvest again"
    if not _is_there(path):
        if _segment_names(folder):
            raise _without_metadata(folder)
        raise UserError(f"{folder}: there are no activations here; run topklm neurons harvest")
    with damage_is_a_user_error(path, advice, TypeError, KeyError):
        content = read_json(path, advice)
        version, digest = content["format"], content.get(DIGEST, "")
        if version not in (_WITHOUT_DIGESTS, FORMAT):
            raise UserError(
                f"{folder}: a store of format {version}, this topklm reads {FORMAT}: harvest again"
            )
        fields = unsealed(content) if version == FORMAT else dict(content)
        del fields["format"]
        return Metadata(**{**fields, "layers": tuple(fields["layers"])}), digest


def _without_metadata(folder: Path) -> UserError:
    return UserError(
        f"{folder / _METADATA} is missing, and with it what the activations here are of: put it back, or "
        f"delete {folder}, and harvest again"
    )


def _check_same(folder: Path, metadata: Metadata) -> str:
    """Returns the store's digest; raises UserError if it holds activations of something else."""
    there, digest = _read_metadata(folder)
    for name, value in dataclasses.asdict(metadata).items():
        found = getattr(there, name)
        if found != value and not (name == "parameters" and not digest):
            raise UserError(
                f"{folder} holds activations of another {name} ({found!r}, not {value!r}): delete it, "
                "or harvest into another folder"
            )
    return digest
