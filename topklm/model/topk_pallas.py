"""The TopK activation as one Pallas kernel for GPU (through Triton) and TPU (through Mosaic).

It reads the activations once and writes the result once; between, a row stays on the chip while its winners
are found on bit planes (`topk_pallas_bits`). Bit for bit the same as `jax.lax.top_k`.

What it costs on an H200, [65,536, 2048] bfloat16, by counting instructions: the copy moves 4 bytes an entry,
134 us at 4 TB/s. A pass over every entry for every bit of the key, a comparison and an addition at least,
is 32 integer operations an entry, and the 132 SMs do 64 a cycle: 290 us, twice the copy. On bit planes it is
about 12: 1 to pair two entries in a word, 4 to transpose, 1 to build keys, 4 to search (27 passes, ties
included, of some 10 instructions for the two words of a thread), 2 to write: 110 us, which the copy hides
where enough rows are under way. A row of 2048 is one warp's: 64 entries a thread are 32 registers of pairs
and 32 of planes, about 100 in all, so 20 rows are under way on an SM, and no count leaves its warp.
"""

import functools
import math

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from topklm.model import topk_pallas_bits as bits
from topklm.model.topk_pallas_tiles import Ref, Tile, make_tile

_MAX_D = 16_384
_DTYPES = {
    "gpu": (jnp.float32, jnp.bfloat16, jnp.float16),
    "tpu": (jnp.float32, jnp.bfloat16),
}
_OPERATIONS_PER_ENTRY = 16


def limits(shape: tuple[int, ...], dtype: jnp.dtype, platform: str) -> str:
    """Returns why the kernel does not take arrays [..., D] on platform "gpu" or "tpu", or ""."""
    if not any(jnp.dtype(dtype) == jnp.dtype(each) for each in _DTYPES.get(platform, ())):
        return f"does not take {jnp.dtype(dtype)} on {platform}"
    if not 1 <= shape[-1] <= _MAX_D or math.prod(shape) == 0:
        return f"takes rows of 1 to {_MAX_D} entries, and at least one"
    return ""


