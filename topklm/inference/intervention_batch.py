"""Interventions as arrays, and their effect on a layer: after TopK, or inside of it.

All interventions are data of the program, filled up to a few sizes, so other neurons, values, modes or
positions compile nothing. Dims: E entries, B rows, T tokens, D d_model, L layers.
"""

from collections.abc import Callable, Sequence
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.errors import ArgumentError
from topklm.inference.interventions import (
    DEFAULT_MODE,
    MODES,
    POSITIONS,
    Intervention,
    Mode,
    Steer,
    entries_of,
)
from topklm.inference.tokens import is_traced
from topklm.model.block import LayerHooks
from topklm.model.topk import model_topk

_SMALLEST = 4  # entries; more are filled up to the next power of two
_NO_LAYER = -1
_EVERY_ROW = -1
_END = 2**31 - 1
_RANGE = len(POSITIONS)
_FEW = 8  # entries; of more, a table of all neurons is made
_PER_BATCH = (8, 64)  # entries at least, of `on_rows`: of one row, and of several together
_MORE_ENTRIES = 8  # times as many, where those are too few


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class InterventionBatch:
    """Any number of interventions, as arrays int32[E] of one entry for each; differentiable in `value`."""

    layer: Any  # -1 in entries that only fill up
    neuron: Any
    value: Any  # float32[E]; its meaning depends on the mode
    mode: Any  # index into `MODES`
    where: Any  # index into `POSITIONS`, and one more for a range
    begin: Any  # first position of a range; the separator before a text has position 0
    end: Any  # the position after its last
    row: Any  # which row of a batch; -1: all

    @classmethod
    def of(
        cls, config: ModelConfig, steer: Steer, mode: str = DEFAULT_MODE, n_rows: int | None = None
    ) -> "InterventionBatch":
        """Makes one of any form in which people give interventions, see `entries_of`.

        ValueError for entries that `Intervention.check` refuses, two on one neuron at one position, more
        winners in a layer than its k, and a row that the batch does not have.
        """
        if isinstance(steer, InterventionBatch) and is_traced(jax.tree.leaves(steer)):
            return steer
        entries = entries_of(steer, mode)
        for entry in entries:
            entry.check(config)
            if n_rows is not None and entry.row is not None and entry.row >= n_rows:
                allowed = f"from 0 to {n_rows - 1}, the texts of the batch"
                raise ArgumentError(field="row", value=entry.row, allowed=allowed)
        if isinstance(steer, InterventionBatch):
            return steer
        _refuse_overlap(entries)
        _refuse_too_many(entries, config)
        size = max(_SMALLEST, 1 << (len(entries) - 1).bit_length())
        empty = (_NO_LAYER, 0, 0.0, 0, 0, 0, 0, _EVERY_ROW)
        rows = [_numbers(entry) for entry in entries] + [empty] * (size - len(entries))
        layers, neurons, values, *rest = zip(*rows, strict=True)
        if is_traced(values):  # numbers only when the program runs
            value: Any = jnp.stack([jnp.asarray(value, jnp.float32) for value in values])
        else:
            value = np.array([float(value) for value in values], np.float32)
        layer, neuron, *others = (np.array(column, np.int32) for column in (layers, neurons, *rest))
        return cls(layer, neuron, value, *others)

    def entries(self) -> list[Intervention]:
        """Returns the interventions one by one, as `of` takes them."""
        columns = [np.asarray(column).tolist() for column in jax.tree.leaves(self)]
        return [_intervention(*numbers) for numbers in zip(*columns, strict=True) if numbers[0] != _NO_LAYER]

    def layer_hooks(
        self,
        config: ModelConfig,
        positions_BT: jax.Array | None = None,
        prompt_lengths_B: jax.Array | int | None = None,
    ) -> LayerHooks:
        """Returns arguments for `Transformer.hidden(hooks=hooks, hook_inputs=jnp.arange(L))` in a program.

        Positions are int32[B, T], by default 0, 1, 2, ...; prompt lengths int32[B] or one number, tokens of
        each row's prompt; the rest is generated. By default all tokens are the prompt.
        """
        lengths = jnp.asarray(_END if prompt_lengths_B is None else prompt_lengths_B)

        def applies(like_BTD: jax.Array, layer: jax.Array) -> jax.Array:
            batch, length, _ = like_BTD.shape
            positions = jnp.arange(length)[None] if positions_BT is None else positions_BT
            applies_BTE = self._applies(positions, jnp.broadcast_to(lengths, (batch,)))
            return jnp.broadcast_to(applies_BTE & (self.layer == layer), (batch, length, len(self.layer)))

        def select(u_BTD: jax.Array, layer: jax.Array) -> jax.Array:
            highest = jnp.finfo(u_BTD.dtype).max
            lowest = 0 if config.topk_activation == "abs" else -highest
            # Sure to be kept, or not to be; `edit` then writes the activation that was asked for.
            bid = self._by_mode(lambda mode: {"wins": highest, "loses": lowest}.get(str(mode.competes), 0.0))
            factor = self._by_mode(lambda mode: 0.0 if mode.competes else 1.0)
            bids_BTD = _changed(u_BTD, self.neuron, factor, bid, applies(u_BTD, layer))
            return model_topk(config, bids_BTD)

        def edit(h_BTD: jax.Array, layer: jax.Array) -> jax.Array:
            value = jnp.asarray(self.value, jnp.float32)
            factor = self._by_mode(lambda mode: mode.factor(value))
            term = self._by_mode(lambda mode: mode.term(value))
            return _changed(h_BTD, self.neuron, factor, term, applies(h_BTD, layer))

        return LayerHooks(topk=select, output=edit)

    def _by_mode(self, of_mode: Callable[[Mode], Any]) -> jax.Array:
        """Returns a number for each entry, float32[E], from one for each mode or float32[E] for each mode."""
        is_mode = [self.mode == index for index in range(len(MODES))]
        each = [jnp.broadcast_to(jnp.float32(of_mode(mode)), self.mode.shape) for mode in MODES.values()]
        return jnp.select(is_mode, each, 0.0)

    def _applies(self, positions_BT: jax.Array, prompt_lengths_B: jax.Array) -> jax.Array:
        """Returns which entries apply to which tokens, by position and row, bool[B, T, E]."""
        at = positions_BT[..., None]
        is_prompt = at < prompt_lengths_B[:, None, None]
        in_range = (at >= self.begin) & (at < self.end)
        where = [jnp.ones_like(is_prompt), is_prompt, ~is_prompt, in_range]
        by_position = jnp.select([self.where == number for number in range(len(where))], where, False)
        row = jnp.arange(len(prompt_lengths_B))[:, None, None]
        return by_position & ((self.row == _EVERY_ROW) | (self.row == row))

    def __repr__(self) -> str:
        # JAX prints trees that hold other things than arrays in its error messages.
        return f"InterventionBatch({getattr(self.layer, 'shape', '?')})"


