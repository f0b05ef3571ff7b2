"""Memory of a run: whether its state fits, and how a train step on CPUs comes to take that of one step.

Measured: docs/decisions.md.
"""

import contextlib
import math
import os
import pathlib
import re
import resource
from typing import Any

import jax

from topklm import sharding
from topklm.errors import UserError
from topklm.runtime import allocator

# XLA says that a step is done slightly before it frees the step's temporaries: some 0.3 ms.
_RELEASE_SECONDS = 0.002
_LARGE_BYTES = 64 * 2**20


def compile_step(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a train step, and gives back what the compiler took and freed."""
    compiled = lowered.compile()
    allocator.release_freed_memory()
    return compiled


def release_seconds(compiled: jax.stages.Compiled) -> float:
    """Returns how long to wait, in seconds, between a step that is done and the next; 0 if they may overlap.

    A step that begins before the last one's temporaries are free takes as much memory again, and the
    allocator keeps it.
    """
    if jax.default_backend() != "cpu":
        return 0.0
    sizes = compiled.memory_analysis()
    large = sizes is not None and sizes.temp_size_in_bytes > _LARGE_BYTES
    return _RELEASE_SECONDS if large else 0.0


def check(state: Any, mesh: jax.sharding.Mesh) -> None:
    """Refuses a training state that does not fit, before any of it is made: XLA on CPUs would wait for ever.

    Counts parameters, optimizer and gradients; activations come on top.

    Args:
        state: `TrainState` of `jax.ShapeDtypeStruct`.
        mesh: Of the run.

    Raises:
        UserError: If one of this process's devices, or the host whose memory they are, is too small.
    """
    devices = mesh.local_devices
    needed = _bytes_on_a_device(state, mesh) + _bytes_on_a_device(state.params, mesh)
    if devices[0].platform == "cpu":
        needed *= len(devices)
        limit, whose = min(_host_limits())
    else:
        stats = devices[0].memory_stats() or {}
        limit, whose = stats.get("bytes_limit", math.inf), f"the memory of {devices[0].device_kind}"
    if needed > limit:
        n = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
        raise UserError(
            f"config.model: {n:,} parameters with their optimizer and gradients take {_gib(needed)}, more "
            f"than {whose}, {_gib(limit)}: make the model smaller, or split it over more devices with "
            "--config.mesh.fsdp"
        )


def _bytes_on_a_device(tree: Any, mesh: jax.sharding.Mesh) -> int:
    shardings = sharding.parameter_shardings(tree, mesh)
    parts = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, tree, shardings)
    return sum(jax.tree.leaves(parts))


def _host_limits() -> list[tuple[float, str]]:
    """Bytes that this process may still take, by what limits them."""
    limits: list[tuple[float, str]] = []
    with contextlib.suppress(OSError, ValueError):  # no such names outside of Linux and macOS
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limits.append((memory + _proc("/proc/meminfo", "SwapTotal"), "the machine's memory"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            limits.append((int(pathlib.Path(file).read_text()), "the container's memory"))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(
            (max(soft - _proc("/proc/self/status", "VmSize"), 0), "the limit of this process (ulimit -v)")
        )
    return limits or [(math.inf, "")]


def _proc(file: str, field: str) -> int:
    """Reads a field in kB of a file of proc(5), in bytes; 0 where there is none."""
    with contextlib.suppress(OSError):
        if found := re.search(rf"^{field}:\s+(\d+) kB$", pathlib.Path(file).read_text(), re.M):
            return int(found[1]) * 1024
    return 0


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:,.1f} GiB"
