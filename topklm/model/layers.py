"""The small parts a block is made of: linear layer, RMSNorm, SwiGLU, embedding.

Parameters are float32; each call computes in the dtype of its input. The gradient rules written out here
equal automatic differentiation and exist only because they compile to faster code on CPUs. So do `product`
and `transposed`: XLA for CPUs has a kernel for bfloat16, twice as fast as float32, but takes it only for two
row-major matrices and a float32 result; all else it converts to float32 first (docs/decisions.md).
"""

import math

from flax import nnx
import jax
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp

from topklm.parallel import ALONE, Parallel


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes `a @ b` of one dtype, [..., N, K] and [..., K, M], in that dtype, with sums in float32."""
    if a.dtype != jnp.bfloat16:
        return a @ b
    return jax.lax.platform_dependent(a, b, cpu=_rounded_product, default=jnp.matmul)


def transposed(x: jax.Array) -> jax.Array:
    """Exchanges the last two axes, for use in a product: [..., N, M] -> [..., M, N]."""
    if x.dtype != jnp.bfloat16:
        return x.mT
    return jax.lax.platform_dependent(x, cpu=_row_major_transpose, default=lambda x: x.mT)


def _rounded_product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(a.dtype)


def _row_major_transpose(x: jax.Array) -> jax.Array:
    # Without the constraint XLA would leave the data as it is and multiply a column-major matrix.
    return with_layout_constraint(x.mT, Layout(tuple(range(x.ndim))))


@jax.custom_vjp
def matmul(x_NI: jax.Array, w_IO: jax.Array) -> jax.Array:
    """Computes `x @ w`, its weight gradient as `x.T @ g`: JAX's `(g.T @ x).T` is copied transposed."""
    return product(x_NI, w_IO)


def _matmul_forward(x_NI: jax.Array, w_IO: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x_NI, w_IO), (x_NI, w_IO)


