"""Whether parameters that were read are those that were saved: compares checksums.

`topklm.checkpoint.checksums` defines a checksum, and computes it where arrays live, by a compiled program.
Here those of a small model in host memory are computed without one, which would take longer to compile than
the model takes to load.
"""

from collections.abc import Mapping
from concurrent import futures
import hashlib
import json
from typing import Any

import jax
import numpy as np

from topklm.checkpoint import checksums

_PIECE = 2**15  # elements: what is computed on the way stays in a core's own cache

# Without a program it takes 0.35 s per GB and core, with one 0.1 s, and 0.5 s to compile (EPYC, Zen 5).
_SMALL_BYTES = 10**9

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by the bytes of an element


def changed(tree: Any, saved: Mapping[str, int]) -> list[str]:
    """Names the arrays whose checksum is not the saved one.

    Args:
        tree: Nested dict of arrays, as `topklm.checkpoint.checksums.checksums` takes it.
        saved: What that gave before they were saved; it may hold others, too.
    """
    found = _checksums(tree)
    return [name for name in found if found[name] != saved.get(name)]


def fingerprint(params: Any) -> str:
    """Tells a model's parameters from others', in 64 hexadecimal digits; takes as long as `changed`.

    Args:
        params: Nested dict of arrays.
    """
    return hashlib.sha256(json.dumps(_checksums(params), sort_keys=True).encode()).hexdigest()


def _checksums(tree: Any) -> dict[str, int]:
    arrays = checksums.named(tree)
    small = sum(array.nbytes for array in arrays.values()) < _SMALL_BYTES
    if small and all(_is_in_host_memory(array) for array in arrays.values()):
        with futures.ThreadPoolExecutor() as threads:
            return dict(zip(arrays, threads.map(_checksum, arrays.values()), strict=True))
    # One after another, each in memory that the one before has left.
    return {name: checksums.checksums({name: array})[name] for name, array in arrays.items()}


def _is_in_host_memory(array: jax.Array) -> bool:
    return len(array.devices()) == 1 and next(iter(array.devices())).platform == "cpu"


def _checksum(array: jax.Array) -> int:
    content = np.asarray(array).reshape(-1)  # a view
    bits = content.view(_WORDS[content.itemsize])
    stride = checksums.INDEX_STRIDE
    pattern = np.arange(_PIECE, dtype=np.uint32) * np.uint32(stride)
    total = 0
    for start in range(0, bits.size, _PIECE):
        piece = bits[start : start + _PIECE]
        mixed = checksums.mix((pattern[: piece.size] + np.uint32(start * stride % 2**32)) ^ piece)
        total += int(mixed.sum(dtype=np.uint64))
    return total % 2**32
