"""The data of the prompt page: the neurons of each token of a text, and what the model expects next."""

from collections.abc import Mapping
import math
import re
from typing import Any

import numpy as np

from topklm.errors import UserError
from topklm.explorer.live_model import LiveModel
from topklm.explorer.neuron_data import NeuronData
from topklm.explorer.views import strongest_tokens

RANKINGS = {"activation": "activation", "share": "share of its own highest"}
SHOWN = 4  # neurons of a layer in a row of the page

_N_SENTENCES, _SENTENCE_TOKENS = 5, 160
_SENTENCE = re.compile(r"\s*(\S.{15,140}?[^.\s]{3}[.!?])(?=\s)")  # no end after an initial or "e.g."


def prompt(source: NeuronData, reader: LiveModel, text: str, by: str = "activation") -> dict[str, Any]:
    """Returns the active neurons of each token of a text, those first that are high in a ranking.

    `by` is one of `RANKINGS`. A share is of the neuron's largest activation in the harvested text; it is null
    for a neuron that was never active there, which then comes last. UserError if the text is empty or too
    long.
    """
    if by not in RANKINGS:
        raise UserError(f"by = {by}: must be one of {', '.join(RANKINGS)}")
    ids, labels, layers = reader.ids(text), source.named(), source.measured.layers
    read = reader.read(ids)
    highest = source.column("max_activation").reshape(len(layers), -1)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = np.stack([v / highest[s][i] for s, (i, v) in enumerate(zip(*read[:2], strict=True))])
    if by == "share":
        # Not a number is after every number.
        order = np.argsort(-np.where(read.values == 0, np.nan, shares), axis=-1, kind="stable")
    else:
        order = np.broadcast_to(np.arange(shares.shape[-1]), shares.shape)
    sorted_ = [np.take_along_axis(x, order, axis=-1).tolist() for x in (*read[:2], shares)]
    expected = zip(read.next_ids.tolist(), read.next_probabilities.tolist(), strict=True)
    tokens = [
        {
            "token": token,
            "id": token_id,
            "loss": float(loss),
            "next": [
                {"id": one, "token": shown, "probability": probability}
                for one, shown, probability in zip(following, source.texts(following), chances, strict=True)
            ],
            "layers": [
                {
                    "layer": layer,
                    "neurons": [
                        {"neuron": neuron, "activation": value, "share": None if math.isnan(share) else share}
                        for neuron, value, share in zip(*(x[place][at] for x in sorted_), strict=True)
                        if value
                    ],
                }
                for place, layer in enumerate(layers)
            ],
        }
        for at, (token, token_id, loss, (following, chances)) in enumerate(
            zip(source.running_texts(ids), ids.tolist(), read.losses, expected, strict=True)
        )
    ]
    seen = {place for token in tokens for place in _active_places(token)}
    return {
        "text": text,
        "by": by,
        "layers": list(layers),
        "tokens": tokens,
        "labels": [
            {"layer": layer, "neuron": neuron, "label": labels[layer, neuron]}
            for layer, neuron in sorted(seen & labels.keys())
        ],
    }


def prompt_page(source: NeuronData, data: Mapping[str, Any], chosen: int | None) -> dict[str, Any]:
    """Returns what the page shows besides the data of `prompt`, of all tokens or the chosen one.

    `named`: the labels of neurons by layer and number. `highest`: the largest activation of each layer,
    leaving out the first token, whose activations are far from all others in most models. `usual`: the tokens
    that the neurons on the page are most active at.
    """
    highest = dict.fromkeys(data["layers"], 1e-9)
    for token in data["tokens"][1:] or data["tokens"]:
        for layer in token["layers"]:
            sizes = (abs(neuron["activation"]) for neuron in layer["neurons"])
            highest[layer["layer"]] = max(highest[layer["layer"]], *sizes, 0)
    if chosen is None:
        places = {place for token in data["tokens"] for place in _active_places(token, SHOWN)}
    else:
        places = set(_active_places(data["tokens"][chosen]))
    return {
        "named": {(item["layer"], item["neuron"]): item["label"] for item in data["labels"]},
        "highest": highest,
        "usual": {place: strongest_tokens(source, *place) for place in places},
        "rankings": RANKINGS,
        "n_shown": SHOWN,
    }


def sentences(source: NeuronData) -> list[str]:
    """Returns some sentences of the harvested text, from documents far from one another."""
    starts, _ = source.documents
    n = len(starts) - 1
    order = sorted(range(n), key=lambda place: (place * _N_SENTENCES) % n) if n else []
    found: list[str] = []
    for place in order:
        begin, end = int(starts[place]), int(starts[place + 1])
        text = source.plain_text(begin, min(end, begin + _SENTENCE_TOKENS))
        if (match := _SENTENCE.match(text)) and match[1].isprintable() and match[1] not in found:
            found.append(match[1])
        if len(found) == _N_SENTENCES:
            break
    return found


def _active_places(token: Mapping[str, Any], most: int | None = None) -> list[tuple[int, int]]:
    return [(layer["layer"], item["neuron"]) for layer in token["layers"] for item in layer["neurons"][:most]]
