"""Compiles what most traffic needs before it comes."""

from collections.abc import Callable
import itertools

from topklm.config import ModelConfig
from topklm.inference.intervention_batch import InterventionBatch
from topklm.inference.sampling import Sampling
from topklm.inference.sizes import Sizes
from topklm.inference.slots import Slots
from topklm.inference.text import Text


def warm_up(slots: Slots, config: ModelConfig, sizes: Sizes, report: Callable[[int, int], None]) -> None:
    """Compiles, in an empty batch.

    Args:
        slots: The batch.
        config: Of its model.
        sizes: Its sizes.
        report: Is told how many of how many parts are done.
    """
    steer = InterventionBatch.of(config, {(0, 0): 0.0})
    # Rows, texts run together, their length, places of the cache, whether steered.
    parts: list[tuple[int, int, int, int, bool]] = []
    for steered, length in itertools.product((False, True), sizes.lengths):
        room = sizes.room(length)
        parts += [(sizes.most_rows, n, length, room, steered) for n in sizes.groups(length)]
    for steered, n_rows, room in itertools.product((False, True), sizes.batches, sizes.rooms):
        parts += [(n_rows, n, 1, room, steered) for n in sizes.groups(1) if n_rows > 1 or n == 1]
    for done, (n_rows, n, length, room, steered) in enumerate(parts):
        report(done, len(parts))
        slots.hold(n_rows, room)
        texts = [
            Text.of(config, [0] * length, Sampling(), 1, steer=steer if steered else None)
            for _ in range(min(n, n_rows))
        ]
        slots.put(texts)
        texts[0].n_alternatives = 0 if n == 1 else None
        slots.advance(1)
        for text in texts:
            slots.take_out(text)
    for room in sizes.rooms:
        for one, other in itertools.permutations(sizes.batches, 2):
            slots.hold(one, room)
            slots.hold(other, room)
    slots.shrink()
    report(len(parts), len(parts))
