"""Plain formulas of the model's parts, to which tests hold the fast ones."""

import jax
import jax.numpy as jnp
import numpy as np

from topklm.model import topk as topk_lib


def attention_reference(
    q_BTHd: jax.Array, k_BTKd: jax.Array, v_BTKd: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """Computes softmax(q k^T / sqrt(d)) v over the allowed keys, as `causal_attention`."""
    length = q_BTHd.shape[1]
    same_segment = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    allowed = same_segment & np.tril(np.ones((length, length), bool))
    return jax.nn.dot_product_attention(q_BTHd, k_BTKd, v_BTKd, mask=allowed[:, None])


def cross_entropy_reference(
    h_BTD: jax.Array,
    w_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    z_loss: float,
    n_vocab: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes `losses.cross_entropy` with all logits in memory."""
    logits = jnp.matmul(h_BTD, w_DV.astype(h_BTD.dtype), preferred_element_type=jnp.float32)[..., :n_vocab]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nll = log_z - jnp.take_along_axis(logits, targets_BT[..., None], axis=-1)[..., 0]
    return jnp.sum(weights_BT * (nll + z_loss * log_z**2)), jnp.sum(weights_BT * nll)


def active_mask(x: jax.Array, k: int, activation: str = "relu", backend: str = "auto") -> jax.Array:
    """Returns bool[..., D], which entries pass through `topk`: those where its gradient passes."""
    return topk_lib._topk((x,), None, k, activation, backend, True)[1]
