"""The data of pages about a trace as plain values, for templates and for the JSON API."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from topklm.explorer import trace_figures
from topklm.explorer.markup import Link
from topklm.explorer.traces import CURVES, StepData, TraceData
from topklm.explorer.views import LabelOf, snippets, summary
from topklm.trace import tables
from topklm.trace.summary import CARRIED, MEDIANS, SHARE_BEST, WRITTEN, onset_counts

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
        ("Identity", about, trace_figures.identity(found)),
        ("Loss and entropies", "Medians over living neurons.", trace_figures.losses(found)),
    ]
    if "kl_bigram" in own.values():
        about = "How far the model's output is from n-grams of the training text."
        curves.append(("Beside n-grams", about, trace_figures.distances(found)))
    return {
        "curves": curves,
        "changes": trace_figures.change_points(found),
        "heat": [(layer, trace_figures.heat(own, layer, link)) for layer in trace.settings.layers],
    }


def drawn_layers(trace: TraceData) -> Any:
    """Draws r of two layers by step; None for layers too many to be told apart."""
    return trace_figures.layers([trace.summary]) if len(trace.settings.layers) <= _DRAWN_LAYERS else None


def plain(values: np.ndarray) -> list[float | None]:
    """Returns numbers for JSON, None for NaN and infinity."""
    return [float(value) if np.isfinite(value) else None for value in values]
