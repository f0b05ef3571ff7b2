"""TopK and the RMSNorm of its result in one Pallas kernel: measured, not used by the model."""

import functools

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from topklm.model import topk_pallas
from topklm.model.topk_pallas import Ref, Tile


def select_and_norm(
    x: jax.Array,
    k: int,
    activation: str,
    platform: str,
    scale_D: jax.Array,
    epsilon: float,
    *,
    residual: jax.Array | None = None,
    with_mask: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Computes TopK and `y * rsqrt(mean(y * y) + epsilon) * scale` of its result y, taken in float32.

    Args:
        x: As in `topk_pallas.select`.
        k: As in `topk_pallas.select`.
        activation: As in `topk_pallas.select`.
        platform: As in `topk_pallas.select`.
        scale_D: float32[D].
        epsilon: Added to the mean square.
        residual: As in `topk_pallas.select`.
        with_mask: As in `topk_pallas.select`.
        interpret: As in `topk_pallas.select`.

    Returns:
        The result of TopK; its norm, in the dtype of x; the inverse root mean square, float32[..., 1]; the
        mask of `topk_pallas.select`, or None. Of a row with a NaN, the first three are NaN.
    """
    n_rows, d = x.size // x.shape[-1], x.shape[-1]
    tile = topk_pallas.make_tile(platform, n_rows, d, x.dtype.itemsize)

    def kernel(inputs: dict[str, Ref], outputs: dict[str, Ref]) -> None:
        y = topk_pallas.topk_of_tile(inputs, outputs, tile=tile, k=k, activation=activation)
        _norm(inputs["scale"], outputs, y, tile, epsilon)

    scale_block = pl.BlockSpec((1, tile.block_d), lambda i: (0, 0))
    block, one = (pl.BlockSpec((tile.rows, width), lambda i: (i, 0)) for width in (tile.block_d, 1))
    out = topk_pallas.call(
        kernel,
        x,
        tile,
        residual=residual,
        with_mask=with_mask,
        more_inputs={"scale": (scale_D.astype(jnp.float32)[None], scale_block)},
        more_outputs={
            "normed": (jax.ShapeDtypeStruct((n_rows, d), x.dtype), block),
            "inverse_rms": (jax.ShapeDtypeStruct((n_rows, 1), jnp.float32), one),
        },
        interpret=interpret,
    )
    mask = topk_pallas.unpacked(out["mask"], d) if with_mask else None
    return out["y"], out["normed"], out["inverse_rms"], mask


def _norm(scale: Ref, outputs: dict[str, Ref], y: list[jax.Array], tile: Tile, epsilon: float) -> None:
    """Computes `layers.RMSNorm`; entries past the end of a row are 0, or NaN where the row is."""
    y32 = [each.astype(jnp.float32) for each in y]
    squares = functools.reduce(jnp.add, (each * each for each in y32))
    mean_R1 = jnp.sum(squares, axis=1, keepdims=True) / tile.d
    inverse_rms_R1 = jax.lax.rsqrt(mean_R1 + epsilon)
    for chunk, each in enumerate(y32):
        normed = each * inverse_rms_R1 * tile.load(scale, chunk)
        tile.store(outputs["normed"], chunk, normed.astype(y[0].dtype))
    tile.store_whole(outputs["inverse_rms"], inverse_rms_R1)
