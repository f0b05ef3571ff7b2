"""The activations of TopK layers in sparse form, read off while the model runs.

`capture` is for inside `jax.jit`; what people call is `LanguageModel.run_with_cache`. Dims: S TopK layers,
B batch, T tokens, k kept entries, D d_model = neurons per layer.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topklm.model.transformer import Changes, Transformer
from topklm.neurons import names


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["indices", "values"], meta_fields=["d_model"]
)
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class SparseActivations:
    """What TopK layers keep: k entries for each token, the strongest first.

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
        """The k largest entries by magnitude of every row; nothing is lost where at most k are not 0.

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
        """[S, B, T, D], what the layers hand on."""
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
    changes: Changes | None = None,
    more_active: int = 0,
    segment_ids_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
) -> tuple[jax.Array, SparseActivations, dict[str, jax.Array]]:
    """Runs the stack and keeps what has one of these names.

    Args:
        model: As `transformer.bind` gives it, inside `jax.jit`.
        tokens_BT: int32[B, T].
        wanted: Names, from `names.chosen`.
        changes: What is done to layers meanwhile, with their numbers; what is kept is what they hand on then.
        more_active: Entries that this may make active besides those of TopK.
        segment_ids_BT: As in `Transformer.__call__`.
        positions_BT: As in `Transformer.__call__`.

    Returns:
        The normed hidden state [B, T, D]; the activations of the TopK layers whose `hook_topk` is wanted,
        sparse, in their order; and everything else, dense, [B, T, D] each in the compute dtype.
    """
    places = {name: names.parse(name) for name in wanted}
    sparse_layers = [layer for layer, hook in places.values() if hook == names.TOPK]
    dense_hooks = {hook for _, hook in places.values()} - {names.TOPK}
    k = min(model.config.topk_k + more_active, model.config.d_model)

    def tap(h: jax.Array, u: jax.Array, h_next: jax.Array) -> tuple[SparseActivations | None, dict]:
        dense = {names.RESID_PRE: h, names.TOPK_PRE: u, names.RESID_POST: h_next}
        neurons = SparseActivations.from_dense(h_next, k) if sparse_layers else None
        return neurons, {hook: dense[hook] for hook in dense_hooks}

    numbers, changes = jnp.arange(model.config.n_layers), changes or Changes()
    h_BTD, (neurons, dense) = model.hidden(
        tokens_BT, segment_ids_BT, positions_BT, tap=tap, **changes._asdict(), edits=numbers
    )
    others = {name: dense[hook][layer] for name, (layer, hook) in places.items() if hook != names.TOPK}
    if not sparse_layers:
        empty = jnp.zeros((0, *tokens_BT.shape, k))
        return h_BTD, SparseActivations(empty.astype(jnp.int32), empty, model.config.d_model), others
    # Slices, so that XLA sees which layers nobody asks for, and does not search those.
    chosen = jax.tree.map(lambda x: jnp.stack([x[layer] for layer in sparse_layers]), neurons)
    return h_BTD, chosen, others