def _changed(
    h_BTD: jax.Array, neuron_E: jax.Array, factor_E: jax.Array, term_E: jax.Array, applies_BTE: jax.Array
) -> jax.Array:
    """Returns `h * factor + term` at the neurons of entries that apply; of a neuron and token at most one."""
    is_neuron_ED = neuron_E[:, None] == np.arange(h_BTD.shape[-1])
    if len(neuron_E) <= _FEW:
        # Part of the loop over h that XLA makes in any case; a scatter would be a loop of its own.
        changed_BTD = h_BTD.astype(jnp.float32)
        for entry in range(len(neuron_E)):
            here_BTD = applies_BTE[..., entry, None] & is_neuron_ED[entry]
            changed = changed_BTD * factor_E[entry] + term_E[entry]
            changed_BTD = jnp.where(here_BTD, changed, changed_BTD)
        return changed_BTD.astype(h_BTD.dtype)
    # Each sum has one term at most: exact, if products are.
    numbers_E3D = (
        jnp.stack([jnp.ones_like(factor_E), factor_E, term_E], axis=1)[:, :, None] * is_neuron_ED[:, None]
    )
    sums_BT3D = jnp.einsum(
        "bte,ecd->btcd", applies_BTE.astype(jnp.float32), numbers_E3D, precision=jax.lax.Precision.HIGHEST
    )
    here_BTD, factor_BTD, term_BTD = (sums_BT3D[:, :, i] for i in range(3))
    return jnp.where(here_BTD > 0, h_BTD * factor_BTD + term_BTD, h_BTD).astype(h_BTD.dtype)


