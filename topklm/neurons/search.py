"""Text found in a store, and the neurons that stand for it; neurons chosen by label, or by a contrast.

The text of a document is what its tokens spell, byte by byte, so a character may be of several tokens and a
token may end within one. A byte that is of no character counts as a character of its own. Tokens of a
tokenizer that changes its text spell what `Tokenizer.token_strings` shows, byte tokens apart.

Precision and recall are ours: a neuron whose activation reaches a threshold at a token says "there is a match
here". It is right if the token is marked as matched. The threshold is the neuron's own, the one with the
highest F1 on these very tokens, so a neuron that reaches it seldom looks better than it is. Which tokens of a
match are marked is for the caller to say.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import itertools
import math
from pathlib import Path
import re
import time
from typing import Any

import numpy as np

from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError, visible
from topklm.neurons.contrast import ORDERS
from topklm.neurons.display import Activation, ActiveNeurons
from topklm.neurons.store import NeuronBlock, Store
from topklm.storage.files import DIGEST, read_json, unsealed

try:
    import regex
except ImportError:  # it comes with an extra, and only patterns need it
    regex = None

OVERLAP = 1024  # tokens before and after a stretch that a match in it may look at
MAX_PATTERN = 1000  # characters

_STRETCH = 16_384  # tokens of a document that are searched at once
_READ = 1 << 18  # tokens read from the store at once
# Characters of a pattern once its repetitions are written out, as the library does: it takes 0.5 kB for each.
_MAX_WRITTEN_OUT = 200_000
# (?R), (?1), (?&name) and the like: without an end, the library takes a gigabyte to find out.
_CALLS = re.compile(r"\(\?(?:R|[+-]?\d|&|P>)")
_SHOWN = 60  # characters of a pattern in a message
_FIRST_TRY_S = 0.05
_SHORTEST_TRY_S = 0.01

BLOCK_EVENTS = 2_000_000  # read at once, some 50 bytes each; a single neuron may have more
BLOCK_NEURONS = 64
_SIZES = 2**15  # magnitudes that a bfloat16 can have

_NUMBERS = ("difference", "score", "p_value", "q_value", "family_p_value")  # of a saved contrast


@dataclasses.dataclass(frozen=True, eq=False)
class Matches:
    """Where a pattern matches in the N tokens of a store."""

    count: int  # how often; matches do not overlap
    touched: np.ndarray  # bool[N], the tokens that hold a part of a match
    # bool[N], the last token of each match: a neuron of a causal model cannot know the match before.
    ends: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class _Stretch:
    """A part of a document, with some text before and after it."""

    text: str  # the spelling of its n tokens
    first_token: int  # which token of the store is the first of the n
    first_byte: int  # of the text, counted from the start of the store
    begins: np.ndarray  # int64[n + 1], the byte of the text with which each token begins
    # The bytes of the text from which on, and before which, a match of this stretch starts.
    inside: tuple[int, int]


class StoredText:
    """The text of a store, decoded stretch by stretch for memory's sake; UserError for another tokenizer."""

    def __init__(self, store: Store, tokenizer: Tokenizer):
        if tokenizer.sha256 != store.metadata.tokenizer_sha256:
            raise UserError(
                f"{store.folder} holds tokens of another tokenizer: delete it, and run topklm neurons harvest"
            )
        self._store = store
        self._pieces = tokenizer.token_bytes(range(tokenizer.vocab_size))
        self._lengths = np.array([len(piece) for piece in self._pieces], np.int64)

    def matches(self, pattern: str, *, ignore_case: bool = True, timeout_s: float = 10.0) -> Matches:
        """Searches all documents for a regular expression of the package `regex`.

        A match lies within a document, at whose ends `^` and `$` match. Long documents are searched in
        stretches, each with `OVERLAP` tokens before and after. A match within so many tokens, including its
        looking ahead and back, is found once and whole; of a longer match, parts may be found, or nothing.
        UserError for a pattern that is none, is longer than `MAX_PATTERN`, calls itself, matches the empty
        text, or takes too much memory, or time by the clock.
        """
        compiled = _compile(pattern, ignore_case)
        patience = _Patience(timeout_s)
        touched, ends = np.zeros((2, self._store.n_tokens), bool)
        count, searched = 0, 0  # bytes of the store up to the end of the last match
        for stretch in self._stretches():
            with _limits(pattern, timeout_s):
                spans = _spans(compiled, stretch, searched - stretch.first_byte, patience)
            if not len(spans):
                continue
            count += len(spans)
            first = np.searchsorted(stretch.begins[1:], spans[:, 0], side="right")
            last = np.searchsorted(stretch.begins[:-1], spans[:, 1], side="left") - 1
            n = len(stretch.begins) - 1
            depth = np.cumsum(np.bincount(first, minlength=n + 1) - np.bincount(last + 1, minlength=n + 1))
            touched[stretch.first_token :][:n] |= depth[:n] > 0
            ends[stretch.first_token + last] = True
            searched = stretch.first_byte + int(spans[-1, 1])
        return Matches(count, touched, ends)

    def tokens_equal(self, *token_ids: int) -> np.ndarray:
        """Returns bool[N], the tokens that are one of these; raises UserError for one that is not there."""
        for token_id in token_ids:
            if not 0 <= token_id < len(self._pieces):
                raise UserError(f"token {token_id}: must be from 0 to {len(self._pieces) - 1}")
        found = np.zeros(self._store.n_tokens, bool)
        for begin in range(0, len(found), _READ):
            found[begin : begin + _READ] = np.isin(self._store.tokens(begin, begin + _READ), token_ids)
        return found

    def _stretches(self) -> Iterator[_Stretch]:
        n_bytes = 0  # of what came before
        read, ids = 0, np.zeros(0, np.int64)  # tokens that are in memory, and the place of the first
        for begin, end in itertools.pairwise(self._store.document_bounds().tolist()):
            for first in range(begin, end, _STRETCH):
                stop = min(first + _STRETCH, end)
                seen = max(first - OVERLAP, begin), min(stop + OVERLAP, end)
                if seen[1] > read + len(ids):
                    read, ids = seen[0], self._store.tokens(seen[0], max(seen[1], seen[0] + _READ))
                tokens = ids[seen[0] - read : seen[1] - read]
                begins = np.concatenate([[0], np.cumsum(self._lengths[tokens])])
                inside = int(begins[first - seen[0]]), int(begins[stop - seen[0]])
                text = b"".join([self._pieces[i] for i in tokens.tolist()]).decode("utf-8", "surrogateescape")
                yield _Stretch(text, seen[0], n_bytes - inside[0], begins, inside)
                n_bytes += inside[1] - inside[0]


