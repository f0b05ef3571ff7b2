"""How often and how strongly neurons are active, and what the other figures of a block of neurons share.

A neuron is *active* at a token where its value is not 0, and its *strength* there is the magnitude of the
value. With topk_activation "relu", and for the positive part of dense neurons, the two are the same; with
"identity" and "abs" values may be negative, and then every figure that weighs or ranks tokens goes by
strength. All tokens of the store count: it holds text only, no separators and no padding.

*Examples* are tokens at which to look at a neuron: the strongest, and some from every part of its range.
Of each neuron, by strength:

- the 20 strongest tokens, each in another document; equal ones in the order of the text;
- 5 tokens from each of 5 parts of equal width of (0, largest strength], drawn with a fixed seed among those
  in documents that hold no example of this neuron yet, the parts one after another from the weakest.

Where there are not enough such documents, books for instance, the rest of the 20 (or 5) are taken from
documents that do hold examples, at least 128 tokens away from each of them, so that windows of 128 tokens
around them need not overlap. There are fewer where there are no such places either. The choice is ours.

*Co-activation* of two neurons is the cosine of their activations over tokens, values with their signs:

    sum of a[n, i] a[n, j] / sqrt(sum of a[n, i]^2 * sum of a[n, j]^2)

over at most 262,144 tokens: all of a store that has no more, else 64 stretches of 4,096 tokens, spread over
it evenly. Nothing is centred. The definition is ours.

Dims: n neurons of a block, E events, D neurons of a layer.
"""

from collections.abc import Iterator, Mapping, Sequence
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topklm.errors import UserError
from topklm.neurons.store import NeuronBlock, Store

HISTOGRAM_BINS = 40
STRONGEST = 20
FROM_EACH_PART = 5
RANGE_PARTS = 5  # into which the range of a neuron's activations is cut
APART = 128  # tokens
SAMPLE_TOKENS = 2**18
NEAREST = 10

_STRETCH = 4096


def columns(block: NeuronBlock, n_tokens: int) -> Mapping[str, Any]:
    """Returns the columns that are about activity; for each one value for each neuron, NaN or None for none.

    `density` is the share of all tokens at which a neuron is active: n_active / N. Of a layer, densities add
    up to the mean number of active neurons per token, which is k where none of the k kept values is 0.
    `mean_activation` and `max_activation` are of strengths, over the active tokens. A dead neuron, one that
    is active nowhere in the store, has density 0 and no mean, maximum or histogram. UserError if an
    activation is NaN or infinite.
    """
    found, counts = figures(block, n_tokens), n_active(block)
    rows = [row.tolist() if count else None for row, count in zip(histogram(block), counts, strict=True)]
    return {**found, "histogram": rows}


def figures(block: NeuronBlock, n_tokens: int) -> Mapping[str, np.ndarray]:
    """Returns those of `columns` that are single numbers, and raises as it does."""
    counts, strengths = n_active(block), np.abs(block.values)
    maxima = reduced(np.maximum, strengths, block.offsets)
    if not np.all(np.isfinite(maxima)):
        raise UserError(
            "the store holds activations that are NaN or infinite: training diverged before this checkpoint; "
            "harvest an earlier step"
        )
    with np.errstate(invalid="ignore"):  # 0 / 0 of dead neurons
        means = reduced(np.add, strengths, block.offsets) / counts
    return {
        "n_active": counts,
        "density": counts / n_tokens,
        "mean_activation": means,
        "max_activation": np.where(counts > 0, maxima, np.nan),
    }


def n_active(block: NeuronBlock) -> np.ndarray:
    """Returns int64[n], at how many tokens each neuron is active."""
    return np.diff(block.offsets)


def owners(block: NeuronBlock) -> np.ndarray:
    """Returns int64[E], which neuron of the block each event is of."""
    return np.repeat(np.arange(len(block.offsets) - 1), n_active(block))


def histogram(block: NeuronBlock, n_bins: int = HISTOGRAM_BINS) -> np.ndarray:
    """Counts tokens by strength in equal parts, upper ends included, of (0, largest]: int64[n, n_bins]."""
    strengths = np.abs(block.values)
    bins = parts(strengths, np.repeat(reduced(np.maximum, strengths, block.offsets), n_active(block)), n_bins)
    n = len(block.offsets) - 1
    return np.bincount(owners(block) * n_bins + bins, minlength=n * n_bins).reshape(n, n_bins)


