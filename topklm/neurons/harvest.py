"""Runs a model over text, and stores or counts what its neurons do.

Every token of every document is read once, in a window that begins with the separator or with tokens before
it. Separators and padding do not count. Dims: S layers, B batch, T tokens, D neurons per layer, k kept,
G units of text.

`Flows` are how much of a layer's neurons came in by the residual stream, and how much the layer itself wrote.
Of a layer with input h, which writes w = u - h (attention and MLP, see `topklm.model.block`) and keeps o: for
each neuron j, over the N tokens that are read,

    carried(j)      sum of max(s h, 0) / sum of |o|, over tokens where o is not 0; s is the sign of o there
    kept_before(j)  the share of these tokens at which s h is above 0
    r_input(j)      Pearson correlation of o and h
    r_written(j)    Pearson correlation of o and w
    r_written_other the same of o and w of the next neuron, j + 1: what chance and a common mean give

Sums of a row are taken in float32 where the layer is computed, and added up over rows in float64.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.errors import UserError
from topklm.model import transformer
from topklm.model.losses import token_losses
from topklm.model.topk import topk
from topklm.neurons import segment as segment_lib
from topklm.neurons.capture import SparseActivations
from topklm.neurons.dictionary import Dictionary, Encoder, encode
from topklm.neurons.documents import Packed, TextModel, TokenWindow, batches
from topklm.neurons.segment import Segment


def flow_sums(
    h_BTD: jax.Array, u_BTD: jax.Array, kept_BTD: jax.Array, read_BT: jax.Array
) -> dict[str, jax.Array]:
    """Sums over the inputs of each row that are read, bool[B, T]: float32[B, D] each, by name."""
    m = read_BT[:, :, None]
    h, u, o = (jnp.where(m, x.astype(jnp.float32), 0) for x in (h_BTD, u_BTD, kept_BTD))
    w, along = u - h, h * jnp.sign(o)
    terms = {
        "o": o,
        "oo": o * o,
        "h": h,
        "hh": h * h,
        "ho": h * o,
        "w": w,
        "ww": w * w,
        "wo": w * o,
        "hw": h * w,
        "other": jnp.roll(w, -1, axis=2) * o,
        "kept": jnp.abs(o),
        "carried": jnp.maximum(along, 0),
        "active": (o != 0).astype(jnp.float32),
        "before": (along > 0).astype(jnp.float32),
    }
    return {name: jnp.sum(x, axis=1) for name, x in terms.items()}


@dataclasses.dataclass(eq=False)
class Flows:
    """The sums of some text, filled batch by batch."""

    n_tokens: int = 0
    sums: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # float64[S, D] each

    def add(self, of_batch: Mapping[str, jax.Array], n_tokens: int) -> None:
        """Adds the sums of a batch's rows, float32[S, B, D] each, over so many tokens."""
        self.n_tokens += n_tokens
        for name, x in of_batch.items():
            self.sums[name] = self.sums.get(name, 0) + np.asarray(x).astype(np.float64).sum(axis=1)

    def columns(self) -> dict[str, np.ndarray]:
        """Returns the figures, float64[S, D] each; NaN where a neuron is never active, or does not vary.

        `r_written_input`, the correlation of h and w, is for a layer that reads another's neurons.
        """
        s = self.sums
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = {"carried": s["carried"] / s["kept"], "kept_before": s["before"] / s["active"]}
        next_w, next_ww = (np.roll(s[name], -1, axis=1) for name in ("w", "ww"))
        n = self.n_tokens
        return shares | {
            "r_input": pearson(n, s["h"], s["hh"], s["o"], s["oo"], s["ho"]),
            "r_written": pearson(n, s["w"], s["ww"], s["o"], s["oo"], s["wo"]),
            "r_written_other": pearson(n, next_w, next_ww, s["o"], s["oo"], s["other"]),
            "r_written_input": pearson(n, s["w"], s["ww"], s["h"], s["hh"], s["hw"]),
        }


