"""Hidden states made of known features: SynthSAEBench-16k, at a scale.

After Chanin and Garriga-Alonso 2026, arXiv 2602.14687. A hidden state is the sum of the features that fire,
each a unit vector times its value, and a bias. As there: firing is Zipfian (rank^-0.5, from 0.4 to 5e-4) with
low-rank correlations (a Gaussian copula of rank 25, scale 0.1); two thirds of the features lie in trees
(roots, four children each, three levels below), where a child fires only if its parent does, at most one
child of a parent does, and its value follows the parent's; values are normal, of mean 5 (frequent) to 4
(rare). Vectors are made more orthogonal by 100 steps of Adam.

At a scale s every s-th feature is taken and all widths are divided by s, so that the noise of features on
each other, and how many there are for a dimension and for a latent, stay. Scale 1 is SynthSAEBench-16k.

Dims: F features, D dimensions, N samples, R rank, M latents.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import linear_sum_assignment

_FEATURES, _D, _ROOTS = 16_384, 768, 128
_WIDTH = 4096  # of the SAEs that the paper trains on it
_BRANCHES, _DEPTH = 4, 3
_EXPONENT, _MOST, _LEAST = 0.5, 0.4, 5e-4
_RANK, _CORRELATION = 25, 0.1
_MEANS, _DEVIATION, _BIAS = (5.0, 4.0), 0.5, 0.5
_ORTHOGONAL_STEPS, _ORTHOGONAL_RATE = 100, 3e-4


@dataclasses.dataclass(frozen=True, eq=False)
class SyntheticModel:
    """All that hidden states are drawn from."""

    vectors: np.ndarray  # float32[F, D], unit rows, the most frequent feature first
    bias: np.ndarray  # float32[D]
    probabilities: np.ndarray  # float32[F], with which features should fire
    drawn: np.ndarray  # float32[F], with which they are drawn, before trees switch some off
    means: np.ndarray  # float32[F]
    deviations: np.ndarray  # float32[F]
    factors: np.ndarray  # float32[F, R], of the copula's covariance: factors factors^T and a diagonal
    n_roots: int

    @property
    def width(self) -> int:
        """M of the SAEs to be trained on it."""
        return len(self.vectors) * _WIDTH // _FEATURES

    def sample(self, seed: int, number: int, n: int) -> tuple[jax.Array, jax.Array]:
        """Draws the hidden states [N, D] of a batch, and the values of its features [N, F], mostly 0."""
        rng = np.random.Generator(np.random.SFC64([seed, number]))  # several times as fast as XLA's on CPUs
        shift = rng.standard_normal((n, _RANK), np.float32)
        firing, trees = (
            rng.random((n, f), np.float32) for f in (len(self.drawn), levels(self.n_roots)[-1].stop)
        )
        values = _values(
            self.n_roots, shift, firing, trees, self.drawn, self.means, self.deviations, self.factors
        )
        return _sums(values, self.vectors, self.bias), values


def make(scale: int = 1, seed: int = 0) -> SyntheticModel:
    """Draws the model of a scale."""
    rng = np.random.default_rng(seed)
    n, d, n_roots = _FEATURES // scale, _D // scale, _ROOTS // scale
    zipf = (np.arange(1, n + 1) * float(scale)) ** -_EXPONENT
    last = _FEATURES**-_EXPONENT
    probabilities = _LEAST + (_MOST - _LEAST) * (zipf - last) / (1 - last)
    factors = rng.standard_normal((n, _RANK)) * _CORRELATION
    vectors = _orthogonalized(rng.standard_normal((n, d)).astype(np.float32))
    bias = rng.standard_normal(d)
    arrays = {
        "vectors": vectors,
        "bias": bias * _BIAS / np.linalg.norm(bias),
        "probabilities": probabilities,
        "drawn": _drawn(probabilities, n_roots),
        "means": np.linspace(*_MEANS, n),
        "deviations": np.abs(_DEVIATION + _DEVIATION * rng.standard_normal(n)),
        "factors": factors / np.sqrt(np.maximum(1, np.square(factors).sum(axis=1) / 0.99))[:, None],
    }
    return SyntheticModel(**{name: x.astype(np.float32) for name, x in arrays.items()}, n_roots=n_roots)


def levels(n_roots: int) -> list[slice]:
    """Returns the features of each level of the trees, roots first, the children of a parent side by side."""
    sizes = [n_roots * _BRANCHES**depth for depth in range(_DEPTH + 1)]
    ends = np.cumsum(sizes).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _drawn(probabilities: np.ndarray, n_roots: int) -> np.ndarray:
    """Computes with what probability to draw features before trees switch some off.

    A child's is divided by its parent's, and multiplied by 1 + the siblings to be expected beside it. That is
    the paper's rule; deep in a tree features still fire less often than they should (L0 34 of 59 at scale 1).
    """
    drawn = probabilities.copy()
    for above, level in itertools.pairwise(levels(n_roots)):
        families, parents = probabilities[level].reshape(-1, _BRANCHES), probabilities[above, None]
        siblings = families.sum(axis=1, keepdims=True) - families
        drawn[level] = (families / parents * (1 + siblings / parents)).reshape(-1)
    return np.minimum(drawn, 1.0)


@jax.jit
def _sums(values_NF: jax.Array, vectors_FD: jax.Array, bias_D: jax.Array) -> jax.Array:
    return values_NF @ vectors_FD + bias_D


@functools.partial(jax.jit, static_argnums=0)
def _values(
    n_roots: int,
    normal_NR: jax.Array,
    u_NF: jax.Array,
    lots_NF: jax.Array,
    drawn_F: jax.Array,
    means_F: jax.Array,
    deviations_F: jax.Array,
    factors_FR: jax.Array,
) -> jax.Array:
    """Computes values of features from standard normal and uniform numbers."""
    shift_NF = normal_NR @ factors_FR.T
    own_F = jnp.sqrt(1 - jnp.square(factors_FR).sum(axis=1))
    # A feature fires where shift + own noise exceeds the quantile of its probability; the noise is integrated
    # out, and of the uniform number that decides, the part below the probability is uniform again.
    quantile_F = math.sqrt(2) * jax.lax.erf_inv(1 - 2 * drawn_F)
    p_NF = 0.5 * jax.lax.erfc((quantile_F - shift_NF) / (math.sqrt(2) * own_F))
    within_NF = jnp.clip(u_NF / p_NF, 1e-6, 1 - 1e-6)
    values_NF = means_F + deviations_F * math.sqrt(2) * jax.lax.erf_inv(2 * within_NF - 1)
    values_NF = jnp.where(u_NF < p_NF, jnp.maximum(values_NF, 0), 0)
    for above, level in itertools.pairwise(levels(n_roots)):
        children, lots = (x_NF[:, level].reshape(len(u_NF), -1, _BRANCHES) for x_NF in (values_NF, lots_NF))
        chosen = jax.nn.one_hot(jnp.where(children > 0, lots, -1).argmax(axis=2), _BRANCHES)
        parents = values_NF[:, above] / means_F[above]
        kept = children * chosen * parents[..., None]
        values_NF = values_NF.at[:, level].set(kept.reshape(len(u_NF), -1))
    return values_NF


def _orthogonalized(vectors_FD: np.ndarray) -> np.ndarray:
    """Makes vectors of unit length more orthogonal, as the paper does."""

    def loss(x_FD: jax.Array) -> jax.Array:
        products = x_FD @ x_FD.T
        lengths = jnp.diagonal(products)
        return (
            jnp.square(products).sum() - jnp.square(lengths).sum() + len(x_FD) * jnp.square(lengths - 1).sum()
        )

    optimizer = optax.adam(_ORTHOGONAL_RATE)

    @jax.jit
    def step(x_FD: jax.Array, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        updates, state = optimizer.update(jax.grad(loss)(x_FD), state)
        return optax.apply_updates(x_FD, updates), state

    x_FD = jnp.asarray(vectors_FD / np.linalg.norm(vectors_FD, axis=1, keepdims=True))
    state = optimizer.init(x_FD)
    for _ in range(_ORTHOGONAL_STEPS):
        x_FD, state = step(x_FD, state)
    return np.asarray(x_FD / jnp.linalg.norm(x_FD, axis=1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Recovery:
    """How well latents are features; the names are the paper's."""

    f1: float  # mean over latents, each a detector of the feature nearest to its decoder row
    precision: float
    recall: float
    mcc: float  # mean |cosine| of decoder rows and features, paired one to one for the largest sum
    uniqueness: (
        float  # share of latents whose nearest feature is nearest to no other, counted as distinct ones
    )
    explained_variance: float
    l0: float
    dead: int


