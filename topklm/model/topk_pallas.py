"""The TopK activation as one Pallas kernel for GPU (through Triton) and TPU (through Mosaic).

It reads the activations once and writes the result once; between, a row stays on the chip while its winners
are found on bit planes: 32 entries of a row share a word (bit c of word j stands for entry `c * width + j`),
and a plane holds one bit of all of a row's numbers, so that one AND and one population count judge 32
entries. Bit for bit the same as `jax.lax.top_k`.

Its cost on an H200, [65,536, 2048] bfloat16, by counting instructions: the copy moves 4 bytes an entry,
134 us at 4 TB/s. A pass over every entry for every bit of the key, a comparison and an addition at least,
is 32 integer operations an entry, and the 132 SMs do 64 a cycle: 290 us, twice the copy. On bit planes it is
about 12: 1 to pair two entries in a word, 4 to transpose, 1 to build keys, 4 to search (27 passes, ties
included, of some 10 instructions for the two words of a thread), 2 to write: 110 us, which the copy hides
where enough rows are under way. A row of 2048 is one warp's: 64 entries a thread are 32 registers of pairs
and 32 of planes, about 100 in all, so 20 rows are under way on an SM, and no count leaves its warp.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
import operator
from typing import Any, TypeAlias

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

Ref: TypeAlias = Any  # an argument of a kernel; Pallas takes several types for it

_WORD = 32  # entries in a word
_ALL = -1  # a word with all bits set
# For s = 16 ... 1: the bits of a word whose position has bit s unset.
_EVEN = {16: 0x0000FFFF, 8: 0x00FF00FF, 4: 0x0F0F0F0F, 2: 0x33333333, 1: 0x55555555}

_WORDS_PER_WARP = 64  # two a thread; see the module's text
_LEAST_WIDTH = 4  # on a GPU; less would cut a short row into pieces too small to load well
_LANES = 128
_SUBLANES = 16  # rows of a TPU register of 16-bit numbers
# Of the activations in a TPU's block. Block and result are buffered twice, and the planes are as large again:
# together they stay below the 16 MiB that a kernel gets.
_TPU_BLOCK_BYTES = 2**20
_TPU_MAX_ROWS = 512
_MAX_D = 16_384
_DTYPES = {
    "gpu": (jnp.float32, jnp.bfloat16, jnp.float16),
    "tpu": (jnp.float32, jnp.bfloat16),
}
_OPERATIONS_PER_ENTRY = 16


@dataclasses.dataclass(frozen=True)
class Tile:
    """The rows that one program of a kernel works on, and how it reads and writes them.

    Tile i holds the rows from `i * rows` on; the last one may reach past the array. It is cut along D into up
    to 32 chunks of one width: chunk c is bit c of the words.
    """

    n_rows: int  # of the whole array
    d: int
    rows: int
    width: int
    compiler_params: plgpu.CompilerParams | pltpu.CompilerParams

    @property
    def block_d(self) -> int:
        """Entries of a row with those past its end that fill up the last chunk."""
        return pl.cdiv(self.d, self.width) * self.width

    @property
    def flag_spec(self) -> pl.BlockSpec:
        """Of one int32 that all tiles read, int32[1]."""
        return pl.BlockSpec() if self._on_gpu else pl.BlockSpec(memory_space=pltpu.SMEM)

    def block(self, width: int) -> pl.BlockSpec:
        """Returns the part of an array [N, width] that belongs to a tile."""
        return pl.BlockSpec((self.rows, width), lambda i: (i, 0))

    def load(self, ref: Ref, chunk: int) -> jax.Array:
        """Reads a chunk of the tile [rows, width], or of a row for all tiles; 0 past the end of a row."""
        rows = ref.shape[0]
        if chunk * self.width >= self.d:
            return jnp.zeros((rows, self.width), ref.dtype)
        part, inside = self._part(ref, chunk), self._inside(chunk, rows)
        if self._on_gpu:
            return plgpu.load(part, mask=inside, other=None if inside is None else 0.0)
        return part[...] if inside is None else jnp.where(inside, part[...], 0)

    def store(self, ref: Ref, chunk: int, value: jax.Array) -> None:
        """Writes a chunk of the tile; entries past the end of the array are dropped."""
        if chunk * self.width >= self.d:
            return
        part = self._part(ref, chunk)
        if self._on_gpu:
            plgpu.store(part, value, mask=self._inside(chunk, self.rows))
        else:
            part[...] = value  # the copy of the block to the array cuts it off

    def store_whole(self, ref: Ref, value: jax.Array) -> None:
        """Writes an array that is not cut into chunks, [rows, ...]."""
        if self._on_gpu:
            plgpu.store(ref, value, mask=self._in_array(value.shape))
        else:
            ref[...] = value

    @property
    def _on_gpu(self) -> bool:
        return isinstance(self.compiler_params, plgpu.CompilerParams)

    def _part(self, ref: Ref, chunk: int) -> Ref:
        return ref.at[:, pl.ds(chunk * self.width, self.width)]

    def _inside(self, chunk: int, rows: int) -> jax.Array | None:
        """Returns bool[rows, width], the entries of a chunk in the array; None if all, or all that matter."""
        shape, left = (rows, self.width), self.d - chunk * self.width
        in_array = self._in_array(shape)
        if left >= self.width:
            return in_array
        in_row = _position(shape) < left
        return in_row if in_array is None else in_row & in_array

    def _in_array(self, shape: tuple[int, ...]) -> jax.Array | None:
        """Does the same for rows. On a TPU rows past the end may hold anything: no row looks at another."""
        if not self._on_gpu or shape[0] != self.rows or self.n_rows % self.rows == 0:
            return None
        left = self.n_rows - pl.program_id(0) * self.rows
        return jax.lax.broadcasted_iota(jnp.int32, shape, 0) < left


def make_tile(platform: str, n_rows: int, d: int, itemsize: int) -> Tile:
    """Returns the tile for n_rows rows of d entries of itemsize bytes on platform "gpu" or "tpu"."""
    if platform == "gpu":
        # Sizes are powers of two, as Triton wants them; up to D = 2048 a program is one warp.
        width = max(_LEAST_WIDTH, pl.next_power_of_2(d) // _WORD)
        rows = max(1, _WORDS_PER_WARP // width)
        n_warps = rows * width // _WORDS_PER_WARP
        return Tile(n_rows, d, rows, width, plgpu.CompilerParams(num_warps=n_warps, num_stages=1))
    width = pl.cdiv(d, _LANES * _WORD) * _LANES  # chunks are whole registers
    block_d = pl.cdiv(d, width) * width
    rows = min(_TPU_BLOCK_BYTES // (block_d * itemsize), _TPU_MAX_ROWS, n_rows + _SUBLANES - 1)
    rows = max(rows // _SUBLANES, 1) * _SUBLANES
    return Tile(n_rows, d, rows, width, pltpu.CompilerParams(dimension_semantics=("parallel",)))


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
    """Computes TopK of [..., D], as `limits` allows, on "gpu" or "tpu"; it has no gradient rule of its own.

    Arguments are as in `topk.topk`: the sum with the residual is rounded to the dtype of x, and where TopK
    does not apply the kernel copies and searches for nothing. With `interpret` it runs as ordinary JAX
    operations, on any platform. Returns the result in the dtype of x; and bool[..., D], its active entries,
    or None. The kernel writes the mask as one bit an entry.
    """
    n_rows, d = x.size // x.shape[-1], x.shape[-1]
    tile = make_tile(platform, n_rows, d, x.dtype.itemsize)
    inputs, in_specs = {"x": x.reshape(n_rows, d)}, {"x": tile.block(tile.block_d)}
    outputs, out_specs = {"y": jax.ShapeDtypeStruct((n_rows, d), x.dtype)}, {"y": tile.block(tile.block_d)}
    if residual is not None:
        inputs["residual"], in_specs["residual"] = residual.reshape(n_rows, d), tile.block(tile.block_d)
    if applies is not None:
        inputs["applies"], in_specs["applies"] = applies.astype(jnp.int32).reshape(1), tile.flag_spec
    if with_mask:
        outputs["mask"] = jax.ShapeDtypeStruct((n_rows, tile.width), jnp.int32)
        out_specs["mask"] = tile.block(tile.width)

    def kernel(inputs: dict[str, Ref], outputs: dict[str, Ref]) -> None:
        topk_of_tile(inputs, outputs, tile=tile, k=k, activation=activation)

    # For XLA's scheduler, which does not look into a kernel.
    arrays: list[jax.Array | jax.ShapeDtypeStruct] = [*inputs.values(), *outputs.values()]
    n_bytes = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    cost = pl.CostEstimate(flops=_OPERATIONS_PER_ENTRY * x.size, bytes_accessed=n_bytes, transcendentals=0)
    out = pl.pallas_call(
        kernel,
        out_shape=outputs,
        grid=(pl.cdiv(n_rows, tile.rows),),
        in_specs=(in_specs,),
        out_specs=out_specs,
        compiler_params=tile.compiler_params,
        cost_estimate=cost,
        interpret=interpret,
        name="topk",
    )(inputs)
    return out["y"].reshape(x.shape), unpacked(out["mask"], x.shape) if with_mask else None


def unpacked(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns a mask of this shape, bool[..., D], from its words, int32[N, width]."""
    entries = (words[:, None] >> jnp.arange(_WORD, dtype=jnp.int32)[:, None]) & 1
    return entries.reshape(len(words), -1)[:, : shape[-1]].reshape(shape) != 0