def _compile(pattern: str, ignore_case: bool) -> Any:
    if regex is None:
        raise UserError("regular expressions need the package regex; run: pip install 'topklm[explore]'")
    if not pattern:
        raise UserError("regex is empty: give a pattern such as 'sea|ocean'")
    if len(pattern) > MAX_PATTERN:
        raise UserError(f"regex has {len(pattern):,} characters: at most {MAX_PATTERN:,}; shorten it")
    name = _name(pattern)
    # The library would take minutes and all memory, and does not listen to a timeout yet.
    if _written_out(pattern) > _MAX_WRITTEN_OUT:
        raise UserError(f"{name}: repeats too much, as {{1000}} within {{1000}} does; lower the counts")
    if _CALLS.search(pattern):
        raise UserError(f"{name}: calls itself or a group of it, which is not supported; write it out")
    try:
        compiled = regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)
    except RecursionError as e:
        raise UserError(f"{name}: nested too deeply; use fewer groups") from e
    except Exception as e:  # the library raises its own error, and others for patterns that it stumbles over
        raise UserError(f"{name}: is no regular expression ({visible(str(e))}); mend it") from e
    if compiled.flags & regex.REVERSE:
        raise UserError(f"{name}: (?r) searches backwards, which is not supported; leave it out")
    with _limits(pattern, timeout := 1.0):
        if compiled.search("", timeout=timeout):
            raise _EmptyMatchError
    return compiled


