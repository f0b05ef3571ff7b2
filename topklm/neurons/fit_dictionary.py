"""Makes dictionaries (`topklm.neurons.dictionary`) from the hidden states of a Base LM on its training text.

- *random*: an orthonormal basis drawn at random for each layer; the centre is the mean hidden state.
- *pca*: the leading D / 2 principal components of the hidden state, each of them twice: a code is never
  negative, so a component's two signs are two codes, 2 i and 2 i + 1, of which at most one is active. Nothing
  is whitened: the K largest codes are those that reconstruct best.
- *sae*: a post-hoc TopK sparse autoencoder after Gao et al. 2024, arXiv 2406.04093:

      z = TopK(relu(W_enc (x - b_pre)))        x is about W_dec z + b_pre

  The decoder's rows start random, of unit length, and are brought back to it after every step; the encoder
  starts as the decoder's transpose, b_pre as the mean. The loss is the mean squared error, the optimizer
  Adam. The paper's remedy for dead codes (AuxK) is left out: dead codes are counted instead. Autoencoders of
  several layers are trained side by side.

All have as many codes M as the model has coordinates D. The text is the run's training stream, in a shuffled
order; the text that is looked at afterwards is only used to say how much of its variance the codes explain.
Dims: S layers, B batch, T tokens, N tokens of a batch, D d_model, M codes of a layer.
"""

from collections.abc import Callable, Iterable, Sequence
import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from topklm.config import DataConfig, ModelConfig
from topklm.data.building.build import prepare
from topklm.data.stream import train_stream
from topklm.errors import UserError
from topklm.model import transformer
from topklm.model.topk import topk
from topklm.neurons import DICTIONARY_TOKENS
from topklm.neurons.dictionary import Dictionary, ExplainedVariance
from topklm.neurons.documents import TextModel
from topklm.progress import Progress

LEARNING_RATE = 2e-3
MINIBATCH = 1024  # tokens of a step of an autoencoder

_SEED = 0  # of the order of the text and of what is drawn
_SCALE_BATCHES = 8  # of which an autoencoder gets its start
_EVALUATED = 32_768  # tokens
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 6.25e-10  # the paper's
_WARMUP, _DECAY = 0.05, 0.2  # shares of the steps, at both ends
_LAST = 0.2  # share of the steps in which a code has to be active once not to count as dead

# Hidden states float32[S, N, D], and which of the tokens are text, bool[N].
States = Iterable[tuple[jax.Array, jax.Array]]


def fit(
    kind: str,
    model: TextModel,
    data: DataConfig,
    documents: Iterable[np.ndarray],
    *,
    keep: int,
    width: int | None = None,
    n_tokens: int = DICTIONARY_TOKENS,
    seed: int = _SEED,
    start: Dictionary | None = None,
    layers: Sequence[int] | None = None,
    progress: Progress,
) -> Dictionary:
    """Makes a dictionary of the hidden state that each layer of a Base LM hands on.

    It is one of `DICTIONARIES`, of K = `keep`, an autoencoder's of M = `width` (None: D), learned from about
    `n_tokens` of the run's training text; more than there are are read again, in another order. Nothing is
    learned from the documents to be harvested. An autoencoder begins at random, by the seed, or at that of
    `start`; only those `layers` have one (None: all). UserError if the training text cannot be read.
    """
    mixture = prepare(data, lambda line: None)
    rows, d, length = model.rows, model.config.d_model, model.config.context_length
    n_batches = max(1, round(n_tokens / (rows * length)))

    def batches(n: int) -> States:
        stream = train_stream(mixture, context_length=length, batch_size=rows, seed=_SEED)
        for batch in itertools.islice(stream, n):
            arrays = batch["inputs"], batch["segment_ids"], batch["positions"]
            is_text = (batch["inputs"] != model.separator_id).reshape(-1)
            states = hidden_states(model.config, model.params, *model.put(arrays))
            yield states if layers is None else states[np.array(layers)], jnp.asarray(is_text)

    facts: dict[str, Any] = {"tokens": n_tokens, "seed": seed}
    with progress.phase(f"making a dictionary ({kind})", n_batches) as report:

        def tell() -> None:
            report(1, 0, rows * length)

        if kind == "sae":
            mean, scatter = moments(batches(min(_SCALE_BATCHES, n_batches)))
            scale = np.sqrt(np.trace(scatter, axis1=1, axis2=2) / d)
            trained, dead = fit_autoencoders(
                batches(n_batches),
                n_batches,
                mean,
                scale,
                keep=keep,
                width=width or d,
                seed=seed,
                start=start,
                report=tell,
            )
            arrays = [np.asarray(array) for array in (trained.centre, trained.encoder, trained.decoder)]
            facts["dead_codes"] = dead.sum(axis=1).tolist()
        else:
            mean, scatter = moments(batches(n_batches), tell)
            rows_SMD = random_rows(len(mean), d, seed) if kind == "random" else signed_components(scatter)
            arrays = [mean, np.swapaxes(rows_SMD, 1, 2), rows_SMD]
    facts["text"] = f"training text of {', '.join(dataset.path.name for dataset in mixture.datasets)}"
    centre, encoder, decoder = (array.astype(np.float32) for array in arrays)
    made = Dictionary(kind, keep, centre, encoder, decoder, facts)
    facts["explained_variance"] = explained_variance(made, model, documents, layers)
    return made


