"""Ablates sets of neurons, and measures by how much the loss rises in each of several groups of tokens.

Groups are two texts, of which one is to be forgotten (neurons are chosen by `topklm.neurons.contrast`), or
the targets of a pattern and the tokens around them (`topklm.neurons.ablate_targets`). Neurons are chosen on
one half of the documents, and losses are measured on the other half, so nothing that was used to choose is
used to score. Beside the chosen set stand random ones of as many neurons of the same layers and of nearly
the same densities: the cost of ablating so much of the model, for any purpose. The definitions are ours.
Dims: G units or documents, N tokens, S layers, D neurons per layer, R random sets.

The set that is off is data, one number for each neuron of the model, so one program serves every set. The
text is read as `topklm.neurons.harvest` reads it: every token once, each given what stands before it in its
window; separators and padding have no loss. L layers, B rows, T tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.errors import ArgumentError
from topklm.model import transformer
from topklm.model.block import LayerHooks
from topklm.model.losses import token_losses
from topklm.neurons.contrast import ContrastedNeuron
from topklm.neurons.documents import TextModel, batches

Neuron = tuple[int, int]  # layer of the model, number in it
Report = Callable[[int], None]  # told of the tokens that are done since the last time

_STRETCH_TOKENS = 2**20  # that are packed together
_NEAREST = 10  # neurons of a layer, by density, of which one is drawn for each chosen one
_RESAMPLES = 2000
_DRAWN_AT_ONCE = 2**22  # units of resamples, for memory
_INTERVAL = (2.5, 97.5)  # percentiles


class AblatedLosses:
    """Documents, ready to be read again and again with other neurons off.

    "Off" is what the intervention "ablate" does: the layer's output is 0 there, at every token. It is
    computed in float32, whatever the dtype of the model, for effects of few neurons are small. Documents are
    token ids int[n] without separators, none empty; groups say which of all N tokens, in their order, are of
    each, bool[N], and `n_tokens`, int64[G], how many tokens of each document.
    """

    def __init__(self, model: TextModel, documents: Sequence[np.ndarray], groups: Mapping[str, np.ndarray]):
        in_float32 = dataclasses.replace(model.config, dtype="float32")
        self._model = dataclasses.replace(model, config=in_float32)
        self._groups, self._n_documents = dict(groups), len(documents)
        self._documents = np.repeat(np.arange(len(documents)), [len(ids) for ids in documents])
        stretches = batches(model.windows(documents), _STRETCH_TOKENS)
        self._packed = [model.pack(stretch) for stretch in stretches]
        self.n_tokens = {name: self._sums(of.astype(np.int64)) for name, of in self._groups.items()}

    def sums(
        self, ablated: Iterable[Neuron] = (), report: Report = lambda tokens: None
    ) -> dict[str, np.ndarray]:
        """Returns float64[G] of each group, nats: sums over the tokens of each document, with these off."""
        losses = self.of_tokens(ablated, report)
        return {name: self._sums(np.where(of, losses, 0.0)) for name, of in self._groups.items()}

    def _sums(self, of_tokens: np.ndarray) -> np.ndarray:
        sums = np.bincount(self._documents, of_tokens, self._n_documents)
        return sums.astype(of_tokens.dtype)

    def of_tokens(self, ablated: Iterable[Neuron] = (), report: Report = lambda tokens: None) -> np.ndarray:
        """Returns float64[N], nats, the loss of each token with these neurons off."""
        model, losses, done = self._model, np.zeros(len(self._documents)), 0
        keep = np.ones((model.config.n_layers, model.config.d_model), np.float32)
        for layer, neuron in ablated:
            if not (0 <= layer < keep.shape[0] and 0 <= neuron < keep.shape[1]):
                raise ValueError(
                    f"layer {layer}, neuron {neuron}: the model has layers 0 to {keep.shape[0] - 1} of "
                    f"{keep.shape[1]} neurons"
                )
            keep[layer, neuron] = 0
        keep_LD = jax.device_put(keep, model.layout.replicated)
        for packed in self._packed:
            for arrays, read, tokens in packed.batches():
                with jax.default_matmul_precision("float32"):
                    nll = _forward(model.config, model.params, keep_LD, *model.put(arrays))
                losses[done + tokens] = np.asarray(nll, np.float64).reshape(-1)[read - 1]
                report(len(read))
            done += len(packed.tokens)
        return losses


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    config: ModelConfig,
    params: transformer.Parameters,
    keep_LD: jax.Array,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    positions_BT: jax.Array,
) -> jax.Array:
    """Returns next-token losses, nats, float32[B, T]."""
    model = transformer.bind(config, params)

    def edit(h_BTD: jax.Array, keep_D: jax.Array) -> jax.Array:
        return h_BTD * keep_D.astype(h_BTD.dtype)

    h_BTD, _ = model.hidden(
        tokens_BT, segment_ids_BT, positions_BT, hooks=LayerHooks(output=edit), hook_inputs=keep_LD
    )
    return token_losses(h_BTD, model.unembedding(), jnp.roll(tokens_BT, -1, axis=1), config.vocab_size)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A ratio of sums over documents or texts, with its 95 % interval by bootstrap over them."""

    value: float  # NaN where there is no token to take it of
    low: float  # percentile, NaN likewise, and where there are too few to draw from
    high: float


