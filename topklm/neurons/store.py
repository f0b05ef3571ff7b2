"""The store of a run's activations: a folder of segments, appended to one by one, read without loading any.

    store/metadata.json               what the activations are of
    store/segments/0-000000/...       one segment (`topklm.neurons.segment`)
    store/parts/0/part.json           how many segments there are of part 0

A segment is written under another name and renamed when it is whole, so that a killed process leaves whole
segments; a run continues after the last. Each part (a host's share of the text) numbers its own segments,
and one process at a time writes to it.

All JSON carries its own digest, and every segment and array says whose it is, so nothing is read in the place
of something else. Stores of format 1 had none of this; they are read, and nothing is added to them.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
from pathlib import Path
import re
import shutil

import numpy as np

from topklm.errors import ArgumentError, UserError
from topklm.neurons import NeuronsFolder, damage_is_a_user_error
from topklm.neurons import segment as segment_lib
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

_METADATA, _SEGMENTS, _PARTS, _PART = "metadata.json", "segments", "parts", "part.json"
_NAME = re.compile(r"(\d+)-(\d{6,})")

_READ = 1 << 18  # tokens read at once
_AGAIN = "run the same topklm neurons harvest again"


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The origin of a store's activations; all segments share it."""

    run: str  # name of the run folder
    step: int  # of the checkpoint
    tokenizer_sha256: str  # of the tokenizer that made the tokens
    source: str  # of the text, in words and fingerprints
    # "topk", what TopK layers hand on; "dense", the positive part of what a Base LM's layers do; or one
    # of `DICTIONARIES`, what those do, written in a dictionary.
    kind: str
    layers: tuple[int, ...]  # the model's layers, rising; S of them
    d_model: int  # D, neurons per layer
    topk_k: int  # k; of a Base LM, how many entries or codes of each token were kept, D where all were
    topk_activation: str  # as in the config
    context_length: int  # tokens in a window
    parts: int = 1  # into how many shares the documents were dealt
    dictionary: str = ""  # `Dictionary.description`; empty where there is none
    parameters: str = ""  # `checksums.fingerprint` of the model; empty in stores of earlier versions


@dataclasses.dataclass(frozen=True, eq=False)
class NeuronBlock:
    """All events of one neuron, or of neighbouring ones of a layer, neuron by neuron."""

    offsets: np.ndarray  # int64[n + 1], where the events of each of the n neurons begin
    # int64[E], which tokens of the store, rising for each neuron; `Store.tokens` reads around them.
    tokens: np.ndarray
    values: np.ndarray  # float32[E]

    def one(self, number: int) -> "NeuronBlock":
        """Returns the events of one of the n neurons."""
        return self.part(number, number + 1)

    def part(self, begin: int, end: int) -> "NeuronBlock":
        """Returns the events of the neurons from `begin` to `end` - 1."""
        offsets = self.offsets[begin : end + 1]
        events = slice(offsets[0], offsets[-1])
        return NeuronBlock(offsets - offsets[0], self.tokens[events], self.values[events])

    def at(self, tokens: np.ndarray) -> "NeuronBlock":
        """Returns the events at some tokens of the store, bool[N]."""
        kept = tokens[self.tokens]
        offsets = np.concatenate([[0], np.cumsum(kept)])[self.offsets]
        return NeuronBlock(offsets, self.tokens[kept], self.values[kept])


class StoreWriter(contextlib.AbstractContextManager["StoreWriter"]):
    """Appends segments of one part to a store, which it makes if there is none.

    Nobody else can write to the part, a share of the text counted from 0, until it is closed, or let go of.
    `wait` is told which process writes to it, if another one does; if it returns, that one's end is waited
    for; None: that is an error. UserError if the folder holds activations of something else, or is damaged.
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
        if _is_there(folder / _METADATA) or _segment_names(folder):
            _check_same(folder, metadata)

        def refuse(owner: str) -> None:
            raise UserError(f"{folder}: process {owner} is writing to part {part} of it: wait for its end")

        with contextlib.ExitStack() as stack:
            self._about.mkdir(parents=True, exist_ok=True)
            self._segments.mkdir(exist_ok=True)
            stack.enter_context(folder_lock(self._about, wait or refuse))
            if not _is_there(folder / _METADATA):
                content = {"format": FORMAT, **dataclasses.asdict(metadata)}
                write_atomically(folder / _METADATA, sealed_json(content, indent=2))
            self._store = _check_same(folder, metadata)
            for left in self._segments.glob(f".{part}-*"):  # by one that was killed
                shutil.rmtree(left)
            there = _segments_of(folder, part, _segment_names(folder), self._store, metadata)
            self._n_written, self.n_tokens = len(there), sum(each.n_tokens for each in there)
            if self._store:
                self._write_part()
            self._closing = stack.pop_all()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets others write to the part."""
        self._closing.close()

    def append(self, segment: Segment) -> None:
        """Adds a segment; it is on the disk, whole, when this returns."""
        if not self._store:
            raise UserError(
                f"{self._folder} was made by an earlier version of topklm: it can be read, but nothing can "
                "be added to it; delete it, and harvest again"
            )
        name = _name(self._part, self._n_written)
        temporary = self._segments / f".{name}"
        segment_lib.write(temporary, segment, self._store, self._part, self._n_written, self.n_tokens)
        temporary.rename(self._segments / name)
        fsync(self._segments)
        self._n_written += 1
        self.n_tokens += len(segment.tokens)
        self._write_part()

    def _write_part(self) -> None:
        """Counts the segments, last: a kill before that leaves one more than are counted, and it is whole."""
        content = {"store": self._store, "part": self._part, "segments": self._n_written}
        write_atomically(self._about / _PART, sealed_json(content))


