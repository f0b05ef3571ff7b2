"""Neurons found by words, by a regular expression, by their labels, or on a prompt, token by token."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from topklm.errors import UserError
from topklm.explorer.index import Index
from topklm.explorer.live_model import LiveModel
from topklm.explorer.neuron_data import NeuronData, shown
from topklm.explorer.views.neuron import summary
from topklm.neurons.search import rank

KINDS = ("words", "regex")
MOST_FOUND = 50
MOST_PASSAGES = 20
REGEX_SECONDS = 10.0


def words(source: NeuronData, index: Index, text: str) -> dict[str, Any]:
    """Labels, neurons and passages of the store in which words are found.

    Raises:
        UserError: If there are none.
    """
    if not text.strip():
        raise UserError("search is empty: type a few words")
    labels = source.named()
    wanted = text.casefold().split()
    labelled = [place for place, label in labels.items() if all(word in label.casefold() for word in wanted)]
    return {
        "kind": "words",
        "text": text,
        "labelled": [summary(source, source.number(*place), labels) for place in labelled[:MOST_FOUND]],
        "neurons": [summary(source, number, labels) for number in index.active_at(text, MOST_FOUND)],
        "passages": [
            {
                "begin": passage.begin,
                "document": passage.document,
                "pieces": [{"text": shown(piece), "matched": matched} for piece, matched in passage.pieces],
                "text": source.plain_text(passage.begin, passage.begin + 64),
            }
            for passage in index.passages(text, MOST_PASSAGES)
        ],
    }


def regex(
    source: NeuronData, pattern: str, ignore_case: bool = True, only_ends: bool = False
) -> dict[str, Any]:
    """Neurons by how well they tell the tokens of matches from others; see `topklm.neurons.search`.

    Args:
        source: Of everything.
        pattern: A regular expression of the package `regex`.
        ignore_case: Whether capitals are small letters.
        only_ends: Whether of a match only the last token counts, where a neuron can first know of it.

    Raises:
        UserError: For a pattern that is none, or takes longer than `REGEX_SECONDS`.
    """
    found = source.stored_text.matches(pattern, ignore_case=ignore_case, timeout_s=REGEX_SECONDS)
    matched = found.ends if only_ends else found.touched
    labels, neurons = source.named(), []
    for ranked in rank(source.store, matched, MOST_FOUND):
        line = summary(source, source.number(ranked.layer, ranked.neuron), labels)
        neurons.append({**line, **dataclasses.asdict(ranked)})
    return {
        "kind": "regex",
        "text": pattern,
        "n_matches": found.count,
        "n_matched": int(matched.sum()),
        "n_tokens": len(matched),
        "neurons": neurons,
    }


def labelled(source: NeuronData) -> list[dict[str, Any]]:
    """Returns all neurons that have a label."""
    labels = source.named()
    return [summary(source, source.number(*place), labels) for place in labels]


def prompt(source: NeuronData, reader: LiveModel, text: str) -> dict[str, Any]:
    """Returns all that the prompt page shows.

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


def usual_tokens(source: NeuronData, token: Mapping[str, Any]) -> dict[tuple[int, int], list[str]]:
    """Returns the tokens that a token's active neurons, as `prompt` gives them, are most active at."""
    places = [(layer["layer"], item["neuron"]) for layer in token["layers"] for item in layer["neurons"]]
    rows = {place: source.row(source.number(*place), ["top_tokens"])["top_tokens"] or [] for place in places}
    return {place: source.texts(tokens[:3]) for place, tokens in rows.items()}


def highest(data: Mapping[str, Any]) -> dict[int, float]:
    """Returns the largest activation of each layer in what `prompt` gave, leaving out the first token.

    The activations of a first token are far from all others in most models.
    """
    found = dict.fromkeys(data["layers"], 1e-9)
    for token in data["tokens"][1:] or data["tokens"]:
        for layer in token["layers"]:
            sizes = [abs(neuron["activation"]) for neuron in layer["neurons"]]
            found[layer["layer"]] = max(found[layer["layer"]], *sizes) if sizes else found[layer["layer"]]
    return found