@dataclasses.dataclass(frozen=True)
class Change:
    """The effect of ablating a set."""

    neurons: tuple[Neuron, ...]  # the set
    # Mean over the set of the share of tokens at which a neuron is active, where they were chosen.
    density: float
    # Changes of the mean loss, nats per token, by name of the group, in the order in which they were given.
    groups: Mapping[str, Estimate]

    @property
    def gap(self) -> float:
        """How much more is lost in the first group, which is aimed at, than in the last, the rest."""
        first, *_, last = self.groups.values()
        return first.value - last.value


@dataclasses.dataclass(frozen=True)
class Spread:
    """The mean of one figure over random sets, and its 2.5th and 97.5th percentiles, between sets linear."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> "Spread":
        """Summarises one figure or more."""
        low, high = np.percentile(figures, _INTERVAL)
        return cls(float(np.mean(figures)), float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A chosen set, and random ones beside it."""

    chosen: Change
    random: tuple[Change, ...]

    @property
    def p_value(self) -> float:
        """How often chance does as well: (1 + random sets whose gap is as large) / (1 + R)."""
        return (1 + self.n_as_large) / (1 + len(self.random))

    @property
    def n_as_large(self) -> int:
        """How many random sets have as large a gap."""
        return sum(one.gap >= self.chosen.gap for one in self.random)

    def spread(self, group: str) -> Spread:
        """Summarises the changes of a group over the random sets."""
        return Spread.of([one.groups[group].value for one in self.random])

    @property
    def random_density(self) -> float:
        """Mean density over the random sets."""
        return float(np.mean([one.density for one in self.random]))


