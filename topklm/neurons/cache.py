"""What a forward pass left behind, by the names of TransformerLens."""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import operator

import jax

from topklm.neurons import names
from topklm.neurons.activations import SparseActivations


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["neurons", "others"],
    meta_fields=["layers", "hook_names"],
)
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ActivationCache(Mapping[str, jax.Array]):
    """What was asked for of a forward pass; see `topklm.neurons.names`.

    `cache["blocks.3.hook_topk"]` is [B, T, D], what TopK layer 3 hands on, made dense when it is asked for;
    `cache["topk", 3]` is the same, and `cache["topk", -1]` is of the last layer that has it. What was kept is
    found by every name of the array (see `names.same_array`).

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
        same = names.same_array(found) if found in self._known else None
        for kept, array in self.others.items():
            if names.same_array(kept) == same:
                return array
        if same in (captured := [names.of(layer, names.RESID_POST) for layer in self.layers]):
            # From the right: `jax.vmap` puts axes before.
            return self.neurons[..., captured.index(same), :, :, :].dense()
        there_are = ", ".join(self) or "none, for this model has no TopK layers"
        raise KeyError(f"{name!r} is not in the cache (see names_filter); there are: {there_are}")

    @property
    def _known(self) -> tuple[str, ...]:
        return self.hook_names or tuple(self)

    def _name(self, parts: tuple) -> str:
        """Gives the name of ("topk", 3), or of one whose layer counts from behind."""
        if len(parts) != 2 or not hasattr(parts[1], "__index__"):
            raise KeyError(f"{parts!r}: must be a name, or a hook and its layer, as in ('resid_post', 3)")
        hook, layer = f"hook_{parts[0]}", operator.index(parts[1])
        places = [at for at, of_layer in map(names.parse, self._known) if of_layer == hook]
        return names.of(places[layer] if -len(places) <= layer < 0 else layer, hook)

    def __iter__(self) -> Iterator[str]:
        yield from (names.of(layer, names.TOPK) for layer in self.layers)
        yield from self.others

    def __len__(self) -> int:
        return len(self.layers) + len(self.others)

    def __repr__(self) -> str:
        return f"ActivationCache({', '.join(self) or 'empty'}; neurons={self.neurons!r})"
