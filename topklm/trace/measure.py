"""The rows of one step: each neuron beside the reference, the step before, and other layers.

Figures that `neurons measure` has are computed by its own functions (`topklm.neurons.statistics`), and all
are sums over events in float64, so they depend neither on batches nor on segments. Clusters of semantic
entropy are the reference's at every step. Dims: S layers, n neurons of a layer, N tokens, V of the
vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import itertools
from typing import Any

import numpy as np
import pyarrow as pa

from topklm.neurons.flows import Flows
from topklm.neurons.statistics import activity, entropy, variance
from topklm.neurons.store import NeuronBlock
from topklm.trace import compare, tables
from topklm.trace.compare import Sums

EXAMPLES = 5  # of a neuron at a step
EMBEDDING = -1  # stands for the layer before the first

_CELLS = 2**22  # neurons x vocabulary that are held at once
_ALL_PAIRS = 4  # layers, of more of which only neighbours are compared, and the first with the last
_SHIFT = 1 / 3  # of the text


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """The tokens that every checkpoint reads."""

    tokens: np.ndarray  # uint[N]
    bounds: np.ndarray  # int64[documents + 1], where documents begin
    vocab_size: int
    n_bytes: int  # of text, as UTF-8

    @property
    def n_tokens(self) -> int:
        """N."""
        return len(self.tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """Everything that was read of one checkpoint."""

    step: int
    parameters: str  # fingerprint
    loss: float  # mean over the tokens, nats
    blocks: Sequence[NeuronBlock]  # of each layer, S
    # float32[n, V] of each layer, the effect of each neuron on the output tokens, less its mean
    lenses: Sequence[np.ndarray]
    flows: Flows | None  # None where neurons are not coordinates


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """A reading, and what comparisons with it need of each layer."""

    reading: Reading
    sums: Sequence[Sums]
    top_tokens: Sequence[list[list[int] | None]]


def side(reading: Reading, text: Text) -> Side:
    """Makes what comparisons with a reading need."""
    tops = []
    for block in reading.blocks:
        of_layer: list[list[int] | None] = []
        for part, _ in parts(block, text.vocab_size):
            strengths = entropy.by_group(part, text.tokens, text.vocab_size)
            of_layer += [ids.tolist() or None for ids, _ in entropy.top_tokens(strengths)]
        tops.append(of_layer)
    return Side(reading, [compare.sums(block) for block in reading.blocks], tops)


def parts(block: NeuronBlock, vocab_size: int) -> Iterator[tuple[NeuronBlock, slice]]:
    """Yields the events of neighbouring neurons, and which these are, few enough to be held by token."""
    width = max(1, _CELLS // vocab_size)
    n = len(block.offsets) - 1
    for begin in range(0, n, width):
        end = min(begin + width, n)
        yield block.part(begin, end), slice(begin, end)


def neuron_rows(
    now: Side, reference: Side, previous: Side | None, text: Text, clusters: np.ndarray, layers: Sequence[int]
) -> pa.Table:
    """Returns the rows of `tables.NEURONS` of a step; clusters are int[V], of each token."""
    before = variance.previous(text.tokens, text.bounds)
    found = []
    for number, layer in enumerate(layers):
        block = now.reading.blocks[number]
        n = len(block.offsets) - 1
        columns: dict[str, Any] = {"step": [now.reading.step] * n, "layer": [layer] * n, "neuron": range(n)}
        columns |= _own(block, text, before, clusters)
        columns |= _beside_reference(number, now, reference, text.n_tokens)
        columns |= _beside_previous(number, now, previous, text.n_tokens)
        found.append(tables.table(tables.NEURONS, columns))
    return pa.concat_tables(found)


def _own(block: NeuronBlock, text: Text, before: np.ndarray, clusters: np.ndarray) -> Mapping[str, Any]:
    columns: list[dict[str, Any]] = []
    for part, _ in parts(block, text.vocab_size):
        columns.append(
            {
                **activity.figures(part, text.n_tokens),
                **entropy.columns(part, text.tokens, clusters),
                **variance.columns(part, text.tokens, before, text.vocab_size),
                **activity.strongest_columns(part, text.bounds, EXAMPLES),
            }
        )
    return {
        name: np.concatenate([part[name] for part in columns])
        if isinstance(values, np.ndarray)
        else list(itertools.chain.from_iterable(part[name] for part in columns))
        for name, values in columns[0].items()
    }


def _beside_reference(number: int, now: Side, reference: Side, n_tokens: int) -> Mapping[str, Any]:
    x, y = now.reading.blocks[number], reference.reading.blocks[number]
    products, both = compare.joint(x, y, n_tokens)
    shifted, _ = compare.joint(x, y, n_tokens, shift=round(n_tokens * _SHIFT))
    of_x, of_y = now.sums[number], reference.sums[number]
    r = compare.correlation(n_tokens, of_x, of_y, products)
    pairs = compare.correlations(x, y, n_tokens)
    np.fill_diagonal(pairs, r)  # exact, and so the same as `r_reference`
    return {
        "r_reference": r,
        "r_shifted": compare.correlation(n_tokens, of_x, of_y, shifted),
        "jaccard_reference": compare.jaccard(both, x, y),
        **compare.partners(pairs)._asdict(),
        "lens_reference": _cosines(now.reading.lenses[number], reference.reading.lenses[number]),
        "top_reference": compare.overlap(now.top_tokens[number], reference.top_tokens[number]),
    }


def _beside_previous(number: int, now: Side, previous: Side | None, n_tokens: int) -> Mapping[str, Any]:
    x = now.reading.blocks[number]
    if previous is None:
        return dict.fromkeys(("r_previous", "top_previous"), np.full(len(x.offsets) - 1, np.nan))
    products, _ = compare.joint(x, previous.reading.blocks[number], n_tokens)
    return {
        "r_previous": compare.correlation(n_tokens, now.sums[number], previous.sums[number], products),
        "top_previous": compare.overlap(now.top_tokens[number], previous.top_tokens[number]),
    }


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the cosine of each row of [n, V] with the same one of another, float64[n]."""
    found = np.full(len(a), np.nan)
    for row, pair in enumerate(zip(a, b, strict=True)):
        x, y = (effects.astype(np.float64) for effects in pair)
        if length := np.sqrt((x @ x) * (y @ y)):
            found[row] = x @ y / length
    return found


