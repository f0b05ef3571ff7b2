"""A trace: the rows of each step, every neuron beside the reference, the step before, and other layers.

    r(x, y)        Pearson correlation of two neurons' activations over all N tokens, zeros included
    jaccard(x, y)  tokens at which both are active, over tokens at which one of them is

Both follow from events, so neurons are never made dense, but for the correlations of all pairs of two layers:
these go through pieces of 4,096 tokens in float32, whose products are added up in float64. Figures that
`neurons measure` has are computed by its own functions (`topklm.neurons.statistics`). All are sums over
events in float64, so they depend neither on batches nor on segments. Clusters of semantic entropy are the
reference's at every step. Dims: S layers, n neurons of a layer, N tokens, V of the vocabulary.

The loop (`trace`) reads checkpoints, compares, writes the tables of each step, and goes on after a stop. The
reference is read first, then the steps rise; of activations, those of the reference, of the step before and
of the present one are held, whatever the number of checkpoints. Each of several processes does this for
neighbouring steps, and the first writes the table over all steps.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import itertools
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from topklm import distributed
from topklm.errors import UserError
from topklm.inference.language_model import LanguageModel
from topklm.neurons.harvest import Flows, pearson
from topklm.neurons.statistics import activity, selectivity
from topklm.neurons.store import NeuronBlock
from topklm.progress import Progress
from topklm.trace import changes, tables
from topklm.trace.tables import Settings, TraceFolder

_LOOKED_UP = 2**22  # neurons x tokens that are looked up at once
_PIECE = 4096  # tokens of a dense piece


class Sums(NamedTuple):
    """Sums of each neuron's activations and of their squares, float64[n]."""

    total: np.ndarray
    squares: np.ndarray


def sums(block: NeuronBlock) -> Sums:
    """Computes the sums of a block's neurons."""
    squares = np.square(block.values.astype(np.float64))
    reduced = (activity.reduced(np.add, x, block.offsets) for x in (block.values, squares))
    return Sums(*reduced)


