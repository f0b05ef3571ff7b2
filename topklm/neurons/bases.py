"""Bases of a model's hidden states, and the codes of text in them.

A *basis* is a function from hidden states to codes. Of a TopK LM: its own neurons. Of a Base LM: its
coordinates, cut to the K largest that are positive, and post-hoc SAEs. Of both, to compare with: a
random rotation, and the principal components about the mean of the states on the text that is measured. Codes
of these two are cut as well, as those of a dictionary are (`topklm.neurons.fit_dictionary`); for probing they
are not cut and keep their signs, so a probe has all that a rotation of the states can give. Dims: S layers,
N tokens, D d_model, M codes.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.model.topk import topk
from topklm.neurons import DICTIONARIES, fit_dictionary
from topklm.neurons.dictionary import Dictionary
from topklm.neurons.documents import TextModel, batches
from topklm.neurons.labelled_texts import Located
from topklm.neurons.store import NeuronBlock

_STATES = ""  # no basis: the hidden states themselves
_STRETCH_TOKENS = 2**16  # that are packed together

# By their names in JSON.
TITLES = {
    "own": "own neurons",
    "coordinates": "coordinates, cut",
    **{kind: title for kind, title in DICTIONARIES.items() if kind.startswith("sae")},
    "random": "random rotation",
    "pca": DICTIONARIES["pca"],
}


@dataclasses.dataclass(frozen=True, eq=False)
class Basis:
    """A function from hidden states to codes."""

    name: str  # one of `TITLES`
    # From float32[S, N, D] to codes [S, N, M]; None: the states are the codes
    encode: Callable[[jax.Array], jax.Array] | None = None
    # From float[S, n, D] to what is probed, float[S, n, M]; None: the codes
    project: Callable[[np.ndarray], np.ndarray] | None = None


def make(
    config: ModelConfig,
    mean_SD: np.ndarray,
    covariance_SDD: np.ndarray,
    keep: int,
    saes: Sequence[Dictionary] = (),
    seed: int = 0,
) -> list[Basis]:
    """Returns the bases of a model, its own first, the random rotation last but one, then the components.

    Mean and covariance are of its hidden states, `keep` is K, codes kept of each token, `saes` of a Base LM,
    of a kind each.
    """
    if config.n_topk_layers:
        found = [Basis("own")]
    else:
        found = [Basis("coordinates", jax.jit(lambda h: topk(h, keep)))]
    found += [Basis(sae.kind, jax.jit(sae.encode)) for sae in saes]
    n_layers, d = mean_SD.shape
    rotation = fit_dictionary.random_rows(n_layers, d, seed)
    of_kind = {
        "random": (rotation, rotation),
        "pca": (fit_dictionary.signed_components(covariance_SDD), fit_dictionary.components(covariance_SDD)),
    }
    for kind, (rows_SMD, probed_SMD) in of_kind.items():
        rows = rows_SMD.astype(np.float32)
        cut = Dictionary(kind, keep, mean_SD.astype(np.float32), np.swapaxes(rows, 1, 2), rows)
        project = functools.partial(_project, mean_SD, np.swapaxes(probed_SMD, 1, 2))
        found.append(Basis(kind, jax.jit(cut.encode), project))
    return found


def _project(mean_SD: np.ndarray, columns_SDM: np.ndarray, h_SnD: np.ndarray) -> np.ndarray:
    return (h_SnD - mean_SD[:, None]) @ columns_SDM


# The codes of texts.


def states(
    model: TextModel, n_layers: int, documents: Sequence[np.ndarray], report: Callable[[int], None]
) -> Iterator[tuple[np.ndarray, np.ndarray, jax.Array]]:
    """Yields the hidden states of all tokens of documents, batch by batch.

    Each as the tokens in the batch, int[n]; which of its N inputs these are, int[n]; and what the first
    layers hand on, float32[S, N, D].
    """
    begin = 0
    for stretch in batches(model.windows(documents), _STRETCH_TOKENS):
        packed = model.pack(stretch)
        for arrays, read, to in packed.batches():
            h_LND = fit_dictionary.hidden_states(model.config, model.params, *model.put(arrays))
            yield begin + to, read, h_LND[:n_layers]
            report(len(to))
        begin += len(packed.tokens)


def moments(
    model: TextModel, n_layers: int, documents: Sequence[np.ndarray], report: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean float64[S, D] and covariance float64[S, D, D] of the hidden states on the text."""

    def counted() -> fit_dictionary.States:
        for _, read, h_SND in states(model, n_layers, documents, report):
            is_read = np.zeros(h_SND.shape[1], bool)
            is_read[read] = True
            yield h_SND, jnp.asarray(is_read)

    return fit_dictionary.moments(counted())