def topk_of_tile(
    inputs: dict[str, Ref], outputs: dict[str, Ref], *, tile: Tile, k: int, activation: str
) -> list[jax.Array]:
    """Writes the TopK of a tile, inside of a kernel; returns its entries by chunk, [rows, width] each."""
    u = [_load_sum(inputs, tile, chunk) for chunk in range(_WORD)]
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
    return y


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
    """Does `_active`; where TopK does not apply, all entries are active, and rows with a NaN pass too."""
    if "applies" not in inputs:
        return _active(u, tile, k, activation)

    def search() -> tuple[jax.Array, jax.Array]:
        active, has_nan_R1 = _active(u, tile, k, activation)
        return active, has_nan_R1.astype(jnp.int32)  # a branch of a TPU kernel cannot return a mask

    def pass_all() -> tuple[jax.Array, jax.Array]:
        return valid(tile.d, u[0].shape), jnp.zeros((tile.rows, 1), jnp.int32)

    active, has_nan_R1 = jax.lax.cond(inputs["applies"][0] != 0, search, pass_all)
    return active, has_nan_R1 != 0


def _active(u: list[jax.Array], tile: Tile, k: int, activation: str) -> tuple[jax.Array, jax.Array]:
    """Returns the active entries of chunks as bits, int32[R, width]; and the rows with a NaN, bool[R, 1]."""
    dtype = u[0].dtype
    planes = bit_planes([_as_integer(each) for each in u], 8 * dtype.itemsize)
    winners = valid(tile.d, u[0].shape)
    # Before the search, which overwrites the planes: they need not stay in registers for this.
    eligible = _positive(planes) if activation == "relu" else winners
    has_nan_R1 = _count(_is_nan(planes, jnp.finfo(dtype).nmant)) > 0
    if k < tile.d:
        order = _order_planes(planes, by_magnitude=activation == "abs")
        winners = largest(order, k, winners)
    return winners & eligible, has_nan_R1


