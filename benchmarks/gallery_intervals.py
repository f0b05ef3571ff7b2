"""Intervals of the gallery's figures by bootstrap over documents (`benchmarks.bootstrap`).

For each run, layer and figure: median and mean over neurons, from the sample and from each draw. Runs that
read the same text are drawn the same documents, so that their differences have intervals of their own.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import rich.console

from benchmarks import bootstrap
import topklm
from topklm.model import transformer
from topklm.neurons.paths import NeuronsFolder
from topklm.neurons.statistics import embeddings, table
from topklm.neurons.store import Store
from topklm.progress import TerminalProgress

SUMMARIES = ("median", "mean")


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """Of one run.

    Attributes:
        text: Read, and how much of it; runs with the same may be subtracted from each other.
        layers: The model's.
        values: float64[figures, layers, summaries, 1 + R]: from the sample as it is, then from each draw.
    """

    text: str
    layers: tuple[int, ...]
    values: np.ndarray

    def of(self, figure: str, layer: int, summary: str) -> np.ndarray:
        """Returns one figure, float64[1 + R]."""
        at = bootstrap.FIGURES.index(figure), self.layers.index(layer), SUMMARIES.index(summary)
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
    drawn = bootstrap.document_weights(len(read.bounds) - 1, n_draws)
    weights = np.concatenate([np.ones((len(drawn), 1), drawn.dtype), drawn], axis=1)
    values = np.empty((len(bootstrap.FIGURES), len(layers), len(SUMMARIES), 1 + n_draws))
    progress = TerminalProgress(rich.console.Console())
    with progress.phase(f"drawing documents of {folder.run.name}", len(layers) * measured.d_model) as report:
        for at, layer in enumerate(layers):
            found = bootstrap.resample(store, layer, read, weights, lambda n: report(n, 0, 0))
            for number, name in enumerate(bootstrap.FIGURES):
                in_table = rows.filter(pa.compute.equal(rows["layer"], layer))[name].to_numpy()
                # The very figures of the table, or else these intervals would be of something else.
                np.testing.assert_allclose(found[name][:, 0], in_table.astype(float), rtol=1e-3, atol=1e-5)
                summaries = bootstrap.summaries(found[name])
                values[number, at] = [summaries[summary] for summary in SUMMARIES]
    np.save(kept, values)
    return Drawn(text, layers, values)


def of_run(drawn: Drawn) -> dict[int, Any]:
    """Computes intervals by layer, figure and summary."""
    return {
        layer: {
            figure: {summary: _interval(drawn.of(figure, layer, summary)) for summary in SUMMARIES}
            for figure in bootstrap.FIGURES
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
            for figure in bootstrap.FIGURES
        ]
    )
    return of_run(Drawn(drawn.text, both, values))


def _interval(values: np.ndarray) -> dict[str, float]:
    found = bootstrap.interval(float(values[0]), values[1:])
    return {name: round(value, 5) for name, value in dataclasses.asdict(found).items()}


def _text(folder: NeuronsFolder, store: Store, measured: table.TableMetadata) -> bootstrap.Text:
    """Returns the text, with the clusters and contexts of the table."""
    model = topklm.load(str(folder.run), step=folder.step)
    columns = np.asarray(transformer.bind(model.config.model, model.params).unembedding())
    unembedding = columns[:, : model.config.model.vocab_size]
    token_ids, bounds = store.tokens(0, store.n_tokens), store.document_bounds()
    of_token = embeddings.cluster_tokens(
        unembedding, measured.details["n_clusters"], measured.details["seed"]
    )
    around = embeddings.Contexts(token_ids, bounds, embeddings.token_vectors(unembedding))
    vectors = bootstrap.embed_all(around, store.n_tokens)
    return bootstrap.Text(token_ids, of_token[token_ids], bounds, vectors)
