"""The readability card of a model: the same measures of every basis of its hidden state, on the same tokens.

A *basis* is a function from hidden states to codes. Of a TopK LM: its own neurons. Of a Base LM: its
coordinates, cut to the K largest that are positive, and a post-hoc TopK SAE. Of both, to compare with: a
random rotation and the principal components of the states on the measured text, about their mean. Codes of
these two are cut as well, as those of a dictionary are (`topklm.neurons.fit_dictionary`); for probing they
are not cut and keep their signs, so the probe has all that a rotation of the states can give.

Measured of each layer of each basis, over tokens that are not the first of their document:

    density             share of tokens at which a code is active
    dead                share of codes that are active nowhere
    token_entropy       corrected, as `statistics.entropy`
    semantic_entropy    likewise, of clusters of tokens from one resource for all models
    by_token            as `statistics.variance`
    by_context          likewise

Of all but `dead` the median over codes that are active at 30 tokens or more. Intervals are those of
`statistics.bootstrap`, of the median, with the codes that count held fixed. The definitions are ours.
Dims: S layers, N tokens, G documents, R draws (the first is the sample as it is), D d_model, M codes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import scipy.sparse

from topklm.config import ModelConfig
from topklm.errors import UserError
from topklm.model import transformer
from topklm.model.topk import topk
from topklm.neurons import fit_dictionary, labelled_texts, probing
from topklm.neurons.detectors import Detector, DetectorSearch
from topklm.neurons.dictionary import Dictionary
from topklm.neurons.documents import TextModel, batches
from topklm.neurons.labelled_texts import Located
from topklm.neurons.statistics import ablation, embeddings, table, variance
from topklm.neurons.statistics.bootstrap import (
    document_weights,
    entropy_of_draws,
    interval,
    sums_of_draws,
)
from topklm.neurons.store import NeuronBlock

DRAWS = 200
LEAST_TOKENS, LEAST_DOCUMENTS = 1000, 8
READABLE = 40  # of the ranking of a basis, over all layers
FAIR_F1 = 0.5
NO_CLUSTER = -1

_STRETCH_TOKENS = 2**16  # that are packed together

Neuron = tuple[int, int]  # layer, number


@dataclasses.dataclass(frozen=True)
class Measure:
    """A measure of a layer: its name in JSON, its head in a table, and how its number is written."""

    name: str
    title: str
    text: str
    of_tokens: bool = True  # whether models of other tokenizers cannot be compared by it


MEASURES = (
    Measure("density", "density", "{:.2%}", of_tokens=False),
    Measure("dead", "dead", "{:.1%}", of_tokens=False),
    Measure("token_entropy", "token entropy", "{:.2f}"),
    Measure("semantic_entropy", "semantic entropy", "{:.2f}"),
    Measure("by_token", "by token", "{:.3f}"),
    Measure("by_context", "by context", "{:.3f}"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Basis:
    """A function from hidden states to codes.

    Attributes:
        name: "own", "coordinates", "sae", "random" or "pca".
        encode: From float32[S, N, D] to codes [S, N, M]; None: the states are the codes.
        project: From float[S, n, D] to what is probed, float[S, n, M]; None: the codes.
    """

    name: str
    encode: Callable[[jax.Array], jax.Array] | None = None
    project: Callable[[np.ndarray], np.ndarray] | None = None


def bases(
    config: ModelConfig,
    mean_SD: np.ndarray,
    covariance_SDD: np.ndarray,
    keep: int,
    sae: Dictionary | None = None,
    seed: int = 0,
) -> list[Basis]:
    """Returns the bases of a model, its own first, the random rotation last but one, then the components.

    Args:
        config: The model.
        mean_SD: Of its hidden states.
        covariance_SDD: Likewise.
        keep: K, codes kept of each token.
        sae: Of a Base LM.
        seed: Of the rotation.
    """
    if config.n_topk_layers:
        found = [Basis("own")]
    else:
        found = [Basis("coordinates", jax.jit(lambda h: topk(h, keep)))]
    if sae is not None:
        found.append(Basis("sae", jax.jit(sae.encode)))
    rotation = fit_dictionary.random_rows(*mean_SD.shape, seed)
    of_kind = {
        "random": (rotation, rotation),
        "pca": (fit_dictionary.signed_components(covariance_SDD), fit_dictionary.components(covariance_SDD)),
    }
    for kind, (rows_SMD, probed_SMD) in of_kind.items():
        arrays = (np.asarray(x, np.float32) for x in (mean_SD, np.swapaxes(rows_SMD, 1, 2), rows_SMD))
        cut = Dictionary(kind, keep, *arrays)
        project = functools.partial(_project, mean_SD, np.swapaxes(probed_SMD, 1, 2))
        found.append(Basis(kind, jax.jit(cut.encode), project))
    return found


def _project(mean_SD: np.ndarray, columns_SDM: np.ndarray, h_SnD: np.ndarray) -> np.ndarray:
    return (h_SnD - mean_SD[:, None]) @ columns_SDM


@dataclasses.dataclass(frozen=True, eq=False)
class CardText:
    """The tokens on which bases are measured: of all documents but for the first token of each.

    Attributes:
        documents: int32[n] of each, their first tokens included.
        token_ids: int64[N].
        previous_ids: int64[N], the token before each.
        document_of: int64[N], rising.
        weights: float64[G, R], how often each document is drawn; 1 in the first draw.
        clusters: int64[N], the cluster of each token, `NO_CLUSTER` for none; None: tokens are not compared
            with those of other models at all.
        vocab_size: V.
    """

    documents: Sequence[np.ndarray]
    token_ids: np.ndarray
    previous_ids: np.ndarray
    document_of: np.ndarray
    weights: np.ndarray
    clusters: np.ndarray | None
    vocab_size: int

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
            takes_part = variance.group_sizes(keys, self.vocab_size) > 0
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
    draws: int = DRAWS,
    seed: int = 0,
) -> CardText:
    """Makes the text of documents, whose tokens fall into clusters int[V].

    Raises:
        UserError: If there is too little of it for an interval.
    """
    lengths = [len(ids) for ids in documents]
    n = sum(lengths) - len(lengths)
    if n < LEAST_TOKENS or len(documents) < LEAST_DOCUMENTS:
        text = f"{n:,} tokens of {len(documents):,} documents are too few for an interval"
        advice = f"at least {LEAST_TOKENS:,} of {LEAST_DOCUMENTS} are needed"
        raise UserError(text, field="--tokens", advice=advice)
    token_ids = np.concatenate(documents).astype(np.int64)
    previous = variance.previous(token_ids, np.cumsum([0, *lengths]))
    kept = previous != variance.NO_TOKEN
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


def text_weights(text: np.ndarray, seed: int = 0, draws: int = DRAWS) -> np.ndarray:
    """Returns float64[n, R], how often the texts int[n] of examples are drawn; 1 in the first draw."""
    numbers = np.unique(text, return_inverse=True)[1]
    drawn = document_weights(int(numbers.max()) + 1 if len(numbers) else 1, draws, seed)[numbers]
    return np.concatenate([np.ones((len(text), 1)), drawn], axis=1)


def clusters_of_vectors(path: Path, tokens: Sequence[str], seed: int = 0) -> np.ndarray:
    """Groups V tokens by the vectors of a file: int[V], `NO_CLUSTER` for those without.

    A line of the file is a word and its numbers, with spaces between; the first of equal words counts. A
    token's word is its text without spaces around it, as it is or in small letters.

    Raises:
        UserError: If the file cannot be read, or has vectors for none of the tokens.
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