def layer_pairs(n_layers: int) -> list[tuple[int, int]]:
    """Returns which layers are compared, by their numbers in the order in which they are read."""
    if n_layers <= _ALL_PAIRS:
        return list(itertools.combinations(range(n_layers), 2))
    return [*itertools.pairwise(range(n_layers)), (0, n_layers - 1)]


def layer_rows(now: Side, layers: Sequence[int], n_tokens: int) -> tuple[pa.Table, pa.Table]:
    """Returns the rows of `tables.LAYERS` and of `tables.PAIRS` of a step.

    Figures of flows are those of layer b, where layer a is the one before it, or the embedding.
    """
    step, blocks = now.reading.step, now.reading.blocks
    flows = now.reading.flows.columns() if now.reading.flows else {}
    n = len(blocks[0].offsets) - 1
    nothing = np.full(n, np.nan)
    found, of_pairs = [], []

    def add(a: int, b: int, number: int, columns: Mapping[str, np.ndarray]) -> None:
        key = {"step": [step] * n, "layer_a": [a] * n, "layer_b": [b] * n, "neuron": range(n)}
        flow = {name: x[number] for name, x in flows.items()} if b == a + 1 else {}
        wanted = {field.name: nothing for field in tables.LAYERS if field.name not in key}
        known = {**wanted, **flow, **columns}
        found.append(tables.table(tables.LAYERS, {**key, **{name: known[name] for name in wanted}}))

    if flows and layers[0] == 0:
        add(EMBEDDING, 0, 0, {"r": flows["r_input"][0]})
    for a, b in layer_pairs(len(layers)):
        x, y = blocks[a], blocks[b]
        products, both = compare.joint(x, y, n_tokens)
        next_y = _rolled(y)
        pairs = compare.correlations(x, y, n_tokens)
        r = compare.correlation(n_tokens, now.sums[a], now.sums[b], products)
        np.fill_diagonal(pairs, r)
        is_best = np.where(np.isnan(r), np.nan, compare.best(pairs) == np.arange(n))
        columns = {
            "r": r,
            "jaccard": compare.jaccard(both, x, y),
            "jaccard_other": compare.jaccard(compare.joint(x, next_y, n_tokens)[1], x, next_y),
            "same_is_best": is_best,
        }
        add(layers[a], layers[b], b, columns)
        others = pairs[~np.eye(n, dtype=bool)]
        others = others[~np.isnan(others)]
        levels = np.quantile(others, tables.QUANTILES) if len(others) else [np.nan] * len(tables.QUANTILES)
        of_pairs.append((step, layers[a], layers[b], int((~np.isnan(r)).sum()), *levels))
    names, rows = tables.PAIRS.names, np.array(of_pairs).reshape(-1, len(tables.PAIRS))
    pair_table = tables.table(tables.PAIRS, dict(zip(names, rows.T, strict=True)))
    return pa.concat_tables([tables.LAYERS.empty_table(), *found]), pair_table


def _rolled(block: NeuronBlock) -> NeuronBlock:
    """Returns a layer in which each neuron has the events of the next, and the last those of the first."""
    first = block.offsets[1]
    counts = np.roll(np.diff(block.offsets), -1)
    return NeuronBlock(
        np.concatenate([[0], np.cumsum(counts)]), np.roll(block.tokens, -first), np.roll(block.values, -first)
    )