class Store:
    """Reads a store; opening it reads a small file of facts for each segment, and no activations.

    `sha256` is of the metadata and identifies the store in other files; it is empty in format 1. Segments
    stand part by part. UserError if the folder is none, or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.metadata, self.sha256 = _read_metadata(folder)
        self.segments: list[SegmentReader] = []
        wanted = _parts(folder, self.sha256)
        names = _segment_names(folder)  # later: somebody may be adding some
        for part, n_segments in wanted.items():
            found = _segments_of(folder, part, names, self.sha256, self.metadata)
            if len(found) < n_segments:
                raise UserError(
                    f"{folder}: of {n_segments} segments of part {part} only {len(found)} are there: {_AGAIN}"
                )
            self.segments += found
        self._starts = np.cumsum([0, *(segment.n_tokens for segment in self.segments)], dtype=np.int64)

    @classmethod
    def of_step(cls, folder: NeuronsFolder) -> "Store":
        """Opens a checkpoint's activations; UserError if there are none, damaged, or of another one."""
        run, step = folder.run, folder.step
        if not folder.store.exists():
            text = f"{run} has no activations of step {step}: run topklm neurons harvest {run} --step {step}"
            raise UserError(text, field="step", value=step)
        store = cls(folder.store)
        if store.metadata.step != step:
            text = f"holds activations of step {store.metadata.step}: delete it, and harvest again"
            raise UserError(f"{folder.store} {text}")
        return store

    def check_model(self, tokenizer_sha256: str, parameters: str) -> None:
        """Raises UserError for activations of another tokenizer or parameters, where these are known."""
        there = self.metadata.tokenizer_sha256, self.metadata.parameters
        if there != (tokenizer_sha256, there[1] and parameters):
            raise UserError(f"{self.folder} is of another model: delete it, and harvest again")

    @property
    def n_tokens(self) -> int:
        """How many tokens have been stored."""
        return int(self._starts[-1])

    @property
    def n_events(self) -> int:
        """How many activations have been stored, of all layers."""
        return sum(segment.n_events for segment in self.segments)

    def neuron(self, layer: int, neuron: int) -> NeuronBlock:
        """Reads all events of a neuron; arguments and errors as of `block`."""
        return self.block(layer, neuron, neuron + 1)

    def largest_activation(self, layer: int, neuron: int) -> float:
        """Returns a neuron's largest activation by magnitude; errors of `block`, and of one never active."""
        values = self.neuron(layer, neuron).values
        if not len(values):
            text = f"is active at none of the {self.n_tokens:,} tokens harvested, so there is no 1x"
            raise ArgumentError(text, field=f"{layer}:{neuron}", advice="give a value without x")
        return float(np.abs(values).max())

    def block(self, layer: int, begin: int, end: int) -> NeuronBlock:
        """Reads the events of neurons `begin` to `end` - 1 of a layer; UserError if there are none such."""
        first, stop = self._number(layer, begin), self._number(layer, end - 1) + 1
        reading = [segment.start_reading(first, stop) for segment in self.segments]
        counts = np.zeros((len(self.segments), end - begin), np.int64)
        tokens, values = [], []
        for n, (segment, (gaps, found)) in enumerate(zip(self.segments, reading, strict=True)):
            offsets = segment.offsets[first : stop + 1] - segment.offsets[first]
            counts[n] = np.diff(offsets)
            tokens.append(self._starts[n] + segment.token_index(segment.result(gaps), offsets))
            values.append(segment.result(found).astype(np.float32))
        offsets = np.concatenate([[0], np.cumsum(counts.sum(axis=0))])
        # A segment's events go after those of the same neuron from the segments before.
        begins = offsets[:-1] + np.cumsum(counts, axis=0) - counts
        all_tokens, all_values = np.empty(offsets[-1], np.int64), np.empty(offsets[-1], np.float32)
        for n in range(len(self.segments)):
            shift = begins[n] - (np.cumsum(counts[n]) - counts[n])
            at = np.arange(len(tokens[n])) + np.repeat(shift, counts[n])
            all_tokens[at], all_values[at] = tokens[n], values[n]
        return NeuronBlock(offsets, all_tokens, all_values)

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Returns int[end - begin], ids of tokens; positions outside of the store are left out."""
        return self._stretch("tokens", begin, end)

    def losses(self, begin: int, end: int) -> np.ndarray:
        """Returns float32, as `tokens`: the loss of each token, nats."""
        return self._stretch("losses", begin, end).astype(np.float32)

    def documents(self, begin: int, end: int) -> np.ndarray:
        """Returns int, as `tokens`: the document of each token."""
        return self._stretch("documents", begin, end)

    def document_bounds(self) -> np.ndarray:
        """Returns int64[documents + 1], where each document begins, and the end of the last; in stretches."""
        bounds = [np.zeros(1, np.int64)]
        for begin in range(0, self.n_tokens, _READ):
            first = max(begin - 1, 0)
            numbers = self.documents(first, begin + _READ)
            bounds.append(first + 1 + np.flatnonzero(numbers[1:] != numbers[:-1]))
        return np.unique(np.concatenate([*bounds, [self.n_tokens]]))

    def blocks(self, layer: int, n_events: int, n_neurons: int) -> Iterator[tuple[int, int]]:
        """Yields bounds of blocks of a layer, of at most `n_neurons` and `n_events`, or one neuron."""
        first, d = self._number(layer, 0), self.metadata.d_model
        counts = (np.diff(segment.offsets[first : first + d + 1]) for segment in self.segments)
        stops, begin = np.cumsum(sum(counts, np.zeros(d, np.int64))), 0
        while begin < len(stops):
            before = stops[begin - 1] if begin else 0
            end = int(np.searchsorted(stops, before + n_events, side="right"))
            end = min(max(end, begin + 1), begin + n_neurons)
            yield begin, end
            begin = end

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
        reading = []
        for start, segment in zip(self._starts[first:].tolist(), self.segments[first:], strict=False):
            if start >= end:
                break
            inside = slice(max(begin - start, 0), min(end - start, segment.n_tokens))
            reading.append((segment, segment.array(name)[inside].read()))
        arrays = [segment.result(part) for segment, part in reading]
        return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)


def wait_for_writers(folder: Path, say: Callable[[str], None]) -> None:
    """Returns when nobody writes to a store any more; `say` is told of those that do."""

    def wait(owner: str) -> None:
        say(f"process {owner} is harvesting into {folder}: waiting for its end")

    for part in (folder / _PARTS).glob("*"):
        if is_locked(part):
            with folder_lock(part, wait):
                pass


def _is_there(path: Path) -> bool:
    """Does what `Path.exists` does; a UserError if that cannot be looked at."""
    with damage_is_a_user_error(path, "mend it"):
        return path.exists()


def _name(part: int, number: int) -> str:
    return f"{part}-{number:06d}"


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


def _segments_of(
    folder: Path, part: int, names: Sequence[tuple[int, int]], store: str, metadata: Metadata
) -> list[SegmentReader]:
    """Opens the part's segments; a UserError if one is missing, damaged or another's."""
    numbers = [number for of, number in names if of == part]
    found, n_tokens = list[SegmentReader](), 0
    for number, there in enumerate(numbers):
        # Those harvested after a damaged one can only be harvested after it.
        damaged = _name(part, there) + (f" to {_name(part, numbers[-1])}" if there < numbers[-1] else "")
        advice = f"delete {damaged} in {_SEGMENTS}, and {_AGAIN}"
        path = folder / _SEGMENTS / _name(part, number)
        if there != number:
            raise UserError(f"{path} is missing, and there are segments after it: {advice}")
        facts = segment_lib.read_facts(path, advice, sealed=bool(store))
        wanted = (store, part, number, n_tokens)
        if store and (facts.store, facts.part, facts.number, facts.begin) != wanted:
            raise UserError(f"{path} is of another store, or of another place in this one: {advice}")
        found.append(SegmentReader(path, facts, len(metadata.layers) * metadata.d_model, advice))
        n_tokens += facts.n_tokens
    return found


def _read_metadata(folder: Path) -> tuple[Metadata, str]:
    """Reads the description of a store, and its digest; that of format 1 has none."""
    path, advice = folder / _METADATA, "delete the folder, and harvest again"
    if not _is_there(path):
        if not _segment_names(folder):
            raise UserError(f"{folder}: there are no activations here; run topklm neurons harvest")
        raise UserError(
            f"{path} is missing, and with it what the activations here are of: put it back, or delete "
            f"{folder}, and harvest again"
        )
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
