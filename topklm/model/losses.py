"""Next-token cross-entropy that never holds all logits at once, and that of a bag of following tokens.

The logits of one chunk of tokens are formed, turned into their loss and their gradient, and dropped, so the
backward pass does no second matrix product with the unembedding.
"""

import functools

import jax
import jax.numpy as jnp

from topklm.model.layers import product, transposed

# A chunk's logits should stay near the cache (8 MB in float32) but a matrix product over fewer tokens
# than this wastes the machine.
_LOGITS_PER_CHUNK = 2**21
_MIN_TOKENS_PER_CHUNK = 512


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(
    h_BTD: jax.Array,
    w_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    z_loss: float,
    n_vocab: int | None = None,
    vocab_axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes the weighted sum of next-token losses of h [B, T, D], by the padded unembedding w [D, V].

    w is cast to the dtype of h, logits are float32. Divide weights, float32[B, T], by the total beforehand
    for a mean; they get no gradient. `z_loss` is the weight of logsumexp(logits)^2 (PaLM, Chowdhery et al.
    2022, section 5). The leading `n_vocab` columns stand for tokens (None: all); the others get probability
    and gradient 0. Inside `jax.shard_map`, `vocab_axis` is the mesh axis that splits V; w is then this
    device's columns, and the gradient of h its share of a sum over the axis.

    Returns float32 scalars: sum of weights * (nll + z_loss * logsumexp^2), which carries the gradient; and
    sum of weights * nll in nats, which carries none.
    """
    # XLA drops the gradient where it is not used.
    return _forward(h_BTD, w_DV, targets_BT, weights_BT, z_loss, n_vocab, vocab_axis)[0]


def token_losses(
    h_BTD: jax.Array,
    w_DV: jax.Array,
    targets_BT: jax.Array,
    n_vocab: int | None = None,
    vocab_axis: str | None = None,
) -> jax.Array:
    """Computes the next-token loss of every position, nats, float32[B, T]; arguments as `cross_entropy`."""
    chunks = _split(h_BTD, targets_BT, jnp.ones(targets_BT.shape, jnp.float32), vocab_size=w_DV.shape[1])
    w = w_DV.astype(h_BTD.dtype)
    nll_CBS = jax.lax.map(lambda chunk: _losses(chunk[0], w, chunk[1], n_vocab, vocab_axis)[0], chunks)
    return _join(nll_CBS, targets_BT.shape[1])


def token_scores(
    h_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array, n_vocab: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Computes the loss of every position as `token_losses`, and whether no token is likelier, bool[B, T]."""
    chunks = _split(h_BTD, targets_BT, jnp.ones(targets_BT.shape, jnp.float32), vocab_size=w_DV.shape[1])
    w = w_DV.astype(h_BTD.dtype)

    def of_chunk(chunk: tuple) -> tuple[jax.Array, jax.Array]:
        h_BSD, targets_BS, _ = chunk
        nll, _, probabilities = _losses(h_BSD, w, targets_BS, n_vocab, None)
        own = jnp.take_along_axis(probabilities, targets_BS[..., None], axis=-1)[..., 0]
        return nll, own >= probabilities.max(axis=-1)

    nll_CBS, likeliest_CBS = jax.lax.map(of_chunk, chunks)
    return _join(nll_CBS, targets_BT.shape[1]), _join(likeliest_CBS, targets_BT.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def bag_cross_entropy(
    h_BTD: jax.Array,
    w_DV: jax.Array,
    bags_BTH: jax.Array,
    shares_BTH: jax.Array,
    weights_BT: jax.Array,
    log_counts_V: jax.Array,
    vocab_axis: str | None = None,
) -> jax.Array:
    """Computes the weighted sum of the losses of a bag of tokens at each position, nats, a float32 scalar.

    A position's loss is the mean of -log p(v) over the tokens int32[B, T, H] of its bag, each with its share,
    float32[B, T, H], where p = softmax(h w + log_counts): how often each v of the vocabulary is among the
    tokens that count as alternatives, as a log, float32[V]. So h says only by how much a token is likelier
    here than there (noise-contrastive: van den Oord et al. 2018, arXiv 1807.03748, with the batch's tokens
    for negatives). Other arguments, and the parts of a device along `vocab_axis`, as in `cross_entropy`.
    """
    return _bag_forward(h_BTD, w_DV, bags_BTH, shares_BTH, weights_BT, log_counts_V, vocab_axis)[0]


def _bag_forward(
    h: jax.Array,
    w_DV: jax.Array,
    bags: jax.Array,
    shares: jax.Array,
    weights: jax.Array,
    log_counts_V: jax.Array,
    vocab_axis: str | None,
) -> tuple:
    w = w_DV.astype(h.dtype)
    w_transposed = transposed(w)
    n_columns = w.shape[1]
    first = 0 if vocab_axis is None else jax.lax.axis_index(vocab_axis) * n_columns

    def add_chunk(total: tuple, chunk: tuple) -> tuple[tuple, jax.Array]:
        loss, dw = total
        h_BSD, bags_BSH, shares_BSH, weights_BS = chunk
        logits = jnp.matmul(h_BSD, w, preferred_element_type=jnp.float32) + log_counts_V
        flat_h, flat_bags = h_BSD.reshape(-1, h.shape[-1]), bags_BSH.reshape(-1, bags.shape[-1])
        columns = flat_bags - first
        columns = jnp.where(columns < 0, n_columns, columns)  # of another device: left out, as those above
        rows = jnp.arange(len(flat_bags))[:, None]
        wanted = jnp.zeros((len(flat_bags), n_columns), jnp.float32)
        wanted = wanted.at[rows, columns].add(shares_BSH.reshape(flat_bags.shape), mode="drop")
        wanted = wanted.reshape(logits.shape)
        own = jnp.sum(wanted * jnp.where(wanted > 0, logits, 0.0), axis=-1)
        of_bag, log_z, probabilities = _softmax(logits, own, vocab_axis)
        loss += jnp.sum(weights_BS * (log_z - of_bag))
        dlogits = ((probabilities - wanted) * weights_BS[..., None]).astype(h.dtype)
        flat_d = dlogits.reshape(-1, n_columns)
        dw += jnp.matmul(transposed(flat_h), flat_d, preferred_element_type=jnp.float32)
        return (loss, dw), product(dlogits, w_transposed)

    zero = (jnp.zeros(()), jnp.zeros(w_DV.shape, jnp.float32))
    (loss, dw), dh = jax.lax.scan(add_chunk, zero, _split(h, bags, shares, weights, vocab_size=n_columns))
    return loss, (_join(dh, h.shape[1]), _barrier_in_bfloat16(h, dw))


def _bag_backward(vocab_axis: str | None, saved: tuple, g: jax.Array) -> tuple:
    del vocab_axis
    dh, dw = saved
    return dh * g.astype(dh.dtype), dw * g, None, None, None, None


bag_cross_entropy.defvjp(_bag_forward, _bag_backward)


def _forward(
    h: jax.Array,
    w_DV: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: float,
    n_vocab: int | None,
    vocab_axis: str | None,
) -> tuple:
    w = w_DV.astype(h.dtype)
    w_transposed = transposed(w)
    vocabulary = _vocabulary(w.shape[1], vocab_axis)

    def add_chunk(total: tuple, chunk: tuple) -> tuple[tuple, jax.Array]:
        loss, nll_sum, dw = total
        h_BSD, targets_BS, weights_BS = chunk
        nll, log_z, probabilities = _losses(h_BSD, w, targets_BS, n_vocab, vocab_axis)
        loss += jnp.sum(weights_BS * (nll + z_loss * log_z**2))
        nll_sum += jnp.sum(weights_BS * nll)
        # d nll = p - onehot(target); d log_z^2 = 2 log_z p
        scale = 1.0 + 2.0 * z_loss * log_z
        is_target = (vocabulary == targets_BS[..., None]).astype(jnp.float32)
        dlogits = ((probabilities * scale[..., None] - is_target) * weights_BS[..., None]).astype(h.dtype)
        flat_h, flat_d = h_BSD.reshape(-1, h.shape[-1]), dlogits.reshape(-1, w.shape[1])
        dw += jnp.matmul(transposed(flat_h), flat_d, preferred_element_type=jnp.float32)
        return (loss, nll_sum, dw), product(dlogits, w_transposed)

    zero = (jnp.zeros(()), jnp.zeros(()), jnp.zeros(w_DV.shape, jnp.float32))
    (loss, nll_sum, dw), dh = jax.lax.scan(
        add_chunk, zero, _split(h, targets, weights, vocab_size=w.shape[1])
    )
    dw = _barrier_in_bfloat16(h, dw)
    return (loss, nll_sum), (_join(dh, h.shape[1]), dw)


def _barrier_in_bfloat16(h: jax.Array, dw: jax.Array) -> jax.Array:
    """Returns dw as it is; in bfloat16 XLA may not look across.

    A tied table takes dw.T. XLA would make one product of that and a single chunk's, of a kind that it cannot
    run on a CPU.
    """
    return jax.lax.optimization_barrier(dw) if h.dtype == jnp.bfloat16 else dw


def _backward(
    z_loss: float, n_vocab: int | None, vocab_axis: str | None, saved: tuple, cotangents: tuple
) -> tuple:
    del z_loss, n_vocab, vocab_axis
    (dh, dw), g = saved, cotangents[0]
    return dh * g.astype(dh.dtype), dw * g, None, None


cross_entropy.defvjp(_forward, _backward)


def _losses(
    h_BSD: jax.Array, w_DV: jax.Array, targets_BS: jax.Array, n_vocab: int | None, vocab_axis: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes nll [B, S], logsumexp [B, S] and probabilities [B, S, V] of one chunk, float32."""
    logits = jnp.matmul(h_BSD, w_DV, preferred_element_type=jnp.float32)
    if n_vocab is not None and (vocab_axis is not None or n_vocab < w_DV.shape[1]):
        # Masked, not cut off: the products keep the shape that the hardware likes.
        logits = jnp.where(_vocabulary(w_DV.shape[1], vocab_axis) < n_vocab, logits, -jnp.inf)
    if vocab_axis is None:
        own = jnp.take_along_axis(logits, targets_BS[..., None], axis=-1)[..., 0]
    else:
        # Another device may have the target's column.
        is_target = _vocabulary(w_DV.shape[1], vocab_axis) == targets_BS[..., None]
        own = jnp.where(is_target, logits, 0.0).sum(axis=-1)
    target_logits, log_z, probabilities = _softmax(logits, own, vocab_axis)
    return log_z - target_logits, log_z, probabilities


def _softmax(
    logits: jax.Array, own: jax.Array, vocab_axis: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums `own`, [B, S], over the parts of the vocabulary; and computes logsumexp [B, S], probabilities."""
    highest = logits.max(axis=-1, keepdims=True)
    if vocab_axis is not None:
        highest = jax.lax.pmax(highest, vocab_axis)
    exponentials = jnp.exp(logits - highest)
    total = exponentials.sum(axis=-1, keepdims=True)
    if vocab_axis is not None:
        total, own = jax.lax.psum((total, own), vocab_axis)
    return own, (highest + jnp.log(total))[..., 0], exponentials / total


def _vocabulary(n_columns: int, vocab_axis: str | None) -> jax.Array:
    """Returns the token that each column of this device stands for, int32[V]."""
    columns = jnp.arange(n_columns, dtype=jnp.int32)
    return columns if vocab_axis is None else columns + jax.lax.axis_index(vocab_axis) * n_columns


def _split(*arrays: jax.Array, vocab_size: int) -> tuple:
    """Cuts along T: each [B, T, ...] -> [chunks, B, S, ...], zero-padded."""
    batch, length = arrays[0].shape[:2]
    tokens = max(_MIN_TOKENS_PER_CHUNK, _LOGITS_PER_CHUNK // vocab_size)
    n_chunks = max(1, min(length, round(batch * length / tokens)))
    size = -(-length // n_chunks)
    n_chunks = -(-length // size)

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, n_chunks * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, n_chunks, size, *x.shape[2:]), 1, 0)

    return tuple(map(cut, arrays))


def _join(x_CBS: jax.Array, length: int) -> jax.Array:
    joined = jnp.moveaxis(x_CBS, 0, 1)
    return joined.reshape(joined.shape[0], -1, *x_CBS.shape[3:])[:, :length]
