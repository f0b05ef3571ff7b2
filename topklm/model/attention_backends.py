"""Attention of accelerators: kernels that never hold the scores, behind the contract of `causal_attention`.

Which one a program runs is decided where the program is made for its devices (`backends.ATTENTION.choose`),
not while it is lowered: cuDNN's cannot be traced without a GPU, and each keeps other arrays for its backward
pass.
"""

import functools
import importlib
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig

CHECKPOINT_NAME = "attention"  # of what `splash` keeps for its backward pass, in remat policies
_LANES = 128  # a TPU's; the kernels' blocks are multiples of it
_SPLASH_BLOCKS = (512, 256, _LANES)
_TRITON_BLOCK = 64
_CUDNN_MAX_HEAD_DIM = 128

_SPLASH_KERNEL = "tpu.splash_attention.splash_attention_kernel"
_SPLASH_MASK = "tpu.splash_attention.splash_attention_mask"
_TRITON_KERNEL = "gpu.attention"


def splash(
    q_BTHd: jax.Array,
    k_BTKd: jax.Array,
    v_BTKd: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention, the Pallas kernel for TPUs that JAX comes with.

    Args:
        q_BTHd: Queries [B, T, H, d].
        k_BTKd: Keys [B, T, K, d]; K divides H.
        v_BTKd: Values [B, T, K, d].
        segment_ids_BT: int32[B, T]; a token attends to equal ids only.
        interpret: Run it on any platform, slowly; for tests.

    Returns:
        [B, T, H, d] in the dtype of q; the backward pass keeps it and the logarithm of each row's sum.
    """
    length = q_BTHd.shape[1]
    padded = _round_up(length, _LANES)
    # Tokens behind the end see only what the mask hides from all others, and nobody reads what they give.
    q, k, v = (
        jnp.swapaxes(_padded(x, padded), 1, 2) for x in (q_BTHd * q_BTHd.shape[-1] ** -0.5, k_BTKd, v_BTKd)
    )
    segments = _padded(segment_ids_BT, padded)
    kernel = _splash_kernel(padded, q_BTHd.shape[2], interpret)
    out = jax.vmap(kernel)(q, k, v, _jax_kernels(_SPLASH_KERNEL).SegmentIds(segments, segments))
    return jnp.swapaxes(out, 1, 2)[:, :length]


def triton(
    q_BTHd: jax.Array,
    k_BTKd: jax.Array,
    v_BTKd: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """The Pallas kernel for GPUs that JAX comes with; arguments and result as `splash`."""
    kernels = _jax_kernels(_TRITON_KERNEL)
    length, width = q_BTHd.shape[1], q_BTHd.shape[-1]
    padded = _round_up(length, _TRITON_BLOCK)
    group = q_BTHd.shape[2] // k_BTKd.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k_BTKd, v_BTKd))  # it knows no grouped queries
    out = kernels.mha(
        *(_padded(x, padded) for x in (q_BTHd, k, v, segment_ids_BT)),
        sm_scale=width**-0.5,
        causal=True,
        block_sizes=kernels.BlockSizes(*[_TRITON_BLOCK] * 6),
        interpret=interpret,
    )
    return out[:, :length]


def cudnn(
    q_BTHd: jax.Array,
    k_BTKd: jax.Array,
    v_BTKd: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    implementation: Any = "cudnn",
) -> jax.Array:
    """Attention of cuDNN, with a mask bool[B, 1, T, T]; arguments and result as `splash`.

    `implementation="xla"` computes the same without a GPU; for tests.
    """
    same = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q_BTHd, k_BTKd, v_BTKd, mask=same, is_causal=True, implementation=implementation
    )


def cudnn_limits(config: ModelConfig) -> str:
    """Returns what a model needs for `cudnn` and does not have, or ""."""
    width = config.head_dim
    fits = width % 8 == 0 and width <= _CUDNN_MAX_HEAD_DIM
    if fits and config.dtype == "bfloat16" and config.context_length % 2 == 0:
        return ""
    return (
        f"needs model.dtype bfloat16 (now {config.dtype}), a head width that 8 divides, at most "
        f"{_CUDNN_MAX_HEAD_DIM} (now {width}), and an even model.context_length (now {config.context_length})"
    )


def splash_block(length: int) -> int:
    """Tokens in a block of splash attention over `length` tokens, a multiple of 128."""
    return next(size for size in _SPLASH_BLOCKS if length % size == 0)


@functools.lru_cache(maxsize=16)
def _splash_kernel(length: int, n_heads: int, interpret: bool) -> Any:
    """The kernel for a causal mask; the cache shares it between layers."""
    kernels, masks = _jax_kernels(_SPLASH_KERNEL), _jax_kernels(_SPLASH_MASK)
    block = splash_block(length)
    names = ["block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv"]
    names += ["block_kv_dkv_compute", "block_q_dq", "block_kv_dq"]
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * n_heads)
    with jax.ensure_compile_time_eval():
        kernel = kernels.make_splash_mha_single_device(
            mask,
            block_sizes=kernels.BlockSizes(**dict.fromkeys(names, block)),
            residual_checkpoint_name=CHECKPOINT_NAME,
            interpret=interpret,
        )
    # As NumPy arrays they belong to no device, and become constants of whichever program uses them.
    return jax.tree.map(np.asarray, kernel)


def _jax_kernels(module: str) -> Any:
    """Kernels that JAX comes with; not imported by programs for devices that do without them."""
    with warnings.catch_warnings():
        # JAX 0.12 says that those for GPUs will move to a package of their own.
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(f"jax.experimental.pallas.ops.{module}")


def _padded(x: jax.Array, length: int) -> jax.Array:
    """[B, T, ...] -> [B, length, ...], with zeros behind."""
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
