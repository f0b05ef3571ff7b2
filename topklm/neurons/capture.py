"""The arrays of a forward pass that can be captured; those of TopK layers in sparse form.

They are named as in TransformerLens. Of layer l: `blocks.{l}.hook_resid_pre`, the residual stream that enters
it; `blocks.{l}.hook_topk_pre`, what its TopK is given, and `blocks.{l}.hook_topk`, what that keeps (TopK
layers only); `blocks.{l}.hook_resid_post`, the output of the layer. That is the output of its TopK, too, and
the input of the next layer, so some names are of the same array.

`capture` is for inside `jax.jit`; people call `LanguageModel.run_with_cache`. Dims: S TopK layers,
B batch, T tokens, k kept entries, D d_model = neurons per layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import difflib
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.errors import one_line
from topklm.model.block import NO_HOOKS, LayerHooks
from topklm.model.transformer import Transformer

RESID_PRE, TOPK_PRE, TOPK, RESID_POST = "hook_resid_pre", "hook_topk_pre", "hook_topk", "hook_resid_post"

_CLOSE = 3  # names that an error message offers
_STATIC = {"static": True}  # of a field: a part of the tree's structure

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None


def hook_name(layer: int, hook: str) -> str:
    """Returns the full name: (3, "hook_topk") -> "blocks.3.hook_topk"."""
    return f"blocks.{layer}.{hook}"


def parse_hook_name(name: str) -> tuple[int, str]:
    """Returns the inverse of `hook_name`."""
    _, layer, hook = name.split(".")
    return int(layer), hook


class HookName(str):
    """A name as functions of hooks get it, also with the parts that it has in TransformerLens."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """Returns the name itself."""
        return str(self)

    def layer(self) -> int:
        """Returns the number of its layer."""
        return parse_hook_name(self)[0]


def same_array(name: str) -> str:
    """Returns the one name of all those that are of the same array, of names that a model has."""
    layer, hook = parse_hook_name(name)
    if hook == RESID_PRE and layer > 0:
        return hook_name(layer - 1, RESID_POST)
    return hook_name(layer, RESID_POST if hook == TOPK else hook)


def all_hook_names(config: ModelConfig) -> tuple[str, ...]:
    """Returns all names of a model, in the order in which they are computed."""
    hooks = {True: (RESID_PRE, TOPK_PRE, TOPK, RESID_POST), False: (RESID_PRE, RESID_POST)}
    return tuple(
        hook_name(layer, hook)
        for layer in range(config.n_layers)
        for hook in hooks[layer < config.n_topk_layers]
    )


def matching_hook_names(config: ModelConfig, names_filter: NamesFilter) -> tuple[str, ...]:
    """Returns the names that a filter stands for, in the order of `all_hook_names`.

    A filter is a name, several, or a function that says of each whether it is wanted; None: the outputs of
    TopK layers. ValueError for a name that the model does not have, or no filter.
    """
    names = all_hook_names(config)
    if names_filter is None:
        return tuple(each for each in names if parse_hook_name(each)[1] == TOPK)
    if callable(names_filter):
        return tuple(filter(names_filter, names))
    try:
        wanted = [names_filter] if isinstance(names_filter, str) else list(names_filter)
    except TypeError:
        raise ValueError(
            f"names_filter = {names_filter!r}: must be a name, several, or a function of a name"
        ) from None
    for each in wanted:
        check_hook_name(config, each, "names_filter")
    return tuple(each for each in names if each in wanted)


def check_hook_name(config: ModelConfig, given: object, field: str) -> None:
    """Raises ValueError, with names that are close, for one that the model does not have."""
    names = all_hook_names(config)
    if not isinstance(given, str) or given not in names:
        close = ", ".join(difflib.get_close_matches(str(given), names, _CLOSE, cutoff=0))
        raise ValueError(
            one_line(
                f"{field}: {given!r} is none of this model's names; close: {close} (all: model.hook_names)"
            )
        )


@jax.tree_util.register_dataclass
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
    d_model: int = dataclasses.field(metadata=_STATIC)

    @classmethod
    def from_dense(cls, dense: jax.Array, k: int) -> "SparseActivations":
        """Returns the k largest entries by magnitude of rows [..., D]: all, if no more are not 0."""
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

        IndexError out of range; JAX would take the last one there is.
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
    """Runs the stack on tokens int32[B, T] inside `jax.jit`, and keeps the arrays of these names.

    Hooks are called in every layer with its number; their outputs are kept, and they may make `more_active`
    entries active besides those of TopK. Returns the normed hidden state [B, T, D]; the activations of the
    TopK layers whose `hook_topk` is wanted, sparse, in their order; and everything else, dense, [B, T, D]
    each in the compute dtype.
    """
    places = {name: parse_hook_name(name) for name in wanted}
    sparse_layers = [layer for layer, hook in places.values() if hook == TOPK]
    dense_hooks = {hook for _, hook in places.values()} - {TOPK}
    k = min(model.config.topk_k + more_active, model.config.d_model)

    def keep(h: jax.Array, u: jax.Array, h_next: jax.Array) -> tuple[SparseActivations | None, dict]:
        dense = {RESID_PRE: h, TOPK_PRE: u, RESID_POST: h_next}
        neurons = SparseActivations.from_dense(h_next, k) if sparse_layers else None
        return neurons, {hook: dense[hook] for hook in dense_hooks}

    numbers = jnp.arange(model.config.n_layers)
    h_BTD, (neurons, dense) = model.hidden(
        tokens_BT, segment_ids_BT, positions_BT, capture=keep, hooks=hooks, hook_inputs=numbers
    )
    others = {name: dense[hook][layer] for name, (layer, hook) in places.items() if hook != TOPK}
    if not sparse_layers:
        empty = jnp.zeros((0, *tokens_BT.shape, k))
        return h_BTD, SparseActivations(empty.astype(jnp.int32), empty, model.config.d_model), others
    # Slices, so that XLA sees which layers nobody asks for, and does not search those.
    chosen = jax.tree.map(lambda x: jnp.stack([x[layer] for layer in sparse_layers]), neurons)
    return h_BTD, chosen, others


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ActivationCache(Mapping[str, jax.Array]):
    """The captured arrays of a forward pass, by their names.

    `cache["blocks.3.hook_topk"]` is [B, T, D], what TopK layer 3 hands on, made dense when it is asked for;
    `cache["topk", 3]` is the same, and `cache["topk", -1]` is of the last layer that has it. A kept array is
    found by each of its names (see `same_array`).

    Attributes:
        neurons: The captured TopK layers, sparse, [S, B, T, k].
        layers: Which layers those are.
        others: Whatever else was captured, [B, T, D] each.
        hook_names: All names of the model; default: those of what was kept.
    """

    neurons: SparseActivations
    layers: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    others: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    hook_names: tuple[str, ...] = dataclasses.field(default=(), metadata=_STATIC)

    def __getitem__(self, name: str | tuple[str, int]) -> jax.Array:
        found = self._name(name) if isinstance(name, tuple) else name
        same = same_array(found) if found in self._known else None
        for kept, array in self.others.items():
            if same_array(kept) == same:
                return array
        if same in (captured := [hook_name(layer, RESID_POST) for layer in self.layers]):
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
        layers = [at for at, of_layer in map(parse_hook_name, self._known) if of_layer == hook]
        return hook_name(layers[layer] if -len(layers) <= layer < 0 else layer, hook)

    def __iter__(self) -> Iterator[str]:
        yield from (hook_name(layer, TOPK) for layer in self.layers)
        yield from self.others

    def __len__(self) -> int:
        return len(self.layers) + len(self.others)

    def __repr__(self) -> str:
        return f"ActivationCache({', '.join(self) or 'empty'}; neurons={self.neurons!r})"
