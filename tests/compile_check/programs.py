"""Run as a program: compiles small functions over 8 virtual CPU devices and prints their texts as JSON."""

import json

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

MESH = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def all_reduce(x):
    return lax.psum(x, "data")


def gather_in_a_scan_of_five(x):
    def step(total, _):
        return total + lax.all_gather(total.mean(axis=1), "fsdp", axis=0, tiled=True).sum(), None

    return lax.scan(step, x, length=5)[0]


def scatter_in_a_scan_of_three_in_a_scan_of_five(x):
    def inner(total, _):
        return jnp.tile(lax.psum_scatter(total, "fsdp", scatter_dimension=0, tiled=True), (4, 1)), None

    def outer(total, _):
        return lax.scan(inner, total * 2, length=3)[0], None

    return lax.scan(outer, x, length=5)[0]


def exchange(x):
    turned = lax.all_to_all(x, "fsdp", split_axis=0, concat_axis=1, tiled=True)
    return turned.sum() + lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])


def reduce_until_small(x):
    """Loops as often as its data says."""
    return lax.while_loop(lambda x: lax.psum(x.sum(), ("data", "fsdp")) > 1.0, lambda x: x / 2, x)


def products(w):
    """Does six products of [16, 32] with [32, 32], then 8 products of [4, 32] with [32, 16] as a batch."""

    def step(h, _):
        return jnp.tanh(h @ w), None

    h = lax.scan(step, jnp.ones((16, 32)), length=6)[0]
    return jnp.einsum("bij,bkj->bik", h.reshape(8, 2, 32).repeat(2, axis=1), jnp.tile(h, (8, 1, 1)))


def compiled(function, shape, *, sharded=True):
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, PartitionSpec()))
    if sharded:
        everywhere = PartitionSpec()
        function = jax.shard_map(
            function, mesh=MESH, in_specs=everywhere, out_specs=everywhere, check_vma=False
        )
    else:
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.jit(function).lower(x).compile()


if __name__ == "__main__":
    functions = (all_reduce, gather_in_a_scan_of_five, scatter_in_a_scan_of_three_in_a_scan_of_five)
    functions += (exchange, reduce_until_small)
    texts = {f.__name__: compiled(f, (64, 128)).as_text() for f in functions}
    alone = compiled(products, (32, 32), sharded=False)
    print(json.dumps({**texts, "products": alone.as_text(), "flops": alone.cost_analysis()["flops"]}))