class _Patience:
    """How long a search may go on by the clock; the library knows processor time of the whole process only.

    Of that, a search may get much less than goes by on the clock, or be charged for that of other threads. So
    it is tried for a short time, and for longer ones from where it came to, each in proportion to what the
    clock showed before.
    """

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds
        self._try, self._rate = _FIRST_TRY_S, 1.0  # processor seconds; those per second of the clock

    def spans(self, compiled: Any, text: str, first: int, stop: int) -> list[tuple[int, int]]:
        """Returns the matches that start from `first` on and before `stop`, as begin and end.

        TimeoutError when the time is over. _EmptyMatchError for a match of no characters.
        """
        spans: list[tuple[int, int]] = []
        while True:
            began, used = time.monotonic(), time.process_time()
            if began >= self._end:
                raise TimeoutError
            seconds = max(min(self._try, (self._end - began) * self._rate), _SHORTEST_TRY_S)
            try:
                for match in compiled.finditer(text, first, timeout=seconds, concurrent=True):
                    span = match.span()
                    if span[0] >= stop:
                        break
                    if span[0] == span[1]:
                        raise _EmptyMatchError
                    spans.append(span)
                return spans
            except TimeoutError:
                first = spans[-1][1] if spans else first
                self._rate = (time.process_time() - used) / max(time.monotonic() - began, 1e-9)
                self._try *= 2


def _spans(compiled: Any, stretch: _Stretch, searched: int, patience: _Patience) -> np.ndarray:
    """Returns int64[m, 2], the bytes with which matches from byte `searched` on begin and end."""
    text, first, stop = stretch.text, 0, len(stretch.text)
    if stretch.inside != (0, stretch.begins[-1]):
        inside = [max(stretch.inside[0], searched), stretch.inside[1]]
        first, stop = np.searchsorted(_bytes_of_characters(text), inside).tolist()
    spans = patience.spans(compiled, text, first, stop)
    return _bytes_of_characters(text)[np.array(spans)] if spans else np.zeros((0, 2), np.int64)


class _EmptyMatchError(Exception):
    """A match of no characters."""


@contextlib.contextmanager
def _limits(pattern: str, timeout_s: float) -> Iterator[None]:
    """Tells the user, if what happens inside says that a pattern is of no use."""
    problems: dict[type[Exception], str] = {
        _EmptyMatchError: "matches the empty text, and so everywhere; have it match at least a character",
        TimeoutError: f"not done within {timeout_s:g} s; make it simpler: repetitions within repetitions, as "
        "in (a+)+, may take for ever",
        MemoryError: "takes too much memory; make it simpler",
    }
    try:
        yield
    except tuple(problems) as e:
        raise UserError(f"{_name(pattern)}: {problems[type(e)]}") from e


