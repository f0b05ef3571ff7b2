"""The effect of a neuron: how the next token's loss changes when it is set to 0.

A sample is a token at which the neuron is active, in the window of its document in which it was harvested
(`topklm.neurons.documents`), and not the window's last. The neuron is set to 0 at that token only, in the
layer's output, and everything that depends on it is computed again: the later layers at that token, for no
other token of the window that counts sees it. The effect is the loss of the next token without the neuron
less the loss with it, in nats: positive where the neuron helps.

For a Base LM the neuron is the positive part of a coordinate, so that part is taken away: h becomes
min(h, 0). The definition is ours. Dims: L layers, W windows of T tokens, D neurons per layer; R rows of M
samples, each row of one window.
"""

from collections.abc import Callable, Iterator
import dataclasses
import itertools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.model import losses, transformer
from topklm.model.block import TokenInput, end_layer
from topklm.model.cached_attention import KeysAndValues, attend_to_past, decode_step, keys_and_values
from topklm.neurons.documents import chunk_bounds

COLUMNS = ("ablation_effect", "ablation_standard_error", "ablation_samples")
MAX_TOKENS = 2**17  # of the windows that are looked at; a neuron that is active seldom has fewer samples

_GROUP_TOKENS = 2048  # windows that are run together
_ROWS, _PER_ROW = 16, 64  # R and M: samples in one program
_GROUPS_PER_NEURON = 8  # over which the samples of a neuron are spread, so that they are not of one text


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Measured samples; each array has one entry for each."""

    layers: np.ndarray  # int, of the model
    neurons: np.ndarray  # int
    rows: np.ndarray  # int, which window of the group
    places: np.ndarray  # int, positions in the window
    effects: np.ndarray  # float64, nats


def measure(
    layers: tuple[int, ...],
    token_ids: np.ndarray,
    bounds: np.ndarray,
    config: ModelConfig,
    params: transformer.Parameters,
    *,
    samples: int,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Measures all neurons of some layers, S rising numbers, on windows drawn from the text of a store.

    Ids are uint[N] of the whole store, bounds as `Store.document_bounds` gives them, parameters on one device
    or a mesh; all is computed in float32. Each neuron has at most so many samples; `options` are those of
    `draw`. Returns `COLUMNS`, [S, D] each: the mean in nats, NaN without a sample; its standard error, as if
    samples were independent, NaN below two; and int64, the number of samples.
    """
    count = np.zeros((len(layers), config.d_model), np.int64)
    total, squares = np.zeros(count.shape), np.zeros(count.shape)
    each = np.full(count.shape, samples)
    for _, found in draw(layers, token_ids, bounds, config, params, samples=each, **options):
        at = np.searchsorted(layers, found.layers), found.neurons
        np.add.at(count, at, 1)
        np.add.at(total, at, found.effects)
        np.add.at(squares, at, found.effects**2)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / count
        variance = np.maximum(squares - count * mean**2, 0) / (count - 1)
        error = np.where(count > 1, np.sqrt(variance / count), np.nan)
    return dict(zip(COLUMNS, (mean, error, count), strict=True))