def _as_integer(x: jax.Array) -> jax.Array:
    """Returns the bits of x in an int32; of a 16-bit float in its lower half, with zeros above."""
    if x.dtype.itemsize == 4:
        return jax.lax.bitcast_convert_type(x, jnp.int32)
    return jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32)


def _bit(position: int) -> int:
    """Returns an int32 with one bit set."""
    return 1 << position if position < _WORD - 1 else -(1 << position)


def bit_planes(numbers: Sequence[jax.Array], n_bits: int) -> list[jax.Array]:
    """Transposes 32 numbers of 16 or 32 bits at every position, int32[...] with zeros above.

    Swaps ever smaller blocks of the bit matrix (Warren 2013, Hacker's Delight, section 7-3); 16-bit numbers
    go through it two to a word. Of the n_bits results, int32[...], bit c of plane b is bit b of numbers[c].
    """
    words = list(numbers)
    if n_bits == 16:
        words = [low | (high << 16) for low, high in zip(words[:16], words[16:], strict=True)]
    for shift, even in _EVEN.items():
        if shift >= n_bits:
            continue
        for i in range(n_bits):
            if i & shift == 0:
                a, b = words[i], words[i + shift]
                words[i] = (a & even) | ((b & even) << shift)
                words[i + shift] = (jax.lax.shift_right_logical(a, shift) & even) | (b & ~even)
    return words


