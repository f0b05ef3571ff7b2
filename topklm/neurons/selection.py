"""Sets of neurons, chosen by what they tell apart, by their labels, or from a contrast of two texts."""

from collections.abc import Mapping, Sequence
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from topklm.errors import UserError
from topklm.neurons.contrast import ORDERS
from topklm.neurons.find import RankedNeuron, rank
from topklm.neurons.store import Store
from topklm.storage.files import DIGEST, read_json, unsealed

_NUMBERS = ("difference", "score", "p_value", "q_value", "family_p_value")


@dataclasses.dataclass(frozen=True)
class Selected:
    """A neuron, and in words why it was chosen."""

    layer: int
    neuron: int
    reason: str


@dataclasses.dataclass(frozen=True)
class SavedContrast:
    """What `topklm neurons contrast --json` printed, as far as it is needed here.

    Attributes:
        step: Of the checkpoint.
        by: What neurons were sorted by, one of `contrast.ORDERS`.
        neurons: Each with layer, neuron, difference, score and p-values.
    """

    step: int
    by: str
    neurons: Sequence[Mapping[str, Any]]


def by_matches(
    store: Store,
    matched: np.ndarray,
    *,
    layer: int | None = None,
    top: int,
    min_precision: float = 0.0,
    min_recall: float = 0.0,
) -> list[Selected]:
    """Those that best tell matched tokens from others; see `find.rank`.

    Args:
        store: Of activations.
        matched: bool[N], for each token of the store.
        layer: Only this one.
        top: At most so many.
        min_precision: At least, from 0 to 1.
        min_recall: Likewise.

    Raises:
        UserError: If the store does not have the layer.
    """
    everything = len(store.metadata.layers) * store.metadata.d_model
    ranked = rank(store, matched, everything, None if layer is None else [layer])
    wanted = [r for r in ranked if r.precision >= min_precision and r.recall >= min_recall]
    return [Selected(r.layer, r.neuron, _found(r)) for r in wanted[:top]]


def by_label(
    labels: Mapping[tuple[int, int], str], text: str, *, layer: int | None = None, top: int
) -> list[Selected]:
    """Those with a label that holds a text, whatever the case; by layer and number.

    Args:
        labels: By layer and number.
        text: Not empty.
        layer: Only this one.
        top: At most so many.
    """
    sought = text.casefold()
    return [
        Selected(*place, f"label {label!r}")
        for place, label in sorted(labels.items())
        if sought in label.casefold() and layer in (None, place[0])
    ][:top]


def by_contrast(
    saved: SavedContrast, *, layer: int | None = None, top: int, max_q: float = 1.0
) -> list[Selected]:
    """Those that are more frequent in the positive text, of all layers, in the order asked for there.

    Args:
        saved: A contrast, with as many neurons as were asked for there.
        layer: Only this one.
        top: At most so many.
        max_q: Only q-values up to this.
    """
    wanted = [
        n
        for n in saved.neurons
        if n["difference"] > 0 and n["q_value"] <= max_q and layer in (None, n["layer"])
    ]
    wanted.sort(key=lambda n: (-n[saved.by], n["layer"], n["neuron"]))
    return [Selected(n["layer"], n["neuron"], _differs(n)) for n in wanted[:top]]


def read_contrast(path: Path) -> SavedContrast:
    """Reads what `topklm neurons contrast --json` printed.

    Raises:
        UserError: If there is no such file, or it is something else.
    """
    again = "run topklm neurons contrast --json, and give its output"
    try:
        content = read_json(path, again)
    except FileNotFoundError as e:
        raise UserError(f"{path}: there is no such file; run topklm neurons contrast --json") from e
    if DIGEST in content:  # earlier versions did not write one
        try:
            unsealed(content)
        except ValueError as e:
            raise UserError(
                f"{path} is not as it was written ({e}): {again}; if you have edited it, remove {DIGEST!r}"
            ) from e
    if (
        type(content.get("step")) is not int
        or content.get("by") not in ORDERS
        or not isinstance(content.get("neurons"), list)
        or not all(map(_is_neuron, content["neurons"]))
    ):
        raise UserError(f"{path} is not what topklm neurons contrast --json prints: {again}")
    return SavedContrast(content["step"], content["by"], content["neurons"])


def _is_neuron(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and all(type(entry.get(name)) is int for name in ("layer", "neuron"))
        and all(isinstance(entry.get(name), int | float) for name in _NUMBERS)
    )


def _differs(neuron: Mapping[str, Any]) -> str:
    return f"difference {neuron['difference']:+.2%}, score {neuron['score']:+.1f}, q {neuron['q_value']:.2g}"


def _found(ranked: RankedNeuron) -> str:
    return f"F1 {ranked.f1:.3f}, precision {ranked.precision:.3f}, recall {ranked.recall:.3f}"
