"""Checksums of arrays, which tell whether the arrays that were read are those that were written.

They depend on values and indices alone, not on mesh, layout or the order of a sum. They find every change of
a single element and, but for one in 2^32, any other; they are no protection against somebody who means harm.
A compiled program computes them where the arrays live. That takes longer to compile than a small model takes
to load, so that NumPy computes those of small arrays in host memory.
"""

from collections.abc import Mapping
from concurrent import futures
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from topklm.storage.files import json_digest

INDEX_STRIDE = 0x9E3779B1  # a prime near 2^32 / golden ratio: spreads neighbouring indices over all bits
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by the bytes of an element

# The CPU backend makes one fast loop of a sum of slices, but not of a sum over all of a large array.
_SLICES = 16

# NumPy takes 0.35 s per GB and core, a program 0.1 s, and 0.5 s to compile (EPYC, Zen 5).
_SMALL_BYTES = 10**9
_PIECE = 2**15  # elements of an array at a time, so that NumPy's temporaries stay in a core's own cache


def checksums(tree: Any) -> dict[str, int]:
    """Computes checksums of arrays by dotted name: the sum of mix(bits XOR index * INDEX_STRIDE), mod 2^32.

    The sum is over the elements, of 1, 2 or 4 bytes, the index that in the whole array, row by row; from 2^32
    elements on it starts again, and then a swap of two elements that far apart goes unnoticed. `mix` is a
    bijection, so one changed element always shows. Arrays lie on one device or one mesh, every process of
    which must call it.
    """
    arrays = by_name(tree)
    if not all(map(_is_in_host_memory, arrays.values())):
        return fetch(start(tree))
    if sum(array.nbytes for array in arrays.values()) < _SMALL_BYTES:
        with futures.ThreadPoolExecutor() as threads:
            return dict(zip(arrays, threads.map(_sum_on_host, arrays.values()), strict=True))
    # One after another, each in memory that the one before has left.
    return {name: fetch(start({name: array}))[name] for name, array in arrays.items()}


def changed(tree: Any, saved: Mapping[str, int]) -> list[str]:
    """Names the arrays whose checksum is not the one in `saved`, which may hold others, too."""
    return [name for name, found in checksums(tree).items() if found != saved.get(name)]


def fingerprint(params: Any) -> str:
    """Tells a model's parameters (a nested dict) from others', in 64 digits; takes as long as `checksums`."""
    return json_digest(checksums(params))


def start(tree: Any) -> dict[str, jax.Array]:
    """Begins computing checksums, uint32 scalars on every device; the arrays may be donated afterwards.

    Every process of the mesh must call it, in the same order as other computations.
    """
    arrays = by_name(tree)
    mesh = _mesh(arrays)
    if mesh is None:
        # A program for each shape: those of a training state come in threes, and compile once.
        return {name: _sums((array,), (PartitionSpec(),), None)[0] for name, array in arrays.items()}
    specs = tuple(_spec(array) for array in arrays.values())
    return dict(zip(arrays, _sums(tuple(arrays.values()), specs, mesh), strict=True))


def fetch(sums: Mapping[str, jax.Array]) -> dict[str, int]:
    """Waits for the checksums that `start` began to compute."""
    return {name: int(value) for name, value in jax.device_get(dict(sums)).items()}


def by_name(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a nested dict by their path, joined with dots."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(str(entry.key) for entry in path): leaf for path, leaf in leaves}


def _is_in_host_memory(array: Any) -> bool:
    devices = array.devices() if isinstance(array, jax.Array) else ()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def _sum_on_host(array: jax.Array) -> int:
    content = np.asarray(array).reshape(-1)  # a view
    bits = content.view(_WORDS[content.itemsize])
    pattern = np.arange(_PIECE, dtype=np.uint32) * np.uint32(INDEX_STRIDE)
    total = 0
    for begin in range(0, bits.size, _PIECE):
        piece = bits[begin : begin + _PIECE]
        mixed = _mix((pattern[: piece.size] + np.uint32(begin * INDEX_STRIDE % 2**32)) ^ piece)
        total += int(mixed.sum(dtype=np.uint64))
    return total % 2**32


def _mesh(arrays: Mapping[str, Any]) -> Mesh | None:
    """Returns the mesh that the arrays are spread over, if they are."""
    shardings = (getattr(array, "sharding", None) for array in arrays.values())
    meshes = (sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding))
    return next((mesh for mesh in meshes if isinstance(mesh, Mesh) and mesh.size > 1), None)


