"""The activations of TopK layers in sparse form, read off while the model runs.

`capture` is for inside `jax.jit`; people call `LanguageModel.run_with_cache`. Dims: S TopK layers,
B batch, T tokens, k kept entries, D d_model = neurons per layer.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topklm.model.block import NO_HOOKS, LayerHooks
from topklm.model.transformer import Transformer
from topklm.neurons import hook_names


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["indices", "values"], meta_fields=["d_model"]
)
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class SparseActivations:
    """The output of TopK layers: k entries for each token, the strongest first.

    Entries are sorted by falling magnitude, ties by rising index; with "relu", where nothing is negative,
    that is falling value. A token's k indices are distinct and below `d_model`, always. An entry with value
    0 is *inactive* ("relu" clipped it) and its index says nothing: it is the lowest one not used yet. So
    every entry may be scattered, gathered or stored as it is, but only those of `active` may be counted.

    Attributes:
        indices: int32[S, B, T, k], neurons. A slice may have fewer leading axes.
        values: [S, B, T, k] in the model's compute dtype, NaN for a token whose hidden state holds a NaN.
        d_model: D, neurons per layer.
    """

    indices: jax.Array
    values: jax.Array
    d_model: int

    @classmethod
    def from_dense(cls, dense: jax.Array, k: int) -> "SparseActivations":
        """Returns the k largest entries by magnitude of every row; nothing is lost where at most k are not 0.

        Args:
            dense: [..., D], e.g. the output of a TopK layer with any of its activations.
            k: Entries kept, at most D.
        """
        # In float32, in which XLA has a TopK for CPUs; other types it sorts.
        _, indices = jax.lax.top_k(jnp.abs(dense).astype(jnp.float32), k)
        return cls(indices, jnp.take_along_axis(dense, indices, axis=-1), dense.shape[-1])

    @property
    def active(self) -> jax.Array:
        """bool[S, B, T, k], which entries are not 0."""
        return self.values != 0

    def dense(self) -> jax.Array:
        """Returns [S, B, T, D], what the layers hand on."""
        zeros = jnp.zeros((*self.values.shape[:-1], self.d_model), self.values.dtype)
        return jnp.put_along_axis(zeros, self.indices, self.values, axis=-1, inplace=False)

    def __getitem__(self, index: Any) -> "SparseActivations":
        """Returns a part along the leading axes, e.g. `neurons[2]` of the third layer, [B, T, k].

        Raises:
            IndexError: Out of range; JAX would take the last one there is.
        """
        if not any(isinstance(part, jax.core.Tracer) for part in jax.tree.leaves(index)):
            _ = np.broadcast_to(np.zeros((), np.int8), self.values.shape)[index]
        return dataclasses.replace(self, indices=self.indices[index], values=self.values[index])

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator["SparseActivations"]:
        return (self[number] for number in range(len(self)))

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        # NumPy would walk through it, number by number.
        raise TypeError("SparseActivations is no array: take .indices and .values, or .dense()")

    def __repr__(self) -> str:
        # JAX prints trees that hold other things than arrays in its error messages.
        shape = list(getattr(self.values, "shape", "?"))
        return f"SparseActivations({getattr(self.values, 'dtype', '?')}{shape} of {self.d_model} neurons)"


def capture(
    model: Transformer,
    tokens_BT: jax.Array,
    wanted: Sequence[str],
    hooks: LayerHooks = NO_HOOKS,
    more_active: int = 0,
    segment_ids_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
) -> tuple[jax.Array, SparseActivations, dict[str, jax.Array]]:
    """Runs the stack and keeps the arrays of these names.

    Args:
        model: As `transformer.bind` gives it, inside `jax.jit`.
        tokens_BT: int32[B, T].
        wanted: Names, from `hook_names.matching`.
        hooks: Called in every layer with its number; their outputs are kept.
        more_active: Entries that they may make active besides those of TopK.
        segment_ids_BT: As in `Transformer.__call__`.
        positions_BT: As in `Transformer.__call__`.

    Returns:
        The normed hidden state [B, T, D]; the activations of the TopK layers whose `hook_topk` is wanted,
        sparse, in their order; and everything else, dense, [B, T, D] each in the compute dtype.
    """
    places = {name: hook_names.parse(name) for name in wanted}
    sparse_layers = [layer for layer, hook in places.values() if hook == hook_names.TOPK]
    dense_hooks = {hook for _, hook in places.values()} - {hook_names.TOPK}
    k = min(model.config.topk_k + more_active, model.config.d_model)

    def keep(h: jax.Array, u: jax.Array, h_next: jax.Array) -> tuple[SparseActivations | None, dict]:
        dense = {hook_names.RESID_PRE: h, hook_names.TOPK_PRE: u, hook_names.RESID_POST: h_next}
        neurons = SparseActivations.from_dense(h_next, k) if sparse_layers else None
        return neurons, {hook: dense[hook] for hook in dense_hooks}

    numbers = jnp.arange(model.config.n_layers)
    h_BTD, (neurons, dense) = model.hidden(
        tokens_BT, segment_ids_BT, positions_BT, capture=keep, hooks=hooks, hook_inputs=numbers
    )
    others = {name: dense[hook][layer] for name, (layer, hook) in places.items() if hook != hook_names.TOPK}
    if not sparse_layers:
        empty = jnp.zeros((0, *tokens_BT.shape, k))
        return h_BTD, SparseActivations(empty.astype(jnp.int32), empty, model.config.d_model), others
    # Slices, so that XLA sees which layers nobody asks for, and does not search those.
    chosen = jax.tree.map(lambda x: jnp.stack([x[layer] for layer in sparse_layers]), neurons)
    return h_BTD, chosen, others


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["neurons", "others"],
    meta_fields=["layers", "hook_names"],
)
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ActivationCache(Mapping[str, jax.Array]):
    """The captured arrays of a forward pass; see `topklm.neurons.hook_names`.

    `cache["blocks.3.hook_topk"]` is [B, T, D], what TopK layer 3 hands on, made dense when it is asked for;
    `cache["topk", 3]` is the same, and `cache["topk", -1]` is of the last layer that has it. A kept array is
    found by each of its names (see `hook_names.same_array`).

    Attributes:
        neurons: The captured TopK layers, sparse, [S, B, T, k].
        layers: Which layers those are.
        others: Whatever else was captured, [B, T, D] each.
        hook_names: All names of the model; default: those of what was kept.
    """

    neurons: SparseActivations
    layers: tuple[int, ...]
    others: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)

    hook_names: tuple[str, ...] = ()

    def __getitem__(self, name: str | tuple[str, int]) -> jax.Array:
        found = self._name(name) if isinstance(name, tuple) else name
        same = hook_names.same_array(found) if found in self._known else None
        for kept, array in self.others.items():
            if hook_names.same_array(kept) == same:
                return array
        if same in (captured := [hook_names.name(layer, hook_names.RESID_POST) for layer in self.layers]):
            # From the right: `jax.vmap` puts axes before.
            return self.neurons[..., captured.index(same), :, :, :].dense()
        there_are = ", ".join(self) or "none, for this model has no TopK layers"
        raise KeyError(f"{name!r} is not in the cache (see names_filter); there are: {there_are}")

    @property
    def _known(self) -> tuple[str, ...]:
        return self.hook_names or tuple(self)

    def _name(self, parts: tuple) -> str:
        """Gives the name of ("topk", 3), or of one whose layer is counted from the end."""
        if len(parts) != 2 or not hasattr(parts[1], "__index__"):
            raise KeyError(f"{parts!r}: must be a name, or a hook and its layer, as in ('resid_post', 3)")
        hook, layer = f"hook_{parts[0]}", operator.index(parts[1])
        places = [at for at, of_layer in map(hook_names.parse, self._known) if of_layer == hook]
        return hook_names.name(places[layer] if -len(places) <= layer < 0 else layer, hook)

    def __iter__(self) -> Iterator[str]:
        yield from (hook_names.name(layer, hook_names.TOPK) for layer in self.layers)
        yield from self.others

    def __len__(self) -> int:
        return len(self.layers) + len(self.others)

    def __repr__(self) -> str:
        return f"ActivationCache({', '.join(self) or 'empty'}; neurons={self.neurons!r})"
