"""How a train step on CPUs comes to take the memory of one step; elsewhere nothing of this applies.

Measured: docs/decisions.md.
"""

import jax

from topklm import allocator

# XLA says that a step is done slightly before it frees the step's temporaries: some 0.3 ms.
_RELEASE_SECONDS = 0.002
_LARGE_BYTES = 64 * 2**20


def compile_step(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a train step, and gives back what the compiler took and freed."""
    compiled = lowered.compile()
    allocator.release_freed_memory()
    return compiled


def release_seconds(compiled: jax.stages.Compiled) -> float:
    """How long to wait between a step that is done and the next; 0 if they may overlap.

    A step that begins before the last one's temporaries are free takes as much memory again, and the
    allocator keeps it.
    """
    if jax.default_backend() != "cpu":
        return 0.0
    sizes = compiled.memory_analysis()
    large = sizes is not None and sizes.temp_size_in_bytes > _LARGE_BYTES
    return _RELEASE_SECONDS if large else 0.0
