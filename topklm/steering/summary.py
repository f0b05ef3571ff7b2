"""The results of a survey, as numbers for a table or a program."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import numpy as np

from topklm.data.tokenizer import Tokenizer
from topklm.steering import significance
from topklm.steering.concepts import KINDS, token_sets
from topklm.steering.survey import PROMPTED, Layer, SurveySettings

ALL = "all"


def summarise(layers: Mapping[int, Layer], settings: SurveySettings) -> dict[str, Any]:
    """Shares of steerable neurons by layer and kind of concept, and what stands beside them.

    Args:
        layers: From `survey.survey`.
        settings: It was made with.

    Returns:
        A JSON object: "settings", and "layers", a list of one object for each layer and one, of layer "all",
        for all together. NaN is null.
    """
    by_layer = [_of_layers(str(number), [layer], settings) for number, layer in layers.items()]
    together = [_of_layers(ALL, list(layers.values()), settings)] if len(layers) > 1 else []
    return without_nan({"settings": dataclasses.asdict(settings), "layers": by_layer + together})


def neurons(
    layers: Mapping[int, Layer], settings: SurveySettings, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Returns each neuron's concepts and verdicts, as JSON objects."""
    rows = []
    for number, layer in layers.items():
        words = {kind: token_sets(layer.concepts, kind) for kind in KINDS}
        for place, neuron in enumerate(layer.concepts.neurons):
            x = int(layer.verdicts.strength[place])
            there_is = x != significance.NO_STRENGTH
            rows.append(
                {
                    "layer": number,
                    "neuron": int(neuron),
                    "strength": settings.strengths[x] if there_is else None,
                    "divergence": float(layer.measured.divergences[x, place]) if there_is else None,
                    "concepts": {
                        kind: _of_concept(layer, place, k, tokenizer.token_strings(words[kind][place]))
                        for k, kind in enumerate(KINDS)
                    },
                }
            )
    return without_nan(rows)


def without_nan(tree: Any) -> Any:
    """Returns the same with None for numbers that JSON does not have."""
    if isinstance(tree, dict):
        return {name: without_nan(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_nan(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _of_concept(layer: Layer, place: int, k: int, tokens: list[str]) -> dict[str, Any]:
    verdicts = layer.verdicts
    found = {
        "tokens": tokens,
        "gain": float(verdicts.gain[place, k]),
        "random": float(verdicts.random[place, k]),
        "others": float(verdicts.others[place, k]),
        "steerable": bool(verdicts.steerable[place, k]),
        "specific": bool(verdicts.specific[place, k]),
    }
    if KINDS[k] in PROMPTED:
        found["prompting_gain"] = float(layer.prompting.gains[place, PROMPTED.index(KINDS[k])])
    return found


def _of_layers(name: str, layers: list[Layer], settings: SurveySettings) -> dict[str, Any]:
    strength = np.concatenate([layer.verdicts.strength for layer in layers])
    steered = strength != significance.NO_STRENGTH
    values = np.asarray(settings.strengths)[strength[steered]]
    chosen = [(layer, np.maximum(layer.verdicts.strength, 0)) for layer in layers]
    divergences = np.concatenate([layer.measured.divergences[x, np.arange(len(x))] for layer, x in chosen])
    return {
        "layer": name,
        "n_alive": sum(layer.n_alive for layer in layers),
        "n_neurons": len(strength),
        "norm": layers[0].norm if len(layers) == 1 else None,
        "within_bound": int(steered.sum()),
        "median_strength": _median(values),
        "median_divergence": _median(divergences[steered]),
        "concepts": {kind: _of_kind(layers, k, steered) for k, kind in enumerate(KINDS)},
        "by_strength": [_at_strength(layers, x, value) for x, value in enumerate(settings.strengths)],
    }


def _of_kind(layers: list[Layer], k: int, steered: np.ndarray) -> dict[str, Any]:
    steerable = np.concatenate([layer.verdicts.steerable[:, k] for layer in layers])
    specific = np.concatenate([layer.verdicts.specific[:, k] for layer in layers])
    gain = np.concatenate([layer.verdicts.gain[:, k] for layer in layers])
    random = np.concatenate([layer.verdicts.random[:, k] for layer in layers])
    n_pairs = [len(layer.measured.others_at) * (len(layer.concepts.neurons) - 1) for layer in layers]
    mismatched = [layer.verdicts.mismatched[k] for layer in layers]
    there_are = [(m, n) for m, n in zip(mismatched, n_pairs, strict=True) if n]
    found = {
        "steerable": _share(steerable),
        "specific": _share(specific),
        "mismatched": float(sum(m * n for m, n in there_are) / max(1, sum(n for _, n in there_are))),
        "median_gain": _median(gain[steered]),
        "median_random": _median(random[steered]),
    }
    if KINDS[k] in PROMPTED:
        number = PROMPTED.index(KINDS[k])
        prompting = np.concatenate([layer.prompting.gains[:, number] for layer in layers])
        divergences = np.concatenate([layer.prompting.divergences[:, number] for layer in layers])
        found["prompting"] = {
            "median_gain": _median(prompting),
            "median_divergence": _median(divergences),
            "steering_gains_more": _share(np.nan_to_num(gain, nan=-np.inf) > prompting),
        }
    return found


def _at_strength(layers: list[Layer], x: int, value: float) -> dict[str, Any]:
    measured = [layer.measured for layer in layers]
    return {
        "strength": value,
        "median_divergence": _median(np.concatenate([m.divergences[x] for m in measured])),
        "median_random_divergence": _median(np.concatenate([m.random_divergences[x] for m in measured])),
        "median_loss": _median(np.concatenate([m.losses[x] for m in measured])),
        "median_gain": {
            kind: _median(np.concatenate([m.own[x, :, k] for m in measured])) for k, kind in enumerate(KINDS)
        },
    }


def _share(passed: np.ndarray) -> dict[str, float]:
    low, high = significance.wilson(int(passed.sum()), len(passed))
    return {"share": float(passed.mean()) if len(passed) else math.nan, "low": low, "high": high}


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if len(values) else math.nan
