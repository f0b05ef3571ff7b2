"""Which neurons stand for something: those active in a text, or where something matches in a store.

Precision and recall are ours: a neuron whose activation reaches a threshold at a token says "there is a match
here". It is right if the token is marked as matched. The threshold is the neuron's own, the one with the
highest F1 on these very tokens, so a neuron that reaches it seldom looks better than it is. Which tokens of a
match are marked is for the caller to say (`topklm.neurons.text_search`).
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from topklm.errors import UserError
from topklm.neurons.contrast import ORDERS
from topklm.neurons.display import SHOWN_PER_LAYER, Activation, ActiveNeurons
from topklm.neurons.store import NeuronBlock, Store
from topklm.storage.files import DIGEST, read_json, unsealed

_BLOCK_EVENTS = 2_000_000  # read at once, some 50 bytes each; a single neuron may have more
_BLOCK_NEURONS = 64
_SIZES = 2**15  # magnitudes that a bfloat16 can have


@dataclasses.dataclass(frozen=True)
class RankedNeuron:
    """How well a neuron tells matched tokens from others.

    Attributes:
        layer: Of the neuron.
        neuron: Its number in the layer.
        n_active: Tokens at which it is active.
        threshold: The |activation| from which on it counts as firing.
        n_firing: Tokens at which it does.
        n_hits: Matched tokens among those.
        precision: n_hits / n_firing.
        recall: n_hits as a share of all matched tokens.
        f1: Harmonic mean of precision and recall.
        weighted_precision: Without a threshold: the share of matched tokens in the sum of |activation|.
    """

    layer: int
    neuron: int
    n_active: int
    threshold: float
    n_firing: int
    n_hits: int
    precision: float
    recall: float
    f1: float
    weighted_precision: float


@dataclasses.dataclass(frozen=True)
class TokenNeurons:
    """The active neurons of a token.

    Attributes:
        position: Of the token in its text, from 0.
        token: Its text.
        neurons: By layer, the strongest of it, falling by magnitude.
        n_active: By layer, how many are active.
    """

    position: int
    token: str
    neurons: dict[int, list[Activation]]
    n_active: dict[int, int]


def rank(
    store: Store, matched: np.ndarray, limit: int = 20, layers: Sequence[int] | None = None
) -> list[RankedNeuron]:
    """Returns the neurons that best tell matched tokens from others, from all tokens of a store.

    Sorted by falling F1, then by falling weighted precision, then by layer and number. Neurons that are
    active at no matched token are left out.

    Args:
        store: Of activations.
        matched: bool[N], for each token of the store.
        limit: Neurons at most.
        layers: Those to look at; default all of the store.

    Raises:
        UserError: If the store does not have a layer.
        ValueError: If `matched` has another shape.
    """
    if matched.shape != (store.n_tokens,):
        raise ValueError(f"matched has shape {matched.shape}: must be [{store.n_tokens}], the store's tokens")
    found = []
    for layer in store.metadata.layers if layers is None else layers:
        for begin, end in _blocks(_events_of_neurons(store, layer)):
            found += _rank_block(store.block(layer, begin, end), matched, layer, begin)
        found = sorted(found, key=_best_first)[:limit]
    return found


def _best_first(ranked: RankedNeuron) -> tuple:
    return -ranked.f1, -ranked.weighted_precision, ranked.layer, ranked.neuron


def _rank_block(block: NeuronBlock, matched: np.ndarray, layer: int, begin: int) -> list[RankedNeuron]:
    n, n_matched = len(block.offsets) - 1, int(matched.sum())
    neuron, n_active = np.repeat(np.arange(n), np.diff(block.offsets)), np.diff(block.offsets)
    hit, size = matched[block.tokens], np.abs(block.values)
    mass, mass_hit = np.bincount(neuron, size, n), np.bincount(neuron[hit], size[hit], n)
    # As the store holds bfloat16, whose upper bits order magnitudes, tokens are counted and not sorted.
    cell = neuron * _SIZES + (size.view(np.uint32) >> 16)
    firing, hits = (
        np.bincount(cells, minlength=n * _SIZES).reshape(n, _SIZES)[:, ::-1].cumsum(axis=1)
        for cells in (cell, cell[hit])
    )
    best = np.argmax(hits / np.maximum(firing + n_matched, 1), axis=1)  # of equally good ones, the highest
    rows = np.arange(n)
    threshold = ((_SIZES - 1 - best).astype(np.uint32) << 16).view(np.float32)
    n_firing, n_hits = firing[rows, best], hits[rows, best]
    return [
        RankedNeuron(
            layer=layer,
            neuron=begin + int(j),
            n_active=int(n_active[j]),
            threshold=float(threshold[j]),
            n_firing=int(n_firing[j]),
            n_hits=int(n_hits[j]),
            precision=float(n_hits[j] / n_firing[j]),
            recall=float(n_hits[j] / n_matched),
            # The harmonic mean from whole numbers: neurons that are equally good get the same bits.
            f1=float(2 * n_hits[j] / (n_firing[j] + n_matched)),
            weighted_precision=float(mass_hit[j] / mass[j]),
        )
        for j in np.flatnonzero(mass_hit)
    ]


def neurons_of_text(
    found: ActiveNeurons, top: int = SHOWN_PER_LAYER, layer: int | None = None, begin: int = 0
) -> list[TokenNeurons]:
    """Returns the active neurons of a text as rows of a table, a token each.

    Args:
        found: As `LanguageModel.active_neurons` gives it.
        top: Neurons of each layer at most.
        layer: Leaves the others out.
        begin: The first token that gets a row; 1 leaves out the separator before the text. Positions in the
            rows are counted from it.

    Raises:
        UserError: For a layer without TopK.
    """
    layers = list(range(len(found.values)))
    if not layers:
        raise UserError("no layer of this model has TopK: its neurons are found in a store, by --regex")
    if layer is not None and layer not in layers:
        raise UserError(f"layer = {layer}: must be a TopK layer, from 0 to {layers[-1]}")
    rows = []
    for at in range(begin, len(found)):
        active: dict[int, list[Activation]] = {number: [] for number in layers if layer in (None, number)}
        for neuron in found[at]:
            if neuron.layer in active:
                active[neuron.layer].append(neuron)
        strongest = {number: those[:top] for number, those in active.items()}
        n_active = {number: len(those) for number, those in active.items()}
        rows.append(TokenNeurons(at - begin, found.tokens[at], strongest, n_active))
    return rows


def _events_of_neurons(store: Store, layer: int) -> np.ndarray:
    """Returns int64[D], how many events each neuron of a layer has."""
    there, d = store.metadata.layers, store.metadata.d_model
    if layer not in there:
        raise UserError(
            f"layer = {layer}: must be one of {', '.join(map(str, there))}, which {store.folder} has"
        )
    first = there.index(layer) * d
    counts = np.zeros(d, np.int64)
    for segment in store.segments:
        counts += np.diff(segment.offsets[first : first + d + 1])
    return counts


def _blocks(counts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Cuts neighbouring neurons into blocks with about so many events as are to be read at once."""
    stops, begin = np.cumsum(counts), 0
    while begin < len(counts):
        most = stops[begin] - counts[begin] + _BLOCK_EVENTS
        end = max(int(np.searchsorted(stops, most, side="right")), begin + 1)
        end = min(end, begin + _BLOCK_NEURONS)
        yield begin, end
        begin = end


_NUMBERS = ("difference", "score", "p_value", "q_value", "family_p_value")


@dataclasses.dataclass(frozen=True)
class Selected:
    """A neuron, and in words why it was chosen."""

    layer: int
    neuron: int
    reason: str


@dataclasses.dataclass(frozen=True)
class SavedContrast:
    """The output of `topklm neurons contrast --json`, as far as it is needed here.

    Attributes:
        step: Of the checkpoint.
        by: The order of the neurons, one of `contrast.ORDERS`.
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
    """Selects the neurons that best tell matched tokens from others; see `rank`.

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
    """Selects the neurons with a label that holds a text, whatever the case; by layer and number.

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
    """Selects neurons that are more frequent in the positive text, of all layers, in the contrast's order.

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
