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
import hashlib
import json
from typing import Any

import numpy as np

from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError
from topklm.explorer.neuronpedia import Window
from topklm.neurons import hook_names
from topklm.neurons.statistics import table
from topklm.neurons.statistics.examples import RANGE_PARTS

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


class Rows:
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
        measured: table.Measured,
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
        hook = hook_names.TOPK if self._measured.kind == "topk" else hook_names.RESID_POST
        return {
            **self._place(row["neuron"]),
            "sourceSetName": self._set_name,
            "creatorId": self._creator_id,
            "maxActApprox": highest,
            "hasVector": False,
            "vector": [],
            "vectorLabel": None,
            "vectorDefaultSteerStrength": None,
            "hookName": hook_names.name(self._layer, hook),
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

    def activations(self, row: Row, windows: Iterator[Window]) -> Iterator[Row]:
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