def _order_planes(planes: Sequence[jax.Array], *, by_magnitude: bool) -> list[jax.Array]:
    """Returns planes of an unsigned key in the total order of the floats, or of their absolute values.

    From the highest bit down, of planes of the floats from the lowest up; the last of these is the sign.
    """
    *magnitude, sign = planes
    if by_magnitude:
        return magnitude[::-1]
    return [~sign, *(plane ^ sign for plane in magnitude[::-1])]


def _positive(planes: Sequence[jax.Array]) -> jax.Array:
    """Finds the floats above 0 in total order, as bits of words; a NaN without sign is one."""
    *magnitude, sign = planes
    return functools.reduce(operator.or_, magnitude) & ~sign


def _is_nan(planes: Sequence[jax.Array], n_mantissa_bits: int) -> jax.Array:
    """Finds the floats that are NaN, as bits of words: exponent all ones, mantissa not 0."""
    mantissa, exponent = planes[:n_mantissa_bits], planes[n_mantissa_bits:-1]
    return functools.reduce(operator.and_, exponent) & functools.reduce(operator.or_, mantissa)


def valid(d: int, shape: tuple[int, ...]) -> jax.Array:
    """Sets the bits that stand for one of the d entries of a row, int32[shape], shape = (R, width)."""
    full, rest = divmod(d, shape[1])
    return jnp.where(_position(shape) < rest, _lowest(full + 1), _lowest(full))


def largest(planes: Sequence[jax.Array], k: int, among: jax.Array) -> jax.Array:
    """Finds the k largest keys of every row, the lowest index first among equals.

    Fixes the bits of the k-th largest key from the highest down. Where more entries tie at it than are
    wanted, the search goes on over the bits of their index, inverted so that a lower one ranks higher: with
    these, no two keys are equal. Planes of keys, from the highest bit down, entries to choose from and result
    are int32[R, width]; `among` has at least k bits set a row, the result exactly k.
    """
    state = (jnp.zeros_like(among), among, jnp.full((among.shape[0], 1), k, jnp.int32))
    chosen, candidates, places = _descend(planes, state)

    def break_ties() -> jax.Array:
        first, last, _ = _descend(_index_planes(among.shape), (chosen, candidates, places))
        return first | last

    has_ties = jnp.max(_count(candidates) - places) > 0
    return jax.lax.cond(has_ties, break_ties, lambda: chosen | candidates)


def _descend(planes: Sequence[jax.Array], state: tuple) -> tuple:
    """Fixes one bit at a time. State: entries sure to be among the k, those still equal, and how many."""
    chosen, candidates, places = state
    for plane in planes:
        hits = candidates & plane
        n_hits = _count(hits)
        too_few = n_hits < places
        keep = jnp.where(too_few, _ALL, 0)  # then all hits are in, and the k-th has this bit unset
        chosen = chosen | (hits & keep)
        candidates = candidates & (plane ^ keep)
        places = jnp.where(too_few, places - n_hits, places)
    return chosen, candidates, places


def _index_planes(shape: tuple[int, ...]) -> list[jax.Array]:
    """Makes planes of the inverted index c * width + j, from the highest bit that can differ down."""
    j = _position(shape)
    of_c = [jnp.full(shape, even, jnp.int32) for even in _EVEN.values()]
    of_j = [jnp.where(j & (1 << b) == 0, _ALL, 0) for b in reversed(range((shape[1] - 1).bit_length()))]
    return of_c + of_j


def _count(words: jax.Array) -> jax.Array:
    """Counts the bits set in a row, int32[R, width] -> int32[R, 1]."""
    return jnp.sum(jax.lax.population_count(words), axis=1, keepdims=True, dtype=jnp.int32)


def _position(shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _lowest(n: int) -> int:
    """Returns a word with its n lowest bits set."""
    return _ALL if n >= _WORD else (1 << n) - 1