def halves(n_documents: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draws the numbers of the documents to choose on, rising, and to score on; the first get one more."""
    if n_documents < 2:
        raise ValueError(f"n_documents = {n_documents}: must be 2 or more, some to choose on, some to score")
    order = np.random.default_rng(seed).permutation(n_documents)
    middle = -(-n_documents // 2)
    return np.sort(order[:middle]), np.sort(order[middle:])


def strongest(
    candidates: Sequence[ContrastedNeuron], n_neurons: int, by: str = "difference"
) -> tuple[Neuron, ...]:
    """Returns the most typical neurons, `by` as in `ranked`; ValueError if fewer are more frequent there."""
    more = [candidate for candidate in candidates if candidate.difference > 0]
    more.sort(key=lambda candidate: (-getattr(candidate, by), candidate.layer, candidate.neuron))
    if not 1 <= n_neurons <= len(more):
        allowed = f"from 1 to {len(more)}, those that are more frequent in the text to be forgotten"
        raise ArgumentError(field="count", value=n_neurons, allowed=allowed)
    return tuple((candidate.layer, candidate.neuron) for candidate in more[:n_neurons])


def matched_set(
    chosen: Sequence[Neuron], density: np.ndarray, layers: Sequence[int], rng: np.random.Generator
) -> tuple[Neuron, ...]:
    """Draws as many other neurons: for each, in random order, one of the 10 of its layer nearest in density.

    Density, float64[S, D], is the share of tokens at which a neuron is active, and compared by its logarithm.
    No neuron is drawn twice, and none that is chosen or never active; ValueError if a layer has too few.
    """
    free = density > 0  # a new array
    numbers = {layer: number for number, layer in enumerate(layers)}
    for layer, neuron in chosen:
        free[numbers[layer], neuron] = False
    drawn = []
    for at in rng.permutation(len(chosen)):
        layer, neuron = chosen[at]
        row = numbers[layer]
        others = np.flatnonzero(free[row])
        if not len(others):
            n = sum(of_set == layer for of_set, _ in chosen)
            text = f"layer {layer} has no {n} others besides the {n} chosen; choose fewer"
            raise ArgumentError(text, field="count")
        distance = np.abs(np.log(density[row, others]) - np.log(density[row, neuron]))
        other = int(rng.choice(others[np.argsort(distance, kind="stable")[:_NEAREST]]))
        free[row, other] = False
        drawn.append((layer, other))
    return tuple(sorted(drawn))


def measure(
    texts: Sequence[AblatedLosses],
    sets: Sequence[Sequence[Neuron]],
    density: np.ndarray,
    layers: Sequence[int],
    *,
    n_random: int,
    seed: int = 0,
    report: Report = lambda tokens: None,
) -> tuple[dict[str, float], list[Outcome]]:
    """Measures chosen sets, each with R = `n_random` random ones beside it, matched as by `matched_set`.

    The texts had no part in choosing; the groups of each have other names. `report` is told of the tokens
    that are done; each is read 1 + (1 + R) x sets times. Returns the mean loss of each group with all neurons
    on, nats, NaN of a group without tokens; and outcomes.
    """
    rng = np.random.default_rng(seed)
    # All are drawn before any is measured, so that an impossible set shows at once.
    drawn = [[matched_set(chosen, density, layers, rng) for _ in range(n_random)] for chosen in sets]
    rows = {layer: number for number, layer in enumerate(layers)}
    n_tokens = {name: of for text in texts for name, of in text.n_tokens.items()}

    def sums(neurons: Sequence[Neuron] = ()) -> dict[str, np.ndarray]:
        return {name: of for text in texts for name, of in text.sums(neurons, report).items()}

    before = sums()

    def change(neurons: Sequence[Neuron]) -> Change:
        after = sums(neurons)
        groups = {
            name: estimate(after[name] - before[name], n, np.random.default_rng(seed))
            for name, n in n_tokens.items()
        }
        of_set = float(np.mean([density[rows[layer], neuron] for layer, neuron in neurons]))
        return Change(tuple(neurons), of_set, groups)

    outcomes = [
        Outcome(change(chosen), tuple(map(change, others)))
        for chosen, others in zip(sets, drawn, strict=True)
    ]
    return {name: _mean(before[name], n) for name, n in n_tokens.items()}, outcomes


def estimate(sums: np.ndarray, n_tokens: np.ndarray, rng: np.random.Generator) -> Estimate:
    """Computes sum(sums) / sum(n_tokens) over documents; those without a token have no part in it."""
    there = n_tokens > 0
    if not there.any():
        return Estimate(math.nan, math.nan, math.nan)
    sums, n_tokens = sums[there], n_tokens[there]
    return Estimate(_mean(sums, n_tokens), *bootstrap_interval(sums, n_tokens, rng))


def _mean(sums: np.ndarray, n_tokens: np.ndarray) -> float:
    return float(sums.sum() / n_tokens.sum()) if n_tokens.any() else math.nan


def bootstrap_interval(
    sums: np.ndarray, n_tokens: np.ndarray, rng: np.random.Generator
) -> tuple[float, float]:
    """Computes the 95 % interval of sum(sums) / sum(n_tokens), documents being drawn with replacement."""
    ratios, at_once = [], max(1, _DRAWN_AT_ONCE // len(sums))
    for begin in range(0, _RESAMPLES, at_once):
        drawn = rng.integers(0, len(sums), (min(at_once, _RESAMPLES - begin), len(sums)))
        ratios.append(sums[drawn].sum(axis=1) / n_tokens[drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(ratios), _INTERVAL)
    return float(low), float(high)