# The codes of texts.


def states(
    model: TextModel, n_layers: int, documents: Sequence[np.ndarray], report: Callable[[int], None]
) -> Iterator[tuple[np.ndarray, np.ndarray, jax.Array]]:
    """Yields the hidden states of all tokens of documents, batch by batch.

    Yields:
        Which of the tokens are in the batch, int[n]; which of its N inputs these are, int[n]; and what the
        first layers hand on, float32[S, N, D].
    """
    begin = 0
    for stretch in batches(model.windows(documents), _STRETCH_TOKENS):
        packed = model.pack(stretch)
        for arrays, read, to in packed.batches():
            h_LND = fit_dictionary.hidden_states(model.config, model.params, *model.put(arrays))
            yield begin + to, read, h_LND[:n_layers]
            report(len(to))
        begin += len(packed.tokens)


def moments(
    model: TextModel, n_layers: int, text: CardText, report: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean float64[S, D] and covariance float64[S, D, D] of the hidden states on the text."""

    def counted() -> fit_dictionary.States:
        for _, read, h_SND in states(model, n_layers, text.documents, report):
            is_read = np.zeros(h_SND.shape[1], bool)
            is_read[read] = True
            yield h_SND, jnp.asarray(is_read)

    return fit_dictionary.moments(counted())


def read_blocks(
    model: TextModel, n_layers: int, of: Sequence[Basis], text: CardText, report: Callable[[int], None]
) -> list[list[NeuronBlock]]:
    """Reads where codes are active, of each basis and each layer; tokens are numbered as in the text."""
    lengths = np.array([len(ids) for ids in text.documents])
    numbers = np.cumsum(np.concatenate([[0, *([1] * (n - 1))] for n in lengths])) - 1
    numbers[np.cumsum([0, *lengths[:-1]])] = -1  # first tokens are not counted
    parts: list[list[list]] = [[[] for _ in range(n_layers)] for _ in of]
    for tokens, read, h_SND in states(model, n_layers, text.documents, report):
        is_counted = numbers[tokens] >= 0
        at = numbers[tokens][is_counted]
        for basis, of_basis in zip(of, parts, strict=True):
            codes = np.asarray(basis.encode(h_SND) if basis.encode else h_SND)
            for layer, of_layer in enumerate(of_basis):
                rows, neurons = np.nonzero(codes[layer, read[is_counted]])
                values = codes[layer, read[is_counted][rows], neurons]
                of_layer.append((at[rows], neurons, values, codes.shape[2]))
    return [[_block(of_layer) for of_layer in of_basis] for of_basis in parts]


def _block(parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, int]]) -> NeuronBlock:
    """Sorts events of a layer by neuron and token."""
    tokens, neurons, values = (np.concatenate(x) for x in list(zip(*parts, strict=True))[:3])
    order = np.lexsort((tokens, neurons))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(neurons, minlength=parts[0][3]))])
    return NeuronBlock(offsets, tokens[order].astype(np.int64), values[order].astype(np.float32))


def pool(
    model: TextModel, n_layers: int, of: Sequence[Basis], located: Located, report: Callable[[int], None]
) -> list[np.ndarray]:
    """Computes what is probed of each basis, float[S, n, M]: codes averaged over each example's tokens."""
    by_token = located.pooling.tocsc()
    pooled: list[Any] = [0.0] * len(of)
    h_SnD: Any = 0.0
    for tokens, read, h_SND in states(model, n_layers, located.documents, report):
        shares = by_token[:, tokens]
        h = np.asarray(h_SND)[:, read]
        h_SnD = h_SnD + np.stack([shares @ of_layer for of_layer in h])
        for number, basis in enumerate(of):
            if basis.project is None and basis.encode is not None:
                codes = np.asarray(basis.encode(h_SND))[:, read]
                pooled[number] = pooled[number] + np.stack([shares @ of_layer for of_layer in codes])
    return [
        basis.project(h_SnD) if basis.project else h_SnD if basis.encode is None else codes
        for basis, codes in zip(of, pooled, strict=True)
    ]


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
    return np.nanmedian(there, axis=0) if len(there) else np.full(figures.shape[1], np.nan)


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
    for number in np.flatnonzero(n_active[:, 0] >= table.FAIR_ACTIVE) if names else ():
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
        if counted.sum() >= variance.LEAST_ACTIVE:
            squares = np.bincount(own[counted], np.square(values[counted]), len(there)) @ weights
            part = sizes[groups, 0] > 0
            sizes_of_part = sizes[groups[part]]
            found[name] = variance.share(of_group[part], sizes_of_part, squares, *text.group_totals[name])
    return found, len(ids)


def with_interval(draws: np.ndarray) -> dict[str, float | None]:
    """Returns a figure, the first of float64[R], with its interval by the others; None for no figure."""
    if not np.isfinite(draws[0]):
        return {"value": None, "low": None, "high": None}
    if not np.isfinite(draws[1:]).any():
        return {"value": float(draws[0]), "low": None, "high": None}
    found = interval(float(draws[0]), draws[1:])
    return {"value": found.figure, "low": found.low, "high": found.high}


# Measures of the most readable neurons of a basis.


def readable(layers: Sequence[Figures], count: int = READABLE) -> list[Neuron]:
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


def detect(search: DetectorSearch, block: NeuronBlock, number: int, n_tokens: int) -> Detector:
    """Returns the best detector of a neuron of a layer."""
    is_active = np.zeros(n_tokens, bool)
    is_active[block.one(number).tokens] = True
    return search.best(is_active)


def detector_search(text: CardText, pieces: Sequence[bytes]) -> DetectorSearch:
    """Makes the search on a text, given the bytes of each of the V tokens."""
    of_tokens = [pieces[token] for token in text.token_ids]
    return DetectorSearch(text.token_ids, text.document_of, text.previous_ids, of_tokens)


def specificity(
    config: ModelConfig,
    params: transformer.Parameters,
    text: CardText,
    neurons: Sequence[Neuron],
    targets: Sequence[np.ndarray],
    *,
    separator_id: int,
    samples: int,
    seed: int = 0,
    report: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """Measures by how much the loss rises without a neuron, at its own targets and elsewhere.

    Args:
        config: The model.
        params: Its parameters.
        text: Read from its beginning.
        neurons: Of the model.
        targets: int[n] of each, next tokens that it should raise.
        separator_id: Of the tokenizer.
        samples: Tokens of each neuron, at most.
        seed: Of the draw.
        report: Told which share of the work is done.

    Returns:
        "own" and "elsewhere", each the mean of "effect" in nats, its "standard_error" and "samples", over all
        samples of all neurons; and "neurons", how many of those that have both have the higher mean at their
        own targets.
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
    drawn = ablation.draw(
        layers,
        token_ids,
        bounds,
        config,
        params,
        separator_id=separator_id,
        samples=wanted,
        seed=seed,
        report=report,
    )
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
        "neurons": {"higher_at_own": higher, "compared": len(both)},
    }


def _mean_of(effects: Sequence[float]) -> dict[str, Any]:
    n = len(effects)
    error = float(np.std(effects, ddof=1) / n**0.5) if n > 1 else None
    return {"effect": float(np.mean(effects)) if n else None, "standard_error": error, "samples": n}


# Probing.


def probing_entry(
    scores: probing.Scores, random: probing.Scores | None, ks: Sequence[int] = probing.KS
) -> dict[str, Any]:
    """Returns means over questions with their intervals, for JSON; and the same less those of the rotation.

    The differences are paired over questions, the standard error is over them as well.
    """
    entry: dict[str, Any] = {}
    for name in ("auc", "balanced_accuracy"):
        own = getattr(scores, name)
        entry[name] = {str(k): with_interval(own[:, at].mean(axis=0)) for at, k in enumerate(ks)}
        if random is not None:
            gaps = own - getattr(random, name)
            entry.setdefault("less_random", {})[name] = {
                str(k): {
                    **with_interval(gaps[:, at].mean(axis=0)),
                    "standard_error": _standard_error(gaps[:, at, 0]),
                }
                for at, k in enumerate(ks)
            }
    return entry


def _standard_error(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
