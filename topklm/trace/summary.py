"""Figures of a trace in a few numbers: medians over neurons, by step and layer, beside their nulls.

Neurons that are active at fewer than `min_tokens` tokens of the reference are in none of them.
"""

from collections.abc import Iterable, Mapping, Sequence
import functools
from typing import Any

import numpy as np
import pyarrow as pa

from topklm.errors import UserError
from topklm.neurons.store import Store
from topklm.trace import changes, language, measure, tables
from topklm.trace.language import Relation
from topklm.trace.tables import Settings, TraceFolder

# Columns whose median is shown, by their titles in tables of at most 80 columns.
MEDIANS: Mapping[str, str] = {
    "r_reference": "r, same index",
    "r_other": "null: best other index",
    "r_shifted": "null: tokens shifted",
    "r_matched": "r, one-to-one match",
    "r_previous": "r to the step before",
    "jaccard_reference": "Jaccard, active tokens",
    "top_reference": "Jaccard, top 10 tokens",
    "lens_reference": "lens cosine",
    "token_entropy": "token entropy",
    "semantic_entropy": "semantic entropy",
    "by_token": "explained by the token",
    "by_context": "by the token before",
}
SHARE_BEST, CARRIED, WRITTEN = "same_is_best", "carried", "r_written"
TITLES: Mapping[str, str] = {
    **MEDIANS,
    SHARE_BEST: "same index is best",
    CARRIED: "carried by the stream",
    WRITTEN: "r, written by the layer",
    "r_written_other": "null: next index",
}
_CHANGING = ("r_reference", "jaccard_reference", "token_entropy", "semantic_entropy", "by_token")
_STRONG = 0.5  # r from which on a match counts