def _spec(array: Any) -> PartitionSpec:
    sharding = getattr(array, "sharding", None)
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()


@functools.partial(jax.jit, static_argnums=(1, 2))
def _sums(arrays: tuple[Any, ...], specs: tuple[PartitionSpec, ...], mesh: Mesh | None) -> list[jax.Array]:
    shapes = [jnp.shape(array) for array in arrays]
    if mesh is None:
        return [_sum(array, [0] * len(shape), shape) for array, shape in zip(arrays, shapes, strict=True)]

    def of_device(*parts: jax.Array) -> jax.Array:
        own = [_sum_once(*part, mesh) for part in zip(parts, shapes, specs, strict=True)]
        return jax.lax.psum(jnp.stack(own), mesh.axis_names)

    on_every_device = jax.shard_map(
        of_device, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
    )
    return list(on_every_device(*arrays))


def _sum_once(part: jax.Array, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> jax.Array:
    """Sums over a device's part of an array; 0 where another device has the same part."""
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    axes_of_dims = [entry if isinstance(entry, tuple) else (entry,) if entry else () for entry in entries]
    starts = [
        jax.lax.axis_index(axes).astype(jnp.uint32) * size if axes else 0
        for axes, size in zip(axes_of_dims, part.shape, strict=True)
    ]
    split = {axis for axes in axes_of_dims for axis in axes}
    repeated = tuple(axis for axis in mesh.axis_names if axis not in split)
    first = jax.lax.axis_index(repeated) == 0 if repeated else True
    return jnp.where(first, _sum(part, starts, shape), jnp.uint32(0))


def _sum(part: jax.Array, starts: list[Any], shape: tuple[int, ...]) -> jax.Array:
    """Sums over the part of an array of this shape that begins at the index `starts`: uint32 scalar."""
    part = jnp.asarray(part)
    if part.dtype.itemsize < 4:
        part = _words(part)  # the CPU backend slices narrow floats by way of float32, which changes NaNs
    if part.ndim == 0:
        return _mix(_words(part).astype(jnp.uint32))
    length = max(1, -(-part.shape[0] // _SLICES))
    whole = part.shape[0] // length * length

    def mixed(begin: int, end: int) -> jax.Array:
        bits = _words(part[begin:end]).astype(jnp.uint32)
        index = _index(bits.shape, [starts[0] + begin, *starts[1:]], shape)
        return _mix(bits ^ (index * np.uint32(INDEX_STRIDE)))

    rest = jnp.pad(
        mixed(whole, part.shape[0]), [(0, whole + length - part.shape[0])] + [(0, 0)] * (part.ndim - 1)
    )
    slices = (mixed(begin, begin + length) for begin in range(0, whole, length))
    return jnp.sum(functools.reduce(jnp.add, slices, rest), dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
    """Returns the elements' bits, as unsigned integers of their size."""
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    return jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize])


def _index(part_shape: tuple[int, ...], starts: list[Any], shape: tuple[int, ...]) -> jax.Array:
    """Returns the index, mod 2^32, of a part's elements in the whole array: uint32 of the part's shape."""
    index = jnp.zeros(part_shape, jnp.uint32)
    for dim, begin in enumerate(starts):
        along = jax.lax.broadcasted_iota(jnp.uint32, part_shape, dim) + jnp.asarray(begin, jnp.uint32)
        index += along * np.uint32(math.prod(shape[dim + 1 :]) % 2**32)
    return index


def _mix(x: jax.Array) -> jax.Array:
    """Applies the finaliser of MurmurHash3 (Austin Appleby, public domain), a bijection of 32 bits."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
