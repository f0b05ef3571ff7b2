"""Trains a TopK sparse autoencoder on hidden states, after Gao et al. 2024, arXiv 2406.04093.

    z = TopK(relu(W_enc (x - b_pre)))        x is about W_dec z + b_pre

The decoder's rows start random, of unit length, and are brought back to it after every step; the encoder
starts as the decoder's transpose, b_pre as the mean. The loss is the mean squared error, the optimizer Adam.
The paper's remedy for dead codes (AuxK) is left out: dead codes are counted instead.
Autoencoders of several layers are trained side by side. Dims: S layers, N tokens, D d_model, M codes of a
layer.
"""

from collections.abc import Callable, Iterable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from topklm.model.topk import topk

LEARNING_RATE = 2e-3
MINIBATCH = 1024  # tokens of a step

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 6.25e-10  # the paper's
_WARMUP, _DECAY = 0.05, 0.2  # shares of the steps, at both ends
_LAST = 0.2  # share of the steps in which a code has to be active once not to count as dead


class Autoencoders(NamedTuple):
    """Those of all layers; of their parameters, of gradients and of updates alike.

    Attributes:
        encoder: float32[S, D, M].
        decoder: float32[S, M, D].
        centre: float32[S, D], b_pre.
    """

    encoder: jax.Array
    decoder: jax.Array
    centre: jax.Array


def initial(centre_SD: jax.Array, width: int, seed: int) -> Autoencoders:
    """Decoders of random unit rows, encoders that are their transposes.

    Args:
        centre_SD: The mean hidden state.
        width: M.
        seed: Of the rows.
    """
    n_layers, d = centre_SD.shape
    decoder = _unit(jax.random.normal(jax.random.key(seed), (n_layers, width, d)))
    return Autoencoders(jnp.swapaxes(decoder, 1, 2), decoder, jnp.asarray(centre_SD, jnp.float32))


def reconstruct(sae: Autoencoders, x_SND: jax.Array, keep: int) -> tuple[jax.Array, jax.Array]:
    """Reconstructions [S, N, D] and codes [S, N, M]."""
    codes = topk(jnp.einsum("snd,sdm->snm", x_SND - sae.centre[:, None], sae.encoder), keep)
    return jnp.einsum("snm,smd->snd", codes, sae.decoder) + sae.centre[:, None], codes


def fit(
    batches: Iterable[tuple[jax.Array, jax.Array]],
    n_batches: int,
    centre_SD: np.ndarray,
    scale_S: np.ndarray,
    *,
    keep: int,
    width: int,
    seed: int = 0,
    learning_rate: float = LEARNING_RATE,
    report: Callable[[], None] = lambda: None,
) -> tuple[Autoencoders, np.ndarray]:
    """Trains autoencoders on hidden states, each batch once, its tokens shuffled into minibatches.

    Args:
        batches: Hidden states float32[S, N, D], and bool[N], which of the tokens count; N is always the same.
        n_batches: How many there are; the learning rate follows from it.
        centre_SD: Mean hidden state.
        scale_S: Root mean square of what is left of a coordinate; hidden states are divided by it, so that
            one learning rate suits all layers.
        keep: K.
        width: M.
        seed: Of the start and of the shuffles.
        learning_rate: The highest.
        report: Told after each batch.

    Returns:
        The autoencoders, for hidden states as they are, not scaled; and bool[S, M], which codes are dead.
    """
    scale_S11 = jnp.asarray(scale_S, jnp.float32)[:, None, None]
    sae = initial(jnp.asarray(centre_SD) / scale_S11[:, 0], width, seed)
    per_batch = None
    state, alive = None, np.zeros((len(scale_S), width), bool)
    for number, (x_SND, counts_N) in enumerate(batches):
        if number == n_batches:
            break
        if per_batch is None:
            per_batch = max(1, len(counts_N) // MINIBATCH)
            optimizer = _optimizer(learning_rate, n_batches * per_batch)
            state = optimizer.init(sae)
        key = jax.random.fold_in(jax.random.key(seed), number)
        sae, state, active_SM = _train(
            optimizer, keep, per_batch, sae, state, x_SND, counts_N, scale_S11, key
        )
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
    """Returns some steps on the tokens of one batch; and which codes were active, bool[S, M]."""
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