def load_fitting(path: Path, kind: str, keep: int, n_tokens: int) -> Dictionary | None:
    """Returns the dictionary a harvest goes on with, or None; UserError if it was made in another way."""
    if not path.exists():
        return None
    there = Dictionary.load(path)
    for name, found, wanted in (
        ("--dictionary", there.kind, kind),
        ("--keep", there.keep, keep),
        ("--dictionary-tokens", there.facts.get("tokens"), n_tokens),
    ):
        if found != wanted:
            raise UserError(
                f"{name} = {wanted}: {path} was made with {found}: give that, or delete {path.parent}, and "
                "harvest again"
            )
    return there


def explained_variance(
    dictionary: Dictionary,
    model: TextModel,
    documents: Iterable[np.ndarray],
    layers: Sequence[int] | None = None,
) -> list[float]:
    """Computes the share of each layer's variance that codes hold, on the beginning of the documents.

    The dictionary is of these layers of the model; None: of all.
    """
    begun, read = list[np.ndarray](), 0
    for ids in documents:
        begun.append(ids)
        read += len(ids)
        if read >= _EVALUATED:
            break
    found = [ExplainedVariance(model.config.d_model) for _ in range(len(dictionary.centre))]
    reconstruct = jax.jit(lambda h_SND: dictionary.decode(dictionary.encode(h_SND)))
    windows = list(model.windows(begun))
    for arrays, inside, _ in model.pack(windows).batches() if windows else ():
        h_SND = hidden_states(model.config, model.params, *model.put(arrays))
        h_SND = h_SND if layers is None else h_SND[np.array(layers)]
        for variance, x, reconstructed in zip(
            found, np.asarray(h_SND), np.asarray(reconstruct(h_SND)), strict=True
        ):
            variance.add(x[inside], reconstructed[inside])
    return [variance.value for variance in found]


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(
    config: ModelConfig,
    params: transformer.Parameters,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    positions_BT: jax.Array,
) -> jax.Array:
    """Returns what layers hand on, float32[S, B T, D]."""
    model = transformer.bind(config, params)
    _, states_SBTD = model.hidden(
        tokens_BT, segment_ids_BT, positions_BT, capture=lambda _h, _u, h_next: h_next.astype(jnp.float32)
    )
    return states_SBTD.reshape(len(states_SBTD), -1, config.d_model)