def _bytes_of_characters(text: str) -> np.ndarray:
    """Returns int64[n + 1], the byte with which each character begins, and the number of bytes."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    lengths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    lengths[(points >= 0xDC80) & (points <= 0xDCFF)] = 1  # a byte that is of no character
    return np.concatenate([[0], np.cumsum(lengths)])


def _written_out(pattern: str) -> int:
    """Bounds the characters of a pattern with every repetition written out: all count as nested.

    Also those in comments and sets; and once more without what `(?x)` skips, if that is more.
    """
    forms = pattern, re.sub(r"\s|#.*", "", pattern)
    counts = [[max(int(n), 1) for n in re.findall(r"\{\s*(\d+)", form)] for form in forms]
    return len(pattern) * max(math.prod(some) for some in counts)


def _name(pattern: str) -> str:
    shown = pattern if len(pattern) <= _SHOWN else pattern[:_SHOWN] + "..."
    return f"regex = {visible(shown)}"


@dataclasses.dataclass(frozen=True)
class RankedNeuron:
    """How well a neuron tells matched tokens from others."""

    layer: int  # of the neuron
    neuron: int  # its number in the layer
    n_active: int  # tokens at which it is active
    threshold: float  # the |activation| from which on it counts as firing
    n_firing: int  # tokens at which it does
    n_hits: int  # matched tokens among those
    precision: float  # n_hits / n_firing
    recall: float  # n_hits as a share of all matched tokens
    f1: float  # harmonic mean of precision and recall
    weighted_precision: float  # without a threshold: the share of matched tokens in the sum of |activation|


def rank(
    store: Store,
    matched: np.ndarray,
    limit: int = 20,
    layers: Sequence[int] | None = None,
    among: np.ndarray | None = None,
) -> list[RankedNeuron]:
    """Returns the neurons that best tell matched tokens, bool[N] of a store's, from others.

    Sorted by falling F1, then by falling weighted precision, then by layer and number. Neurons that are
    active at no matched token are left out. `among`, bool[N], says which tokens there are, as if the store
    held no others; None: all. UserError if the store does not have a layer; None: all that it has. ValueError
    if `matched` has another shape.
    """
    if matched.shape != (store.n_tokens,):
        raise ValueError(f"matched has shape {matched.shape}: must be [{store.n_tokens}], the store's tokens")
    if among is not None:
        matched = matched & among
    there, found = store.metadata.layers, list[RankedNeuron]()
    for layer in there if layers is None else layers:
        if layer not in there:
            raise UserError(
                f"layer = {layer}: must be one of {', '.join(map(str, there))}, which {store.folder} has"
            )
        for begin, end in store.blocks(layer, BLOCK_EVENTS, BLOCK_NEURONS):
            block = store.block(layer, begin, end)
            found += _rank_block(block if among is None else block.at(among), matched, layer, begin)
        found.sort(key=lambda ranked: (-ranked.f1, -ranked.weighted_precision, ranked.layer, ranked.neuron))
        del found[limit:]
    return found


def _rank_block(block: NeuronBlock, matched: np.ndarray, layer: int, begin: int) -> list[RankedNeuron]:
    n, n_matched = len(block.offsets) - 1, int(matched.sum())
    neuron, n_active = np.repeat(np.arange(n), np.diff(block.offsets)), np.diff(block.offsets)
    hit, size = matched[block.tokens], np.abs(block.values)
    mass, mass_hit = np.bincount(neuron, size, n), np.bincount(neuron[hit], size[hit], n)
    # As the store holds bfloat16, whose upper bits order magnitudes, tokens are counted and not sorted.
    cell = neuron * _SIZES + (size.view(np.uint32) >> 16)
    firing, hits = (
        np.bincount(cells, minlength=n * _SIZES).reshape(n, _SIZES)[:, ::-1].cumsum(axis=1)
        for cells in (cell, cell[hit])
    )
    best = np.argmax(hits / np.maximum(firing + n_matched, 1), axis=1)  # of equally good ones, the highest
    rows = np.arange(n)
    threshold = ((_SIZES - 1 - best).astype(np.uint32) << 16).view(np.float32)
    n_firing, n_hits = firing[rows, best], hits[rows, best]
    return [
        RankedNeuron(
            layer=layer,
            neuron=begin + int(j),
            n_active=int(n_active[j]),
            threshold=float(threshold[j]),
            n_firing=int(n_firing[j]),
            n_hits=int(n_hits[j]),
            precision=float(n_hits[j] / n_firing[j]),
            recall=float(n_hits[j] / n_matched),
            # The harmonic mean from whole numbers: neurons that are equally good get the same bits.
            f1=float(2 * n_hits[j] / (n_firing[j] + n_matched)),
            weighted_precision=float(mass_hit[j] / mass[j]),
        )
        for j in np.flatnonzero(mass_hit)
    ]


def count_active(store: Store, matched: np.ndarray) -> np.ndarray:
    """Returns at how many of the marked tokens, bool[N], each neuron is active, int64[S, D]."""
    layers, d = store.metadata.layers, store.metadata.d_model
    found = np.zeros((len(layers), d), np.int64)
    for place, layer in enumerate(layers):
        for begin, end in store.blocks(layer, BLOCK_EVENTS, d):
            block = store.block(layer, begin, end)
            sums = np.concatenate([[0], np.cumsum(matched[block.tokens])])
            found[place, begin:end] = np.diff(sums[block.offsets])
    return found


def neurons_of_text(
    found: ActiveNeurons, layers: Sequence[int] | None = None
) -> list[dict[int, list[Activation]]]:
    """Returns each token's active neurons by layer, strongest first; UserError for a layer without TopK."""
    there = range(len(found.values))
    if not there:
        raise UserError("no layer of this model has TopK: its neurons are found in a store, by --regex")
    shown = there if layers is None else layers
    for layer in set(shown) - set(there):
        raise UserError(f"layer = {layer}: must be a TopK layer, from 0 to {there[-1]}")
    return [{number: found.of_layer(at, number) for number in shown} for at in range(len(found))]


