"""The readability card of a model: the same measures of every basis (`bases`), on the same tokens.

Measured of each layer of each basis, over tokens that are not the first of their document:

    density             share of tokens at which a code is active
    dead                share of codes that are active nowhere
    token_entropy       corrected, as `statistics.selectivity`
    semantic_entropy    likewise, of clusters of tokens from one resource for all models
    by_token            as `statistics.selectivity`
    by_context          likewise

Of all but `dead` the median over codes that are active at 30 tokens or more. The definitions are ours.

Intervals of the median, with the codes that count held fixed, are by bootstrap over documents: tokens of one
document are not independent of each other, documents about are. As many documents as there are are drawn with
replacement, R times; a draw is a weight for each document, how often it was drawn. The figures of every
neuron are computed again from each draw, exactly, from sums by document that are made once.

A draw holds some two thirds of the documents, and some of them twice: its entropies are lower than those of
the sample, and its groups look more alike, by more than draws differ among each other. So an interval is from
the 2.5th to the 97.5th percentile of draws that are moved until their mean is the figure. It says how far the
figure moves with the documents, not how far a sample of this size is from endless text. The choices are ours.

Dims: E events of a neuron, N tokens, G documents, R draws (the first is the sample as it is), D d_model,
M codes of a layer.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse

from topklm.config import ModelConfig
from topklm.errors import UserError
from topklm.model import transformer
from topklm.neurons import labelled_texts, probing
from topklm.neurons.probing import Detector, DetectorSearch
from topklm.neurons.statistics import ablation, embeddings, selectivity, table
from topklm.neurons.store import NeuronBlock

LEVEL = 0.95


def document_weights(n_documents: int, n_draws: int, seed: int = 0) -> np.ndarray:
    """Counts how often each document is drawn, int64[G, R]; a column adds up to G.

    Stores of the same text have the same documents: the same seed draws the same ones of each, so that draws
    of two models may be subtracted from each other.
    """
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_documents, np.full(n_documents, 1 / n_documents), n_draws).T


@dataclasses.dataclass(frozen=True)
class Interval:
    """Of a figure."""

    figure: float  # from the sample as it is
    low: float
    high: float
    shift: float  # mean of the draws less the figure, which was taken off the draws


def interval(figure: float, draws: np.ndarray, level: float = LEVEL) -> Interval:
    """Returns the middle `level` of draws float[R], without NaN, moved so that their mean is the figure."""
    shift = float(np.nanmean(draws) - figure)
    low, high = np.nanquantile(draws - shift, [(1 - level) / 2, (1 + level) / 2])
    return Interval(figure, float(low), float(high), shift)


def sums_of_draws(
    ids: np.ndarray, documents: np.ndarray, values: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Adds up a neuron's values, float64[E], by token or cluster, int[E], in each draw.

    Documents, int[E], are rows of the weights, float64[G, R]. Returns int[u], the distinct ids, rising, and
    float64[u, R].
    """
    distinct, rows = np.unique(ids, return_inverse=True)
    # Sums by token and document; the product with the weights is the sum of every token in every draw.
    by_document = scipy.sparse.csr_array((values, (rows, documents)), (len(distinct), len(weights)))
    return distinct, by_document @ weights


def entropy_of_draws(sums: np.ndarray, n_active: np.ndarray) -> np.ndarray:
    """Computes `plug_in` and `miller_madow` of `selectivity` of each draw, float64[R], nats; NaN for zeros.

    Sums of strengths, float64[u, R], are as from `sums_of_draws`, of `n_active` activations, float64[R].
    """
    totals = sums.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        # - sum of p ln p with p = s / total.
        plug_in = np.log(totals) - np.where(sums > 0, sums * np.log(sums), 0).sum(axis=0) / totals
        correction = (np.count_nonzero(sums, axis=0) - 1) / (2 * n_active)
        return np.where(totals > 0, np.maximum(plug_in, 0) + correction, np.nan)


DRAWS = 200
LEAST_TOKENS, LEAST_DOCUMENTS = 1000, 8
READABLE = 40  # of the ranking of a basis, over all layers
FAIR_F1 = 0.5
NO_CLUSTER = -1

Neuron = tuple[int, int]  # layer, number