def pearson(
    n: int, x: np.ndarray, xx: np.ndarray, y: np.ndarray, yy: np.ndarray, xy: np.ndarray
) -> np.ndarray:
    """Returns correlations from sums over n tokens of x, x^2, y, y^2 and xy; NaN where one does not vary."""
    varies = [squares - total * total / n for total, squares in ((x, xx), (y, yy))]
    # Of a constant, rounding leaves something that is no variance.
    is_constant = (varies[0] <= 1e-12 * xx) | (varies[1] <= 1e-12 * yy)
    with np.errstate(divide="ignore", invalid="ignore"):
        r = (xy - x * y / n) / np.sqrt(varies[0] * varies[1])
    return np.where(is_constant, np.nan, np.clip(r, -1, 1))


TOPK, DENSE = "topk", "dense"

_SEGMENT_TOKENS = 16_384
_SEGMENT_EVENTS = 2**24  # at most, unless four windows have more


@dataclasses.dataclass(frozen=True)
class Share:
    """Which documents are harvested: of each `count` one after another, the one numbered `index`."""

    index: int = 0
    count: int = 1


ALL = Share()


class SegmentWriter(Protocol):
    """Takes the segments of a harvest in the order of the text: a `StoreWriter`, or sums in memory."""

    n_tokens: int  # that it has got

    def append(self, segment: Segment) -> None:
        """Takes the next one."""


def kind_and_layers(config: ModelConfig) -> tuple[str, tuple[int, ...]]:
    """Returns the kind and the layers that are read: those with TopK or, of a Base LM, all."""
    n_layers = config.n_topk_layers or config.n_layers
    return (TOPK if config.n_topk_layers else DENSE), tuple(range(n_layers))


