"""Everything known of one neuron, and its activations on text of the store or one's own."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from topklm.explorer.formatting import effective_number
from topklm.explorer.live_model import LiveModel
from topklm.explorer.neuron_data import LISTED_TOKENS, NeuronData, StoreWindow
from topklm.neurons.statistics import catalog
from topklm.neurons.statistics.activity import RANGE_PARTS

EXAMPLE_TOKENS = 128
MOST_CONTEXT = 1024  # tokens that can be asked for around one

LabelOf = Mapping[tuple[int, int], str]


def neuron(
    source: NeuronData,
    layer: int,
    neuron: int,
    example_tokens: int = EXAMPLE_TOKENS,
    labels: LabelOf | None = None,
) -> dict[str, Any]:
    """Returns all that its page shows.

    Args:
        source: Of everything.
        layer: Of the neuron.
        neuron: Its number in the layer.
        example_tokens: Tokens of each example, at most.
        labels: As `source.named()` gives them, for whoever has them; None: they are read.

    Raises:
        UserError: If there is no such neuron.
    """
    number = source.number(layer, neuron)
    row, measured = source.row(number), source.measured
    labels = source.named() if labels is None else labels
    counts = row["histogram"] or []
    return {
        "run": measured.run,
        "step": measured.step,
        "kind": measured.kind,
        "dictionary": measured.dictionary,
        "layer": layer,
        "neuron": neuron,
        "label": labels.get((layer, neuron), ""),
        "dead": not row["n_active"],
        "n_tokens": measured.n_tokens,
        "figures": {name: row[name] for name in catalog.numbers()},
        "effective_tokens": effective_number(row["token_entropy_corrected"]),
        "effective_clusters": effective_number(row["semantic_entropy_corrected"]),
        "histogram": {
            "width": (row["max_activation"] or 0) / len(counts) if counts else None,
            "counts": counts,
        },
        "input_tokens": _weighed(source, row, "top_tokens", "top_token_shares", "share"),
        "output_tokens": {
            lens: {
                end: _weighed(source, row, f"{lens}_{end}", f"{lens}_{end}_effects", "effect")
                for end in ("top", "bottom")
            }
            for lens in ("identity", "jacobian")
        },
        "similar": {
            "coactive": _similar(source, layer, row, "coactive", labels),
            "effect": _similar(source, layer, row, "similar_effect", labels),
        },
        "examples": _examples(source, layer, neuron, row, example_tokens),
        "previous": _link(source, (number - 1) % source.n_neurons),
        "next": _link(source, (number + 1) % source.n_neurons),
        "embedding": measured.embedding,
        "n_clusters": measured.n_clusters,
        "source": measured.source,
    }


def context(source: NeuronData, layer: int, neuron: int, at: int, size: int) -> dict[str, Any]:
    """Returns text around a token of the store, with the neuron's activations.

    Args:
        source: Of everything.
        layer: Of the neuron.
        neuron: Its number in the layer.
        at: The token, counted through the store.
        size: Tokens, at most `MOST_CONTEXT`.

    Raises:
        UserError: If there is no such neuron or token.
    """
    source.number(layer, neuron)
    window = source.window(at, max(1, min(size, MOST_CONTEXT)))
    return _activations(source, layer, neuron, [window], [at])[0]


def on_text(source: NeuronData, reader: LiveModel, layer: int, neuron: int, text: str) -> dict[str, Any]:
    """Returns the neuron on a text of one's own.

    Raises:
        UserError: If there is no such neuron, or the text is empty or too long.
    """
    source.number(layer, neuron)
    ids, values = reader.neuron(text, layer, neuron)
    return {"layer": layer, "neuron": neuron, "tokens": source.running_texts(ids), "values": values.tolist()}


def summary(source: NeuronData, number: int, labels: LabelOf) -> dict[str, Any]:
    """Returns a neuron as a line of a table: its figures, label and strongest input tokens."""
    layer, neuron = source.place(number)
    row = source.row(number, [*catalog.numbers(), "top_tokens", "top_token_shares"])
    return {
        "layer": layer,
        "neuron": neuron,
        "label": labels.get((layer, neuron), ""),
        "dead": not row["n_active"],
        "figures": {name: row[name] for name in catalog.numbers()},
        "input_tokens": _weighed(source, row, "top_tokens", "top_token_shares", "share")[:5],
    }


def part_titles() -> list[str]:
    """Returns the titles of the parts of the examples: the strongest, then rising parts of the range."""
    step = 100 // RANGE_PARTS
    return [
        "Strongest",
        *(
            f"{step * (part - 1)}\N{EN DASH}{step * part}\N{NO-BREAK SPACE}%"
            for part in range(1, RANGE_PARTS + 1)
        ),
    ]


def _weighed(
    source: NeuronData, row: Mapping[str, Any], ids: str, weights: str, name: str
) -> list[dict[str, Any]]:
    found = list(zip(row[ids] or (), row[weights] or (), strict=True))[:LISTED_TOKENS]
    texts = source.texts([token for token, _ in found])
    return [
        {"id": token, "token": text, name: weight} for (token, weight), text in zip(found, texts, strict=True)
    ]


def _similar(
    source: NeuronData, layer: int, row: Mapping[str, Any], name: str, labels: LabelOf
) -> list[dict[str, Any]]:
    """Neurons of the layer, each with its label and the tokens that it is most active at."""
    found = []
    for neuron, similarity in zip(row[name] or (), row[f"{name}_similarity"] or (), strict=True):
        tokens = source.row(source.number(layer, neuron), ["top_tokens"])["top_tokens"] or []
        found.append(
            {
                "layer": layer,
                "neuron": neuron,
                "label": labels.get((layer, neuron), ""),
                "input_tokens": source.texts(tokens[:3]),
                "similarity": similarity,
            }
        )
    return found


def _link(source: NeuronData, number: int) -> dict[str, int]:
    layer, neuron = source.place(number)
    return {"layer": layer, "neuron": neuron}


def _examples(
    source: NeuronData, layer: int, neuron: int, row: Mapping[str, Any], size: int
) -> list[dict[str, Any]]:
    places, strengths, parts = (
        row[name] or [] for name in ("examples", "example_activations", "example_parts")
    )
    found = _activations(source, layer, neuron, source.windows(places, size), places)
    return [
        {"part": part, "activation": activation, **shown}
        for part, activation, shown in zip(parts, strengths, found, strict=True)
    ]


def _activations(
    source: NeuronData, layer: int, neuron: int, windows: Sequence[StoreWindow], places: Sequence[int]
) -> list[dict[str, Any]]:
    """Returns the neuron in each window, and which of its tokens it is about."""
    events = source.events(layer, neuron)
    edges = [(window.begin, window.begin + len(window.ids)) for window in windows]
    inside = np.searchsorted(events.tokens, np.reshape(edges, (-1, 2))).tolist()
    found = []
    for window, at, (first, stop) in zip(windows, places, inside, strict=True):
        values = np.zeros(len(window.ids), np.float32)
        values[events.tokens[first:stop] - window.begin] = events.values[first:stop]
        found.append(
            {
                "at": at,
                "document": window.document,
                "begin": window.begin,
                "example": at - window.begin,
                "tokens": source.running_texts(window.ids),
                "values": values.tolist(),
            }
        )
    return found