def _matmul_backward(saved: tuple[jax.Array, jax.Array], g_NO: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_NI, w_IO = saved
    return product(g_NO, transposed(w_IO)), product(transposed(x_NI), g_NO)


matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nnx.Module):
    """`x @ kernel`, no bias. `kernel` is float32 [I, O], normal with standard deviation `std`.

    With `columns`, it is padded to that many with zeros, so what stands before does not depend on padding.
    """

    def __init__(self, d_in: int, d_out: int, *, std: float, rngs: nnx.Rngs, columns: int | None = None):
        kernel = std * jax.random.normal(rngs.params(), (d_in, d_out), jnp.float32)
        self.kernel = nnx.Param(jnp.pad(kernel, ((0, 0), (0, (columns or d_out) - d_out))))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., I] -> [..., O] in the dtype of x."""
        kernel = self.kernel[...].astype(x.dtype)
        flat = matmul(x.reshape(-1, x.shape[-1]), kernel)
        return flat.reshape(*x.shape[:-1], kernel.shape[-1])


def sparse_matmul(x: jax.Array, w_IO: jax.Array, indices: jax.Array) -> jax.Array:
    """Computes `x @ w`, to rounding, of rows that are zero but for k entries: only their rows of w are read.

    The entries are [..., k], and indices, int32[..., k], say where they stand, each once.
    """
    rows = w_IO[indices].astype(x.dtype)
    return jnp.einsum("...k,...ko->...o", x, rows, preferred_element_type=jnp.float32).astype(x.dtype)


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale` over the last axis (Zhang and Sennrich 2019, eq. 4); zeros stay zeros."""

    def __init__(self, d: int, *, epsilon: float):
        self.scale = nnx.Param(jnp.ones((d,), jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., D] -> [..., D] in the dtype of x; the mean square is taken in float32."""
        x32 = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        return (x32 * inverse_rms * self.scale[...]).astype(x.dtype)


@jax.custom_vjp
def gated_silu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Computes `silu(gate) * up` (SwiGLU, Shazeer 2020, eq. 6), and the sigmoid again for its gradient."""
    return jax.nn.silu(gate) * up


def _gated_silu_forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return gated_silu(gate, up), (gate, up)


def _gated_silu_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, up = saved
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return g * up * (sigmoid + silu * (1 - sigmoid)), g * silu


gated_silu.defvjp(_gated_silu_forward, _gated_silu_backward)


# Tokens whose gradients are formed together: their hidden states, as wide as the MLP, stay near the cache.
_TOKENS_PER_CHUNK = 1024


@jax.custom_vjp
def swiglu(x_ND: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array) -> jax.Array:
    """Computes SwiGLU, `(silu(x @ gate) * (x @ up)) @ down`: [N, D] -> [N, D] in the dtype of x.

    The formula is eq. 6 of Shazeer 2020. The gradient computes the hidden product again; on CPUs it goes over
    chunks of tokens, one after the other: XLA would else leave the gradients of weights to the end of the
    step, and all that they are made of in memory.
    """
    return _swiglu_forward(x_ND, gate_DF, up_DF, down_FD)[0]


def _swiglu_forward(x: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array) -> tuple:
    gate, up = product(x, gate_DF), product(x, up_DF)
    return product(gated_silu(gate, up), down_FD), (x, gate, up, gate_DF, up_DF, down_FD)


@jax.jit  # so that the layers of a model share one trace
def _swiglu_backward(saved: tuple, g_ND: jax.Array) -> tuple[jax.Array, ...]:
    *of_tokens, gate_DF, up_DF, down_FD = saved
    of_tokens.append(g_ND)

    def of_chunk(x: jax.Array, gate: jax.Array, up: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        hidden, pull = jax.vjp(gated_silu, gate, up)
        g_gate, g_up = pull(product(g, transposed(down_FD)))
        g_x = product(g_gate, transposed(gate_DF)) + product(g_up, transposed(up_DF))
        pairs = (x, g_gate), (x, g_up), (hidden, g)
        return g_x, *(product(transposed(a), b) for a, b in pairs)

    def in_chunks(*of_tokens: jax.Array) -> tuple[jax.Array, ...]:
        n_chunks = math.gcd(len(g_ND), max(1, len(g_ND) // _TOKENS_PER_CHUNK))

        def add_chunk(total: tuple, chunk: tuple) -> tuple[tuple, jax.Array]:
            g_x, *of_weights = of_chunk(*chunk)
            return tuple(map(jnp.add, total, of_weights)), g_x

        zeros = tuple(map(jnp.zeros_like, (gate_DF, up_DF, down_FD)))
        chunks = tuple(x.reshape(n_chunks, -1, x.shape[-1]) for x in of_tokens)
        of_weights, g_x = jax.lax.scan(add_chunk, zeros, chunks)
        return g_x.reshape(g_ND.shape), *of_weights

    return jax.lax.platform_dependent(*of_tokens, cpu=in_chunks, default=of_chunk)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


class SwiGLU(nnx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, d: int, d_mlp: int, *, down_std: float, rngs: nnx.Rngs):
        self.gate = Linear(d, d_mlp, std=d**-0.5, rngs=rngs)
        self.up = Linear(d, d_mlp, std=d**-0.5, rngs=rngs)
        self.down = Linear(d_mlp, d, std=down_std, rngs=rngs)

    def __call__(self, x: jax.Array, gate_up: jax.Array | None = None) -> jax.Array:
        """Maps [..., D] -> [..., D]; `gate_up`, [D, 2 F], takes the place of the matrices of gate and up."""
        if gate_up is None and x.dtype == jnp.float32:
            kernels = (layer.kernel[...] for layer in (self.gate, self.up, self.down))
            return swiglu(x.reshape(-1, x.shape[-1]), *kernels).reshape(x.shape)
        if gate_up is None:
            # Slices of bfloat16 are slow on CPUs, so no chunks.
            return self.down(gated_silu(self.gate(x), self.up(x)))
        return self.down(gated_silu(*jnp.split(product(x, gate_up), 2, axis=-1)))


class Embedding(nnx.Module):
    """Token embedding, float32 [rows, D], normal with standard deviation `std`; rows past V are 0."""

    def __init__(self, vocab_size: int, d: int, *, rows: int, std: float, rngs: nnx.Rngs):
        table_VD = std * jax.random.normal(rngs.params(), (vocab_size, d), jnp.float32)
        self.embedding = nnx.Param(jnp.pad(table_VD, ((0, rows - vocab_size), (0, 0))))

    def __call__(self, tokens_BT: jax.Array, dtype: jnp.dtype, parallel: Parallel = ALONE) -> jax.Array:
        """Maps int32[B, T] -> [B, T, D] in `dtype`; across devices, the residual tokens of each."""
        table_VD = self.embedding[...].astype(dtype)
        if parallel.tensor is None:
            return table_VD[tokens_BT]
        # This device has some rows only: the others give 0, and the sum over devices is exact.
        row = tokens_BT - jax.lax.axis_index(parallel.tensor) * table_VD.shape[0]
        here = (row >= 0) & (row < table_VD.shape[0])
        own = table_VD[jnp.clip(row, 0, table_VD.shape[0] - 1)]
        return parallel.scatter_tokens(jnp.where(here[..., None], own, jnp.zeros((), dtype)))
