"""Makes dictionaries (`topklm.neurons.dictionary`) from the hidden states of a Base LM on its training text.

- *random*: an orthonormal basis drawn at random for each layer; the centre is the mean hidden state.
- *pca*: the leading D / 2 principal components of the hidden state, each of them twice: a code is never
  negative, so a component's two signs are two codes, 2 i and 2 i + 1, of which at most one is active. Nothing
  is whitened: the K largest codes are those that reconstruct best.
- *sae*: a post-hoc TopK sparse autoencoder (`topklm.neurons.sae`).

All have as many codes M as the model has coordinates D. The text is the run's training stream, in a shuffled
order; the text that is looked at afterwards is only used to say how much of its variance the codes explain.
Dims: S layers, B batch, T tokens, D d_model.
"""

from collections.abc import Callable, Iterator
import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from topklm.config import DataConfig, ModelConfig
from topklm.data.building.build import prepare
from topklm.data.stream import train_stream
from topklm.errors import UserError
from topklm.model import transformer
from topklm.neurons import sae
from topklm.neurons.dictionary import Dictionary, ExplainedVariance
from topklm.neurons.documents import Documents, TokenWindow, pack, windows_of
from topklm.progress import Progress

DEFAULT_TOKENS = 1_000_000

_BATCH_TOKENS = 8192  # of one device
_SCALE_BATCHES = 8  # of which an autoencoder gets its start
_EVALUATED = 32_768  # tokens

States = Iterator[tuple[jax.Array, jax.Array]]


def fit(
    kind: str,
    config: ModelConfig,
    params: transformer.Parameters,
    mesh: Mesh,
    data: DataConfig,
    documents: Documents,
    *,
    keep: int,
    n_tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    progress: Progress,
) -> Dictionary:
    """Makes a dictionary of the hidden state that each layer of a Base LM hands on.

    Args:
        kind: One of `dictionary.KINDS`.
        config: The model.
        params: Its parameters, on the devices of `mesh`.
        mesh: Rows of a batch are split over all its devices.
        data: The run's; its training text is read.
        documents: To be harvested; nothing is learned from them.
        keep: K.
        n_tokens: Of training text, about; more than there are are read again, in another order.
        seed: Of the order of the text and of what is drawn.
        progress: Shows how far it is.

    Raises:
        UserError: If the training text cannot be read.
    """
    mixture = prepare(data, lambda line: None)
    rows = max(1, _BATCH_TOKENS // config.context_length) * mesh.size
    n_batches = max(1, round(n_tokens / (rows * config.context_length)))
    states = functools.partial(_states, config, params, mesh, mixture.tokenizer.separator_id)

    def batches(n: int) -> States:
        stream = train_stream(mixture, context_length=config.context_length, batch_size=rows, seed=seed)
        return states(itertools.islice(stream, n))

    facts: dict[str, Any] = {"tokens": n_tokens, "seed": seed}
    d = config.d_model
    with progress.phase(f"making a dictionary ({kind})", n_batches) as report:

        def tell() -> None:
            report(1, 0, rows * config.context_length)

        if kind == "sae":
            mean, scatter = _moments(batches(min(_SCALE_BATCHES, n_batches)))
            scale = np.sqrt(np.trace(scatter, axis1=1, axis2=2) / d)
            trained, dead = sae.fit(
                batches(n_batches), n_batches, mean, scale, keep=keep, width=d, seed=seed, report=tell
            )
            arrays = [np.asarray(array) for array in (trained.centre, trained.encoder, trained.decoder)]
            facts["dead_codes"] = dead.sum(axis=1).tolist()
        else:
            mean, scatter = _moments(batches(n_batches), tell)
            rows_SMD = _random(len(mean), d, seed) if kind == "random" else _components(scatter)
            arrays = [mean, np.swapaxes(rows_SMD, 1, 2), rows_SMD]
    facts["text"] = f"training text of {', '.join(dataset.path.name for dataset in mixture.datasets)}"
    centre, encoder, decoder = (array.astype(np.float32) for array in arrays)
    made = Dictionary(kind, keep, centre, encoder, decoder, facts)
    facts["explained_variance"] = explained_variance(made, config, params, mesh, documents)
    return made


def load_fitting(path: Path, kind: str, keep: int, n_tokens: int) -> Dictionary | None:
    """Returns the dictionary that a harvest goes on with; None where there is none yet.

    Raises:
        UserError: If the one there was made in another way than is asked for now.
    """
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
    config: ModelConfig,
    params: transformer.Parameters,
    mesh: Mesh,
    documents: Documents,
    n_tokens: int = _EVALUATED,
) -> list[float]:
    """Computes, layer by layer, the share of the hidden state's variance that the codes hold.

    Args:
        dictionary: Of the model.
        config: The model.
        params: Its parameters, on the devices of `mesh`.
        mesh: Rows of a batch are split over all its devices.
        documents: The text, read as it is harvested.
        n_tokens: How many, about.
    """
    rows = max(1, _BATCH_TOKENS // config.context_length) * mesh.size
    windows: list[TokenWindow] = []
    read = 0
    separator_id = config.vocab_size - 1  # any: padding does not count
    for number, ids in enumerate(documents):
        windows += windows_of(number, ids, separator_id, config.context_length)
        read += len(ids)
        if read >= n_tokens:
            break
    found = [ExplainedVariance(config.d_model) for _ in range(len(dictionary.centre))]
    if not windows:
        return [float("nan")] * len(found)
    packed = pack(windows, config.context_length, rows, separator_id)
    reconstruct = jax.jit(lambda h_SND: dictionary.decode(dictionary.encode(h_SND)))
    for first in range(0, len(packed.inputs), rows):
        part = slice(first, first + rows)
        arrays = (packed.inputs[part], packed.segment_ids[part], packed.positions[part])
        h_SND = _hidden(config, params, *_on(mesh, *arrays))
        counts = packed.places[part].reshape(-1) >= 0
        for number, (x, reconstructed) in enumerate(
            zip(np.asarray(h_SND), np.asarray(reconstruct(h_SND)), strict=True)
        ):
            found[number].add(x[counts], reconstructed[counts])
    return [variance.value for variance in found]


def _states(
    config: ModelConfig,
    params: transformer.Parameters,
    mesh: Mesh,
    separator_id: int,
    batches: Iterator[Any],
) -> States:
    """Yields hidden states float32[S, B T, D] of training batches, and which tokens are text, bool[B T]."""
    for batch in batches:
        arrays = _on(mesh, batch["inputs"], batch["segment_ids"], batch["positions"])
        counts = (batch["inputs"] != separator_id).reshape(-1)
        yield _hidden(config, params, *arrays), jnp.asarray(counts)


def _on(mesh: Mesh, *arrays: np.ndarray) -> Any:
    return jax.device_put(arrays, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))


