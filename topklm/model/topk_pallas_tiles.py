"""The rows that one program of a Pallas TopK kernel works on, and how it reads, writes and counts them.

A tile is cut along D into up to 32 chunks of one width: chunk c is bit c of the words (`topk_pallas_bits`).
"""

import dataclasses
from typing import Any, TypeAlias

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from topklm.model.topk_pallas_bits import WORD

Ref: TypeAlias = Any  # what a kernel is given; Pallas takes several types for it
_WARP = 32
_WORDS_PER_THREAD = 2  # 64 entries; see `topk_pallas`
_LEAST_WIDTH = 4  # on a GPU; less would cut a short row into pieces too small to load well
_LANES = 128
_SUBLANES = 16  # rows of a TPU register of 16-bit numbers
# Of the activations in a TPU's block. Block and result are buffered twice, and the planes are as large again:
# together they stay below the 16 MiB that a kernel gets.
_TPU_BLOCK_BYTES = 2**20
_TPU_MAX_ROWS = 512


@dataclasses.dataclass(frozen=True)
class Tile:
    """Tile i holds the rows from `i * rows` on; the last one may reach past the array."""

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

    def load(self, ref: Ref, chunk: int) -> jax.Array:
        """A chunk of the tile [rows, width], or of an array with one row for all; 0 past the end of a row."""
        rows = ref.shape[0]
        if chunk * self.width >= self.d:
            return jnp.zeros((rows, self.width), ref.dtype)
        part, inside = self._part(ref, chunk), self._inside(chunk, rows)
        if self._on_gpu:
            return plgpu.load(part, mask=inside, other=None if inside is None else 0.0)
        return part[...] if inside is None else jnp.where(inside, part[...], 0)

    def store(self, ref: Ref, chunk: int, value: jax.Array) -> None:
        """Writes a chunk of the tile; what lies past the array is dropped."""
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

    def count(self, words: jax.Array) -> jax.Array:
        """Bits set in a row, int32[rows, width] -> int32[rows, 1]."""
        return jnp.sum(jax.lax.population_count(words), axis=1, keepdims=True, dtype=jnp.int32)

    @property
    def _on_gpu(self) -> bool:
        return isinstance(self.compiler_params, plgpu.CompilerParams)

    def _part(self, ref: Ref, chunk: int) -> Ref:
        return ref.at[:, pl.ds(chunk * self.width, self.width)]

    def _inside(self, chunk: int, rows: int) -> jax.Array | None:
        """bool[rows, width]: which entries of a chunk the array has; None if all, or all that matter."""
        shape, left = (rows, self.width), self.d - chunk * self.width
        in_row = None if left >= self.width else jax.lax.broadcasted_iota(jnp.int32, shape, 1) < left
        in_array = self._in_array(shape)
        if in_row is None or in_array is None:
            return in_array if in_row is None else in_row
        return in_row & in_array

    def _in_array(self, shape: tuple[int, ...]) -> jax.Array | None:
        """The same for rows. On a TPU those past the array may hold anything: no row looks at another."""
        if not self._on_gpu or shape[0] != self.rows or self.n_rows % self.rows == 0:
            return None
        left = self.n_rows - pl.program_id(0) * self.rows
        return jax.lax.broadcasted_iota(jnp.int32, shape, 0) < left


def make_tile(platform: str, n_rows: int, d: int, itemsize: int) -> Tile:
    """The tile for n_rows rows of d entries of itemsize bytes on platform "gpu" or "tpu"."""
    return _gpu_tile(n_rows, d) if platform == "gpu" else _tpu_tile(n_rows, d, itemsize)


def _gpu_tile(n_rows: int, d: int) -> Tile:
    """Sizes are powers of two, as Triton wants them; up to D = 2048 a program is one warp."""
    width = max(_LEAST_WIDTH, pl.next_power_of_2(d) // WORD)
    rows = max(1, _WARP * _WORDS_PER_THREAD // width)
    n_warps = rows * width // (_WARP * _WORDS_PER_THREAD)
    return Tile(n_rows, d, rows, width, plgpu.CompilerParams(num_warps=n_warps, num_stages=1))


def _tpu_tile(n_rows: int, d: int, itemsize: int) -> Tile:
    """Chunks are whole registers."""
    width = pl.cdiv(d, _LANES * WORD) * _LANES
    block_d = pl.cdiv(d, width) * width
    rows = min(_TPU_BLOCK_BYTES // (block_d * itemsize), _TPU_MAX_ROWS, n_rows + _SUBLANES - 1)
    rows = max(rows // _SUBLANES, 1) * _SUBLANES
    return Tile(n_rows, d, rows, width, pltpu.CompilerParams(dimension_semantics=("parallel",)))