class Scores:
    """Counts how latents detect the features that their decoder rows, [M, D], are nearest to."""

    def __init__(self, model: SyntheticModel, decoder_MD: np.ndarray):
        rows = decoder_MD / np.maximum(np.linalg.norm(decoder_MD, axis=1, keepdims=True), 1e-12)
        self._cosines = np.abs(rows.astype(np.float64) @ model.vectors.T.astype(np.float64))
        self._nearest = self._cosines.argmax(axis=1)
        width = len(decoder_MD)
        self._both, self._latent, self._feature = (np.zeros(width) for _ in range(3))
        self._n, self._error, self._sum, self._squares = 0, 0.0, np.zeros(decoder_MD.shape[1]), 0.0

    def add(
        self, x_ND: np.ndarray, reconstructed_ND: np.ndarray, codes_NM: np.ndarray, values_NF: np.ndarray
    ) -> None:
        """Adds samples."""
        fires, there = codes_NM != 0, values_NF[:, self._nearest] > 0
        self._both += (fires & there).sum(axis=0)
        self._latent += fires.sum(axis=0)
        self._feature += there.sum(axis=0)
        x_ND = x_ND.astype(np.float64)
        self._n += len(x_ND)
        self._error += float(np.square(x_ND - reconstructed_ND).sum())
        self._sum += x_ND.sum(axis=0)
        self._squares += float(np.square(x_ND).sum())

    def recovery(self) -> Recovery:
        """Returns the figures; precision, recall and F1 of a latent that never fires are 0."""
        precision = self._both / np.maximum(self._latent, 1)
        recall = self._both / np.maximum(self._feature, 1)
        f1 = 2 * self._both / np.maximum(self._latent + self._feature, 1)
        scatter = self._squares - np.square(self._sum).sum() / self._n
        return Recovery(
            f1=float(f1.mean()),
            precision=float(precision.mean()),
            recall=float(recall.mean()),
            mcc=float(self._cosines[linear_sum_assignment(-self._cosines)].mean()),
            uniqueness=len(np.unique(self._nearest)) / len(self._nearest),
            explained_variance=1 - self._error / scatter,
            l0=float(self._latent.sum() / self._n),
            dead=int((self._latent == 0).sum()),
        )
