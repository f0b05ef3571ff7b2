"""How far figures of neurons would move with other documents: intervals by bootstrap over documents.

The method is that of `topklm.neurons.card`. Of each draw are computed

- *Entropies*: shares, distinct tokens (clusters) and activations are those of the drawn documents.
- *Monosemanticity*: over pairs of different tokens of the drawn documents. A document that was drawn twice
  counts as two, but is not compared with its own copy, whose contexts are the very same.

Held fixed: the model, the neurons, the clusters and the context embeddings, their centre included.
With few documents (books) an interval says little.
Dims: N tokens, G documents, R draws, D neurons per layer, d width of an embedding.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import rich.console

import topklm
from topklm.model import transformer
from topklm.neurons import NeuronsFolder
from topklm.neurons.card import document_weights, entropy_of_draws, interval, sums_of_draws
from topklm.neurons.statistics import embeddings, table
from topklm.neurons.statistics.embeddings import Embeddings
from topklm.neurons.store import NeuronBlock, Store
from topklm.progress import TerminalProgress

FIGURES = ("token_entropy_corrected", "semantic_entropy_corrected", "monosemanticity")
DRAWS = 1000
SUMMARIES = ("median", "mean")

_BLOCK_NEURONS = 16
_STRETCH = 65_536


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """The text on which neurons are compared."""

    token_ids: np.ndarray  # int[N], the store's tokens
    groups: np.ndarray  # int[N], the cluster of each, from 0
    bounds: np.ndarray  # int64[G + 1], as `Store.document_bounds` gives them
    embeddings: np.ndarray  # float32[N, d], of contexts; see `embed_all`


def embed_all(contexts: Embeddings, n_tokens: int) -> np.ndarray:
    """Embeds the context of every token, float32[N, d]; 4 N d bytes."""
    starts = range(0, n_tokens, _STRETCH)
    return np.concatenate([contexts.at(np.arange(a, min(a + _STRETCH, n_tokens))) for a in starts])


def resample(
    store: Store,
    layer: int,
    text: Text,
    weights: np.ndarray,
    report: Callable[[int], None] = lambda n: None,
) -> dict[str, np.ndarray]:
    """Computes the figures of all neurons of a layer, from each draw.

    Args:
        store: Of activations.
        layer: One of its layers.
        text: The store's.
        weights: [G, R], not negative whole numbers, of any dtype; all 1: the store as it is.
        report: Told how many more neurons are done.

    Returns:
        For each of `FIGURES` float64[D, R]; NaN where a neuron has no such figure in a draw.
    """
    d_model = store.metadata.d_model
    found: dict[str, np.ndarray] = {name: np.empty((d_model, weights.shape[1])) for name in FIGURES}
    for begin in range(0, d_model, _BLOCK_NEURONS):
        end = min(begin + _BLOCK_NEURONS, d_model)
        block = store.block(layer, begin, end)
        for number in range(end - begin):
            for name, figures in of_neuron(block, number, text, weights).items():
                found[name][begin + number] = figures
        report(end - begin)
    return found


def of_neuron(block: NeuronBlock, number: int, text: Text, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Computes the figures of one neuron of a block from each draw, float64[R] each."""
    part = slice(block.offsets[number], block.offsets[number + 1])
    places, strengths = block.tokens[part], np.abs(block.values[part]).astype(np.float64)
    documents = np.searchsorted(text.bounds, places, side="right") - 1
    there, begins = np.unique(documents, return_index=True)  # rising, as places are
    if not len(there):
        return {name: np.full(weights.shape[1], np.nan) for name in FIGURES}
    weights = weights[there].astype(np.float64)
    own = np.searchsorted(there, documents)
    n_active = np.diff([*begins, len(places)]) @ weights

    def entropies(ids: np.ndarray) -> np.ndarray:
        return entropy_of_draws(sums_of_draws(ids, own, strengths, weights)[1], n_active)

    return {
        "token_entropy_corrected": entropies(text.token_ids[places]),
        "semantic_entropy_corrected": entropies(text.groups[places]),
        "monosemanticity": _pairs(text.embeddings[places], begins, strengths, weights, n_active),
    }


def summaries(figures: np.ndarray) -> Mapping[str, np.ndarray]:
    """Returns median and mean over neurons that have them, of figures float64[D, R]: float64[R] each."""
    with np.errstate(invalid="ignore"):
        return {"median": np.nanmedian(figures, axis=0), "mean": np.nanmean(figures, axis=0)}


# Intervals of runs, for the gallery.


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """Of one run."""

    text: str  # read, and how much of it; runs with the same may be subtracted from each other
    layers: tuple[int, ...]  # the model's
    values: np.ndarray  # float64[figures, layers, summaries, 1 + R]: from the sample, then from each draw

    def of(self, figure: str, layer: int, summary: str) -> np.ndarray:
        """Returns one figure, float64[1 + R]."""
        at = FIGURES.index(figure), self.layers.index(layer), SUMMARIES.index(summary)
        return self.values[at]


