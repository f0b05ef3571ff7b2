"""What a forward pass left behind, by the names of TransformerLens."""

from collections.abc import Iterator, Mapping
import dataclasses

import jax

from topklm.neurons import names
from topklm.neurons.activations import SparseActivations


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ActivationCache(Mapping[str, jax.Array]):
    """What was asked for of a forward pass; see `topklm.neurons.names`.

    `cache["blocks.3.hook_topk"]` is [B, T, D], what TopK layer 3 hands on, made dense when it is asked for;
    `cache["topk", 3]` is the same.

    Attributes:
        neurons: The captured TopK layers, sparse, [S, B, T, k].
        layers: Which layers those are.
        others: Whatever else was captured, [B, T, D] each.
    """

    neurons: SparseActivations
    layers: tuple[int, ...]
    others: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str | tuple[str, int]) -> jax.Array:
        if isinstance(name, tuple):
            name = names.of(name[1], f"hook_{name[0]}")
        if name in self.others:
            return self.others[name]
        for place, layer in enumerate(self.layers):
            if name == names.of(layer, names.TOPK):
                return self.neurons[place].dense()
        there_are = ", ".join(self) or "none, for this model has no TopK layers"
        raise KeyError(f"{name!r} is not in the cache (see names_filter); there are: {there_are}")

    def __iter__(self) -> Iterator[str]:
        yield from (names.of(layer, names.TOPK) for layer in self.layers)
        yield from self.others

    def __len__(self) -> int:
        return len(self.layers) + len(self.others)

    def __repr__(self) -> str:
        return f"ActivationCache({', '.join(self) or 'empty'}; neurons={self.neurons!r})"