@functools.partial(jax.jit, static_argnums=0)
def _hidden(
    config: ModelConfig,
    params: transformer.Parameters,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    positions_BT: jax.Array,
) -> jax.Array:
    model = transformer.bind(config, params)
    _, states_SBTD = model.hidden(
        tokens_BT, segment_ids_BT, positions_BT, capture=lambda _h, _u, h_next: h_next.astype(jnp.float32)
    )
    return states_SBTD.reshape(len(states_SBTD), -1, config.d_model)


def _moments(states: States, report: Callable[[], None] = lambda: None) -> tuple[np.ndarray, np.ndarray]:
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


def _random(n_layers: int, d: int, seed: int) -> np.ndarray:
    """Returns float64[S, D, D], rows of random orthonormal bases, all equally likely."""
    rng = np.random.default_rng(seed)
    q, r = np.linalg.qr(rng.standard_normal((n_layers, d, d)))
    return q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None]


def _components(covariance_SDD: np.ndarray) -> np.ndarray:
    """Returns float64[S, D, D]: the leading components, each with both signs, by falling variance."""
    d = covariance_SDD.shape[1]
    _, vectors = np.linalg.eigh(covariance_SDD)  # columns by rising variance
    rows = np.swapaxes(vectors, 1, 2)[:, ::-1][:, : -(-d // 2)]
    # A component has no sign of its own: its largest entry is made positive, so that the numbering is fixed.
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=2)[..., None], axis=2)
    rows = rows * np.sign(largest)
    return np.stack([rows, -rows], axis=2).reshape(len(rows), -1, d)[:, :d]