def draw(folder: NeuronsFolder, layers: Sequence[int], n_draws: int) -> Drawn:
    """Resamples the documents of a run's store; kept beside it, for the next time.

    Args:
        folder: Of the run; its table was measured with the model's own unembedding.
        layers: Those to look at.
        n_draws: R.
    """
    store = Store(folder.store)
    text = f"{store.metadata.source}, {store.n_tokens} tokens"
    layers = tuple(layer for layer in layers if layer in store.metadata.layers)
    kept = folder.path / f"bootstrap-{n_draws}-{'-'.join(map(str, layers))}.npy"
    if kept.exists() and kept.stat().st_mtime > folder.table.stat().st_mtime:
        return Drawn(text, layers, np.load(kept))
    rows, measured = table.read(folder.table)
    read = _text(folder, store, measured)
    drawn = document_weights(len(read.bounds) - 1, n_draws)
    weights = np.concatenate([np.ones((len(drawn), 1), drawn.dtype), drawn], axis=1)
    values = np.empty((len(FIGURES), len(layers), len(SUMMARIES), 1 + n_draws))
    progress = TerminalProgress(rich.console.Console())
    with progress.phase(f"drawing documents of {folder.run.name}", len(layers) * measured.d_model) as report:
        for at, layer in enumerate(layers):
            found = resample(store, layer, read, weights, lambda n: report(n, 0, 0))
            for number, name in enumerate(FIGURES):
                in_table = rows.filter(pa.compute.equal(rows["layer"], layer))[name].to_numpy()
                # The very figures of the table, or else these intervals would be of something else.
                np.testing.assert_allclose(found[name][:, 0], in_table.astype(float), rtol=1e-3, atol=1e-5)
                both = summaries(found[name])
                values[number, at] = [both[summary] for summary in SUMMARIES]
    np.save(kept, values)
    return Drawn(text, layers, values)


def of_run(drawn: Drawn) -> dict[int, Any]:
    """Computes intervals by layer, figure and summary."""
    return {
        layer: {
            figure: {summary: _interval(drawn.of(figure, layer, summary)) for summary in SUMMARIES}
            for figure in FIGURES
        }
        for layer in drawn.layers
    }


def of_difference(drawn: Drawn, less: Drawn) -> dict[int, Any] | None:
    """Returns the same of one run less another; None if they did not read the same text."""
    if drawn.text != less.text:
        return None
    both = tuple(layer for layer in drawn.layers if layer in less.layers)
    values = np.stack(
        [
            [[drawn.of(figure, layer, s) - less.of(figure, layer, s) for s in SUMMARIES] for layer in both]
            for figure in FIGURES
        ]
    )
    return of_run(Drawn(drawn.text, both, values))


def _interval(values: np.ndarray) -> dict[str, float]:
    found = interval(float(values[0]), values[1:])
    return {name: round(value, 5) for name, value in dataclasses.asdict(found).items()}


def _text(folder: NeuronsFolder, store: Store, measured: table.TableMetadata) -> Text:
    """Returns the text, with the clusters and contexts of the table."""
    model = topklm.load(str(folder.run), step=folder.step)
    columns = np.asarray(transformer.bind(model.config.model, model.params).unembedding())
    unembedding = columns[:, : model.config.model.vocab_size]
    token_ids, bounds = store.tokens(0, store.n_tokens), store.document_bounds()
    of_token = embeddings.cluster_tokens(
        unembedding, measured.details["n_clusters"], measured.details["seed"]
    )
    around = embeddings.Contexts(token_ids, bounds, embeddings.token_vectors(unembedding))
    vectors = embed_all(around, store.n_tokens)
    return Text(token_ids, of_token[token_ids], bounds, vectors)


def _pairs(
    embeddings: np.ndarray,
    begins: np.ndarray,
    strengths: np.ndarray,
    weights: np.ndarray,
    n_active: np.ndarray,
) -> np.ndarray:
    """Computes `monosemanticity` of each draw: float64[R].

    With A_g = sum of a e over document g, and W_g how often it was drawn, pairs of different documents add up
    to |sum of W_g A_g|^2 - sum of W_g^2 |A_g|^2, and those within one, W_g times, to |A_g|^2 - sum of
    a^2 |e|^2.
    """
    weighed = embeddings * strengths[:, None]
    vectors = np.add.reduceat(weighed, begins, axis=0)
    lengths = np.square(vectors).sum(axis=1)
    own = np.add.reduceat(np.square(strengths) * np.einsum("nd,nd->n", embeddings, embeddings), begins)
    totals = np.add.reduceat(strengths, begins)
    squares = np.add.reduceat(np.square(strengths), begins)
    more = weights - np.square(weights)
    similar = np.square(vectors.T @ weights).sum(axis=0) + lengths @ more - own @ weights
    pairs = np.square(totals @ weights) + np.square(totals) @ more - squares @ weights
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((n_active < 2) | (pairs <= 0), np.nan, similar / pairs)