def segment_tokens(config: ModelConfig, width: int | None = None) -> int:
    """Tokens of a segment: so few that it fits into memory; of a dictionary of that width."""
    kind, layers = kind_and_layers(config)
    events = len(layers) * (config.topk_k if kind == TOPK else (width or config.d_model) // 2)
    return max(4 * config.context_length, min(_SEGMENT_TOKENS, _SEGMENT_EVENTS // events))


def harvest(
    model: TextModel,
    documents: Iterable[np.ndarray],
    writer: SegmentWriter,
    *,
    n_tokens: int | None = None,
    keep: int | None = None,
    dictionary: Dictionary | None = None,
    layers: Sequence[int] | None = None,
    flows: Flows | None = None,
    share: Share = ALL,
    report: Callable[[int, int], None] = lambda tokens, documents: None,
) -> None:
    """Appends to a store what follows the text that it already holds; UserError if that is other text.

    The documents are token ids int[n], as before where the store is not empty; this share's part shall hold
    about `n_tokens` (None: all there are). Of a Base LM `keep` entries of each token, the largest, are stored
    (None: all that are positive), or the K largest codes of a dictionary, whose layers are `layers` (None:
    those of `kind_and_layers`). `flows`, which a dictionary has none of, get their sums. `report` is told of
    the tokens that are done, and the documents that are begun, since the last time.
    """
    program = _Program(model, keep, dictionary, layers, flows)
    windows = _without(model.windows(documents, share.index, share.count), writer.n_tokens)
    with futures.ThreadPoolExecutor(1) as thread:
        writing: futures.Future[None] | None = None
        begun = 0
        for stretch in batches(
            _first(windows, writer.n_tokens, n_tokens),
            segment_tokens(model.config, dictionary.width if dictionary else None),
        ):
            packed = model.pack(stretch)
            segment = program.run(packed)
            if writing is not None:
                writing.result()
            # Sorting and compressing one stretch takes less time than to run the next.
            writing = thread.submit(lambda make: writer.append(make()), segment)
            report(len(packed.tokens), stretch[-1].document + 1 - begun)
            begun = stretch[-1].document + 1
        if writing is not None:
            writing.result()


def _without(windows: Iterator[TokenWindow], stored: int) -> Iterator[TokenWindow]:
    """Yields the windows after the first `stored` tokens; they are cut the same way every time."""
    skipped = 0
    while skipped < stored and (window := next(windows, None)):
        skipped += window.n_new
    if skipped != stored:
        raise UserError(
            f"the store holds {stored:,} tokens, which is no end of a window of this text: the text "
            "has changed; delete the store, and harvest again"
        )
    yield from windows


def _first(windows: Iterator[TokenWindow], before: int, n_tokens: int | None) -> Iterator[TokenWindow]:
    for window in windows:
        if n_tokens is not None and before >= n_tokens:
            return
        yield window
        before += window.n_new


class _Program:
    """The compiled forward pass, and what is taken from it."""

    def __init__(
        self,
        model: TextModel,
        keep: int | None,
        dictionary: Dictionary | None,
        layers: Sequence[int] | None = None,
        flows: Flows | None = None,
    ):
        self._model, config, self._flows = model, model.config, flows
        kind, all_layers = kind_and_layers(config)
        n_layers = len(all_layers if layers is None else layers)
        # On a CPU the host reads the very memory that the layers were written to, and finds what is not 0
        # faster than a TopK over them would; from other devices only k entries are fetched.
        on_host = model.layout.platform == "cpu"
        # Thresholds keep any number of codes.
        has_k = kind == TOPK if dictionary is None else dictionary.threshold is None
        self._sparse = has_k and not on_host
        k = config.topk_k if dictionary is None else dictionary.keep
        self._width = config.d_model if dictionary is None else dictionary.width
        self._shape = n_layers, -1, k if self._sparse else self._width
        kept = (keep or config.d_model) if dictionary is None else dictionary.keep
        chosen = None if layers is None else tuple(layers)
        self._program = functools.partial(_forward, config, self._sparse, kept, layers=chosen)
        self._written_in = None
        if dictionary is not None:
            self._written_in = jax.device_put(dictionary.encoder_arrays, model.layout.replicated)

    def run(self, packed: Packed) -> Callable[[], Segment]:
        """Reads a stretch; the returned function makes its segment."""
        n, d = len(packed.tokens), self._width
        n_layers, _, width = self._shape
        losses = np.full(n, np.nan, np.float32)
        values = np.empty((n_layers, n, width), jnp.bfloat16)
        indices = np.empty(values.shape, np.min_scalar_type(d - 1)) if self._sparse else None
        computed = ((self._start(arrays, read), read, to) for arrays, read, to in packed.batches())
        # Each is taken apart while the next one is computed.
        ahead = next(computed, None)
        while ahead is not None:
            ((nll, (layers, flows)), read, to), ahead = ahead, next(computed, None)
            if self._flows is not None:
                self._flows.add(flows, len(read))
            losses[to] = np.asarray(nll).reshape(-1)[read - 1]
            taken = np.asarray(layers.values if self._sparse else layers).reshape(self._shape)
            for number in range(n_layers):
                values[number, to] = taken[number, read]
            if indices is not None:
                indices[:, to] = np.asarray(layers.indices).reshape(self._shape)[:, read]
        text = packed.tokens, packed.documents, losses
        if indices is None:
            return lambda: segment_lib.from_dense(*text, values)
        return lambda: segment_lib.from_sparse(*text, indices, values, d)

    def _start(self, arrays: tuple[np.ndarray, ...], read: np.ndarray) -> tuple[jax.Array, tuple[Any, Any]]:
        """Begins to compute a batch, of which some inputs, flat int[n], are read."""
        put, params = self._model.put, self._model.params
        if self._flows is None:
            return self._program(params, *put(arrays), self._written_in)
        is_read = np.zeros(arrays[0].shape, bool)
        is_read.reshape(-1)[read] = True
        *inputs, read_BT = put((*arrays, is_read))
        return self._program(params, *inputs, self._written_in, read_BT)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), static_argnames="layers")
def _forward(
    config: ModelConfig,
    sparse: bool,
    keep: int,
    params: transformer.Parameters,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    positions_BT: jax.Array,
    written_in: Encoder | None = None,
    read_BT: jax.Array | None = None,
    layers: tuple[int, ...] | None = None,
) -> tuple[jax.Array, tuple[Any, Any]]:
    """Returns next-token losses float32[B, T], and the layers' outputs in bfloat16, sparse or [S, B, T, D].

    Beside these, where it is given which inputs are read, the sums of `flow_sums` over them. If `written_in`
    holds the encoder of a dictionary, its codes stand for what layers hand on, and there are no sums.
    """

    def stored(kept: jax.Array) -> jax.Array | SparseActivations:
        if not sparse:
            return kept.astype(jnp.bfloat16)
        neurons = SparseActivations.from_dense(kept, keep if written_in else config.topk_k)
        return dataclasses.replace(neurons, values=neurons.values.astype(jnp.bfloat16))

    def capture(h: jax.Array, u: jax.Array, h_next: jax.Array) -> Any:
        if written_in:  # a layer does not know its number: all of them are encoded together, below
            return h_next
        kept = h_next if config.n_topk_layers else topk(h_next, keep)
        return stored(kept), None if read_BT is None else flow_sums(h, u, kept, read_BT)

    model = transformer.bind(config, params)
    h_BTD, seen = model.hidden(tokens_BT, segment_ids_BT, positions_BT, capture=capture)
    at = slice(len(kind_and_layers(config)[1])) if layers is None else np.array(layers)
    seen = jax.tree.map(lambda x: x[at], seen)
    if written_in:
        seen = stored(encode(written_in, seen)), None
    targets = jnp.roll(tokens_BT, -1, axis=1)
    nll_BT = token_losses(h_BTD, model.unembedding(), targets, config.vocab_size)
    return nll_BT, seen


@dataclasses.dataclass(frozen=True, eq=False)
class UnitCounts:
    """At how many tokens of each unit of a text, a document or a piece of one, neurons are active."""

    layers: tuple[int, ...]  # the model's layers that were read, S of them
    active: np.ndarray  # int32[G, S, D], tokens of a unit at which a neuron is active
    n_tokens: np.ndarray  # int64[G], tokens of a unit
    activation: np.ndarray  # float64[S, D], mean over all tokens


def count(
    model: TextModel,
    documents: Sequence[np.ndarray],
    *,
    keep: int | None = None,
    piece: int | None = None,
    report: Callable[[int], None] = lambda tokens: None,
) -> UnitCounts:
    """Reads documents as `harvest` does, none of them empty, and stores nothing.

    Of a Base LM, a neuron is active where it is among the K largest of its layer; None: above 0. A unit is a
    document, or a piece of so many tokens, of which the last of a document may have fewer. `report` is told
    of the tokens that are done since the last time.
    """
    sizes, layers = unit_sizes([len(ids) for ids in documents], piece), kind_and_layers(model.config)[1]
    counter = _Counter(sizes, len(layers), model.config.d_model, report)
    harvest(model, documents, counter, keep=keep)
    return UnitCounts(layers, counter.active, sizes, counter.activation / sizes.sum())


def unit_sizes(lengths: Sequence[int], piece: int | None) -> np.ndarray:
    """Returns int64[G], the tokens of each unit of documents of these lengths; see `count`."""
    if piece is None:
        return np.asarray(lengths, np.int64)
    return np.array([min(piece, n - begin) for n in lengths for begin in range(0, n, piece)], np.int64)


class _Counter:
    """Adds up segments, which come in the order of the text, where a store would be written."""

    def __init__(self, sizes: np.ndarray, n_layers: int, d_model: int, report: Callable[[int], None]):
        self.n_tokens, self._report = 0, report
        self.active = np.zeros((len(sizes), n_layers, d_model), np.int32)
        self.activation = np.zeros((n_layers, d_model))  # sums
        self._unit_of_token = np.repeat(np.arange(len(sizes)), sizes)

    def append(self, segment: Segment) -> None:
        n = len(segment.tokens)
        units = self._unit_of_token[self.n_tokens : self.n_tokens + n]
        first, n_units = int(units[0]), int(units[-1] - units[0]) + 1
        n_neurons = len(segment.offsets) - 1
        neurons = np.repeat(np.arange(n_neurons), np.diff(segment.offsets))
        cells = (units[segment.token_index] - first) * n_neurons + neurons
        counts = np.bincount(cells, minlength=n_units * n_neurons).astype(np.int32)
        self.active[first : first + n_units] += counts.reshape(n_units, *self.active.shape[1:])
        sums = np.bincount(neurons, segment.values.astype(np.float64), n_neurons)
        self.activation += sums.reshape(self.activation.shape)
        self.n_tokens += n
        self._report(n)
