"""The active neurons of every token of a text that a person types."""

from collections.abc import Mapping
from typing import Any

from topklm.explorer.reading import Reader
from topklm.explorer.source import Source


def prompt(source: Source, reader: Reader, text: str) -> dict[str, Any]:
    """All that the prompt page shows.

    Raises:
        UserError: If the text is empty or too long.
    """
    reading = reader.read(text)
    tokens: list[dict[str, Any]] = [
        {"token": token, "id": int(token_id), "layers": []}
        for token, token_id in zip(source.running_texts(reading.ids), reading.ids, strict=True)
    ]
    for place, layer in enumerate(reading.layers):
        indices, values = reading.indices[place].tolist(), reading.values[place].tolist()
        for token, neurons, found in zip(tokens, indices, values, strict=True):
            active = [
                {"neuron": neuron, "activation": value}
                for neuron, value in zip(neurons, found, strict=True)
                if value
            ]
            token["layers"].append({"layer": layer, "neurons": active})
    labels = source.named()
    seen = {
        (layer["layer"], neuron["neuron"])
        for token in tokens
        for layer in token["layers"]
        for neuron in layer["neurons"]
    }
    return {
        "text": text,
        "layers": list(reading.layers),
        "tokens": tokens,
        "labels": [
            {"layer": layer, "neuron": neuron, "label": labels[layer, neuron]}
            for layer, neuron in sorted(seen & labels.keys())
        ],
    }


def usual_tokens(source: Source, token: Mapping[str, Any]) -> dict[tuple[int, int], list[str]]:
    """What the active neurons of a token, as `prompt` gives it, are most active at elsewhere."""
    places = [(layer["layer"], item["neuron"]) for layer in token["layers"] for item in layer["neurons"]]
    rows = {place: source.row(source.number(*place), ["top_tokens"])["top_tokens"] or [] for place in places}
    return {place: source.texts(tokens[:3]) for place, tokens in rows.items()}


def highest(data: Mapping[str, Any]) -> dict[int, float]:
    """The largest activation of each layer in what `prompt` gave, leaving out the first token.

    The activations of a first token are far from all others in most models.
    """
    found = dict.fromkeys(data["layers"], 1e-9)
    for token in data["tokens"][1:] or data["tokens"]:
        for layer in token["layers"]:
            sizes = [abs(neuron["activation"]) for neuron in layer["neurons"]]
            found[layer["layer"]] = max(found[layer["layer"]], *sizes) if sizes else found[layer["layer"]]
    return found
