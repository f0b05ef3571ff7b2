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


def attention_in_float64(config, params, tokens_BT, segment_ids_BT) -> np.ndarray:
    """Computes the attention weights of every layer of a whole model, float64[L, B, H, T, T], in NumPy.

    `params` may be float64 already; positions count from 0 in each row.
    """
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    tokens, segments, width = np.asarray(tokens_BT), np.asarray(segment_ids_BT), config.head_width
    frequencies = config.rope_theta ** (-np.arange(0, width, 2) / width)
    angles = np.arange(tokens.shape[1])[:, None, None] * frequencies

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + config.norm_eps) * scale

    def heads(x, n, scale=None):
        x = x.reshape(*tokens.shape, n, width)
        x = x if scale is None else norm(x, scale)
        low, high = np.split(x, 2, axis=-1)
        turned = low * np.cos(angles) - high * np.sin(angles), high * np.cos(angles) + low * np.sin(angles)
        return np.concatenate(turned, axis=-1)

    allowed = (segments[:, :, None] == segments[:, None, :]) & np.tri(tokens.shape[1], dtype=bool)
    embedded = params["embed"]["embedding"][tokens]
    every = config.token_input == "every" and config.n_topk_layers > 0
    h, weights = (0 * embedded if every else embedded), []
    for layer in range(config.n_layers):
        block = jax.tree.map(lambda x, layer=layer: x[layer], params["blocks"])
        is_topk = layer < config.n_topk_layers
        beside = embedded if every and is_topk else 0
        kernels = {name: part["kernel"] for name, part in block["attention"].items() if "kernel" in part}
        scales = [block["attention"].get(f"{name}_norm", {}).get("scale") for name in ("query", "key")]
        x = norm(h + beside, block["attention_norm"]["scale"])
        q = heads(x @ kernels["query"], config.n_heads, scales[0])
        k = heads(x @ kernels["key"], config.n_kv_heads, scales[1])
        v = (x @ kernels["value"]).reshape(*tokens.shape, config.n_kv_heads, width)
        k, v = (np.repeat(y, config.n_heads // config.n_kv_heads, axis=2) for y in (k, v))
        scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(width)
        scores = np.where(allowed[:, None], scores, -np.inf)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        weights.append(p)
        a = h + np.einsum("bhts,bshd->bthd", p, v).reshape(*tokens.shape, -1) @ kernels["out"]
        if every and layer == config.n_topk_layers:
            a = a + embedded
        x = norm(a + beside, block["mlp_norm"]["scale"])
        gate, up = (x @ block["mlp"][name]["kernel"] for name in ("gate", "up"))
        h = a + (gate / (1 + np.exp(-gate)) * up) @ block["mlp"]["down"]["kernel"]
        if is_topk:
            kept = h >= np.sort(h, axis=-1)[..., -config.topk_k, None]
            h = np.where(kept, np.maximum(h, 0), 0)
    return np.stack(weights)
