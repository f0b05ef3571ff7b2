"""Which neurons are active on a text."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from topklm.inference.bucketing import ServingBuckets
from topklm.inference.language_model import LanguageModel


def active(
    model: LanguageModel, buckets: ServingBuckets, ids: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the activations of the TopK layers on one text.

    Args:
        model: With at least one such layer.
        buckets: Of lengths, so that few programs are compiled.
        ids: T token ids, at most the context's.

    Returns:
        Neurons int32[S, T, k], the strongest first, and activations float32[S, T, k], 0 where none is active.
    """
    padded = np.zeros((1, buckets.prompt(len(ids))), np.int32)
    padded[0, : len(ids)] = ids
    _, cache = model.run_with_cache(padded)
    indices = np.asarray(cache.neurons.indices)[:, 0, : len(ids)]
    values = np.asarray(cache.neurons.values)[:, 0, : len(ids)].astype(np.float32)
    order = np.argsort(-np.abs(values), axis=-1, kind="stable")
    return np.take_along_axis(indices, order, axis=-1), np.take_along_axis(values, order, axis=-1)


def described(
    model: LanguageModel,
    ids: Sequence[int],
    found: tuple[np.ndarray, np.ndarray],
    *,
    first: int,
    layers: Sequence[int],
    most: int,
) -> list[dict[str, Any]]:
    """Lists the active neurons of some layers for each token from `first` on, as JSON has them.

    Args:
        model: See `active`.
        ids: See `active`.
        found: From `active`.
        first: Position of the first token that is listed.
        layers: Which.
        most: Neurons of a layer, for each token.
    """
    indices, values = (array.tolist() for array in found)
    names = model.tokenizer.token_strings(ids)

    def of_layer(layer: int, position: int) -> dict[str, Any]:
        pairs = zip(indices[layer][position], values[layer][position], strict=True)
        kept = [(neuron, value) for neuron, value in pairs if value != 0][:most]
        return {"layer": layer, "neurons": [n for n, _ in kept], "values": [value for _, value in kept]}

    return [
        {
            "position": position,
            "id": ids[position],
            "token": names[position],
            "layers": [of_layer(layer, position) for layer in layers],
        }
        for position in range(first, len(ids))
    ]
