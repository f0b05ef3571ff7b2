"""Makes dictionaries (`topklm.neurons.dictionary`) from the hidden states of a Base LM on its training text.

- *random*: an orthonormal basis drawn at random for each layer; the centre is the mean hidden state.
- *pca*: the leading D / 2 principal components of the hidden state, each of them twice: a code is never
  negative, so a component's two signs are two codes, 2 i and 2 i + 1, of which at most one is active. Nothing
  is whitened: the K largest codes are those that reconstruct best.
Both have as many codes M as the model has coordinates D. The text is the run's training stream, in a shuffled
order; the text that is looked at afterwards is only used to say how much of its variance the codes explain.
Autoencoders, which are trained, read the same stream: `topklm.sae.text`.
Dims: S layers, B batch, T tokens, N tokens of a batch, D d_model, M codes of a layer.
"""

from collections.abc import Callable, Iterable, Sequence
import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import DataConfig, ModelConfig
from topklm.data.building.build import prepare
from topklm.data.stream import train_stream
from topklm.errors import UserError
from topklm.model import transformer
from topklm.neurons import DICTIONARY_TOKENS
from topklm.neurons.dictionary import Dictionary, ExplainedVariance
from topklm.neurons.documents import TextModel
from topklm.progress import Progress

_SEED = 0  # of the order of the text and of what is drawn
_EVALUATED = 32_768  # tokens

# Hidden states float32[S, N, D], and which of the tokens are text, bool[N].
States = Iterable[tuple[jax.Array, jax.Array]]


class TrainingText:
    """The hidden states that each layer of a Base LM hands on, on its training text.

    Only those `layers` are given (None: all). More batches than there are are read again, in another order.
    UserError if the text cannot be read.
    """

    def __init__(self, model: TextModel, data: DataConfig, layers: Sequence[int] | None = None):
        self._model, self._layers = model, None if layers is None else np.array(layers)
        self._mixture = prepare(data, lambda line: None)
        self.batch_tokens = model.rows * model.config.context_length
        self.name = f"training text of {', '.join(dataset.path.name for dataset in self._mixture.datasets)}"

    def batches(self, first: int = 0) -> States:
        """Yields batches without end, from the one of a number; each process of the layout reads its rows."""
        model, length = self._model, self._model.config.context_length
        sizes = {"context_length": length, "batch_size": model.rows}
        rows = model.layout.process_rows(model.rows)
        stream = train_stream(self._mixture, **sizes, seed=_SEED, rows=rows)
        stream.set_state({"next_index": first})
        for batch in stream:
            arrays = {name: batch[name] for name in ("inputs", "segment_ids", "positions")}
            there = model.layout.put_batch(arrays, model.rows)
            states = hidden_states(model.config, model.params, *(there[name] for name in arrays))
            is_text = (there["inputs"] != model.separator_id).reshape(-1)
            yield states if self._layers is None else states[self._layers], is_text

    def n_batches(self, n_tokens: int) -> int:
        """Returns how many batches hold about so many tokens."""
        return max(1, round(n_tokens / self.batch_tokens))


def fit(
    kind: str,
    model: TextModel,
    data: DataConfig,
    documents: Iterable[np.ndarray],
    *,
    keep: int,
    n_tokens: int = DICTIONARY_TOKENS,
    progress: Progress,
) -> Dictionary:
    """Makes a dictionary of the hidden state that each layer of a Base LM hands on: "random" or "pca".

    It keeps K = `keep` codes, and is made from about `n_tokens` of the run's training text. Nothing is
    learned from the documents to be harvested. UserError if the training text cannot be read.
    """
    text = TrainingText(model, data)
    n_batches = text.n_batches(n_tokens)
    with progress.phase_of_tokens(f"making a dictionary ({kind})", n_batches * text.batch_tokens) as report:
        batches = itertools.islice(text.batches(), n_batches)
        mean, scatter = moments(batches, lambda: report(text.batch_tokens))
    rows_SMD = (
        random_rows(len(mean), mean.shape[1], _SEED) if kind == "random" else signed_components(scatter)
    ).astype(np.float32)
    facts: dict[str, Any] = {"tokens": n_tokens, "seed": _SEED, "text": text.name}
    made = Dictionary(kind, keep, mean.astype(np.float32), np.swapaxes(rows_SMD, 1, 2), rows_SMD, facts)
    facts["explained_variance"] = explained_variance(made, model, documents)
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
    """Returns float64[S, D, D], components by falling variance, the largest entry of each positive."""
    _, vectors = np.linalg.eigh(covariance_SDD)  # columns by rising variance
    rows = np.swapaxes(vectors, 1, 2)[:, ::-1]
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=2)[..., None], axis=2)
    return rows * np.sign(largest)


def signed_components(covariance_SDD: np.ndarray) -> np.ndarray:
    """Returns float64[S, D, D]: the leading components, each with both signs, by falling variance."""
    d = covariance_SDD.shape[1]
    rows = components(covariance_SDD)[:, : -(-d // 2)]
    return np.stack([rows, -rows], axis=2).reshape(len(rows), -1, d)[:, :d]