def joint(x: NeuronBlock, y: NeuronBlock, n_tokens: int, shift: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sums of products of neuron j of two blocks, and at how many tokens both are active.

    float64[n] and int64[n]; x's tokens are moved by `shift`, from the end to the beginning.
    """
    n = len(x.offsets) - 1
    products, both = np.zeros(n), np.zeros(n, np.int64)
    width = max(1, _LOOKED_UP // n_tokens)
    looked_up = np.zeros(width * n_tokens, np.float32)
    for begin in range(0, n, width):
        end = min(begin + width, n)
        of_x, of_y = x.part(begin, end), y.part(begin, end)
        at = activity.owners(of_y) * n_tokens + of_y.tokens
        looked_up[at] = of_y.values
        owners = activity.owners(of_x)
        found = looked_up[owners * n_tokens + (of_x.tokens + shift) % n_tokens].astype(np.float64)
        products[begin:end] = np.bincount(owners, of_x.values * found, end - begin)
        both[begin:end] = np.bincount(owners, found != 0, end - begin)
        looked_up[at] = 0
    return products, both


def shifted(block: NeuronBlock, n_tokens: int, shift: int) -> NeuronBlock:
    """Returns a layer whose activations lie `shift` tokens later, those of the end at the beginning."""
    tokens = (block.tokens + shift) % n_tokens
    order = np.lexsort((tokens, activity.owners(block)))
    return NeuronBlock(block.offsets, tokens[order], block.values[order])


def correlation(n_tokens: int, x: Sums, y: Sums, products: np.ndarray) -> np.ndarray:
    """Returns r of neuron j of two blocks, float64[n], by `joint`; NaN where one does not vary."""
    return pearson(n_tokens, *x, *y, products)


def jaccard(both: np.ndarray, x: NeuronBlock, y: NeuronBlock) -> np.ndarray:
    """Returns the overlap of active tokens, float64[n]; NaN where both neurons are dead."""
    either = activity.n_active(x) + activity.n_active(y) - both
    return np.where(either > 0, both / np.maximum(either, 1), np.nan)


def correlations(x: NeuronBlock, y: NeuronBlock, n_tokens: int) -> np.ndarray:
    """Returns r of every neuron of x, a row, with every one of y, float64[n, m]; NaN as `correlation`."""
    products = np.zeros((len(x.offsets) - 1, len(y.offsets) - 1))
    dense_x, dense_y = _by_token(x, n_tokens), _by_token(y, n_tokens)
    for begin in range(0, n_tokens, _PIECE):
        piece = slice(begin, begin + _PIECE)
        products += dense_x[piece].toarray().T @ dense_y[piece].toarray()
    (a, aa), (b, bb) = sums(x), sums(y)
    return pearson(n_tokens, a[:, None], aa[:, None], b[None], bb[None], products)


def _by_token(block: NeuronBlock, n_tokens: int):  # type: ignore[no-untyped-def]  # SciPy has no types
    import scipy.sparse  # noqa: PLC0415 - of the extra, and half a second

    shape = len(block.offsets) - 1, n_tokens
    values = block.values.astype(np.float32)
    return scipy.sparse.csr_array((values, block.tokens, block.offsets), shape).T.tocsr()


class Partners(NamedTuple):
    """Of each neuron of a layer, which of another it is most like; -1 and NaN where there is none."""

    best: np.ndarray  # int[n], the one with the largest r, on a tie the lowest index
    r_best: np.ndarray  # float64[n]
    r_other: np.ndarray  # float64[n], the largest r of any index but its own
    matched: np.ndarray  # int[n], of the one-to-one match with the largest sum of r (Hungarian)
    r_matched: np.ndarray  # float64[n]


def partners(r: np.ndarray) -> Partners:
    """Finds the partners by the correlations of all pairs, float64[n, n]."""
    from scipy.optimize import linear_sum_assignment  # noqa: PLC0415 - of the extra, and half a second

    known, first = np.where(np.isnan(r), -np.inf, r), best(r)
    r_best = _at(known, first)
    others = known.copy()
    np.fill_diagonal(others, -np.inf)
    # A neuron that varies nowhere costs as much with every partner.
    rows, columns = linear_sum_assignment(np.where(np.isnan(r), -1.0, r), maximize=True)
    matched = np.empty(len(r), np.int64)
    matched[rows] = columns
    r_matched = _at(known, matched)
    return Partners(
        np.where(np.isfinite(r_best), first, -1),
        _finite(r_best),
        _finite(others.max(axis=1)),
        np.where(np.isfinite(r_matched), matched, -1),
        _finite(r_matched),
    )


def best(r: np.ndarray) -> np.ndarray:
    """Returns which column of correlations [n, m] is the largest of each row, int[n]; 0 where all are NaN."""
    return np.where(np.isnan(r), -np.inf, r).argmax(axis=1)


def _at(r: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return np.take_along_axis(r, columns[:, None], axis=1)[:, 0]


def _finite(x: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(x), x, np.nan)


def overlap(these: list[list[int] | None], those: list[list[int] | None]) -> np.ndarray:
    """Returns the Jaccard index of two sets of ids of each neuron, float64[n]; NaN where one is None."""
    found = np.full(len(these), np.nan)
    for number, (one, other) in enumerate(zip(these, those, strict=True)):
        if one is not None and other is not None:
            found[number] = len({*one} & {*other}) / len({*one} | {*other})
    return found


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
            strengths = selectivity.by_group(part, text.tokens, text.vocab_size)
            of_layer += [ids.tolist() or None for ids, _ in selectivity.top_tokens(strengths)]
        tops.append(of_layer)
    return Side(reading, [sums(block) for block in reading.blocks], tops)


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
    before = selectivity.previous(text.tokens, text.bounds)
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
                **selectivity.columns(part, text.tokens, clusters),
                **selectivity.variance_columns(part, text.tokens, before, text.vocab_size),
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
    products, both = joint(x, y, n_tokens)
    shifted, _ = joint(x, y, n_tokens, shift=round(n_tokens * _SHIFT))
    of_x, of_y = now.sums[number], reference.sums[number]
    r = correlation(n_tokens, of_x, of_y, products)
    pairs = correlations(x, y, n_tokens)
    np.fill_diagonal(pairs, r)  # exact, and so the same as `r_reference`
    return {
        "r_reference": r,
        "r_shifted": correlation(n_tokens, of_x, of_y, shifted),
        "jaccard_reference": jaccard(both, x, y),
        **partners(pairs)._asdict(),
        "lens_reference": _cosines(now.reading.lenses[number], reference.reading.lenses[number]),
        "top_reference": overlap(now.top_tokens[number], reference.top_tokens[number]),
    }


def _beside_previous(number: int, now: Side, previous: Side | None, n_tokens: int) -> Mapping[str, Any]:
    x = now.reading.blocks[number]
    if previous is None:
        return dict.fromkeys(("r_previous", "top_previous"), np.full(len(x.offsets) - 1, np.nan))
    products, _ = joint(x, previous.reading.blocks[number], n_tokens)
    return {
        "r_previous": correlation(n_tokens, now.sums[number], previous.sums[number], products),
        "top_previous": overlap(now.top_tokens[number], previous.top_tokens[number]),
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
        products, both = joint(x, y, n_tokens)
        next_y = _rolled(y)
        pairs = correlations(x, y, n_tokens)
        r = correlation(n_tokens, now.sums[a], now.sums[b], products)
        np.fill_diagonal(pairs, r)
        is_best = np.where(np.isnan(r), np.nan, best(pairs) == np.arange(n))
        columns = {
            "r": r,
            "jaccard": jaccard(both, x, y),
            "jaccard_other": jaccard(joint(x, next_y, n_tokens)[1], x, next_y),
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


# Measures the whole model of a step: values by name, the same at every step, and rows of `tables.HEADS`.
Measure = Callable[[LanguageModel], tuple[Mapping[str, float], Sequence[Mapping[str, Any]]]]


class Source(Protocol):
    """Everything that a trace reads: a run's checkpoints (`read.Checkpoints`), or planted ones in tests."""

    text: Text
    clusters: np.ndarray  # int[V], of each token

    def load(self, step: int) -> Any:
        """Loads the model of a step."""

    def read(self, model: Any, folder: TraceFolder, report: Callable[[int], None], store: bool) -> Reading:
        """Reads the text through it; `report` is told of tokens, `store` keeps the events in the folder."""


def trace(
    folder: TraceFolder,
    settings: Settings,
    source: Source,
    steps: Sequence[int],
    progress: Progress,
    measures: Sequence[Measure] = (),
    keep_events: bool = False,
) -> None:
    """Traces steps, rising, that are not traced yet; this process is in `folder.writing`.

    A step is done again where another one is now before it. UserError if two have the same parameters.
    """
    before = dict(zip(steps, [None, *steps[:-1]], strict=True))
    todo, known = distributed.of_first("steps to trace", lambda: _todo(folder, before))
    index, count = distributed.process_index(), distributed.process_count()
    begin, end = (-(-len(todo) * i // count) for i in (index, index + 1))  # rounded up: the first has a part
    own = todo[begin:end]
    if own:
        again = [s for s in own if before[s] is not None and before[s] not in own]
        total = (1 + len(own) + len(again)) * source.text.n_tokens
        of_all = f"{len(own)} of {len(todo)}" if count > 1 else f"{len(todo)}"
        with progress.phase_of_tokens(f"tracing {of_all} steps", total) as report:

            def read(step: int, store: bool = False) -> tuple[Any, Side]:
                return _read(source, step, folder, known, report, store)

            reference = read(settings.reference, store=index == 0)[1]
            previous: Side | None = None
            for step in own:
                earlier = before[step]
                if earlier is None:
                    previous = None
                elif previous is None or previous.reading.step != earlier:
                    previous = read(earlier)[1]
                model, now = read(step, keep_events and step != settings.reference)
                _write(folder, settings, source, now, reference, previous)
                _write_run(folder, source, model, now, earlier, measures)
                previous = now
    if count > 1:
        progress.say("waiting for the other processes")
    distributed.meet("steps traced")
    if index == 0:
        folder.wait_until_done(lambda: _todo(folder, before)[0])
        _check_distinct(folder)
        folder.write_formation(formation_rows(folder, settings))


def _todo(folder: TraceFolder, before: Mapping[int, int | None]) -> tuple[list[int], dict[str, int]]:
    """Returns the steps that are not traced after those before them, and traced ones by their parameters."""
    there = {step: folder.read_step("run", step).to_pylist()[0] for step in folder.steps()}
    todo = [s for s in before if s not in there or there[s]["previous"] != before[s]]
    return todo, {row["parameters"]: step for step, row in there.items()}


def _read(
    source: Source,
    step: int,
    folder: TraceFolder,
    known: dict[str, int],
    report: Callable[[int], None],
    store: bool,
) -> tuple[Any, Side]:
    model = source.load(step)
    reading = source.read(model, folder, report, store)
    if (other := known.setdefault(reading.parameters, step)) != step:
        raise _not_distinct(other, step)
    return model, side(reading, source.text)


def _check_distinct(folder: TraceFolder) -> None:
    """Raises UserError for two steps with the same parameters, and forgets that the later one was traced."""
    known: dict[str, int] = {}
    for step in folder.steps():
        row = folder.read_step("run", step).to_pylist()[0]
        if (other := known.setdefault(row["parameters"], step)) != step:
            folder.forget(step)
            raise _not_distinct(other, step)


def _not_distinct(*steps: int) -> UserError:
    low, high = sorted(steps)
    return UserError(
        f"steps {low} and {high} hold the same parameters: one of the checkpoints is not what its name says; "
        "leave one out of --steps"
    )


def _write(
    folder: TraceFolder,
    settings: Settings,
    source: Source,
    now: Side,
    reference: Side,
    previous: Side | None,
) -> None:
    step, layers = now.reading.step, settings.layers
    rows = neuron_rows(now, reference, previous, source.text, source.clusters, layers)
    folder.write("neurons", step, rows)
    of_layers, of_pairs = layer_rows(now, layers, source.text.n_tokens)
    folder.write("layers", step, of_layers)
    folder.write("pairs", step, of_pairs)


def _write_run(
    folder: TraceFolder,
    source: Source,
    model: Any,
    now: Side,
    earlier: int | None,
    measures: Sequence[Measure],
) -> None:
    reading, text = now.reading, source.text
    values: dict[str, float] = {}
    heads: list[Mapping[str, Any]] = []
    for measure_model in measures:
        more, rows = measure_model(model)
        values |= more
        heads += rows
    if heads:
        with_step = [{"step": reading.step, **row} for row in heads]
        folder.write("heads", reading.step, pa.Table.from_pylist(with_step, schema=tables.HEADS))
    bits = reading.loss * text.n_tokens / np.log(2) / max(text.n_bytes, 1)
    columns = {
        "step": [reading.step],
        "previous": [earlier],
        "parameters": [reading.parameters],
        "loss": [reading.loss],
        "bits_per_byte": [bits],
        **{name: [float(value)] for name, value in values.items()},
    }
    folder.write("run", reading.step, tables.table(tables.run_schema(values), columns))


def formation_rows(folder: TraceFolder, settings: Settings) -> pa.Table:
    """Computes the table over all steps of a folder."""
    names = ["layer", "neuron", "r_reference", "r_previous", "top_previous", "best", "n_active"]
    steps, rows = np.array(folder.steps()), folder.read("neurons", names)
    layers = tables.numbers(rows, "layer")
    found = []
    for layer in settings.layers:
        of_layer = rows.filter(pa.array(layers == layer))
        curves = {name: tables.numbers(of_layer, name).reshape(len(steps), -1) for name in names[2:]}
        columns = changes.columns(steps, settings.reference, curves, settings.min_tokens)
        n = curves["n_active"].shape[1]
        found.append(tables.table(tables.FORMATION, {"layer": [layer] * n, "neuron": range(n), **columns}))
    return pa.concat_tables(found)
