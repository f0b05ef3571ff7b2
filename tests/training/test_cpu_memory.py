"""A large step on CPUs: compiled for little memory, and never two of them at once."""

import jax
import jax.numpy as jnp

from topklm.training import cpu_memory

SIDE = 1024  # a matrix of 4 MiB


def chain(x):
    """Matrices that all exist at once if they are made as early as they can be."""
    products = [jnp.tanh(x * i) @ x for i in range(1, 13)]
    total = x
    for matrix in products:
        total = jnp.cos(total @ matrix)
    return total


def test_the_order_takes_less_memory_than_xlas_own_and_changes_no_bit():
    x = jax.random.normal(jax.random.key(0), (SIDE, SIDE))
    lowered = jax.jit(chain).lower(x)
    ours, plain = cpu_memory.compile_step(lowered, "cpu"), lowered.compile()
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (ours, plain)]
    assert sizes[0] < 0.7 * sizes[1]
    assert jnp.array_equal(ours(x), plain(x))


def test_only_large_steps_take_turns():
    def wait_after(side):
        x = jax.ShapeDtypeStruct((side, side), jnp.float32)
        return cpu_memory.release_seconds(jax.jit(lambda x: (x @ x.T) @ (x.T @ x)).lower(x).compile())

    assert wait_after(8) == 0
    assert wait_after(4 * SIDE) > 0