def draw(
    layers: tuple[int, ...],
    token_ids: np.ndarray,
    bounds: np.ndarray,
    config: ModelConfig,
    params: transformer.Parameters,
    *,
    separator_id: int,
    samples: np.ndarray,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
    report: Callable[[float], None] = lambda share: None,
) -> Iterator[tuple[np.ndarray, Samples]]:
    """Yields samples with the windows that they are of, int32[W, T].

    Arguments are those of `measure`, but for `samples`: of each neuron at most so many, int[S, D]. Windows
    hold `max_tokens` at most; `report` is told which share of the work is done.
    """
    count = np.zeros(samples.shape, np.int64)
    rng = np.random.default_rng(seed)
    groups = _groups(token_ids, bounds, config.context_length, separator_id, max_tokens, rng)
    each = max(1, -(-int(samples.max()) // min(_GROUPS_PER_NEURON, max(len(groups), 1))))
    for number, (inputs, usable) in enumerate(groups):
        wanted = np.minimum(each, samples - count)
        if not wanted.any():
            break
        for found in measure_group(config, params, layers, inputs, usable, wanted, rng):
            np.add.at(count, (np.searchsorted(layers, found.layers), found.neurons), 1)
            yield inputs, found
        report(max((number + 1) / len(groups), count.sum() / samples.sum()))


def measure_group(
    config: ModelConfig,
    params: transformer.Parameters,
    layers: tuple[int, ...],
    inputs: np.ndarray,
    usable: np.ndarray,
    wanted: np.ndarray,
    rng: np.random.Generator,
) -> Iterator[Samples]:
    """Yields samples of windows int32[W, T].

    They are taken where `usable` is True, bool[W, T], never at the last position; of each neuron of the S
    layers, at most as many as are wanted, int[S, D].
    """
    states_LWTD, past, losses_WT = _forward(config, params, inputs)
    with_neuron = np.asarray(losses_WT, np.float64)
    rows, places = np.nonzero(usable)
    drawn = [
        _draw(np.asarray(states_LWTD[layer])[rows, places], wanted[number], config, rng)
        for number, layer in enumerate(layers)
    ]
    sizes = [len(neurons) for _, neurons in drawn]
    which, neurons = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    of_layer, rows, places = np.repeat(layers, sizes), rows[which], places[which]
    for chunk in _chunks(of_layer, rows):
        # Chunks have one shape, [R, M]: free entries are filled up with any sample, and not looked at.
        of_chunk = (x[chunk].astype(np.int32) for x in (of_layer, places, neurons))
        windows = rows[chunk[:, 0]].astype(np.int32)
        without_RM = _losses_without(config, params, states_LWTD, past, inputs, windows, *of_chunk)
        row, column = np.nonzero(chunk >= 0)
        at = chunk[row, column]
        effects = np.asarray(without_RM, np.float64)[row, column] - with_neuron[rows[at], places[at]]
        yield Samples(of_layer[at], neurons[at], rows[at], places[at], effects)


def _chunks(layers: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Groups samples of one window in each row, int64[R, M] with numbers of samples, then -1.

    By rising layer: a chunk takes as long as its first layer asks for.
    """
    order = np.lexsort((rows, layers))
    borders = np.flatnonzero(np.diff(layers[order]) | np.diff(rows[order])) + 1
    lines = [
        part[first : first + _PER_ROW]
        for part in np.split(order, borders)
        for first in range(0, len(part), _PER_ROW)
    ]
    for first in range(0, len(lines), _ROWS):
        chunk = np.full((_ROWS, _PER_ROW), -1)
        for row, line in enumerate(lines[first : first + _ROWS]):
            chunk[row, : len(line)] = line
        yield chunk


def _draw(
    states_ND: np.ndarray, wanted_D: np.ndarray, config: ModelConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws as many samples of each neuron as are wanted and exist: numbers of tokens, and neurons."""
    active = states_ND != 0 if config.n_topk_layers else states_ND > 0
    most = min(int(wanted_D.max()), len(states_ND))
    if not most:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    # The lowest of random numbers; those of tokens at which a neuron is not active are higher than any.
    lots = np.where(active, rng.random(active.shape, np.float32), 2.0)
    lowest = np.argpartition(lots, most - 1, axis=0)[:most]
    drawn = np.take_along_axis(lots, lowest, axis=0) < 1
    drawn &= np.cumsum(drawn, axis=0) <= wanted_D
    order, neurons = np.nonzero(drawn)
    return lowest[order, neurons], neurons


def _groups(
    token_ids: np.ndarray,
    bounds: np.ndarray,
    length: int,
    separator_id: int,
    max_tokens: int,
    rng: np.random.Generator,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draws windows in random order, as many together as are run together.

    Of each group it gives int32[W, T], filled up with separators, and bool[W, T], where samples may be taken.
    """
    windows = [
        (begin, *window)
        for begin, end in itertools.pairwise(bounds)
        for window in chunk_bounds(int(end - begin) + 1, length)
    ]
    together = max(1, _GROUP_TOKENS // length)
    n_windows = min(len(windows), max(1, max_tokens // length))
    chosen = rng.permutation(len(windows))[:n_windows]
    groups = []
    for part in np.split(chosen, range(together, n_windows, together)):
        inputs = np.full((together, length), separator_id, np.int32)
        usable = np.zeros(inputs.shape, bool)
        for row, number in enumerate(part):
            begin, first, stop, known = windows[number]
            # A document's first input is the separator, which the store does not hold.
            ids = token_ids[begin + max(first - 1, 0) : begin + stop - 1]
            inputs[row, max(0, 1 - first) : stop - first] = ids
            usable[row, known - first : stop - first - 1] = True
        groups.append((inputs, usable))
    return groups


@transformer.jit_in_float32
def _forward(
    config: ModelConfig, params: transformer.Parameters, inputs_WT: jax.Array
) -> tuple[jax.Array, KeysAndValues, jax.Array]:
    """Runs whole windows.

    Returns the output of every layer, [L, W, T, D]; the KV caches of all layers but the first, [L - 1, W,
    ...]; and the loss of the next token, [W, T].
    """
    model = transformer.bind(config, params)
    h_WTD, states_LWTD = model.hidden(inputs_WT, capture=lambda _h, _u, h_next: h_next)
    block_def, stacked = nnx.split(model.blocks)
    rotation = model.rotation(jnp.broadcast_to(jnp.arange(inputs_WT.shape[1]), inputs_WT.shape))

    _, token_WTD = model.embedded(inputs_WT)

    def keep(layer: tuple) -> KeysAndValues:
        number, block_params, entering_WTD = layer
        token = TokenInput.of_layer(token_WTD, *model.topk_around(number))
        return keys_and_values(nnx.merge(block_def, block_params), entering_WTD, rotation, token)

    # The input of a layer is the output of the one before.
    later = jax.tree.map(lambda leaf: leaf[1:], stacked)
    past = jax.lax.map(keep, (jnp.arange(1, config.n_layers), later, states_LWTD[:-1]))
    return states_LWTD, past, _losses(model, h_WTD, jnp.roll(inputs_WT, -1, axis=1))


@transformer.jit_in_float32
def _losses_without(
    config: ModelConfig,
    params: transformer.Parameters,
    states_LWTD: jax.Array,
    past: KeysAndValues,
    inputs_WT: jax.Array,
    windows_R: jax.Array,
    layers_RM: jax.Array,
    places_RM: jax.Array,
    neurons_RM: jax.Array,
) -> jax.Array:
    """Computes the loss of the token that follows each sample, without its neuron, float32[R, M].

    Layers, windows, places and neurons are data, so all samples share one program; it runs the layers after
    the first of `layers_RM`.
    """
    model = transformer.bind(config, params)
    windows_R1 = windows_R[:, None]
    rotation = model.rotation(places_RM)
    seen_RMT = jnp.arange(inputs_WT.shape[1]) < places_RM[..., None]

    h_RMD = states_LWTD[layers_RM, windows_R1, places_RM]
    is_neuron_RMD = jnp.arange(config.d_model) == neurons_RM[..., None]
    without_RMD = jnp.zeros_like(h_RMD) if config.n_topk_layers else jnp.minimum(h_RMD, 0.0)
    h_RMD = jnp.where(is_neuron_RMD, without_RMD, h_RMD)
    _, token_RMD = model.embedded(inputs_WT[windows_R1, places_RM])

    def layer(number: jax.Array, h_RMD: jax.Array) -> jax.Array:
        own_past = jax.tree.map(lambda leaf: leaf[number - 1, windows_R], past)
        attend = attend_to_past(own_past, seen_RMT)
        ends_in_topk, follows_topk = model.topk_around(number)
        token = TokenInput.of_layer(token_RMD, ends_in_topk, follows_topk)
        a_RMD, written_RMD, _ = decode_step(model.block(number), h_RMD, rotation, attend, token=token)
        next_RMD = end_layer(config, a_RMD, written_RMD, ends_in_topk)
        return jnp.where((number > layers_RM)[..., None], next_RMD, h_RMD)

    if config.n_layers > 1:
        h_RMD = jax.lax.fori_loop(layers_RM.min() + 1, config.n_layers, layer, h_RMD)
    return _losses(model, model.final_norm(h_RMD), inputs_WT[windows_R1, places_RM + 1])


def _losses(model: transformer.Transformer, h_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    return losses.token_losses(h_BTD, model.unembedding(), targets_BT, model.config.vocab_size)
