"""The traces of a run for pages: the data of each neuron at each step, as plain values and for the JSON API.

A trace holds figures, top tokens and the places of five examples for each neuron and step, so that pages of a
step need no store and no index of it. The text is that of the reference's store.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from topklm.errors import UserError
from topklm.explorer import traced
from topklm.explorer.markup import Link
from topklm.explorer.neuron_data import NeuronRows, NotThereError, RowReader, holds_every_neuron
from topklm.explorer.views import LabelOf, snippets, summary
from topklm.neurons.statistics import catalog
from topklm.neurons.statistics.catalog import Figure
from topklm.neurons.statistics.table import TableMetadata
from topklm.neurons.store import NeuronBlock, Store
from topklm.trace import tables
from topklm.trace.summary import CARRIED, MEDIANS, SHARE_BEST, WRITTEN, Summary, onset_counts
from topklm.trace.tables import TraceFolder

_KEPT_STEPS = 3  # whose rows are held for pages
_KEPT_TRACES = 8
_AGAIN = "delete the trace, and run topklm trace run"

# Columns of a trace beside those of `catalog`.
FIGURES: Sequence[Figure] = tuple(
    Figure(name, title, tables.DEFINITIONS[name][1], kind="correlation", first=bool(note), note=note)
    for name, title, note in (
        ("r_reference", "r, reference", "best other index {r_other} · tokens shifted {r_shifted}"),
        ("jaccard_reference", "Jaccard, reference", "of ten strongest tokens {top_reference}"),
        ("r_other", "r, best other index", ""),
        ("r_shifted", "r, tokens shifted", ""),
        ("r_matched", "r, one-to-one match", ""),
        ("r_previous", "r, step before", ""),
        ("top_reference", "Jaccard, strongest tokens", ""),
        ("lens_reference", "Lens cosine", ""),
    )
)
FORMATION: Sequence[Figure] = tuple(
    Figure(name, title, tables.FORMATION_DEFINITIONS[name][1], kind=kind, unit=unit, first=first)
    for name, title, kind, unit, first in (
        ("onset_50", "Onset .5", "count", "step", True),
        ("onset_90", "Onset .9", "count", "step", True),
        ("onset_excess", "Onset, excess", "count", "step", False),
        ("onset_best", "Onset, own index", "count", "step", False),
        ("stage0_r", "r at first", "correlation", "", True),
        ("turnovers", "Turnovers", "count", "steps", True),
        ("settled", "Settled", "flag", "", True),
    )
)
_OF_CATALOG = {*tables.NEURONS.names, "max_activation"}  # the latter is that of the strongest example

# Columns of a neuron over the steps.
CURVES = (
    *("r_reference", "r_other", "r_shifted", "jaccard_reference", "n_active", "density"),
    *("token_entropy_corrected", "semantic_entropy_corrected", "by_token"),
)


class StepData(NeuronRows):
    """The neurons at a step of a trace, known at their examples; those of other pages too if `is_own`."""

    is_own = True

    @property
    def figures(self) -> Mapping[str, Figure]:
        """Those of the trace, and those of the catalog that it has."""
        known = {name: one for name, one in catalog.numbers().items() if name in _OF_CATALOG}
        entropy = known["semantic_entropy_corrected"]
        note = entropy.note.replace(" of {n_clusters} clusters", " clusters")  # not in a trace
        known[entropy.name] = dataclasses.replace(entropy, note=note)
        return {one.name: one for one in (*FORMATION, *FIGURES)} | known

    def named(self) -> dict[tuple[int, int], str]:
        """Returns labels as pages of this step show them."""
        return super().named() if self.is_own else {}

    def events(self, layer: int, neuron: int) -> NeuronBlock:
        """Returns the events of the examples."""
        row = self.row(self.number(layer, neuron), ["examples", "example_activations"])
        at = np.array(row["examples"] or (), np.int64)
        order = np.argsort(at)
        values = np.array(row["example_activations"] or (), np.float32)
        return NeuronBlock(np.array([0, len(at)]), at[order], values[order])

    def counted(self, layer: int, neuron: int, ids: Sequence[int]) -> list[int] | None:
        """Returns None: a trace does not hold at which tokens a neuron is active."""
        return None

    def loss(self, at: int, after: int | None = None) -> float | None:
        """Returns None: losses of the store are those of the reference."""
        return None


class TraceData:
    """One trace of the run that `source` is of; UserError for one that is damaged, or of other tokens."""

    def __init__(self, folder: TraceFolder, source: NeuronRows, is_own: bool):
        self.folder, self.summary = folder, Summary(folder)
        self._source, self._is_own = source, is_own
        self.settings, self.steps = self.summary.settings, self.summary.steps
        self.name = folder.path.name
        if self.settings.tokenizer_sha256 != source.tokenizer.sha256:
            raise UserError(f"{folder.path} was made with another tokenizer: {_AGAIN}")
        self.at = functools.lru_cache(_KEPT_STEPS)(self._at)
        self._reader = functools.cache(lambda name: RowReader(self._rows[name]))
        self._formed = functools.cache(lambda name: RowReader(self.formation[name]))

    def number(self, layer: int, neuron: int) -> int | None:
        """Returns which row a neuron has in each step; None if it is not traced."""
        layers, width = self.settings.layers, self.settings.width
        return layers.index(layer) * width + neuron if layer in layers and neuron < width else None

    def _at(self, step: int) -> StepData:
        if step not in self.steps:
            raise NotThereError(f"step {step}: must be one of {', '.join(map(str, self.steps))}")
        settings, source = self.settings, self._source
        rows = _as_catalog(self.folder.read_step("neurons", step))
        for figure in FORMATION:
            rows = rows.append_column(figure.name, self.formation[figure.name])
        measured = TableMetadata(
            run=settings.run,
            step=step,
            tokenizer_sha256=settings.tokenizer_sha256,
            kind=settings.kind,
            layers=settings.layers,
            d_model=settings.width,
            topk_k=settings.keep,
            source=settings.source,
            n_tokens=settings.n_tokens,
            n_documents=len(self._store.document_bounds()) - 1,
            embedding=f"the unembedding rows of step {settings.reference:,}",
            n_clusters=0,  # not in the trace
            details={},
            dictionary=settings.dictionary,
        )
        origin = (self.folder.path / "neurons" / f"{step}.parquet", _AGAIN)
        found = StepData(rows, measured, self._store, source.tokenizer, source.labels, origin)
        found.is_own = self._is_own
        return found

    @functools.cached_property
    def _store(self) -> Store:
        return Store(self.folder.store(self.settings.reference))

    @functools.cached_property
    def formation(self) -> pa.Table:
        """The table over all steps, a row for each neuron in the order of `number`; settled is 1 or 0."""
        found = self.summary.formation
        at = found.schema.get_field_index("settled")
        return self._checked(found.set_column(at, "settled", found["settled"].cast(pa.int8())), 1)

    @functools.cached_property
    def _rows(self) -> pa.Table:
        rows = self.folder.read("neurons", ["layer", "neuron", *CURVES, "top_tokens"])
        return self._checked(rows, len(self.steps))

    def _checked(self, rows: pa.Table, n_steps: int) -> pa.Table:
        if not holds_every_neuron(rows, self.settings.layers, self.settings.width, n_steps):
            raise UserError(f"{self.folder.path} does not hold every neuron once a step: {_AGAIN}")
        return rows.combine_chunks()

    def over_steps(self, number: int, name: str) -> list[Any]:
        """Returns a column of `CURVES`, or top_tokens, of a neuron at each step, as plain values."""
        reader, n = self._reader(name), self.formation.num_rows
        return [reader[place * n + number] for place in range(len(self.steps))]

    def texts(self, ids: Sequence[int]) -> list[str]:
        """Returns each token as a page shows it."""
        return self._source.texts(ids)

    def of_pair(self, a: int, b: int) -> dict[str, np.ndarray]:
        """Returns medians of two layers, and what other pairs of their neurons have, float64[C] each."""
        found = self.summary.of_pair(a, b)
        if b == a + 1 and b in self.settings.layers:
            of_layer = self.summary.of_layer(b)
            found |= {name: of_layer[name] for name in (CARRIED, "r_written_other") if name in of_layer}
        rows = self._pairs
        at = (tables.numbers(rows, "layer_a") == a) & (tables.numbers(rows, "layer_b") == b)
        if at.any():
            found |= {name: tables.numbers(rows, name)[at] for name in rows.column_names if "other" in name}
        return found

    @functools.cached_property
    def _pairs(self) -> pa.Table:
        return self.folder.read("pairs")

    def formed(self, number: int) -> dict[str, Any]:
        """Returns the figures of `FORMATION` of a neuron."""
        return {figure.name: self._formed(figure.name)[number] for figure in FORMATION}


class Traces:
    """All traces of a run; one is read again when it has become longer."""

    def __init__(self, run: Path, source: NeuronRows):
        self._run, self._source = run, source
        self._opened = functools.lru_cache(_KEPT_TRACES)(self._open)

    def names(self) -> list[str]:
        """Lists the traces, first the one of the neurons that pages show."""
        return sorted(tables.names(self._run), key=lambda name: (name != self.own_name, name))

    @property
    def own_name(self) -> str:
        """The trace of the neurons that pages show; "" where these are codes of a dictionary."""
        measured = self._source.measured
        if measured.dictionary:
            return ""
        return tables.PLAIN if measured.kind == "topk" else tables.name_of("coordinates")

    @property
    def command(self) -> str:
        """The command that makes the trace of these neurons."""
        flag = "" if self.own_name == tables.PLAIN else " --dictionary coordinates"
        return f"topklm trace run {self._run}{flag}"

    def open(self, name: str) -> TraceData:
        """Opens a trace by name; NotThereError for one that there is not, UserError for a damaged one."""
        if name not in (names := self.names()):
            allowed = f"must be one of {', '.join(names)}" if names else f"there is none; run {self.command}"
            raise NotThereError(f"trace {name}: {allowed}")
        folder = TraceFolder(self._run, name)
        formed = folder.path / "formation.parquet"
        written = formed.stat().st_mtime_ns if formed.exists() else 0
        return self._opened(name, tuple(folder.steps()), written)

    def _open(self, name: str, steps: tuple[int, ...], written: int) -> TraceData:
        return TraceData(TraceFolder(self._run, name), self._source, name == self.own_name)

    def own(self) -> TraceData | None:
        """Opens the trace of these neurons; None if there is none, UserError for a damaged one."""
        return self.open(self.own_name) if self.own_name in self.names() else None


def _as_catalog(rows: pa.Table) -> pa.Table:
    """Returns rows of a step with all columns of the catalog, null where a trace has none."""
    activations, places = (rows[name].to_pylist() for name in ("example_activations", "examples"))
    made = {
        "max_activation": [max(values) if values else None for values in activations],
        "example_parts": [[0] * len(at or ()) for at in places],  # all are of the strongest
    }
    for field in catalog.schema():
        if field.name not in rows.column_names:
            values = made.get(field.name, [None] * rows.num_rows)
            rows = rows.append_column(field.name, pa.array(values, field.type))
    return rows


_TOKENS = 3  # of a neuron at a step, in its strip
_SNIPPETS = 3  # of a card
_DRAWN_LAYERS = 4  # whose curves are told apart in one plot

# Rows of tables of two layers: column of `Summary.of_pair`, or of the table "pairs"; title; whether a null.
_PAIR_ROWS: Sequence[tuple[str, str, Sequence[tuple[str, str, bool]]]] = (
    (
        "r of the same index in two layers",
        "Median over living neurons. Beside it all other pairs of neurons of the two layers.",
        (
            ("r", "same index", False),
            ("r_other_50", "other indices, median", True),
            ("r_other_95", "other indices, 95 %", True),
        ),
    ),
    (
        "What a layer writes",
        "r of a layer's output with the part that its attention and MLP wrote, without what the residual "
        "stream carried on; beside it the next index, and r of the written part with the layer's input.",
        (
            (WRITTEN, "written, same index", False),
            ("r_written_other", "written, next index", True),
            ("r_written_input", "written, with the input", False),
        ),
    ),
    (
        "What the stream carries",
        "Share of a layer's kept value that the residual stream brought from the layer below.",
        ((CARRIED, "carried", False),),
    ),
    (
        "Tokens in common",
        "Jaccard index of the tokens at which the same index is active in both layers; of the next index.",
        (("jaccard", "same index", False), ("jaccard_other", "next index", True)),
    ),
    (
        "The same index is the best",
        "Share of living neurons that no other index of the other layer is more like; 1 / D by chance.",
        ((SHARE_BEST, "same index is best", False),),
    ),
)


def life(trace: TraceData, layer: int, neuron: int) -> dict[str, Any] | None:
    """Returns a neuron at each step, and when it formed; None where its layer is not traced."""
    number = trace.number(layer, neuron)
    if number is None:
        return None
    columns = {name: trace.over_steps(number, name) for name in CURVES}
    tokens = [(ids or [])[:_TOKENS] for ids in trace.over_steps(number, "top_tokens")]
    formed, settings = trace.formed(number), trace.settings
    return {
        "reference": settings.reference,
        "n_tokens": settings.n_tokens,
        "min_tokens": settings.min_tokens,
        "formation": formed,
        "steps": [
            {
                "step": step,
                **{name: values[place] for name, values in columns.items()},
                "tokens": trace.texts(tokens[place]),
                "onsets": [name for name in ("onset_50", "onset_90") if formed[name] == step],
            }
            for place, step in enumerate(trace.steps)
        ],
    }


def life_said(life: Mapping[str, Any]) -> str:
    """Returns in a sentence when a neuron formed."""
    formed = life["formation"]
    reference = f"step\N{NO-BREAK SPACE}{life['reference']:,}"
    if formed["turnovers"] is None:
        return f"No onset: active at fewer than {life['min_tokens']} tokens of {reference}, the reference."
    said = []
    for name, level in (("onset_50", ".5"), ("onset_90", ".9")):
        step = formed[name]
        said.append(f"{level} " + ("never" if step is None else f"from step\N{NO-BREAK SPACE}{step:,} on"))
    turns = formed["turnovers"]
    return (
        f"r with {reference} on {life['n_tokens']:,} tokens; above {', above '.join(said)}; "
        f"{turns} turnover{'' if turns == 1 else 's'} of its strongest tokens; "
        f"{'' if formed['settled'] else 'not '}settled at {reference}."
    )


def at_step(source: StepData, layer: int, neuron: int, labels: LabelOf) -> dict[str, Any]:
    """Returns a neuron as the card of a step shows it."""
    number = source.number(layer, neuron)
    found = [snippet for snippet, _ in zip(snippets(source, number), range(_SNIPPETS), strict=False)]
    return {**summary(source, number, labels), "step": source.measured.step, "snippets": found}


def step_links(
    steps: Sequence[int], current: int, address: Callable[[int | None], str], now: int
) -> dict[str, Any]:
    """Returns the links of a slider over steps, `address(None)` for `now`; None beyond its ends."""
    every = sorted({*steps, now})
    links = [
        {"step": step, "address": address(None if step == now else step), "current": step == current}
        for step in every
    ]
    at = every.index(current)
    return {
        "at": at,
        "links": links,
        "earlier": links[at - 1]["address"] if at else None,
        "later": links[at + 1]["address"] if at + 1 < len(links) else None,
    }


def formation(trace: TraceData) -> dict[str, Any]:
    """Returns what `/formation` shows of one trace beside its table: medians, onsets, change points."""
    own = trace.summary
    layers = []
    for layer in trace.settings.layers:
        onsets = {name: own.onsets(layer, name) for name in ("onset_50", "onset_90")}
        layers.append(
            {
                "layer": layer,
                "living": int(own.living[layer].sum()),
                "medians": {name: plain(values) for name, values in own.of_layer(layer).items()},
                "onsets": {name: onset_counts(steps) for name, steps in onsets.items()},
            }
        )
    return {
        "trace": trace.name,
        "about": tables.described(trace.settings),
        "reference": trace.settings.reference,
        "min_tokens": trace.settings.min_tokens,
        "steps": trace.steps,
        "values": {name: plain(values) for name, values in own.values().items()},
        "medians": {name: plain(own.over_layers(name)) for name in MEDIANS},
        "changes": own.changes(1),
        "layers": layers,
    }


def layers(trace: TraceData) -> dict[str, Any]:
    """Returns the figures of two layers at each step, in groups; rows are medians, or chance."""
    groups = []
    for title, about, wanted in _PAIR_ROWS:
        rows = []
        for a, b in trace.summary.pairs():
            found = trace.of_pair(a, b)
            rows += [
                {
                    "layer_a": a,
                    "layer_b": b,
                    "title": name,
                    "null": null,
                    "column": column,
                    "values": plain(found[column]),
                }
                for column, name, null in wanted
                if column in found and np.isfinite(found[column]).any()
            ]
        if rows:
            groups.append({"title": title, "about": about, "rows": rows})
    return {
        "trace": trace.name,
        "about": tables.described(trace.settings),
        "steps": trace.steps,
        "groups": groups,
    }


def drawn_formation(trace: TraceData, others: Sequence[TraceData], link: Link | None) -> dict[str, Any]:
    """Draws the figures of `/formation`: one trace, with r of others beside it."""
    own = trace.summary
    found = [own, *(other.summary for other in others)]
    about = "r with the reference, by index: medians over living neurons, and what chance gives."
    curves = [
        ("Identity", about, traced.identity(found)),
        ("Loss and entropies", "Medians over living neurons.", traced.losses(found)),
    ]
    if "kl_bigram" in own.values():
        about = "How far the model's output is from n-grams of the training text."
        curves.append(("Beside n-grams", about, traced.distances(found)))
    return {
        "curves": curves,
        "changes": traced.change_points(found),
        "heat": [(layer, traced.heat(own, layer, link)) for layer in trace.settings.layers],
    }


def drawn_layers(trace: TraceData) -> Any:
    """Draws r of two layers by step; None for layers too many to be told apart."""
    return traced.layers([trace.summary]) if len(trace.settings.layers) <= _DRAWN_LAYERS else None


def plain(values: np.ndarray) -> list[float | None]:
    """Returns numbers for JSON, None for NaN and infinity."""
    return [float(value) if np.isfinite(value) else None for value in values]
