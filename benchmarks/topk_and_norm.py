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

    `scale_D` is float32[D]; the other arguments are those of `topk_pallas.select`.

    Returns:
        The result of TopK; its norm, in the dtype of x; the inverse root mean square, float32[..., 1]; the
        mask of `topk_pallas.select`, or None. Of a row with a NaN, the first three are NaN.
    """
    n_rows, d = x.size // x.shape[-1], x.shape[-1]
    tile = topk_pallas.make_tile(platform, n_rows, d, x.dtype.itemsize)

    def kernel(inputs: dict[str, Ref], outputs: dict[str, Ref]) -> None:
        y = topk_pallas.topk_of_tile(inputs, outputs, tile=tile, k=k, activation=activation)
        _norm(inputs["scale"], outputs, y, tile, epsilon)

    inputs = {"x": x.reshape(n_rows, d), "scale": scale_D.astype(jnp.float32)[None]}
    block = tile.block(tile.block_d)
    in_specs = {"x": block, "scale": pl.BlockSpec((1, tile.block_d), lambda i: (0, 0))}
    outputs = {
        "y": jax.ShapeDtypeStruct((n_rows, d), x.dtype),
        "normed": jax.ShapeDtypeStruct((n_rows, d), x.dtype),
        "inverse_rms": jax.ShapeDtypeStruct((n_rows, 1), jnp.float32),
    }
    out_specs = {"y": block, "normed": block, "inverse_rms": tile.block(1)}
    if residual is not None:
        inputs["residual"], in_specs["residual"] = residual.reshape(n_rows, d), block
    if with_mask:
        outputs["mask"] = jax.ShapeDtypeStruct((n_rows, tile.width), jnp.int32)
        out_specs["mask"] = tile.block(tile.width)
    out = pl.pallas_call(
        kernel,
        out_shape=outputs,
        grid=(pl.cdiv(n_rows, tile.rows),),
        in_specs=(in_specs,),
        out_specs=out_specs,
        compiler_params=tile.compiler_params,
        interpret=interpret,
        name="topk_and_norm",
    )(inputs)
    mask = topk_pallas.unpacked(out["mask"], x.shape) if with_mask else None
    inverse_rms = out["inverse_rms"].reshape(*x.shape[:-1], 1)
    return out["y"].reshape(x.shape), out["normed"].reshape(x.shape), inverse_rms, mask


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