@dataclasses.dataclass(frozen=True)
class Measure:
    """A measure of a layer."""

    name: str  # in JSON
    title: str  # on tables and pictures
    text: str  # how its number is written
    unit: str = ""
    of_tokens: bool = True  # whether models of other tokenizers cannot be compared by it


MEASURES = (
    Measure("density", "density", "{:.2%}", of_tokens=False),
    Measure("dead", "dead", "{:.1%}", of_tokens=False),
    Measure("token_entropy", "token entropy", "{:.2f}", "nats"),
    Measure("semantic_entropy", "semantic entropy", "{:.2f}", "nats"),
    Measure("by_token", "by token", "{:.3f}"),
    Measure("by_context", "by context", "{:.3f}"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class CardText:
    """The tokens on which bases are measured: of all documents but for the first token of each."""

    documents: Sequence[np.ndarray]  # int32[n] of each, their first tokens included
    token_ids: np.ndarray  # int64[N]
    previous_ids: np.ndarray  # int64[N], the token before each
    document_of: np.ndarray  # int64[N], rising
    weights: np.ndarray  # float64[G, R], how often each document is drawn; 1 in the first draw
    # int64[N], the cluster of each token, `NO_CLUSTER` for none; None: tokens are not compared with those of
    # other models at all
    clusters: np.ndarray | None
    vocab_size: int  # V

    @functools.cached_property
    def n_tokens(self) -> np.ndarray:
        """float64[R], tokens of each draw."""
        return np.bincount(self.document_of, minlength=len(self.weights)) @ self.weights

    @functools.cached_property
    def group_sizes(self) -> Mapping[str, np.ndarray]:
        """float64[V, R] by measure, tokens of each group that takes part in the analysis of variance."""
        found = {}
        for name, keys in (("by_token", self.token_ids), ("by_context", self.previous_ids)):
            counts = scipy.sparse.csr_array(
                (np.ones(len(keys)), (keys, self.document_of)), (self.vocab_size, len(self.weights))
            )
            takes_part = selectivity.group_sizes(keys, self.vocab_size) > 0
            found[name] = np.where(takes_part[:, None], counts @ self.weights, 0)
        return found

    @functools.cached_property
    def group_totals(self) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
        """float64[R] and int64[R] by measure, tokens of all these groups, and how many groups there are."""
        sizes = self.group_sizes
        return {name: (x.sum(axis=0), np.count_nonzero(x, axis=0)) for name, x in sizes.items()}


def make_text(
    documents: Sequence[np.ndarray],
    vocab_size: int,
    clusters: np.ndarray | None,
    draws: int,
    seed: int = 0,
) -> CardText:
    """Makes the text of documents, clusters int[V]; UserError if there is too little for an interval."""
    lengths = [len(ids) for ids in documents]
    n = sum(lengths) - len(lengths)
    if n < LEAST_TOKENS or len(documents) < LEAST_DOCUMENTS:
        text = f"{n:,} tokens of {len(documents):,} documents are too few for an interval"
        advice = f"at least {LEAST_TOKENS:,} of {LEAST_DOCUMENTS} are needed"
        raise UserError(text, field="--tokens", advice=advice)
    token_ids = np.concatenate(documents).astype(np.int64)
    previous = selectivity.previous(token_ids, np.cumsum([0, *lengths]))
    kept = previous != selectivity.NO_TOKEN
    drawn = document_weights(len(documents), draws, seed).astype(np.float64)
    return CardText(
        documents,
        token_ids[kept],
        previous[kept],
        np.repeat(np.arange(len(documents)), lengths)[kept],
        np.concatenate([np.ones((len(documents), 1)), drawn], axis=1),
        None if clusters is None else clusters[token_ids[kept]],
        vocab_size,
    )


def text_weights(text: np.ndarray, draws: int, seed: int = 0) -> np.ndarray:
    """Returns float64[n, R], how often the texts int[n] of examples are drawn; 1 in the first draw."""
    numbers = np.unique(text, return_inverse=True)[1]
    drawn = document_weights(int(numbers.max()) + 1 if len(numbers) else 1, draws, seed)[numbers]
    return np.concatenate([np.ones((len(text), 1)), drawn], axis=1)


def clusters_of_vectors(path: Path, tokens: Sequence[str], seed: int = 0) -> np.ndarray:
    """Groups V tokens by the vectors of a file: int[V], `NO_CLUSTER` for those without.

    A line of the file is a word and its numbers, with spaces between; the first of equal words counts. A
    token's word is its text without spaces around it, as it is or in small letters. UserError for other
    files.
    """
    words = {word for token in tokens for word in (token.strip(), token.strip().lower()) if word}
    vectors: dict[str, np.ndarray] = {}
    for number, line in enumerate(labelled_texts.lines(path, "--vectors"), 1):
        word, *numbers = line.rstrip().split(" ")
        if word not in words or word in vectors or len(numbers) < 2:  # a head with two counts is no vector
            continue
        try:
            vectors[word] = np.array(numbers, np.float32)
        except ValueError as e:
            text = f"line {number} must be a word and its numbers, with spaces between"
            raise UserError(text, field="--vectors", value=str(path)) from e
    of_token = [vectors.get(t.strip(), vectors.get(t.strip().lower())) for t in tokens]
    there = [place for place, vector in enumerate(of_token) if vector is not None]
    rows = [vector for vector in of_token if vector is not None]
    if not rows or len({len(row) for row in rows}) > 1:
        text = "has no vectors of one length for the model's tokens; give lines 'word 0.1 -0.2 ...'"
        raise UserError(text, field="--vectors", value=str(path))
    clusters = np.full(len(tokens), NO_CLUSTER)
    clusters[there] = embeddings.cluster_tokens(np.stack(rows).T, None, seed)
    return clusters


# Measures of one layer of one basis.


@dataclasses.dataclass(frozen=True, eq=False)
class Figures:
    """Figures of the M neurons of a layer in every draw; NaN where there is none."""

    n_active: np.ndarray  # float64[M, R]
    n_tokens: np.ndarray  # float64[R]
    n_distinct: np.ndarray  # int64[M], distinct tokens in the sample
    by_neuron: Mapping[str, np.ndarray]  # float64[M, R] of each measure of tokens

    @property
    def is_counted(self) -> np.ndarray:
        """bool[M], which neurons medians are taken over."""
        return self.n_active[:, 0] >= table.FAIR_ACTIVE

    def summaries(self) -> dict[str, np.ndarray]:
        """Returns float64[R] of each measure."""
        of_neurons = {"density": self.n_active / self.n_tokens, **self.by_neuron}
        found = {name: _median(figures[self.is_counted]) for name, figures in of_neurons.items()}
        return {**found, "dead": (self.n_active == 0).mean(axis=0)}


def _median(figures: np.ndarray) -> np.ndarray:
    """Returns float64[R], the median of those of [M, R] that the sample has."""
    there = figures[~np.isnan(figures[:, 0])]
    is_drawn = ~np.isnan(there).all(axis=0)
    medians = np.full(figures.shape[1], np.nan)
    medians[is_drawn] = np.nanmedian(there[:, is_drawn], axis=0) if len(there) else np.nan
    return medians


def measure(block: NeuronBlock, text: CardText, report: Callable[[int], None] = lambda n: None) -> Figures:
    """Computes the figures of a layer's neurons; of those active at fewer than 30 tokens, counts only."""
    n_neurons, n_documents = len(block.offsets) - 1, len(text.weights)
    owners = np.repeat(np.arange(n_neurons), np.diff(block.offsets))
    counts = scipy.sparse.csr_array(
        (np.ones(len(owners)), (owners, text.document_of[block.tokens])), (n_neurons, n_documents)
    )
    n_active = counts @ text.weights
    names = [measure.name for measure in MEASURES if measure.of_tokens] if text.clusters is not None else []
    by_neuron = {name: np.full(n_active.shape, np.nan) for name in names}
    n_distinct = np.zeros(n_neurons, np.int64)
    for number in np.flatnonzero(n_active[:, 0] >= table.FAIR_ACTIVE).tolist() if names else ():
        found, n_distinct[number] = _of_neuron(block.one(number), text, n_active[number])
        for name, figures in found.items():
            by_neuron[name][number] = figures
        report(1)
    return Figures(n_active, text.n_tokens, n_distinct, by_neuron)


def _of_neuron(
    events: NeuronBlock, text: CardText, n_active: np.ndarray
) -> tuple[dict[str, np.ndarray], int]:
    """Computes the figures of one neuron, float64[R] each, and its number of distinct tokens."""
    values = events.values.astype(np.float64)
    there, own = np.unique(text.document_of[events.tokens], return_inverse=True)
    weights = text.weights[there]
    ids, sums = sums_of_draws(text.token_ids[events.tokens], own, values, weights)
    strengths = np.abs(values)
    of_strengths = sums
    if (values < 0).any():
        of_strengths = sums_of_draws(text.token_ids[events.tokens], own, strengths, weights)[1]
    assert text.clusters is not None
    clusters = text.clusters[events.tokens]
    has = clusters != NO_CLUSTER
    _, by_cluster = sums_of_draws(clusters[has], own[has], strengths[has], weights)
    n_clustered = np.bincount(own[has], minlength=len(there)) @ weights
    previous = sums_of_draws(text.previous_ids[events.tokens], own, values, weights)
    found = {
        "token_entropy": entropy_of_draws(of_strengths, n_active),
        "semantic_entropy": entropy_of_draws(by_cluster, n_clustered),
    }
    for name, keys, (groups, of_group) in (
        ("by_token", text.token_ids, (ids, sums)),
        ("by_context", text.previous_ids, previous),
    ):
        sizes = text.group_sizes[name]
        counted = sizes[keys[events.tokens], 0] > 0
        if counted.sum() >= selectivity.LEAST_ACTIVE:
            squares = np.bincount(own[counted], np.square(values[counted]), len(there)) @ weights
            part = sizes[groups, 0] > 0
            sizes_of_part = sizes[groups[part]]
            found[name] = selectivity.share(of_group[part], sizes_of_part, squares, *text.group_totals[name])
    return found, len(ids)


def with_interval(draws: np.ndarray, least: float = -np.inf) -> dict[str, float | None]:
    """Returns a figure, the first of float64[R], with its interval, from `least` up; None for no figure."""
    if not np.isfinite(draws[0]):
        return {"value": None, "low": None, "high": None}
    if not np.isfinite(draws[1:]).any():
        return {"value": float(draws[0]), "low": None, "high": None}
    found = interval(float(draws[0]), draws[1:])
    return {"value": found.figure, "low": max(found.low, least), "high": found.high}


def layer_entry(figures: Figures) -> dict[str, Any]:
    """Returns the measures of a layer for JSON."""
    counts = {"n_neurons": len(figures.n_active), "n_counted": int(figures.is_counted.sum())}
    leasts = {"dead": 0.0}  # no draw has fewer dead neurons than the sample
    summaries = figures.summaries().items()
    return counts | {name: with_interval(draws, leasts.get(name, -np.inf)) for name, draws in summaries}


# Measures of the most readable neurons of a basis.


def readable(layers: Sequence[Figures], count: int) -> list[Neuron]:
    """Returns the first neurons of a basis in the order of the pages, `table.readable_first`."""
    columns = {
        "n_active": np.concatenate([f.n_active[:, 0] for f in layers]),
        "density": np.concatenate([f.n_active[:, 0] / f.n_tokens[0] for f in layers]),
        "n_distinct_tokens": np.concatenate([f.n_distinct for f in layers]),
    }
    for name in ("token_entropy", "semantic_entropy"):
        columns[f"{name}_corrected"] = np.concatenate([f.by_neuron[name][:, 0] for f in layers])
    numbers = [(layer, n) for layer, f in enumerate(layers) for n in range(len(f.n_active))]
    order = table.readable_first(pa.table(columns))[:count]
    return [numbers[place] for place in order.tolist() if columns["n_active"][place] > 0]


def detector_search(text: CardText, pieces: Sequence[bytes]) -> DetectorSearch:
    """Makes the search on a text, given the bytes of each of the V tokens."""
    of_tokens = [pieces[token] for token in text.token_ids]
    return DetectorSearch(text.token_ids, text.document_of, text.previous_ids, of_tokens)


def detect(search: DetectorSearch, block: NeuronBlock, number: int, n_tokens: int) -> Detector:
    """Returns the best detector of a neuron of a layer."""
    is_active = np.zeros(n_tokens, bool)
    is_active[block.one(number).tokens] = True
    return search.best(is_active)


def detectors_entry(
    search: DetectorSearch,
    neurons: Sequence[Neuron],
    blocks: Sequence[NeuronBlock],
    n_tokens: int,
    report: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Finds the best detector of each neuron, given the blocks of all layers; returns them for JSON.

    "n_fair" of them have an F1 of `FAIR_F1` or more; a neuron that is silent where rules are scored has none.
    """
    found = list[Detector]()
    for layer, number in neurons:
        found.append(detect(search, blocks[layer], number, n_tokens))
        report(1)
    scores = np.array([best.f1 for best in found])
    return {
        "n": len(found),
        "n_fair": int((scores >= FAIR_F1).sum()),
        "median_f1": float(np.nanmedian(scores)) if np.isfinite(scores).any() else None,
        "neurons": [
            {"layer": layer, "neuron": number, **dataclasses.asdict(best)}
            for (layer, number), best in zip(neurons, found, strict=True)
        ],
    }


def specificity(
    config: ModelConfig,
    params: transformer.Parameters,
    text: CardText,
    neurons: Sequence[Neuron],
    targets: Sequence[np.ndarray],
    *,
    samples: int,
    **options: Any,
) -> dict[str, Any]:
    """Measures by how much the loss rises without a neuron, at its own targets and elsewhere.

    The text is read from its beginning; `targets` are int[n] of each neuron, next tokens that it should
    raise; `samples` the tokens of each neuron, at most; `options` are those of `ablation.draw`.

    Returns "own" and "elsewhere", each the mean "effect" in nats, its "standard_error" and the number of
    "samples", over all samples of all neurons; "compared", how many neurons have both; "higher_at_own", how
    many of these have the higher mean at their own targets.
    """
    layers = tuple(sorted({layer for layer, _ in neurons}))
    wanted = np.zeros((len(layers), config.d_model), np.int64)
    own_targets = {}
    for (layer, number), ids in zip(neurons, targets, strict=True):
        wanted[layers.index(layer), number] = samples
        own_targets[layer, number] = set(np.asarray(ids).tolist())
    token_ids = np.concatenate(text.documents)
    bounds = np.cumsum([0, *(len(ids) for ids in text.documents)])
    effects: dict[Neuron, tuple[list[float], list[float]]] = {neuron: ([], []) for neuron in own_targets}
    drawn = ablation.draw(layers, token_ids, bounds, config, params, samples=wanted, **options)
    for inputs, found in drawn:
        following = inputs[found.rows, found.places + 1]
        for layer, number, token, effect in zip(
            found.layers.tolist(),
            found.neurons.tolist(),
            following.tolist(),
            found.effects.tolist(),
            strict=True,
        ):
            effects[layer, number][token not in own_targets[layer, number]].append(effect)
    own, elsewhere = (list(itertools.chain(*(both[side] for both in effects.values()))) for side in (0, 1))
    both = [pair for pair in effects.values() if pair[0] and pair[1]]
    higher = sum(bool(np.mean(at_own) > np.mean(others)) for at_own, others in both)
    return {
        "own": _mean_of(own),
        "elsewhere": _mean_of(elsewhere),
        "higher_at_own": higher,
        "compared": len(both),
    }


def _mean_of(effects: Sequence[float]) -> dict[str, Any]:
    n, error = len(effects), _standard_error(np.array(effects))
    return {"effect": float(np.mean(effects)) if n else None, "standard_error": error, "samples": n}


# Probing.


def probing_entry(scores: probing.Scores, controls: Mapping[str, probing.Scores]) -> dict[str, Any]:
    """Returns means over questions with intervals, for JSON; "less_NAME", paired, less those of a control."""
    entry: dict[str, Any] = {}
    for name in ("auc", "balanced_accuracy"):
        own = getattr(scores, name)
        entry[name] = {str(k): with_interval(own[:, at].mean(axis=0)) for at, k in enumerate(probing.KS)}
        for control, its_scores in controls.items():
            gaps = own - getattr(its_scores, name)
            entry.setdefault(f"less_{control}", {})[name] = {
                str(k): {
                    **with_interval(gaps[:, at].mean(axis=0)),
                    "standard_error": _standard_error(gaps[:, at, 0]),
                }
                for at, k in enumerate(probing.KS)
            }
    return entry


def _standard_error(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