def parts(strengths: np.ndarray, maximum: np.ndarray | float, n_parts: int) -> np.ndarray:
    """Returns int64[E], in which of `n_parts` parts of equal width of (0, maximum] strengths lie, from 0.

    Part p is (p / n_parts, (p + 1) / n_parts] of the maximum, which is one, or float32[E].
    """
    # In float64 the product is exact, so that what lies on an edge falls on the right side of it.
    shares = strengths.astype(np.float64) * n_parts / maximum
    return np.minimum(np.ceil(shares).astype(np.int64) - 1, n_parts - 1)


def reduced(function: np.ufunc, x: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Returns float64[n], the sum (`np.add`) or the like of x[offsets[j] : offsets[j + 1]], 0 of nothing."""
    result = np.zeros(len(offsets) - 1)
    there = np.diff(offsets) > 0  # of an empty range, reduceat would take the element after it
    if there.any():
        result[there] = function.reduceat(x.astype(np.float64), offsets[:-1][there])
    return result


def example_columns(
    block: NeuronBlock, bounds: np.ndarray, layer: int, begin: int, seed: int = 0
) -> Mapping[str, Any]:
    """Returns the columns that are about examples; a dead neuron has none.

    The strongest come first, then the parts, rising; falling strength in each. The layer and the number of a
    neuron (`begin` is that of the block's first) decide what is drawn, so that the examples do not depend on
    how neurons are cut into blocks. Documents begin at bounds, int64[documents + 1].
    """
    rows: list[tuple[list | None, ...]] = []
    for number, (a, b) in enumerate(itertools.pairwise(block.offsets)):
        if a == b:
            rows.append((None, None, None))
            continue
        rng = np.random.default_rng([seed, layer, begin + number])
        events, part = choose_examples(block.tokens[a:b], block.values[a:b], bounds, rng)
        chosen = a + events
        rows.append((block.tokens[chosen].tolist(), block.values[chosen].tolist(), part.tolist()))
    names = ("examples", "example_activations", "example_parts")
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def choose_examples(
    tokens: np.ndarray, values: np.ndarray, bounds: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the examples of one neuron, which is active at tokens int64[E], rising, E at least 1.

    Returns which of the E events, int64[m]; and int8[m], 0 for the strongest, then 1 to RANGE_PARTS.
    """
    strengths = np.abs(values)
    chooser = _Chooser(tokens, bounds)
    chosen = [chooser.strongest(strengths, STRONGEST)]
    part_of = parts(strengths, float(strengths.max()), RANGE_PARTS)
    for part in range(RANGE_PARTS):
        chosen.append(chooser.drawn(np.flatnonzero(part_of == part), FROM_EACH_PART, rng))
    in_order = [np.array(sorted(events, key=lambda e: (-strengths[e], e)), np.int64) for events in chosen]
    return np.concatenate(in_order), np.repeat(
        np.arange(1 + RANGE_PARTS, dtype=np.int8), list(map(len, chosen))
    )


def strongest_columns(block: NeuronBlock, bounds: np.ndarray, count: int) -> Mapping[str, Any]:
    """Returns `examples` and `example_activations` of the strongest tokens alone, `count` at most.

    Chosen and ordered as the strongest of `example_columns`; None for a dead neuron.
    """
    tokens: list[list[int] | None] = []
    values: list[list[float] | None] = []
    for a, b in itertools.pairwise(block.offsets.tolist()):
        there, strengths = block.tokens[a:b], np.abs(block.values[a:b])
        chosen = _Chooser(there, bounds).strongest(strengths, count) if a < b else []
        chosen = sorted(chosen, key=lambda event: (-strengths[event], event))
        tokens.append(there[chosen].tolist() if chosen else None)
        values.append(block.values[a:b][chosen].tolist() if chosen else None)
    return {"examples": tokens, "example_activations": values}


class _Chooser:
    """Keeps track of which events of a neuron may still become examples."""

    def __init__(self, tokens: np.ndarray, bounds: np.ndarray):
        self._tokens, self._bounds = tokens, bounds
        # First those in documents that hold none; then, those far enough from every example.
        self._free = np.ones(len(tokens), bool), np.ones(len(tokens), bool)

    def strongest(self, strengths: np.ndarray, count: int) -> list[int]:
        """Returns the strongest events, one after another."""
        taken: list[int] = []
        for kind, free in enumerate(self._free):
            left = np.where(free, strengths, 0)
            while len(taken) < count and left[event := int(np.argmax(left))] > 0:
                taken.append(event)
                left[self._take(event)[kind]] = 0
        return taken

    def drawn(self, events: np.ndarray, count: int, rng: np.random.Generator) -> list[int]:
        """Returns some of these events (rising), each as likely as the others that may be taken."""
        taken: list[int] = []
        for kind, free in enumerate(self._free):
            if len(taken) == count:
                break
            left = events[free[events]]
            while len(taken) < count and len(left):
                event = int(left[rng.integers(len(left))])
                taken.append(event)
                gone = self._take(event)[kind]
                first, stop = np.searchsorted(left, (gone.start, gone.stop))
                left = np.concatenate([left[:first], left[stop:]])
        return taken

    def _take(self, event: int) -> tuple[slice, slice]:
        """Marks an event as an example; returns which events that rules out, for each kind of free."""
        token = self._tokens[event]
        document = np.searchsorted(self._bounds, token, side="right")
        first, stop = self._bounds[document - 1], self._bounds[document]
        near = max(first, token - APART + 1), min(stop, token + APART)
        edges = np.searchsorted(self._tokens, (first, stop, *near)).tolist()
        gone = slice(*edges[:2]), slice(*edges[2:])
        for free, out in zip(self._free, gone, strict=True):
            free[out] = False
        return gone


def coactive_columns(similarities: np.ndarray, begin: int, end: int) -> Mapping[str, Any]:
    """Returns the columns about co-activation, for the neurons from `begin` to `end` - 1.

    The `NEAREST` others, by falling cosine, on a tie by rising index; only those with a cosine above 0. A
    neuron that is active nowhere in the sample has no neighbours, and is nobody's.
    """
    neurons: list[list[int] | None] = []
    cosines: list[list[float] | None] = []
    for neuron in range(begin, end):
        row = similarities[neuron]
        others = np.flatnonzero(row > 0)
        others = others[others != neuron]
        nearest = others[np.argsort(-row[others], kind="stable")][:NEAREST]
        is_dead = row[neuron] == 0
        neurons.append(None if is_dead else nearest.tolist())
        cosines.append(None if is_dead else row[nearest].tolist())
    return {"coactive": neurons, "coactive_similarity": cosines}


def sample(n_tokens: int) -> Sequence[tuple[int, int]]:
    """Returns which stretches of a store of so many tokens are compared: (first, one after the last)."""
    if n_tokens <= SAMPLE_TOKENS:
        return [(begin, min(begin + _STRETCH, n_tokens)) for begin in range(0, n_tokens, _STRETCH)]
    begins = np.linspace(0, n_tokens - _STRETCH, SAMPLE_TOKENS // _STRETCH).astype(np.int64)
    return [(begin, begin + _STRETCH) for begin in begins.tolist()]


def coactivation(store: Store, layer: int) -> np.ndarray:
    """Returns float32[D, D], the cosine of every two neurons of a layer; rows and columns of dead ones are 0.

    Runs on the accelerator where there is one; takes three times D^2 * 4 bytes.
    """
    d_model = store.metadata.d_model
    gram = jnp.zeros((d_model, d_model), jnp.float32)
    for piece in _pieces(store, layer):
        gram = _add(gram, piece)
    products = np.array(gram)
    lengths = np.sqrt(np.diagonal(products))
    scale = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    return products * scale * scale[:, None]


@functools.partial(jax.jit, donate_argnums=0)
def _add(gram: jax.Array, piece: np.ndarray) -> jax.Array:
    return gram + jnp.matmul(piece, piece.T, precision=jax.lax.Precision.HIGHEST)


def _pieces(store: Store, layer: int) -> Iterator[np.ndarray]:
    """Yields the sample as float32[D, 4096], zeros after a shorter piece: one shape, one program."""
    import scipy.sparse  # noqa: PLC0415  (of the extra, and half a second)

    d_model = store.metadata.d_model
    first = store.metadata.layers.index(layer) * d_model
    stretches = sample(store.n_tokens)
    start = 0
    for reader in store.segments:
        n_tokens = reader.n_tokens
        inside = [(max(a - start, 0), min(b - start, n_tokens)) for a, b in stretches]
        inside = [(a, b) for a, b in inside if a < b]
        start += n_tokens
        if not inside:
            continue
        gaps, values = map(reader.result, reader.start_reading(first, first + d_model))
        offsets = reader.offsets[first : first + d_model + 1] - reader.offsets[first]
        places = reader.token_index(gaps, offsets).astype(np.int32)
        events = scipy.sparse.csr_array((values.astype(np.float32), places, offsets), (d_model, n_tokens))
        for a, b in inside:
            piece = np.zeros((d_model, _STRETCH), np.float32)
            piece[:, : b - a] = events[:, a:b].toarray()
            yield piece
