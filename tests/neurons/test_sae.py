"""Autoencoders: one step against float64 by hand, and whether training finds what is there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topklm.neurons import fit_dictionary
from topklm.neurons.dictionary import ExplainedVariance

S, D, M, K, N = 2, 8, 12, 2, 512


@pytest.fixture(scope="module")
def sparse_data():
    """Returns hidden states float32[S, 40 N, D] that are sums of two of twelve directions, at two scales."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(S, M, D))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    codes = np.zeros((S, 40 * N, M))
    for layer in range(S):
        which = np.argsort(rng.random((40 * N, M)), axis=1)[:, :K]
        np.put_along_axis(codes[layer], which, rng.uniform(1, 2, which.shape), axis=1)
    scales = np.array([1.0, 50.0])[:, None, None]
    return (scales * (codes @ directions + 3)).astype(np.float32)


def fitted(x, counts=None, **options):
    n = x.shape[1] // N
    counts = np.ones(x.shape[1], bool) if counts is None else counts
    parts = [
        (jnp.asarray(x[:, i * N : (i + 1) * N]), jnp.asarray(counts[i * N : (i + 1) * N])) for i in range(n)
    ]
    mean = x[:, counts].mean(axis=1)
    scale = np.sqrt(np.square(x[:, counts] - mean[:, None]).mean(axis=(1, 2)))
    settings = {"keep": K, "width": M, "learning_rate": 0.02, **options}
    return fit_dictionary.fit_autoencoders(parts, n, mean, scale, **settings)


@pytest.fixture(scope="module", autouse=True)
def short_minibatches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_dictionary, "MINIBATCH", 64)
        yield


def explained(trained, x, layer):
    found = ExplainedVariance(D)
    codes = np.maximum((x[layer] - trained.centre[layer]) @ trained.encoder[layer], 0)
    least = np.sort(codes, axis=1)[:, -K, None]
    codes = np.where(codes >= least, codes, 0)
    found.add(x[layer], codes @ trained.decoder[layer] + trained.centre[layer])
    return found.value


def test_training_finds_sparse_directions_whatever_the_scale(sparse_data):
    x = sparse_data
    trained, dead = fitted(x)
    trained = jax.tree.map(np.asarray, trained)
    np.testing.assert_allclose(np.linalg.norm(trained.decoder, axis=-1), 1, rtol=1e-5)
    for layer in range(S):
        assert explained(trained, x, layer) > 0.8
    # Of PCA with as many components as codes are kept, on data without such directions.
    _, variances, _ = np.linalg.svd(x[0] - x[0].mean(axis=0), full_matrices=False)
    assert explained(trained, x, 0) > (variances[:K] ** 2).sum() / (variances**2).sum() + 0.2
    assert dead.shape == (S, M) and dead.mean() < 0.5


def test_the_same_seed_gives_the_same_bits_and_another_another(sparse_data):
    x = sparse_data
    one, again, other = (fitted(x, seed=seed)[0] for seed in (0, 0, 1))
    for a, b, c in zip(one, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


def test_what_is_no_text_is_not_learned_from(sparse_data):
    x = sparse_data.copy()
    counts = np.random.default_rng(1).random(x.shape[1]) < 0.7
    one = fitted(x, counts)[0]
    x[:, ~counts] = 1e6
    for a, b in zip(one, fitted(x, counts)[0], strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_code_that_is_never_the_strongest_is_dead(sparse_data):
    x = sparse_data.copy()
    x[0] = 0
    x[0, :, 0] = np.random.default_rng(2).uniform(1, 2, x.shape[1])
    _, dead = fitted(x)
    # On a line, of the codes on either side the same two are always the strongest.
    assert M / 2 < dead[0].sum() < M
    assert dead[1].sum() < M / 2


def test_the_start_is_tied_and_centred():
    start = fit_dictionary.initial_autoencoders(jnp.arange(S * D, dtype=jnp.float32).reshape(S, D), M, 3)
    np.testing.assert_array_equal(start.encoder, np.swapaxes(start.decoder, 1, 2))
    np.testing.assert_allclose(np.linalg.norm(start.decoder, axis=-1), 1, rtol=1e-6)
    x = np.broadcast_to(np.asarray(start.centre)[:, None], (S, 5, D))
    reconstructed, codes = fit_dictionary.reconstruct(start, x, K)
    assert not codes.any()
    np.testing.assert_array_equal(reconstructed, x)


def test_the_first_step_is_that_of_adam_on_the_gradient_across_the_rows(sparse_data):
    """Steps by hand, one minibatch in float64: Adam's first step is the gradient's sign, times the rate."""
    x = sparse_data[:1, :64].astype(np.float64)
    mean, rate, eps = x.mean(axis=1), 0.01, 1e-4
    scale = np.sqrt(np.square(x - mean[:, None]).mean())
    optimizer = fit_dictionary._optimizer(rate, 10)
    start = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64),
        fit_dictionary.initial_autoencoders(jnp.asarray(mean / scale), M, 0),
    )
    scaled = x[0] / scale

    def loss(encoder, decoder, centre):
        codes = np.maximum((scaled - centre) @ encoder, 0)
        codes = np.where(codes >= np.sort(codes, axis=1)[:, -K, None], codes, 0)
        return np.square(scaled - codes @ decoder - centre).mean()

    arrays = start.encoder[0], start.decoder[0], start.centre[0]
    gradients = []
    for which, array in enumerate(arrays):
        gradient = np.zeros(array.shape)
        for index in np.ndindex(array.shape):
            moved = [[a.copy() for a in arrays] for _ in range(2)]
            moved[0][which][index] += eps
            moved[1][which][index] -= eps
            gradient[index] = (loss(*moved[0]) - loss(*moved[1])) / (2 * eps)
        gradients.append(gradient)
    gradients[1] -= (gradients[1] * arrays[1]).sum(axis=1, keepdims=True) * arrays[1]
    wanted = [a - rate * g / (np.abs(g) + 1e-8) for a, g in zip(arrays, gradients, strict=True)]
    wanted[1] /= np.linalg.norm(wanted[1], axis=1, keepdims=True)
    given = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), start)
    found, _, _ = fit_dictionary._train(
        optimizer,
        K,
        1,
        given,
        optimizer.init(given),
        jnp.asarray(x, jnp.float32),
        jnp.ones(64, bool),
        jnp.full((1, 1, 1), scale, jnp.float32),
        jax.random.key(0),
    )
    for name, a, b, g in zip(("encoder", "decoder", "centre"), found, wanted, gradients, strict=True):
        clear = np.abs(g) > 1e-4  # where the sign is no matter of rounding
        assert clear.mean() > 0.5, name
        np.testing.assert_allclose(np.asarray(a)[0][clear], b[clear], atol=2e-4, err_msg=name)