def select(
    x: jax.Array,
    k: int,
    activation: str,
    platform: str,
    *,
    residual: jax.Array | None = None,
    applies: jax.Array | None = None,
    with_mask: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """TopK of x, or of x + residual; it has no gradient rule of its own.

    Args:
        x: [..., D], as `limits` allows.
        k: Entries kept per row, 1 or more.
        activation: "relu", "identity" or "abs", as in `topk.topk`.
        platform: "gpu" or "tpu".
        residual: [..., D] in the dtype of x; added first, the sum rounded to that dtype.
        applies: bool scalar, as in `topk.topk`; if False, the kernel copies and searches for nothing.
        with_mask: Return which entries are active, too.
        interpret: Run the kernel as ordinary JAX operations, on any platform.

    Returns:
        The result as of `topk.topk`, [..., D] in the dtype of x; and bool[..., D] as of `topk.active_mask`,
        or None. The kernel writes the mask as one bit an entry.
    """
    out = _call(x, residual, applies, None, k, activation, platform, 0.0, with_mask, interpret)
    return out["y"], _unpacked(out, x.shape[-1])


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
    """TopK and the RMSNorm of its result, `y * rsqrt(mean(y * y) + epsilon) * scale` taken in float32.

    Args:
        x: As in `select`.
        k: As in `select`.
        activation: As in `select`.
        platform: As in `select`.
        scale_D: float32[D].
        epsilon: Added to the mean square.
        residual: As in `select`.
        with_mask: As in `select`.
        interpret: As in `select`.

    Returns:
        The result of TopK; its norm, in the dtype of x; the inverse root mean square, float32[..., 1]; the
        mask of `select`, or None. Of a row with a NaN, the first three are NaN.
    """
    out = _call(x, residual, None, scale_D, k, activation, platform, epsilon, with_mask, interpret)
    return out["y"], out["normed"], out["inverse_rms"], _unpacked(out, x.shape[-1])


def _call(
    x: jax.Array,
    residual: jax.Array | None,
    applies: jax.Array | None,
    scale_D: jax.Array | None,
    k: int,
    activation: str,
    platform: str,
    epsilon: float,
    with_mask: bool,
    interpret: bool,
) -> dict[str, jax.Array]:
    d = x.shape[-1]
    n_rows = x.size // d
    tile = make_tile(platform, n_rows, d, x.dtype.itemsize)
    block = pl.BlockSpec((tile.rows, tile.block_d), lambda i: (i, 0))
    inputs, in_specs = {"x": x.reshape(n_rows, d)}, {"x": block}
    outputs, out_specs = {"y": jax.ShapeDtypeStruct((n_rows, d), x.dtype)}, {"y": block}
    if residual is not None:
        inputs["residual"], in_specs["residual"] = residual.reshape(n_rows, d), block
    if applies is not None:
        inputs["applies"], in_specs["applies"] = applies.astype(jnp.int32).reshape(1), tile.flag_spec
    if with_mask:
        outputs["mask"] = jax.ShapeDtypeStruct((n_rows, tile.width), jnp.int32)
        out_specs["mask"] = pl.BlockSpec((tile.rows, tile.width), lambda i: (i, 0))
    if scale_D is not None:
        inputs["scale"] = scale_D.astype(jnp.float32)[None]
        in_specs["scale"] = pl.BlockSpec((1, tile.block_d), lambda i: (0, 0))
        outputs["normed"], out_specs["normed"] = outputs["y"], block
        outputs["inverse_rms"] = jax.ShapeDtypeStruct((n_rows, 1), jnp.float32)
        out_specs["inverse_rms"] = pl.BlockSpec((tile.rows, 1), lambda i: (i, 0))
    out = pl.pallas_call(
        functools.partial(_kernel, tile=tile, k=k, activation=activation, epsilon=epsilon),
        out_shape=outputs,
        grid=(pl.cdiv(n_rows, tile.rows),),
        in_specs=(in_specs,),
        out_specs=out_specs,
        compiler_params=tile.compiler_params,
        cost_estimate=_cost(x.size, *inputs.values(), *outputs.values()),
        interpret=interpret,
        name="topk",
    )(inputs)
    return {name: array.reshape(*x.shape[:-1], array.shape[-1]) for name, array in out.items()}


def _cost(n_entries: int, *arrays: jax.Array | jax.ShapeDtypeStruct) -> pl.CostEstimate:
    """For XLA's scheduler, which does not look into a kernel."""
    n_bytes = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    return pl.CostEstimate(flops=_OPERATIONS_PER_ENTRY * n_entries, bytes_accessed=n_bytes, transcendentals=0)


def _unpacked(out: dict[str, jax.Array], d: int) -> jax.Array | None:
    """bool[..., D] of the mask's words, int32[..., width]."""
    if "mask" not in out:
        return None
    words = out["mask"]
    entries = (words[..., None, :] >> jnp.arange(bits.WORD, dtype=jnp.int32)[:, None]) & 1
    return entries.reshape(*words.shape[:-1], -1)[..., :d] != 0


def _kernel(
    inputs: dict[str, Ref],
    outputs: dict[str, Ref],
    *,
    tile: Tile,
    k: int,
    activation: str,
    epsilon: float,
) -> None:
    u = [_load_sum(inputs, tile, chunk) for chunk in range(bits.WORD)]
    active, has_nan_R1 = _active_if_it_applies(inputs, u, tile, k, activation)
    if "mask" in outputs:
        tile.store_whole(outputs["mask"], active)
    # A row with a NaN keeps nothing: all of it is filled.
    kept = jnp.where(has_nan_R1, 0, active)
    # In float32 first: with a condition of one value a row, a TPU cannot choose between 16-bit numbers.
    fill_R1 = jnp.where(has_nan_R1, jnp.float32(jnp.nan), jnp.float32(0)).astype(u[0].dtype)
    y = [jnp.where(kept & _bit(chunk) != 0, each, fill_R1) for chunk, each in enumerate(u)]
    for chunk, each in enumerate(y):
        tile.store(outputs["y"], chunk, each)
    if "scale" in inputs:
        _norm(inputs["scale"], outputs, y, tile, epsilon)


def _load_sum(inputs: dict[str, Ref], tile: Tile, chunk: int) -> jax.Array:
    x = tile.load(inputs["x"], chunk)
    if "residual" not in inputs:
        return x
    # Rounded once more from float32, a sum of 16-bit floats is still the nearest one (Figueroa 1995).
    residual = tile.load(inputs["residual"], chunk)
    return (x.astype(jnp.float32) + residual.astype(jnp.float32)).astype(x.dtype)


def _active_if_it_applies(
    inputs: dict[str, Ref], u: list[jax.Array], tile: Tile, k: int, activation: str
) -> tuple[jax.Array, jax.Array]:
    """As `_active`; where TopK does not apply, all entries and no row: those that hold a NaN pass, too."""
    if "applies" not in inputs:
        return _active(u, tile, k, activation)

    def search() -> tuple[jax.Array, jax.Array]:
        active, has_nan_R1 = _active(u, tile, k, activation)
        return active, has_nan_R1.astype(jnp.int32)  # a branch of a TPU kernel cannot return a mask

    def pass_all() -> tuple[jax.Array, jax.Array]:
        return bits.valid(tile.d, u[0].shape), jnp.zeros((tile.rows, 1), jnp.int32)

    active, has_nan_R1 = jax.lax.cond(inputs["applies"][0] != 0, search, pass_all)
    return active, has_nan_R1 != 0


def _active(u: list[jax.Array], tile: Tile, k: int, activation: str) -> tuple[jax.Array, jax.Array]:
    """Of chunks of u: the active entries as bits, int32[R, width]; and bool[R, 1], which rows hold a NaN."""
    dtype = u[0].dtype
    planes = bits.bit_planes([_as_integer(each) for each in u], 8 * dtype.itemsize)
    winners = bits.valid(tile.d, u[0].shape)
    # Before the search, which overwrites the planes: they need not stay in registers for this.
    eligible = bits.positive(planes) if activation == "relu" else winners
    has_nan_R1 = tile.count(bits.is_nan(planes, jnp.finfo(dtype).nmant)) > 0
    if k < tile.d:
        order = bits.order_planes(planes, by_magnitude=activation == "abs")
        winners = bits.select(order, k, winners, tile.count)
    return winners & eligible, has_nan_R1


def _as_integer(x: jax.Array) -> jax.Array:
    """The bits of x in an int32; of a 16-bit float in its lower half, with zeros above."""
    if x.dtype.itemsize == 4:
        return jax.lax.bitcast_convert_type(x, jnp.int32)
    return jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32)


def _bit(position: int) -> int:
    """An int32 with one bit set."""
    return 1 << position if position < bits.WORD - 1 else -(1 << position)


def _norm(scale: Ref, outputs: dict[str, Ref], y: list[jax.Array], tile: Tile, epsilon: float) -> None:
    """RMSNorm as in `layers.RMSNorm`; entries past the end of a row are 0, or NaN where the row is."""
    y32 = [each.astype(jnp.float32) for each in y]
    squares = functools.reduce(jnp.add, (each * each for each in y32))
    mean_R1 = jnp.sum(squares, axis=1, keepdims=True) / tile.d
    inverse_rms_R1 = jax.lax.rsqrt(mean_R1 + epsilon)
    for chunk, each in enumerate(y32):
        normed = each * inverse_rms_R1 * tile.load(scale, chunk)
        tile.store(outputs["normed"], chunk, normed.astype(y[0].dtype))
    tile.store_whole(outputs["inverse_rms"], inverse_rms_R1)