def _numbers(entry: Intervention) -> tuple:
    """Returns the element of each array for one entry."""
    if isinstance(entry.positions, str):
        where, begin, end = POSITIONS.index(entry.positions), 0, 0
    else:
        where, (begin, end) = _RANGE, entry.positions
    row = _EVERY_ROW if entry.row is None else entry.row
    mode = list(MODES).index(entry.mode)
    return entry.layer, entry.neuron, entry.value, mode, where, begin, end, row


def _intervention(
    layer: int, neuron: int, value: float, mode: int, where: int, begin: int, end: int, row: int
) -> Intervention:
    """Returns the entry that has these elements of the arrays."""
    positions = POSITIONS[where] if where != _RANGE else (begin, end)
    return Intervention(
        layer, neuron, value, list(MODES)[mode], positions, None if row == _EVERY_ROW else row
    )


def on_rows(
    config: ModelConfig, each: list[tuple[int, InterventionBatch]], n_rows: int
) -> InterventionBatch | None:
    """Joins interventions on rows of a batch, of (row, interventions on its sequence); None without any.

    They are filled up to a few sizes, a single row to a smaller one, for there decoding is faster the fewer
    neurons may be active.
    """
    if not each:
        return None
    parts = []
    for row, interventions in each:
        used = np.asarray(interventions.layer) != _NO_LAYER
        kept = InterventionBatch(*(np.asarray(column)[used] for column in jax.tree.leaves(interventions)))
        parts.append(dataclasses.replace(kept, row=np.full_like(kept.row, row)))
    size, n = _PER_BATCH[n_rows > 1], sum(len(part.layer) for part in parts)
    while size < n:
        size *= _MORE_ENTRIES
    empty = InterventionBatch.of(config, {})  # whose entries only fill up
    filling = jax.tree.map(lambda column: np.resize(column, size - n), empty)
    return jax.tree.map(lambda *columns: np.concatenate(columns), *parts, filling)


def _refuse_overlap(entries: Sequence[Intervention]) -> None:
    """Raises ValueError for two on one neuron at one position: their order would matter."""

    def neuron(entry: Intervention) -> tuple[int, int]:
        return entry.layer, entry.neuron

    for (layer, number), group in itertools.groupby(sorted(entries, key=neuron), key=neuron):
        for one, other in itertools.combinations(group, 2):
            if one.may_meet(other):
                neuron_and_layer = f"neuron {number} of layer {layer}"
                text = f"two interventions on {neuron_and_layer} at the same place: keep one, or give them "
                raise ArgumentError(f"{text}other positions", field="steer")


def _refuse_too_many(entries: Sequence[Intervention], config: ModelConfig) -> None:
    """Raises ValueError for more winners in a layer, or in a group of its neurons, than TopK keeps there."""
    forced = [entry for entry in entries if MODES[entry.mode].competes == "wins"]
    for layer, row in {(entry.layer, entry.row) for entry in forced}:
        neurons = [entry.neuron for entry in forced if entry.layer == layer and entry.row in (None, row)]
        begin = 0
        for width, k in config.groups:
            end = begin + width
            number = sum(begin <= neuron < end for neuron in neurons)
            if number > k:
                of_group = "" if len(config.groups) == 1 else f"neurons {begin} to {end - 1} of "
                text = f"{number} neurons forced in {of_group}layer {layer}: must be at most {k}, its places"
                raise ArgumentError(text, field="steer")
            begin = end
