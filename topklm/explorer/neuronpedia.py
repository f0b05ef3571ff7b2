"""Writes what is known of neurons as the files that Neuronpedia imports in bulk.

    DIR/{model}/{source}/release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl    one line each
    DIR/{model}/{source}/features/batch-0.jsonl.gz        a line for each neuron
    DIR/{model}/{source}/activations/batch-0.jsonl.gz     a line for each example of these neurons
    DIR/{model}/{source}/explanations/batch-0.jsonl.gz    a line for each label that a person gave; if any

A source is a layer. Numbers are the store's and the table's own; nothing is rounded. Names of columns are
those of Neuronpedia's schema and of SAEDashboard's `neuronpedia_export.py`. Every row of a kind has the same
columns, for the import takes those of a file's first line. A column that has a default over there and nothing
to do with us is left out, `createdAt` for instance, so the same store gives the same files. In our terms:

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

from collections.abc import Iterable, Iterator, Mapping, Sequence
import functools
import gzip
import itertools
import json
from pathlib import Path
import re
from typing import Any, NamedTuple

import numpy as np

from topklm.checkpoint.run_folder import saved_config
from topklm.errors import UserError
from topklm.explorer.neuron_data import NeuronData, document_starts, window_bounds
from topklm.neurons.capture import RESID_POST, TOPK, hook_name
from topklm.neurons.labels import BETWEEN
from topklm.neurons.statistics.activity import RANGE_PARTS
from topklm.neurons.store import Store
from topklm.progress import Progress
from topklm.storage.files import json_digest, new_folder

# The user whom Neuronpedia's own import scripts name as the creator; its database must hold who is named.
CREATOR_ID = "clkht01d40000jv08hvalcvly"
WINDOW = 128  # tokens around an example

# Neurons in a file. Over there a file becomes one statement, of at most 256 MB.
_BATCH = 256
_COMPRESSION = 3  # of gzip; higher ones take twice the time for a few percent
_CREATOR_NAME = "topklm"
_MODEL_ID = re.compile(r"[a-z0-9_-]{1,128}")
_STRIP = 2**20  # tokens of the store that are read at once

Row = Mapping[str, Any]


def export(
    source: NeuronData,
    out: Path,
    *,
    model_id: str,
    neurons: Iterable[tuple[int, int]] | None = None,
    creator_id: str = CREATOR_ID,
    progress: Progress | None = None,
) -> None:
    """Writes the files; they are there all or not at all. Memory grows neither with text nor with neurons.

    Of all neurons, or of (layer, neuron) each. Over there the model is `model_id`, and all of it belongs to
    the user `creator_id`. UserError if an argument is none of this, the store holds other text than was
    measured, or the disk is full.
    """
    if not _MODEL_ID.fullmatch(model_id):
        raise UserError(
            f"model id = {model_id!r}: must be 1 to 128 small letters, digits, hyphens and underscores; "
            "choose another name"
        )
    measured, n_tokens = source.measured, source.store.n_tokens
    if n_tokens != measured.n_tokens:
        raise UserError(
            f"{source.folder.table} was measured on {measured.n_tokens:,} tokens, and {source.store.folder} "
            f"holds {n_tokens:,}: delete it, and run topklm neurons measure"
        )
    wanted: Sequence[int] = range(source.n_neurons)
    if neurons is not None:
        wanted = sorted({source.number(layer, neuron) for layer, neuron in neurons})
    if not wanted:
        raise UserError("neurons: there are none among those asked for; ask for others")
    labels = {
        place: BETWEEN.join(note.label for note in some if note.holds(measured.step))
        for place, some in source.labels.notes().items()
    }
    phase = (progress or Progress(lambda text: None)).phase("writing neurons", len(wanted))
    with new_folder(out) as folder, phase as report:
        for place, of_layer in itertools.groupby(wanted, lambda number: number // measured.d_model):
            rows = _Rows(source, measured.layers[place], model_id, creator_id)
            path = folder / model_id / rows.source_id
            path.mkdir(parents=True)
            for name, row in rows.headings().items():
                (path / f"{name}.jsonl").write_bytes(_line(row))
            # The same neuron is always in the batch of the same number.
            batches = itertools.groupby(of_layer, lambda number: number % measured.d_model // _BATCH)
            for batch, numbers in batches:
                chosen = {number: source.row(number) for number in numbers}
                for kind, lines in rows.lines(chosen, labels).items():
                    _write(path / kind / f"batch-{batch}.jsonl.gz", lines)
                report(len(chosen))


def _write(path: Path, rows: Iterator[Row]) -> None:
    """Writes a file of lines; none if there are no rows, for the import fails at one without lines."""
    first = next(rows, None)
    if first is None:
        return
    path.parent.mkdir(exist_ok=True)
    # Without a name and a time in it, the same rows give the same bytes.
    with path.open("wb") as file, gzip.GzipFile("", "wb", _COMPRESSION, file, mtime=0) as compressed:
        for row in itertools.chain([first], rows):
            compressed.write(_line(row))


def _line(row: Row) -> bytes:
    return (json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n").encode()


class _ExampleWindow(NamedTuple):
    """Text around an example: its first token as counted in the store, ids int[n], losses float32[n]."""

    begin: int
    ids: np.ndarray
    losses: np.ndarray


def _example_windows(store: Store, positions: np.ndarray) -> list[_ExampleWindow]:
    """Returns the text around tokens int64[M] of a store, in any order, read strip by strip, never held."""
    order = np.argsort(positions, kind="stable")
    found: dict[int, _ExampleWindow] = {}
    for rows in np.split(order, np.flatnonzero(np.diff(positions[order] // _STRIP)) + 1):
        if not len(rows):
            continue
        start, end = max(int(positions[rows[0]]) - WINDOW, 0), int(positions[rows[-1]]) + WINDOW + 1
        ids, losses = store.tokens(start, end), store.losses(start, end)
        # Where a document reaches out of what is read, it reaches further than a window does.
        starts = document_starts(store.documents(start, end))
        _, begins, ends = window_bounds(starts, positions[rows] - start, WINDOW)
        for row, a, b in zip(rows.tolist(), begins.tolist(), ends.tolist(), strict=True):
            found[row] = _ExampleWindow(start + a, ids[a:b].copy(), losses[a:b].copy())
    return [found[row] for row in range(len(positions))]


class _Rows:
    """Makes the rows of one source, which is a layer; `model_id` and `creator_id` are as in `export`."""

    def __init__(self, source: NeuronData, layer: int, model_id: str, creator_id: str):
        self._source, self._measured, self._layer = source, source.measured, layer
        self._model_id, self._creator_id = model_id, creator_id
        self._set_name = f"res-{source.measured.kind}"
        self.source_id = f"{layer}-{self._set_name}"
        self._string = functools.cache(lambda token_id: source.tokenizer.token_strings([token_id])[0])

    def headings(self) -> dict[str, Row]:
        """Makes the rows of the four files that describe what the neurons belong to."""
        measured, config = self._measured, saved_config(self._source.folder.run)
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
                "layers": config.model.n_layers if config else 0,  # which is what SAEDashboard writes
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

    def lines(
        self, rows: Mapping[int, Row], labels: Mapping[tuple[int, int], str]
    ) -> dict[str, Iterator[Row]]:
        """Makes the lines of some neurons by kind, given rows of the statistics by their rising numbers."""
        named = ((row["neuron"], labels.get((self._layer, row["neuron"]))) for row in rows.values())
        return {
            "features": map(self._feature, rows.values()),
            "activations": self._activations(rows),
            "explanations": (self._explanation(neuron, label) for neuron, label in named if label),
        }

    def _feature(self, row: Row) -> Row:
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
            **_empty("topkCosSimIndices topkCosSimValues"),
            **_empty("neuron_alignment_indices neuron_alignment_values neuron_alignment_l1"),
            **_empty("correlated_neurons_indices correlated_neurons_pearson correlated_neurons_l1"),
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
            **_empty("logits_hist_data_bar_heights logits_hist_data_bar_values decoder_weights_dist"),
        }

    def _activations(self, rows: Mapping[int, Row]) -> Iterator[Row]:
        """Yields the neurons' examples in the table's order; UserError if the store does not hold one."""
        positions = [at for row in rows.values() for at in row["examples"] or []]
        windows = iter(_example_windows(self._source.store, np.array(positions, np.int64)))
        for number in self._source.reading_ahead(rows):
            row, bins = rows[number], self._bins(rows[number])
            names = ("examples", "example_activations", "example_parts")
            examples = list(zip(*(row[name] or [] for name in names), strict=True))
            own = list(itertools.islice(windows, len(examples)))
            bounds = [(window.begin, window.begin + len(window.ids)) for window in own]
            found = self._source.activations(self._layer, row["neuron"], bounds)
            for (at, strength, part), window, array in zip(examples, own, found, strict=True):
                values = array.tolist()
                if values[at - window.begin] != strength:
                    raise UserError(
                        f"layer {self._layer}, neuron {row['neuron']}: the store does not hold the examples "
                        "of the statistics: delete neurons.parquet, and run topklm neurons measure"
                    )
                yield self._activation(row["neuron"], at, window, values, bins[part])

    def _activation(
        self, neuron: int, at: int, window: _ExampleWindow, values: list[float], within: Row
    ) -> Row:
        losses = window.losses.tolist()
        if not np.isfinite(window.losses).all():
            losses = [loss if np.isfinite(loss) else None for loss in losses]
        highest = max(values)
        return {
            "id": self._row_id(neuron, at),
            **self._place(neuron),
            "creatorId": self._creator_id,
            "dataIndex": None,
            "dataSource": None,
            "tokens": self._strings(window.ids.tolist()),
            "maxValue": highest,
            "maxValueTokenIndex": values.index(highest),
            "minValue": min(values),
            "values": values,
            "dfaValues": [],
            "dfaTargetIndex": None,
            "dfaMaxValue": None,
            "lossValues": losses,
            "logitContributions": None,
            **within,
            "qualifyingTokenIndex": at - window.begin,
        }

    def _explanation(self, neuron: int, label: str) -> Row:
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
        if not row["examples"]:
            return []
        highest = row["max_activation"]
        bins: list[Row] = [{"binMin": -1.0, "binMax": highest, "binContains": -1.0}]
        # The histogram's bars lie within the parts.
        counts = np.reshape(row["histogram"], (RANGE_PARTS, -1)).sum(axis=1)
        counts[0] += self._measured.n_tokens - row["n_active"]
        for part, count in enumerate(counts.tolist()):
            low, high = (edge / RANGE_PARTS * highest for edge in (part, part + 1))
            bins.append({"binMin": low, "binMax": high, "binContains": count / self._measured.n_tokens})
        return bins

    def _place(self, neuron: int) -> Row:
        return {"modelId": self._model_id, "layer": self.source_id, "index": str(neuron)}

    def _row_id(self, neuron: int, what: int | str) -> str:
        """Returns an id as long as theirs, the same each time, so that rows imported twice are there once."""
        measured = self._measured
        facts = [self._model_id, self.source_id, neuron, what, measured.run, measured.step, measured.n_tokens]
        return "c" + json_digest(facts)[:24]

    def _strings(self, ids: Sequence[int]) -> list[str]:
        return list(map(self._string, ids))


def _empty(names: str) -> Row:
    return {name: [] for name in names.split()}