class Summary:
    """The figures of one trace; tables are read when they are needed."""

    def __init__(self, folder: TraceFolder):
        self.folder, self.settings = folder, folder.settings()
        self.steps = folder.steps()
        if not self.steps:
            raise UserError(f"{folder.path}: no step is traced yet; run topklm trace run")

    @property
    def name(self) -> str:
        """The run, and the dictionary if there is one."""
        settings = self.settings
        return f"{settings.run} {settings.dictionary}".strip()

    @functools.cached_property
    def run(self) -> pa.Table:
        """A row for each step."""
        return self.folder.read("run")

    @functools.cached_property
    def formation(self) -> pa.Table:
        """A row for each neuron."""
        return self.folder.read_formation()

    @functools.cached_property
    def _neurons(self) -> pa.Table:
        return self.folder.read("neurons", ["layer", *MEDIANS, "best", "n_active", "mean_activation"])

    @functools.cached_property
    def _layers(self) -> pa.Table:
        return self.folder.read("layers")

    @functools.cached_property
    def living(self) -> Mapping[int, np.ndarray]:
        """bool[n] of each layer, which neurons are counted."""
        at = tables.numbers(self.formation, "layer")
        enough = tables.numbers(self.formation, "n_active") >= self.settings.min_tokens
        return {layer: enough[at == layer] for layer in self.settings.layers}

    def curves(self, layer: int, name: str) -> np.ndarray:
        """Returns a column of `tables.NEURONS` of a layer, float64[C, n] over C steps."""
        if name not in self._neurons.column_names:
            rows = self.folder.read("neurons", ["layer", name])
        else:
            rows = self._neurons
        return _of(rows, name, tables.numbers(rows, "layer") == layer, len(self.steps))

    def of_layer(self, layer: int) -> dict[str, np.ndarray]:
        """Returns the figures of a layer, float64[C] each, by the names in `TITLES`."""
        alive = self.living[layer]
        found = {name: _median(self.curves(layer, name)[:, alive]) for name in MEDIANS}
        is_best = self.curves(layer, "best")[:, alive] == np.flatnonzero(alive)
        found[SHARE_BEST] = is_best.mean(axis=1) if alive.any() else np.full(len(self.steps), np.nan)
        carried = self.pair(layer - 1, layer, CARRIED)
        if carried is not None:
            # Of the layer's whole activation, as if all neurons were one.
            kept = self.curves(layer, "n_active") * self.curves(layer, "mean_activation")
            with np.errstate(invalid="ignore"):
                found[CARRIED] = np.nansum(carried * kept, axis=1) / np.nansum(kept, axis=1)
            for name in (WRITTEN, "r_written_other"):
                values = self.pair(layer - 1, layer, name)
                assert values is not None
                found[name] = _median(values[:, alive])
        return found

    def pairs(self) -> list[tuple[int, int]]:
        """Lists the layers that were compared."""
        keys = zip(*(self._layers[name].to_pylist() for name in ("layer_a", "layer_b")), strict=True)
        return sorted(set(keys))

    def pair(self, a: int, b: int, name: str) -> np.ndarray | None:
        """Returns a column of `tables.LAYERS`, float64[C, n]; None where the layers were not compared."""
        rows = self._layers
        at = (tables.numbers(rows, "layer_a") == a) & (tables.numbers(rows, "layer_b") == b)
        found = _of(rows, name, at, len(self.steps)) if at.any() else None
        return None if found is None or np.isnan(found).all() else found

    def of_pair(self, a: int, b: int) -> dict[str, np.ndarray]:
        """Returns medians over the neurons of two layers, float64[C] each."""
        alive, found = self.living[b], {}
        for name in ("r", "jaccard", "jaccard_other", "same_is_best", "r_written", "r_written_input"):
            if (values := self.pair(a, b, name)) is not None:
                chosen = values[:, alive]
                found[name] = np.nanmean(chosen, axis=1) if name == "same_is_best" else _median(chosen)
        return found

    def over_layers(self, name: str) -> np.ndarray:
        """Returns the median over the neurons of all layers, float64[C]."""
        alive = [self.curves(layer, name)[:, self.living[layer]] for layer in self.settings.layers]
        return _median(np.concatenate(alive, axis=1))

    def values(self) -> dict[str, np.ndarray]:
        """Returns the figures of the whole model, float64[C] each."""
        names = [n for n in self.run.column_names if n not in ("step", "previous", "parameters")]
        return {name: tables.numbers(self.run, name) for name in names}

    @functools.cached_property
    def relations(self) -> dict[str, list[Relation]]:
        """How well heads find each relation at each step; none where heads were not measured."""
        rows = self.folder.read("heads").to_pylist()
        found = [language.attachment([row for row in rows if row["step"] == step]) for step in self.steps]
        by_step = [{one.relation: one for one in of_step} for of_step in found]
        return {one.relation: [of_step[one.relation] for of_step in by_step] for one in found[-1]}

    def changes(self, n_breaks: int = 0) -> dict[str, dict[str, Any]]:
        """Returns from which step on each curve rises, and falls, faster than before (`trace.changes`).

        Of the whole model's figures, of the attachment of each relation, and of medians over the neurons of
        all layers. With `n_breaks`, also the steps at which the straight pieces begin that fit a curve best;
        none where it has too few points, or too many.
        """
        medians = {TITLES[name]: self.over_layers(name) for name in _CHANGING}
        relations = {name: np.array([one.uas for one in of]) for name, of in self.relations.items()}
        found = dict[str, dict[str, Any]]()
        for name, curve in {**self.values(), **relations, **medians}.items():
            ways = {way: changes.onset(self.steps, curve, rises=way == "rises") for way in ("rises", "falls")}
            found[name] = ways
            if n_breaks:
                n_known = int(np.isfinite(curve).sum())
                can = changes.points_needed(n_breaks) <= n_known <= changes.MOST_POINTS
                found[name]["breaks"] = changes.breaks(self.steps, curve, n_breaks) if can else []
        return found

    def onsets(self, layer: int, name: str) -> np.ndarray:
        """Returns onsets of a layer's counted neurons, float64[m]; NaN for never."""
        at = tables.numbers(self.formation, "layer") == layer
        return tables.numbers(self.formation, name)[at][self.living[layer]]


def onset_counts(onsets: np.ndarray) -> dict[str, int]:
    """Counts onsets, float64[m], by step, and neurons without one as "never"."""
    steps, n = np.unique(onsets[~np.isnan(onsets)], return_counts=True)
    found = {str(int(step)): int(k) for step, k in zip(steps, n, strict=True)}
    return found | {"never": int(np.isnan(onsets).sum())}