def moments(states: States, report: Callable[[], None] = lambda: None) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean float64[S, D] and covariance float64[S, D, D] of hidden states."""
    n, mean, scatter = 0.0, np.zeros(1), np.zeros(1)
    for h_SND, counts_N in states:
        added, mean_SD, scatter_SDD = (np.asarray(x, np.float64) for x in _of_batch(h_SND, counts_N))
        apart = mean_SD - mean
        # As in `ExplainedVariance`: the scatter of two samples about their common mean.
        scatter = scatter + scatter_SDD + apart[:, :, None] * apart[:, None] * (n * added / (n + added))
        mean = mean + apart * added / (n + added)
        n += float(added)
        report()
    return mean, scatter / n


@jax.jit
def _of_batch(h_SND: jax.Array, counts_N: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    n = jnp.sum(counts_N)
    mean_SD = jnp.sum(jnp.where(counts_N[:, None], h_SND, 0), axis=1) / n
    centred = jnp.where(counts_N[:, None], h_SND - mean_SD[:, None], 0)
    return n, mean_SD, jnp.einsum("snd,sne->sde", centred, centred, precision=jax.lax.Precision.HIGHEST)


def random_rows(n_layers: int, d: int, seed: int) -> np.ndarray:
    """Returns float64[S, D, D], rows of random orthonormal bases, all equally likely."""
    rng = np.random.default_rng(seed)
    q, r = np.linalg.qr(rng.standard_normal((n_layers, d, d)))
    return q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None]


def components(covariance_SDD: np.ndarray) -> np.ndarray:
    """Returns float64[S, D, D], rows of principal components by falling variance.

    A component has no sign of its own: its largest entry is made positive, so that it is fixed.
    """
    _, vectors = np.linalg.eigh(covariance_SDD)  # columns by rising variance
    rows = np.swapaxes(vectors, 1, 2)[:, ::-1]
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=2)[..., None], axis=2)
    return rows * np.sign(largest)


def signed_components(covariance_SDD: np.ndarray) -> np.ndarray:
    """Returns float64[S, D, D]: the leading components, each with both signs, by falling variance."""
    d = covariance_SDD.shape[1]
    rows = components(covariance_SDD)[:, : -(-d // 2)]
    return np.stack([rows, -rows], axis=2).reshape(len(rows), -1, d)[:, :d]


class Autoencoders(NamedTuple):
    """Sparse autoencoders of all layers; their parameters, gradients and updates alike."""

    encoder: jax.Array  # float32[S, D, M]
    decoder: jax.Array  # float32[S, M, D]
    centre: jax.Array  # float32[S, D], b_pre


def initial_autoencoders(centre_SD: jax.Array, width: int, seed: int) -> Autoencoders:
    """Makes decoders of M = `width` random unit rows, and encoders that are their transposes."""
    n_layers, d = centre_SD.shape
    decoder = _unit(jax.random.normal(jax.random.key(seed), (n_layers, width, d)))
    return Autoencoders(jnp.swapaxes(decoder, 1, 2), decoder, jnp.asarray(centre_SD, jnp.float32))


def reconstruct(sae: Autoencoders, x_SND: jax.Array, keep: int) -> tuple[jax.Array, jax.Array]:
    """Returns reconstructions [S, N, D] and codes [S, N, M]."""
    codes = topk(jnp.einsum("snd,sdm->snm", x_SND - sae.centre[:, None], sae.encoder), keep)
    return jnp.einsum("snm,smd->snd", codes, sae.decoder) + sae.centre[:, None], codes


def fit_autoencoders(
    batches: States,
    n_batches: int,
    centre_SD: np.ndarray,
    scale_S: np.ndarray,
    *,
    keep: int,
    width: int,
    seed: int = 0,
    start: Dictionary | None = None,
    learning_rate: float = LEARNING_RATE,
    report: Callable[[], None] = lambda: None,
) -> tuple[Autoencoders, np.ndarray]:
    """Trains autoencoders on hidden states, each batch once, its tokens shuffled into minibatches.

    All `n_batches` are of as many tokens; the learning rate, the highest of which is given, follows from
    their number. From the mean hidden state and the root mean square of what is left of a coordinate, by
    which hidden states are divided, so that one learning rate suits all layers. `keep` is K, `width` M; with
    `start` the autoencoders of a dictionary are trained on, its own centres included.
    `report` is told after each batch. Returns the autoencoders, for hidden states as they are, not scaled;
    and bool[S, M], which codes are dead.
    """
    scale_S11 = jnp.asarray(scale_S, jnp.float32)[:, None, None]
    if start is None:
        sae = initial_autoencoders(jnp.asarray(centre_SD) / scale_S11[:, 0], width, seed)
    else:
        centre = jnp.asarray(start.centre) / scale_S11[:, 0]
        sae = Autoencoders(jnp.array(start.encoder), jnp.array(start.decoder), centre)
    state, alive = None, np.zeros((len(scale_S), width), bool)
    for number, (x_SND, counts_N) in enumerate(batches):
        n_steps = max(1, len(counts_N) // MINIBATCH)
        optimizer = _optimizer(learning_rate, n_batches * n_steps)
        state = optimizer.init(sae) if state is None else state
        key = jax.random.fold_in(jax.random.key(seed), number)
        sae, state, active_SM = _train(optimizer, keep, n_steps, sae, state, x_SND, counts_N, scale_S11, key)
        if number >= int(n_batches * (1 - _LAST)):
            alive |= np.asarray(active_SM)
        report()
    return sae._replace(centre=sae.centre * scale_S11[:, 0]), ~alive


@functools.cache  # so that it is one static argument of the compiled program
def _optimizer(learning_rate: float, n_steps: int) -> optax.GradientTransformation:
    warmup, decay = int(_WARMUP * n_steps), int(_DECAY * n_steps)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(learning_rate / (warmup + 1), learning_rate, warmup),
            optax.constant_schedule(learning_rate),
            optax.linear_schedule(learning_rate, 0.0, max(decay, 1)),
        ],
        [warmup, n_steps - decay],
    )
    return optax.adam(schedule, _BETA1, _BETA2, _EPSILON)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def _train(
    optimizer: optax.GradientTransformation,
    keep: int,
    n_steps: int,
    sae: Autoencoders,
    state: optax.OptState,
    x_SND: jax.Array,
    counts_N: jax.Array,
    scale_S11: jax.Array,
    key: jax.Array,
) -> tuple[Autoencoders, optax.OptState, jax.Array]:
    """Takes some steps on the tokens of one batch; returns which codes were active too, bool[S, M]."""
    x_SND = x_SND.astype(jnp.float32) / scale_S11
    size = x_SND.shape[1] // n_steps
    order = jax.random.permutation(key, x_SND.shape[1])[: n_steps * size].reshape(n_steps, size)

    def loss_of(sae: Autoencoders, x: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        reconstructed, codes = reconstruct(sae, x, keep)
        errors = jnp.mean(jnp.square(x - reconstructed), axis=2)
        # Layers do not see each other: the gradient of a sum is each one's own.
        loss = jnp.sum(jnp.where(counts, errors, 0)) / jnp.maximum(jnp.sum(counts), 1)
        return loss, jnp.any((codes > 0) & counts[:, None], axis=1)

    def step(carry: tuple, tokens: jax.Array) -> tuple[tuple, jax.Array]:
        sae, state = carry
        gradients, active = jax.grad(loss_of, has_aux=True)(sae, x_SND[:, tokens], counts_N[tokens])
        # Along a row of the decoder a step would be undone by scaling: Adam is not to see that part.
        along = jnp.sum(gradients.decoder * sae.decoder, axis=2, keepdims=True)
        gradients = gradients._replace(decoder=gradients.decoder - along * sae.decoder)
        updates, state = optimizer.update(gradients, state, sae)
        sae = optax.apply_updates(sae, updates)
        return (sae._replace(decoder=_unit(sae.decoder)), state), active

    (sae, state), active = jax.lax.scan(step, (sae, state), order)
    return sae, state, jnp.any(active, axis=0)


def _unit(rows: jax.Array) -> jax.Array:
    return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)
