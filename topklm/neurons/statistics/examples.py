"""Tokens at which to look at a neuron: the strongest, and some from every part of its range.

Of each neuron, by strength (`activity`):

- the 20 strongest tokens, each in another document; equal ones in the order of the text;
- 5 tokens from each of 5 parts of equal width of (0, largest strength], drawn with a fixed seed among those
  in documents that hold no example of this neuron yet, the parts one after another from the weakest.

Where there are not enough such documents, books for instance, the rest of the 20 (or 5) are taken from
documents that do hold examples, at least 128 tokens away from each of them, so that windows of 128 tokens
around them need not overlap. There are fewer where there are no such places either. The choice is ours.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from topklm.neurons.statistics import activity
from topklm.neurons.store import Block

STRONGEST = 20
FROM_EACH_PART = 5
RANGE_PARTS = 5  # into which the range of a neuron's activations is cut
APART = 128  # tokens


def columns(block: Block, bounds: np.ndarray, layer: int, begin: int, seed: int = 0) -> Mapping[str, Any]:
    """Returns the columns of `table` that are about examples; a dead neuron has none.

    Args:
        block: The neurons.
        bounds: int64[documents + 1], as `embeddings.document_bounds` gives them.
        layer: Of the model.
        begin: The first neuron of the block; with the layer it decides what is drawn, so that the examples
            of a neuron do not depend on how neurons are cut into blocks.
        seed: Of what is drawn.

    Returns:
        For each column one value for each neuron. The strongest come first, then the parts, rising; falling
        strength in each.
    """
    places: list[list[int] | None] = []
    values: list[list[float] | None] = []
    parts: list[list[int] | None] = []
    for number, (a, b) in enumerate(zip(block.offsets[:-1], block.offsets[1:], strict=True)):
        if a == b:
            places.append(None)
            values.append(None)
            parts.append(None)
            continue
        rng = np.random.default_rng([seed, layer, begin + number])
        events, part = choose(block.tokens[a:b], block.values[a:b], bounds, rng)
        places.append(block.tokens[a + events].tolist())
        values.append(block.values[a + events].tolist())
        parts.append(part.tolist())
    return {"examples": places, "example_activations": values, "example_parts": parts}


def choose(
    tokens: np.ndarray, values: np.ndarray, bounds: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the examples of one neuron.

    Args:
        tokens: int64[E], where it is active, rising; E is at least 1.
        values: float32[E].
        bounds: int64[documents + 1], where documents begin.
        rng: Draws.

    Returns:
        int64[m], which of the E events; and int8[m], 0 for the strongest, then 1 to RANGE_PARTS.
    """
    strengths = np.abs(values)
    chooser = _Chooser(tokens, bounds)
    chosen = [chooser.strongest(strengths, STRONGEST)]
    part_of = activity.parts(strengths, float(strengths.max()), RANGE_PARTS)
    for part in range(RANGE_PARTS):
        chosen.append(chooser.drawn(np.flatnonzero(part_of == part), FROM_EACH_PART, rng))
    in_order = [np.array(sorted(events, key=lambda e: (-strengths[e], e)), np.int64) for events in chosen]
    return np.concatenate(in_order), np.repeat(
        np.arange(1 + RANGE_PARTS, dtype=np.int8), list(map(len, chosen))
    )


class _Chooser:
    """Keeps track of which events of a neuron may still become examples."""

    def __init__(self, tokens: np.ndarray, bounds: np.ndarray):
        self._tokens, self._bounds = tokens, bounds
        # First those in documents that hold none; then, those far enough from every example.
        self._free = np.ones(len(tokens), bool), np.ones(len(tokens), bool)

    def strongest(self, strengths: np.ndarray, count: int) -> list[int]:
        """Returns the strongest events, one after another."""
        taken: list[int] = []
        for kind, free in enumerate(self._free):
            left = np.where(free, strengths, 0)
            while len(taken) < count and left[event := int(np.argmax(left))] > 0:
                taken.append(event)
                left[self._take(event)[kind]] = 0
        return taken

    def drawn(self, events: np.ndarray, count: int, rng: np.random.Generator) -> list[int]:
        """Returns some of these events (rising), each as likely as the others that may be taken."""
        taken: list[int] = []
        for kind, free in enumerate(self._free):
            if len(taken) == count:
                break
            left = events[free[events]]
            while len(taken) < count and len(left):
                event = int(left[rng.integers(len(left))])
                taken.append(event)
                gone = self._take(event)[kind]
                first, stop = np.searchsorted(left, (gone.start, gone.stop))
                left = np.concatenate([left[:first], left[stop:]])
        return taken

    def _take(self, event: int) -> tuple[slice, slice]:
        """Marks an event as an example; returns which events that rules out, for each kind of free."""
        token = self._tokens[event]
        document = np.searchsorted(self._bounds, token, side="right")
        first, stop = self._bounds[document - 1], self._bounds[document]
        near = max(first, token - APART + 1), min(stop, token + APART)
        edges = np.searchsorted(self._tokens, (first, stop, *near)).tolist()
        gone = slice(*edges[:2]), slice(*edges[2:])
        for free, out in zip(self._free, gone, strict=True):
            free[out] = False
        return gone
