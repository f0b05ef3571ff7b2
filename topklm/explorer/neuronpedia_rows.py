"""A neuron's statistics in the columns of Neuronpedia's database.

Names of columns are those of its schema and of SAEDashboard's `neuronpedia_export.py`. Every row of a kind
has the same columns, for the import takes those of a file's first line. A column that has a default over
there and nothing to do with us is left out, `createdAt` for instance, so the same store gives the same files.
In our terms:

- `values`, `lossValues`: of each token of the window the activation, and the token's own loss given those
  before it in its document, in nats.
- `binMin`, `binMax`: between which the example's strength lies, without the lower bound; `binContains`: the
  share of all tokens that do. As over there the lowest bin counts the tokens at which the neuron is not
  active, and the strongest examples have -1, the highest activation, -1.
- `qualifyingTokenIndex`: the example itself; the rest of its window is there to be read.
- `freq_hist_data_*`: how many tokens, and the middle of the part of (0, highest activation].
- `pos_*`, `neg_*`: by the identity lens, which is theirs.
- `correlated_features_l1`: the cosine of the activations of two neurons; SAEDashboard puts that there too.

Nothing we measure is meant by these, which stay empty or null: `correlated_features_pearson`,
`correlated_neurons_*`, `neuron_alignment_*`, `topkCosSim*`, `logits_hist_data_*`, `decoder_weights_dist`,
`vector*`, `dfa*`, `logitContributions`, `dataIndex`, `dataSource`, `num_prompts`, `num_tokens_in_prompt`.
Entropies, monosemanticity, measured ablation effects, the Jacobian lens and likeness of effects have no
columns over there.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError
from topklm.neurons.capture import RESID_POST, TOPK, hook_name
from topklm.neurons.statistics import table
from topklm.neurons.statistics.activity import RANGE_PARTS
from topklm.neurons.store import Store

WINDOW = 128  # tokens around an example

_BLOCK_EVENTS = 2**21  # held at once, some 80 MB with all that is made of them
_STRIP = 2**20  # tokens of the store that are read at once

# Of the statistics, what is used here.
COLUMNS = (
    "neuron",
    "n_active",
    "density",
    "max_activation",
    "histogram",
    "identity_top",
    "identity_top_effects",
    "identity_bottom",
    "identity_bottom_effects",
    "coactive",
    "coactive_similarity",
    "examples",
    "example_activations",
    "example_parts",
)

_CREATOR_NAME = "topklm"

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ExampleWindow:
    """Text around an example.

    Attributes:
        begin: Its first token, counted through the store.
        ids: Of each token.
        values: Activation of the neuron at each token.
        losses: Of each token, nats; None where the store has none.
    """

    begin: int
    ids: list[int]
    values: list[float]
    losses: list[float | None]


class ExampleWindows:
    """Text around M tokens of a store: of one document, `WINDOW` tokens or all it has, the token well inside.

    Args:
        store: Of the text.
        places: int64[M], the tokens, in any order.
    """

    def __init__(self, store: Store, places: np.ndarray):
        shape = len(places), WINDOW
        self._begins, self._lengths = np.zeros(len(places), np.int64), np.zeros(len(places), np.int64)
        self._ids, self._losses = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        order = np.argsort(places, kind="stable")
        # Strip by strip, so that all of a store is read once at most, and never held.
        for rows in np.split(order, np.flatnonzero(np.diff(places[order] // _STRIP)) + 1):
            if len(rows):
                self._read(store, places[rows], rows)

    def around(self, numbers: slice, tokens: np.ndarray, values: np.ndarray) -> Iterator[ExampleWindow]:
        """Yields some of them, with the activations of one neuron.

        Args:
            numbers: Which of the M, from start to stop.
            tokens: int64[E], where in the store the neuron is active, rising.
            values: float32[E].
        """
        begins, lengths = self._begins[numbers], self._lengths[numbers]
        first = np.searchsorted(tokens, begins).tolist()
        stop = np.searchsorted(tokens, begins + lengths).tolist()
        for number, begin, n, a, b in zip(
            range(numbers.start, numbers.stop), begins.tolist(), lengths.tolist(), first, stop, strict=True
        ):
            found = np.zeros(n)
            found[tokens[a:b] - begin] = values[a:b]
            losses = self._losses[number, :n].tolist()
            if not np.isfinite(self._losses[number, :n]).all():
                losses = [loss if np.isfinite(loss) else None for loss in losses]
            yield ExampleWindow(begin, self._ids[number, :n].tolist(), found.tolist(), losses)

    def _read(self, store: Store, places: np.ndarray, rows: np.ndarray) -> None:
        """Reads those around rising places of one strip."""
        start, end = max(int(places[0]) - WINDOW, 0), int(places[-1]) + WINDOW + 1
        documents = store.documents(start, end)
        # Where a document reaches out of what is read, it reaches further than a window does.
        borders = np.flatnonzero(documents[1:] != documents[:-1]) + 1
        bounds = start + np.concatenate([[0], borders, [len(documents)]])
        document = np.searchsorted(bounds, places, side="right")
        first, stop = bounds[document - 1], bounds[document]
        begins = np.maximum(first, np.minimum(places - WINDOW // 2, stop - WINDOW))
        self._begins[rows], self._lengths[rows] = begins, np.minimum(WINDOW, stop - begins)
        taken = np.minimum(begins[:, None] + np.arange(WINDOW) - start, len(documents) - 1)
        self._ids[rows] = store.tokens(start, end)[taken]
        self._losses[rows] = store.losses(start, end)[taken]


def events(
    store: Store, layer: int, rows: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], np.ndarray, np.ndarray]]:
    """Yields rows of the statistics with all events of their neurons.

    Neighbours are read at once, as many as fit into memory.

    Args:
        store: Of the activations.
        layer: Of all the rows.
        rows: With `neuron`, rising, and `n_active`.

    Yields:
        A row; the tokens at which its neuron is active, int64[E], rising; and its values there, float32[E].
    """
    begin = 0
    while begin < len(rows):
        end, n_events = begin + 1, rows[begin]["n_active"]
        while end < len(rows) and rows[end]["neuron"] == rows[end - 1]["neuron"] + 1:
            n_events += rows[end]["n_active"]
            if n_events > _BLOCK_EVENTS:
                break
            end += 1
        block = store.block(layer, rows[begin]["neuron"], rows[end - 1]["neuron"] + 1)
        for row, a, b in zip(rows[begin:end], block.offsets[:-1], block.offsets[1:], strict=True):
            yield row, block.tokens[a:b], block.values[a:b]
        begin = end


class NeuronpediaRows:
    """Makes the rows of one source, which is a layer.

    Args:
        measured: Of the table.
        layer: One of its layers.
        n_layers: Of the model.
        tokenizer: Of the run.
        model_id: Of the model, over there.
        creator_id: Id of the user there to whom all belongs.
    """

    def __init__(
        self,
        measured: table.TableMetadata,
        layer: int,
        n_layers: int,
        tokenizer: Tokenizer,
        model_id: str,
        creator_id: str,
    ):
        self._measured, self._layer, self._n_layers = measured, layer, n_layers
        self._model_id, self._creator_id = model_id, creator_id
        self._set_name = f"res-{measured.kind}"
        self.source_id = f"{layer}-{self._set_name}"
        self._tokenizer, self._texts = tokenizer, dict[int, str]()

    def headings(self) -> dict[str, Row]:
        """Makes the rows of the four files that describe what the neurons belong to."""
        measured = self._measured
        creator = {"creatorId": self._creator_id, "visibility": "PUBLIC"}
        of_model = {"modelId": self._model_id, **creator}
        kind = measured.dictionary or measured.kind
        what = f"{measured.run}, step {measured.step}: neurons of its hidden state ({kind})"
        release = f"{self._model_id}-{self._set_name}"
        return {
            "release": {
                "name": release,
                "description": what,
                "descriptionShort": what,
                "urls": [],
                "creatorName": _CREATOR_NAME,
                **creator,
            },
            "model": {
                "id": self._model_id,
                "displayNameShort": self._model_id,
                "displayName": self._model_id,
                "dimension": measured.d_model,
                "instruct": False,
                "layers": self._n_layers,
                "neuronsPerLayer": measured.d_model,
                "owner": "",
                "website": None,
                **creator,
            },
            "sourceset": {
                "name": self._set_name,
                "description": what,
                "type": "",
                "creatorName": _CREATOR_NAME,
                "urls": [],
                "releaseName": release,
                **of_model,
            },
            "source": {
                "id": self.source_id,
                "setName": self._set_name,
                "num_prompts": None,  # of one length; ours are documents
                "num_tokens_in_prompt": None,
                "dataset": measured.source,
                "notes": f"{measured.n_tokens:,} tokens of {measured.n_documents:,} documents; lossValues "
                "are losses in nats, of each token given those before it",
                **of_model,
            },
        }

    def feature(self, row: Row) -> Row:
        """Returns a neuron."""
        heights = row["histogram"] or []
        highest = row["max_activation"] or 0.0
        hook = TOPK if self._measured.kind == "topk" else RESID_POST
        return {
            **self._place(row["neuron"]),
            "sourceSetName": self._set_name,
            "creatorId": self._creator_id,
            "maxActApprox": highest,
            "hasVector": False,
            "vector": [],
            "vectorLabel": None,
            "vectorDefaultSteerStrength": None,
            "hookName": hook_name(self._layer, hook),
            "topkCosSimIndices": [],
            "topkCosSimValues": [],
            "neuron_alignment_indices": [],
            "neuron_alignment_values": [],
            "neuron_alignment_l1": [],
            "correlated_neurons_indices": [],
            "correlated_neurons_pearson": [],
            "correlated_neurons_l1": [],
            "correlated_features_indices": row["coactive"] or [],
            "correlated_features_pearson": [],
            "correlated_features_l1": row["coactive_similarity"] or [],
            "neg_str": self._strings(row["identity_bottom"] or []),
            "neg_values": row["identity_bottom_effects"] or [],
            "pos_str": self._strings(row["identity_top"] or []),
            "pos_values": row["identity_top_effects"] or [],
            "frac_nonzero": row["density"],
            "freq_hist_data_bar_heights": heights,
            "freq_hist_data_bar_values": [(n + 0.5) / len(heights) * highest for n in range(len(heights))],
            "logits_hist_data_bar_heights": [],
            "logits_hist_data_bar_values": [],
            "decoder_weights_dist": [],
        }

    def activations(self, row: Row, windows: Iterator[ExampleWindow]) -> Iterator[Row]:
        """Yields the examples of a neuron, in the table's order.

        Args:
            row: Of the neuron.
            windows: Around its examples.

        Raises:
            UserError: If an example is not in its window as the table has it.
        """
        bins = self._bins(row)
        examples = (row[name] or [] for name in ("examples", "example_activations", "example_parts"))
        for place, value, part, window in zip(*examples, windows, strict=True):
            at = place - window.begin
            if window.values[at] != value:
                raise UserError(
                    f"layer {self._layer}, neuron {row['neuron']}: the store does not hold the examples "
                    "of the statistics: delete neurons.parquet, and run topklm neurons measure"
                )
            highest = max(window.values)
            yield {
                "id": self._row_id(row["neuron"], place),
                **self._place(row["neuron"]),
                "creatorId": self._creator_id,
                "dataIndex": None,
                "dataSource": None,
                "tokens": self._strings(window.ids),
                "maxValue": highest,
                "maxValueTokenIndex": window.values.index(highest),
                "minValue": min(window.values),
                "values": window.values,
                "dfaValues": [],
                "dfaTargetIndex": None,
                "dfaMaxValue": None,
                "lossValues": window.losses,
                "logitContributions": None,
                **bins[part],
                "qualifyingTokenIndex": at,
            }

    def explanation(self, neuron: int, label: str) -> Row:
        """Returns a label that a person gave a neuron."""
        return {
            "id": self._row_id(neuron, label),
            **self._place(neuron),
            "authorId": self._creator_id,
            "description": label,
            "notes": "a label that a person gave",
            "typeName": None,
            "explanationModelName": None,
        }

    def _bins(self, row: Row) -> list[Row]:
        """Returns by `example_parts`, the bin of an example."""
        if not row["examples"]:
            return []
        highest, n_parts = row["max_activation"], RANGE_PARTS
        bins: list[Row] = [{"binMin": -1.0, "binMax": highest, "binContains": -1.0}]
        # The histogram's bars lie within the parts.
        counts = np.reshape(row["histogram"], (n_parts, -1)).sum(axis=1)
        counts[0] += self._measured.n_tokens - row["n_active"]
        for part, count in enumerate(counts.tolist()):
            low, high = (edge / n_parts * highest for edge in (part, part + 1))
            bins.append({"binMin": low, "binMax": high, "binContains": count / self._measured.n_tokens})
        return bins

    def _place(self, neuron: int) -> Row:
        return {"modelId": self._model_id, "layer": self.source_id, "index": str(neuron)}

    def _row_id(self, neuron: int, what: int | str) -> str:
        """As long as theirs, and the same each time, so that what is imported twice is there once."""
        measured = self._measured
        facts = [self._model_id, self.source_id, neuron, what, measured.run, measured.step, measured.n_tokens]
        return "c" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]

    def _strings(self, ids: Sequence[int]) -> list[str]:
        """Returns each token as a reader would want it, made once."""
        if unknown := [token_id for token_id in set(ids) if token_id not in self._texts]:
            self._texts.update(zip(unknown, self._tokenizer.token_strings(unknown), strict=True))
        return [self._texts[token_id] for token_id in ids]
