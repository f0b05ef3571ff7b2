"""Measures of sparse autoencoders on held-out text, and of a TopK LM's neurons where they make sense.

    l0                  active codes of a token, on average
    dead                codes that are active at no token
    explained_variance  as `topklm.neurons.dictionary.ExplainedVariance`
    recovered_zero      (loss without the layer - loss with the reconstruction) / (loss without - loss), where
    recovered_mean      "without" sets the layer's hidden states to 0, or to their mean, at tokens of text
    decoder_cosine      mean |cosine| of two decoder rows, least near the right number of codes: 2508.16560
    stability           of each row, the largest cosine with rows of another seed: mean, share above 0.9; and
    matched             the mean cosine of the best one-to-one assignment (Hungarian)

Separators and padding neither count nor are replaced. Of a TopK LM rows are coordinates, so neurons of two
runs are compared by the correlation of their activations on the same tokens.
Dims: S layers, N tokens, D d_model, M codes of a layer.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topklm.checkpoint import run_folder
from topklm.config import ModelConfig
from topklm.errors import UserError
from topklm.imports import optional_module
from topklm.inference.language_model import LanguageModel
from topklm.model import transformer
from topklm.model.block import NO_HOOKS, LayerHooks
from topklm.model.losses import token_losses
from topklm.neurons.dictionary import Dictionary, Encoder, ExplainedVariance, encode
from topklm.neurons.documents import TextModel, batches
from topklm.neurons.fit_dictionary import hidden_states
from topklm.progress import Progress, Report
from topklm.sae import train
from topklm.sae.kinds import SaeConfig

STABLE = 0.9  # cosine from which a row is found again
RANDOM_SUBSPACES = 50  # of the hedging rate's baseline

_STRETCH_TOKENS = 2**16  # that are packed together
_BLOCK = 1024  # rows whose products are held at once

_CLEAN, _RECONSTRUCTED, _ZERO, _MEAN = "clean", "reconstructed", "zero", "mean"


# Measures of decoder rows.


def decoder_cosine(rows_SMD: np.ndarray) -> np.ndarray:
    """Returns float64[S], the mean |cosine| of two different rows; NaN for one row."""
    return np.array([_mean_cosine(_unit(rows)) for rows in rows_SMD])


def _mean_cosine(rows_MD: np.ndarray) -> float:
    m = len(rows_MD)
    total = sum(np.abs(rows_MD[i : i + _BLOCK] @ rows_MD.T).sum() for i in range(0, m, _BLOCK))
    own = np.square(rows_MD).sum()
    return float((total - own) / (m * (m - 1))) if m > 1 else float("nan")


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


def agreement(likeness_MM: np.ndarray) -> dict[str, float]:
    """Returns how well rows are found among columns, by their likeness (cosines, correlations) [M, M']."""
    assign = optional_module("scipy.optimize", "explore", "topklm sae measure").linear_sum_assignment
    best = likeness_MM.max(axis=1)
    rows, columns = assign(likeness_MM, maximize=True)
    return {
        "stability": float(best.mean()),
        "stable_share": float((best > STABLE).mean()),
        "matched": float(likeness_MM[rows, columns].mean()),
    }


def stability(rows_MD: np.ndarray, other_MD: np.ndarray) -> dict[str, float]:
    """Returns how well decoder rows are found again in those of another seed, see `agreement`."""
    return agreement(_unit(rows_MD) @ _unit(other_MD).T)


def hedging_rate(control_MD: np.ndarray, extended_ND: np.ndarray, seed: int = 0) -> float:
    """Returns how far old rows have moved into the span of new ones, 2505.11756: 0 to 1.

        max(0, (d - r) / (1 - r))    d: mean length of the moves' projection on the span, in mean row lengths
                                     r: the same for random subspaces of as many dimensions, their mean

    `control_MD` was trained on with M codes, `extended_ND` with new ones after these M. NaN if the new rows
    span everything.
    """
    m, d = control_MD.shape
    moves = (extended_ND[:m] - control_MD).astype(np.float64)
    length = float(np.linalg.norm(control_MD.astype(np.float64), axis=1).mean())

    def share(rows: np.ndarray) -> float:
        left, sizes, _ = np.linalg.svd(rows.astype(np.float64).T, full_matrices=False)
        basis = left[:, sizes > 1e-12 * sizes[0]]
        return float(np.linalg.norm(moves @ basis, axis=1).mean()) / length

    draw = np.random.default_rng(seed).standard_normal
    new = extended_ND[m:]
    if len(new) >= d:
        return float("nan")
    baseline = float(np.mean([share(draw(new.shape)) for _ in range(RANDOM_SUBSPACES)]))
    return float(max(0.0, (share(new) - baseline) / (1 - baseline)))


def hedging(
    config: SaeConfig,
    states: train.Source,
    n_batches: int,
    n_new: int,
    seed: int = 0,
    start: Dictionary | None = None,
    **options: Any,
) -> list[float]:
    """Returns the hedging rate of each layer: trains autoencoders, and goes on without and with new codes.

    `states` as of `train.fit`, a function or a list, for it is read three times; so many batches each time.
    With `start`, autoencoders of this config that are trained already, twice.
    """

    def fit(config: SaeConfig, seed: int, start: Dictionary | None = None) -> Dictionary:
        return train.fit(config, states, n_batches, seed=seed, start=start, **options).dictionary

    first = fit(config, seed) if start is None else start
    wider = dataclasses.replace(config, width=config.width + n_new)
    control, extended = (fit(one, seed + 1, first).decoder for one in (config, wider))
    return [hedging_rate(a, b, seed) for a, b in zip(control, extended, strict=True)]


def reading_rows(config: ModelConfig, params: transformer.Parameters, layer: int) -> np.ndarray:
    """Returns float64[D, n], by which what reads a layer's output reads each coordinate.

    Projections of the next layer's attention and MLP side by side, or the unembedding after the last layer;
    each row times the norm's scale and sqrt(D), so it is that of a state of length 1.
    """
    params = jax.tree.map(np.asarray, params)
    if layer + 1 == config.n_layers:
        parts = [(params["final_norm"], np.asarray(transformer.bind(config, params).unembedding()))]
    else:
        block = jax.tree.map(lambda leaf: leaf[layer + 1], params["blocks"])
        attention, mlp = block["attention"], block["mlp"]
        parts = [(block["attention_norm"], attention[name]["kernel"]) for name in ("query", "key", "value")]
        parts += [(block["mlp_norm"], mlp[name]["kernel"]) for name in ("gate", "up")]
    rows = [norm["scale"].astype(np.float64)[:, None] * kernel for norm, kernel in parts]
    return np.sqrt(config.d_model) * np.concatenate(rows, axis=1)


def hedging_of_topk_lm(control: LanguageModel, wider: LanguageModel) -> list[float]:
    """Returns the hedging rate of each TopK layer's neurons: both begun as one model, `wider` with new ones.

    Rows are `reading_rows`. UserError unless both were begun by `train.init` of one run and trained alike, to
    one step, and differ in the width alone.
    """
    begun = control.config.train.init
    if not begun or wider.cfg.d_model <= control.cfg.d_model:
        allowed = f"a run begun like {control.run} by train.init, with a larger model.d_model"
        raise UserError(field="--wider", value=str(wider.run), allowed=allowed)
    # Groups add up to the width.
    models = [
        dataclasses.replace(one.cfg, d_model=0, head_dim=one.cfg.head_width, topk_groups="")
        for one in (control, wider)
    ]
    configs = (
        dataclasses.replace(one.config, model=model)
        for one, model in zip((control, wider), models, strict=True)
    )
    differing = run_folder.differing_fields(*configs)
    if control.step != wider.step:
        differing = f"step was {control.step}, now {wider.step}"
    if differing:
        text = f"must differ from {control.run} in model.d_model alone: {differing}"
        raise UserError(text, field="--wider", value=str(wider.run))
    both = [
        [reading_rows(model.cfg, model.params, layer) for layer in range(control.cfg.n_topk_layers)]
        for model in (control, wider)
    ]
    return [hedging_rate(rows, more) for rows, more in zip(*both, strict=True)]


# Measures on text.


def _batches(
    model: TextModel, documents: Iterable[np.ndarray], n_tokens: int
) -> Iterator[tuple[tuple[jax.Array, ...], np.ndarray]]:
    """Yields inputs on the devices, and which of them, flat int[n], are read: about so many in all."""
    done = 0
    for stretch in batches(model.windows(documents), min(n_tokens, _STRETCH_TOKENS)):
        for arrays, read, _ in model.pack(stretch).batches():
            if len(read):
                yield model.put(arrays), read
                done += len(read)
        if done >= n_tokens:
            return


@jax.jit
def _sums(
    arrays: Encoder, decoder_SMD: jax.Array, h_SND: jax.Array, is_read_N: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns reconstructions [S, N, D], and how many tokens each code is active at, int32[S, M]."""
    codes = encode(arrays, h_SND)
    active = jnp.sum((codes > 0) & is_read_N[:, None], axis=1)
    return _decoded(arrays, decoder_SMD, codes), active


def _decoded(arrays: Encoder, decoder_SMD: jax.Array, codes: jax.Array) -> jax.Array:
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("snm,smd->snd", codes, decoder_SMD, precision=exact) + arrays.centre[:, None]


def reconstruction(
    dictionary: Dictionary,
    layers: Sequence[int],
    model: TextModel,
    read: Sequence[tuple[tuple[jax.Array, ...], np.ndarray]],
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Measures codes and explained variance; returns those of each layer, and mean states float64[S, D]."""
    arrays, decoder = dictionary.encoder_arrays, jnp.asarray(dictionary.decoder)
    counts = np.zeros(dictionary.decoder.shape[:2], np.int64)
    explained = [ExplainedVariance(dictionary.centre.shape[1]) for _ in layers]
    total, n = np.zeros(dictionary.centre.shape), 0
    for inputs, inside in read:
        h_SND = hidden_states(model.config, model.params, *inputs)[np.array(layers)]
        back, active = _sums(arrays, decoder, h_SND, _mask(h_SND.shape[1], inside))
        states, reconstructed = np.asarray(h_SND), np.asarray(back)
        for variance, x, y in zip(explained, states, reconstructed, strict=True):
            variance.add(x[inside], y[inside])
        total += states[:, inside].sum(axis=1, dtype=np.float64)
        counts += np.asarray(active)
        n += len(inside)
    found = [
        {"l0": float(of.sum() / n), "dead": int((of == 0).sum()), "explained_variance": variance.value}
        for of, variance in zip(counts, explained, strict=True)
    ]
    return found, total / n


def _mask(n: int, inside: np.ndarray) -> jax.Array:
    is_read = np.zeros(n, bool)
    is_read[inside] = True
    return jnp.asarray(is_read)


class _Replaced(NamedTuple):
    """Arrays that take the place of hidden states, with an axis of all the model's layers."""

    is_changed: jax.Array  # bool[L], which layers are changed
    arrays: Encoder
    decoder: jax.Array  # float32[L, M, D]
    mean: jax.Array  # float32[L, D]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _losses(
    config: ModelConfig,
    how: str,
    params: transformer.Parameters,
    inputs: tuple[jax.Array, ...],
    is_read_N: jax.Array,
    replaced: _Replaced,
) -> jax.Array:
    """Returns next-token losses float32[N], where some layers' hidden states are others at tokens of text."""

    def changed(h_BTD: jax.Array, of_layer: _Replaced) -> jax.Array:
        def put(x: jax.Array) -> jax.Array:
            if how == _RECONSTRUCTED:
                arrays, decoder = jax.tree.map(lambda leaf: leaf[None], (of_layer.arrays, of_layer.decoder))
                other = _decoded(arrays, decoder, encode(arrays, x))
            else:
                other = of_layer.mean if how == _MEAN else jnp.zeros_like(of_layer.mean)
            return jnp.where(is_read_N[:, None], other, x)

        x = h_BTD.reshape(1, -1, h_BTD.shape[-1]).astype(jnp.float32)
        x = jax.lax.cond(of_layer.is_changed, put, lambda x: x, x)
        return x.reshape(h_BTD.shape).astype(h_BTD.dtype)

    hooks = NO_HOOKS if how == _CLEAN else LayerHooks(output=changed)
    model = transformer.bind(config, params)
    h_BTD, _ = model.hidden(*inputs, hooks=hooks, hook_inputs=replaced)
    targets = jnp.roll(inputs[0], -1, axis=1)
    return token_losses(h_BTD, model.unembedding(), targets, config.vocab_size).reshape(-1)


def recovered(
    dictionary: Dictionary,
    layers: Sequence[int],
    means_SD: np.ndarray,
    model: TextModel,
    read: Sequence[tuple[tuple[jax.Array, ...], np.ndarray]],
    report: Callable[[int], None] = lambda tokens: None,
    together: Sequence[int] | None = None,
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Measures losses with reconstructions in place of a layer's hidden states, one layer at a time.

    Returns the losses of each layer; and the loss with the layers `together` changed at once, by default all
    but the model's last, which no other reads.
    """
    n_layers = model.config.n_layers
    everywhere = _everywhere(dictionary, layers, means_SD, n_layers)
    if together is None:
        together = [layer for layer in layers if layer < n_layers - 1]
    cases = [(_CLEAN, []), (_RECONSTRUCTED, list(together))]
    cases += [(how, [layer]) for layer in layers for how in (_RECONSTRUCTED, _ZERO, _MEAN)]
    nats = np.zeros(len(cases))
    for inputs, inside in read:
        is_read = _mask(inputs[0].size, inside)
        for number, (how, changed) in enumerate(cases):
            at = everywhere._replace(is_changed=jnp.isin(jnp.arange(n_layers), np.array(changed, int)))
            losses = _losses(model.config, how, model.params, inputs, is_read, at)
            # A token's own loss stands one before it.
            nats[number] += np.asarray(losses)[inside - 1].sum(dtype=np.float64)
        report(len(inside))
    clean, at_once, *by_layer = (nats / sum(len(inside) for _, inside in read)).tolist()
    found = []
    for reconstructed, zero, mean in np.reshape(by_layer, (-1, 3)).tolist():
        shares = {
            f"recovered_{name}": _share(without, reconstructed, clean)
            for name, without in (("zero", zero), ("mean", mean))
        }
        found.append({"loss": clean, "loss_reconstructed": reconstructed, **shares})
    return found, {"layers": list(together), "loss": clean, "loss_reconstructed": at_once}


def _everywhere(
    dictionary: Dictionary, layers: Sequence[int], means_SD: np.ndarray, n_layers: int
) -> _Replaced:
    """Spreads arrays of some layers over all, 0 elsewhere."""

    def spread(leaf: jax.Array) -> jax.Array:
        return jnp.zeros((n_layers, *leaf.shape[1:]), leaf.dtype).at[np.array(layers)].set(leaf)

    arrays = dictionary.encoder_arrays, jnp.asarray(dictionary.decoder), jnp.asarray(means_SD, jnp.float32)
    return _Replaced(jnp.zeros(n_layers, bool), *jax.tree.map(spread, arrays))


def _share(without: float, reconstructed: float, clean: float) -> float:
    return float((without - reconstructed) / (without - clean)) if without != clean else float("nan")


# The tables of `topklm sae measure`.


def of_folders(
    given: Sequence[tuple[str, Dictionary, tuple[int, ...]]],
    model: TextModel,
    documents: Iterable[np.ndarray],
    n_tokens: int,
    progress: Progress,
    together: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Measures the autoencoders of folders, each by its name and layers; UserError for layers that differ.

    `together` as of `recovered`.
    """
    read, entries = list(_batches(model, documents, n_tokens)), list[dict[str, Any]]()
    n = sum(len(inside) for _, inside in read)
    for name, dictionary, layers in given:
        with progress.phase(f"measuring {name}", n) as report:
            found, means = reconstruction(dictionary, layers, model, read)
            tell = functools.partial(_tell, report)
            losses, at_once = recovered(dictionary, layers, means, model, read, tell, together)
        alike = decoder_cosine(dictionary.decoder)
        rows = [{**a, **b, "decoder_cosine": float(c)} for a, b, c in zip(found, losses, alike, strict=True)]
        about = {"name": name, "kind": dictionary.kind, "description": dictionary.description}
        entries.append({**about, "of_layers": list(layers), "layers": rows, "together": at_once})
    _add_stability(given, entries)
    return {"tokens": n, "autoencoders": entries, "notes": []}


def _tell(report: Report, tokens: int) -> None:
    report(tokens, 0, tokens)


def _add_stability(
    given: Sequence[tuple[str, Dictionary, tuple[int, ...]]], entries: Sequence[dict[str, Any]]
) -> None:
    """Adds the stability of each folder's rows, averaged over the other folders of its kind."""
    for at, (name, dictionary, layers) in enumerate(given):
        if layers != given[0][2]:
            text = f"is of layers {layers}, and {given[0][0]} of {given[0][2]}: measure them by themselves"
            raise UserError(text, field="folder", value=name)
        others = [other for i, (_, other, _) in enumerate(given) if i != at and other.kind == dictionary.kind]
        for number, row in enumerate(entries[at]["layers"] if others else ()):
            pairs = [stability(dictionary.decoder[number], other.decoder[number]) for other in others]
            row |= {key: float(np.mean([pair[key] for pair in pairs])) for key in pairs[0]}


def of_topk_lm(
    model: LanguageModel,
    others: Sequence[LanguageModel],
    text_model: TextModel,
    documents: Iterable[np.ndarray],
    n_tokens: int,
    progress: Progress,
    wider: LanguageModel | None = None,
) -> dict[str, Any]:
    """Measures a TopK LM by itself, and its neurons against those of TopK LMs of other seeds.

    With `wider`, the hedging rate too. UserError as of `hedging_of_topk_lm`, and if another one has another
    tokenizer, width or number of TopK layers.
    """
    config = model.cfg
    rates = None if wider is None else hedging_of_topk_lm(model, wider)
    for other in others:
        mine, its = ((m.tokenizer.sha256, m.cfg.d_model, m.cfg.n_topk_layers) for m in (model, other))
        if mine != its:
            text = "has another tokenizer, width or number of TopK layers: neurons cannot be compared"
            raise UserError(text, field="--against", value=str(other.run))
    models = [text_model, *(dataclasses.replace(text_model, config=o.cfg, params=o.params) for o in others)]
    n_layers, sums, n = config.n_topk_layers, _Correlations(len(others)), 0
    active = np.zeros((n_layers, config.d_model), np.int64)
    with progress.phase("comparing neurons", n_tokens) as report:
        for inputs, inside in _batches(text_model, documents, n_tokens):
            states = [
                np.asarray(hidden_states(m.config, m.params, *inputs))[:n_layers, inside] for m in models
            ]
            active += (states[0] != 0).sum(axis=1)
            sums.add(states)
            n += len(inside)
            report(len(inside), 0, len(inside))
    rows: list[dict[str, Any]] = []
    for layer, counts in enumerate(active):
        row: dict[str, Any] = {"l0": float(counts.sum() / n), "dead": int((counts == 0).sum())}
        row |= {
            "explained_variance": 1.0,
            "recovered_zero": 1.0,
            "recovered_mean": 1.0,
            "decoder_cosine": 0.0,
        }
        if others:
            pairs = [agreement(sums.correlation(number, layer)) for number in range(len(others))]
            row |= {key: float(np.mean([pair[key] for pair in pairs])) for key in pairs[0]}
        if rates is not None:
            row["hedging"] = rates[layer]
        rows.append(row)
    description = f"neurons of a TopK LM: {config.topk_k} of {config.d_model}"
    entry = {"name": str(model.run), "description": description, "of_layers": list(range(n_layers))}
    note = (
        "of a TopK LM the dictionary is the identity: explained variance, loss recovered and decoder cosine "
        "are so by construction; stability is by the correlation of activations on the same tokens"
    )
    return {"tokens": n, "autoencoders": [{**entry, "layers": rows}], "notes": [note]}


class _Correlations:
    """Sums of activations of a model and of others on the same tokens, in float64."""

    def __init__(self, n_others: int):
        self._n, self._ones, self._squares = 0, [0.0] * (1 + n_others), [0.0] * (1 + n_others)
        self._products: list[Any] = [0.0] * n_others

    def add(self, states: Sequence[np.ndarray]) -> None:
        """Adds activations float[S, n, D] of all models."""
        exact = [x.astype(np.float64) for x in states]
        self._n += exact[0].shape[1]
        self._ones = [a + x.sum(axis=1) for a, x in zip(self._ones, exact, strict=True)]
        self._squares = [a + np.square(x).sum(axis=1) for a, x in zip(self._squares, exact, strict=True)]
        products = (np.swapaxes(exact[0], 1, 2) @ x for x in exact[1:])
        self._products = [a + x for a, x in zip(self._products, products, strict=True)]

    def correlation(self, other: int, layer: int) -> np.ndarray:
        """Returns float64[D, D] of a layer; 0 for neurons that do not vary."""
        means = [np.asarray(ones)[layer] / self._n for ones in self._ones]
        spreads = [
            np.sqrt(np.maximum(np.asarray(squares)[layer] / self._n - mean**2, 0))
            for squares, mean in zip(self._squares, means, strict=True)
        ]
        covariance = self._products[other][layer] / self._n - np.outer(means[0], means[1 + other])
        scale = np.outer(spreads[0], spreads[1 + other])
        return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 1e-12)