@dataclasses.dataclass(frozen=True)
class Selected:
    """A neuron, and in words why it was chosen."""

    layer: int
    neuron: int
    reason: str


def by_matches(
    store: Store,
    matched: np.ndarray,
    layers: Sequence[int] | None = None,
    min_precision: float = 0.0,
    min_recall: float = 0.0,
) -> list[Selected]:
    """Selects neurons that tell matched tokens from others, best first; arguments and errors as of `rank`."""
    everything = len(store.metadata.layers) * store.metadata.d_model
    return [
        Selected(r.layer, r.neuron, f"F1 {r.f1:.3f}, precision {r.precision:.3f}, recall {r.recall:.3f}")
        for r in rank(store, matched, everything, layers)
        if r.precision >= min_precision and r.recall >= min_recall
    ]


def by_label(labels: Mapping[tuple[int, int], str], text: str) -> list[Selected]:
    """Selects the neurons whose label holds a text, whatever the case, by layer and number."""
    return [
        Selected(layer, neuron, f"label {label!r}")
        for (layer, neuron), label in sorted(labels.items())
        if text.casefold() in label.casefold()
    ]


def read_contrast(path: Path, max_q: float = 1.0) -> tuple[int, list[Selected]]:
    """Selects neurons of `topklm neurons contrast --json` that are more frequent in the positive text.

    Returns the checkpoint's step, and the neurons of all layers in the order of the contrast. UserError for
    any other file, and one that was changed.
    """
    again = "run topklm neurons contrast --json, and give its output"
    try:
        content = read_json(path, again)
    except FileNotFoundError as e:
        raise UserError(f"{path}: there is no such file; run topklm neurons contrast --json") from e
    if DIGEST in content:  # earlier versions did not write one
        try:
            unsealed(content)
        except ValueError as e:
            raise UserError(
                f"{path} is not as it was written ({e}): {again}; if you have edited it, remove {DIGEST!r}"
            ) from e
    step, by, neurons = content.get("step"), content.get("by"), content.get("neurons")
    if (
        type(step) is not int
        or by not in ORDERS
        or not isinstance(neurons, list)
        or not all(map(_is_neuron, neurons))
    ):
        raise UserError(f"{path} is not what topklm neurons contrast --json prints: {again}")
    more = [n for n in neurons if n["difference"] > 0 and n["q_value"] <= max_q]
    more.sort(key=lambda n: (-n[by], n["layer"], n["neuron"]))
    reason = "difference {difference:+.2%}, score {score:+.1f}, q {q_value:.2g}"
    return step, [Selected(n["layer"], n["neuron"], reason.format_map(n)) for n in more]


def _is_neuron(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and all(type(entry.get(name)) is int for name in ("layer", "neuron"))
        and all(isinstance(entry.get(name), int | float) for name in _NUMBERS)
    )