def _of(rows: pa.Table, name: str, at: np.ndarray, n_steps: int) -> np.ndarray:
    return tables.numbers(rows, name)[at].reshape(n_steps, -1)


def _median(values: np.ndarray) -> np.ndarray:
    """Returns the median of each row, NaN left out; NaN where there is nothing else."""
    known = ~np.isnan(values)
    return np.array(
        [np.median(row[at]) if at.any() else np.nan for row, at in zip(values, known, strict=True)]
    )


def columns_of(steps: Sequence[int], count: int) -> list[int]:
    """Chooses at most `count` of C steps for a table, by their numbers: the ends, evenly by logarithm."""
    if len(steps) <= count:
        return list(range(len(steps)))
    at = np.log(np.maximum(steps, 0.5))
    chosen: list[int] = []
    for wanted in np.linspace(at[0], at[-1], count):
        free = [n for n in range(len(steps)) if n not in chosen]
        chosen.append(min(free, key=lambda n: abs(at[n] - wanted)))
    return sorted({0, len(steps) - 1, *chosen[1:-1]})


# Two traces.


def check_same_tokenizer(one: Settings, other: Settings) -> None:
    """Raises UserError for traces of which no figure is of the same tokens."""
    if one.tokenizer_sha256 != other.tokenizer_sha256:
        raise UserError(f"{other.run} has another tokenizer than {one.run}: their tokens cannot be compared")


def why_not_matched(one: Settings, other: Settings) -> str:
    """Returns why neurons of two traces cannot be compared token by token; "" if they can."""
    if one.text != other.text:
        return (
            f"{other.run} was traced on other text than {one.run} ({other.n_tokens:,} tokens of "
            f"{other.source}, and {one.n_tokens:,} of {one.source}): trace both on the same"
        )
    if one.width != other.width:
        return f"{other.run} has {other.width} neurons in a layer, {one.run} has {one.width}"
    return ""


def shared_steps(one: TraceFolder, other: TraceFolder) -> list[tuple[int, int]]:
    """Lists the steps at which two traces can be matched: those of both whose activations are kept.

    The references last, also where their steps differ.
    """
    both = [s for s in one.steps() if s in other.steps() and all(f.store(s).exists() for f in (one, other))]
    references = one.settings().reference, other.settings().reference
    return [*((s, s) for s in both if (s, s) != references), references]


def against(one: TraceFolder, other: TraceFolder, steps: tuple[int, int]) -> list[dict[str, Any]]:
    """Matches the neurons of two traces at a step of each; a row for each layer of both.

    Medians over neurons active at `min_tokens` of the first: r by the same index; the largest r of any
    other index; r by the best one-to-one match; the same with the other's tokens shifted (null); of the
    match, the share of pairs with the same index, and with r of .5 or more.
    """
    settings, there = one.settings(), other.settings()
    check_same_tokenizer(settings, there)
    if why := why_not_matched(settings, there):
        raise UserError(why)
    stores = [Store(folder.store(step)) for folder, step in zip((one, other), steps, strict=True)]
    rows, n = [], settings.n_tokens
    for layer in (layer for layer in settings.layers if layer in there.layers):
        x, y = (store.block(layer, 0, settings.width) for store in stores)
        r = measure.correlations(x, y, n)
        moved = measure.shifted(y, n, n // 2)
        found, null = measure.partners(r), measure.partners(measure.correlations(x, moved, n))
        alive = np.diff(x.offsets) >= settings.min_tokens
        same = np.diagonal(r)
        rows.append(
            {
                "step": steps[0],
                "other_step": steps[1],
                "layer": layer,
                "n": int(alive.sum()),
                "same_index": _one(same[alive]),
                "other_index": _one(found.r_other[alive]),
                "matched": _one(found.r_matched[alive]),
                "matched_shifted": _one(null.r_matched[alive]),
                "matched_same_index": _mean(found.matched[alive] == np.flatnonzero(alive)),
                "matched_strong": _mean(found.r_matched[alive] >= _STRONG),
            }
        )
    return rows


def _one(values: np.ndarray) -> float | None:
    found = _median(values[None])[0]
    return None if np.isnan(found) else float(found)


def _mean(values: Iterable[Any]) -> float | None:
    known = np.asarray(values, np.float64)
    return float(known.mean()) if len(known) else None
