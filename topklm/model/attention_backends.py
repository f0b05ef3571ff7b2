"""Attention of accelerators: kernels that never hold the scores, behind the contract of `causal_attention`.

Which one a program runs is decided where the program is made for its devices (`choose`), not while it is
lowered: cuDNN's cannot be traced without a GPU, and what a backward pass keeps differs from one to another.
"""

import functools
import importlib
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.errors import UserError

CHECKPOINT_NAME = "attention"  # of what `splash` keeps for its backward pass, in remat policies
_PLATFORMS = {"splash": "tpu", "triton": "gpu", "cudnn": "gpu"}
_LANES = 128  # a TPU's; the kernels' blocks are multiples of it
_SPLASH_BLOCKS = (512, 256, _LANES)
_TRITON_BLOCK = 64
_CUDNN_MAX_HEAD_DIM = 128

_SPLASH_KERNEL = "tpu.splash_attention.splash_attention_kernel"
_SPLASH_MASK = "tpu.splash_attention.splash_attention_mask"
_TRITON_KERNEL = "gpu.attention"


def choose(config: ModelConfig, platform: str) -> str:
    """The name of the attention to run: "blocked", "splash", "triton" or "cudnn".

    On GPUs "auto" is the Pallas kernel for Triton, in bfloat16 only: of float32 it would round the products.
    cuDNN is faster at plain causal attention, but what JAX makes public of it knows documents inside a row
    only as a T x T mask: memory that grows with T^2, read for every head, and a gradient of the same size
    that nobody wants.

    Args:
        config: Of the model.
        platform: Of the devices that the program is for, as `jax.Device.platform`.

    Raises:
        UserError: If the config asks for one that these devices or shapes do not allow.
    """
    asked = config.attention
    if asked == "auto":
        on_gpu = "triton" if config.dtype == "bfloat16" else "blocked"
        return {"tpu": "splash", "gpu": on_gpu}.get(platform, "blocked")
    if _PLATFORMS.get(asked, platform) != platform:
        raise UserError(
            f"model.attention = {asked!r}: runs on {_PLATFORMS[asked].upper()}s only, and these devices are "
            f"{platform.upper()}s: use auto or blocked"
        )
    if asked == "cudnn" and not _cudnn_allows(config):
        raise UserError(
            f"model.attention = 'cudnn': needs model.dtype bfloat16 (now {config.dtype}), a head width that "
            f"8 divides, at most {_CUDNN_MAX_HEAD_DIM} (now {config.head_dim}), and an even "
            f"model.context_length (now {config.context_length}): change them, or use auto"
        )
    return asked


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


def _cudnn_allows(config: ModelConfig) -> bool:
    width = config.head_dim
    fits = width % 8 == 0 and width <= _CUDNN_MAX_HEAD_DIM
    return fits and config.dtype == "bfloat16" and config.context_length % 2 == 0


def _padded(x: jax.Array, length: int) -> jax.Array:
    """[B, T, ...] -> [B, length, ...], with zeros behind."""
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
