"""Large steps on CPUs take turns, so that the memory of two is never taken."""

import jax
import jax.numpy as jnp

from topklm.training.step import compile_step, release_seconds


def test_only_large_steps_take_turns():
    def wait_after(side):
        x = jax.ShapeDtypeStruct((side, side), jnp.float32)
        return release_seconds(compile_step(jax.jit(lambda x: (x @ x.T) @ (x.T @ x)).lower(x)))

    assert wait_after(8) == 0
    assert wait_after(4096) > 0  # a matrix of 64 MiB