def read_blocks(
    model: TextModel,
    n_layers: int,
    of: Sequence[Basis],
    documents: Sequence[np.ndarray],
    report: Callable[[int], None],
) -> list[list[NeuronBlock]]:
    """Reads where codes are active, of each basis and each layer.

    Tokens are those of all documents but for the first of each, which are not counted, nor numbered.
    """
    lengths = np.array([len(ids) for ids in documents])
    numbers = np.cumsum(np.concatenate([[0, *([1] * (n - 1))] for n in lengths])) - 1
    numbers[np.cumsum([0, *lengths[:-1]])] = -1
    parts: list[list[list]] = [[[] for _ in range(n_layers)] for _ in of]
    for tokens, read, h_SND in states(model, n_layers, documents, report):
        is_counted = numbers[tokens] >= 0
        at = numbers[tokens][is_counted]
        for basis, of_basis in zip(of, parts, strict=True):
            codes = np.asarray(basis.encode(h_SND) if basis.encode else h_SND)
            for layer, of_layer in enumerate(of_basis):
                rows, neurons = np.nonzero(codes[layer, read[is_counted]])
                values = codes[layer, read[is_counted][rows], neurons]
                of_layer.append((at[rows], neurons, values, codes.shape[2]))
    return [[_block(of_layer) for of_layer in of_basis] for of_basis in parts]


def _block(parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, int]]) -> NeuronBlock:
    """Sorts events of a layer by neuron and token."""
    tokens, neurons, values = (np.concatenate(x) for x in list(zip(*parts, strict=True))[:3])
    order = np.lexsort((tokens, neurons))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(neurons, minlength=parts[0][3]))])
    return NeuronBlock(offsets, tokens[order].astype(np.int64), values[order].astype(np.float32))


def pool(
    model: TextModel, n_layers: int, of: Sequence[Basis], located: Located, report: Callable[[int], None]
) -> list[np.ndarray]:
    """Computes what is probed of each basis, float[S, n, M]: codes averaged over each example's tokens."""
    by_token = located.pooling.tocsc()
    # A rotation of means is the mean of rotations: it is taken afterwards.
    encoders = {basis.name: basis.encode for basis in of if basis.encode and not basis.project}
    pooled: dict[str, np.ndarray] = {}
    for tokens, read, h_SND in states(model, n_layers, located.documents, report):
        shares = by_token[:, tokens]
        rows = np.unique(shares.indices)
        shares = shares.tocsr()[rows]
        for name, encode in {_STATES: None, **encoders}.items():
            x_SND = np.asarray(encode(h_SND) if encode else h_SND)[:, read]
            if name not in pooled:
                shape = n_layers, located.pooling.shape[0], x_SND.shape[2]
                pooled[name] = np.zeros(shape, np.float32)
            for layer, x_ND in enumerate(x_SND):
                pooled[name][layer, rows] += shares @ x_ND
    h_SnD = pooled[_STATES]
    return [basis.project(h_SnD) if basis.project else pooled.get(basis.name, h_SnD) for basis in of]
