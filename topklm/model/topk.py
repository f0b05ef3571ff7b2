"""The TopK activation: each row keeps its k largest entries, the rest become zero.

A backend finds the winners of every row; activation, NaN and gradient are the same for all of them. What
wins is decided on the row's IEEE total order (-0.0 < +0.0), as `jax.lax.top_k` has it; on a tie the lowest
index wins, in every backend but "approx", bit for bit.
"""

from collections.abc import Callable
import dataclasses
import functools
import operator

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from topklm.config import TOPK_ACTIVATIONS, TOPK_BACKENDS, ModelConfig
from topklm.errors import UserError
from topklm.model import topk_pallas, topk_threshold
from topklm.model.topk_threshold import keep, order_key

# Share of the k largest entries that "approx" finds, on average over rows in random order.
APPROX_RECALL = 0.95
MASK_NAME = "topk_mask"  # of what the reverse pass keeps, in remat policies

Terms = tuple[jax.Array, ...]  # what a row is the sum of
Selected = tuple[jax.Array, jax.Array | None]  # what `topk` returns, and which entries are active
Backend = Callable[[Terms, jax.Array | None, int, str, bool], Selected]
KERNELS = {"pallas_gpu": "gpu", "pallas_tpu": "tpu"}  # backends for one platform only


def topk(
    x: jax.Array,
    k: int,
    activation: str = "relu",
    backend: str = "auto",
    residual: jax.Array | None = None,
    applies: jax.Array | None = None,
) -> jax.Array:
    """Keeps the k largest entries of every row.

    Args:
        x: [..., D], float32, bfloat16 or float16.
        k: Entries kept per row, 1 or more; k >= D drops none.
        activation: What is kept. "relu": the largest by signed value, clipped at 0. "identity": the same,
            not clipped. "abs": the largest by magnitude, with their sign.
        backend: How the winners are found. "lax": `jax.lax.top_k`. "threshold": a search for the k-th value.
            "pallas_gpu", "pallas_tpu": one kernel, on that platform only. "auto": the fastest of these where
            the program runs. All of them give the same bits. "approx": `jax.lax.approx_max_k`, which keeps k
            entries, but on TPUs not always the largest: on average `APPROX_RECALL` of them.
        residual: [..., D] in the dtype of x: the row is x + residual.
        applies: bool scalar, known when the program runs; False: the rows pass as they are, with all their
            gradient, and nothing is searched for. None: True.

    Returns:
        [..., D] in the dtype of x. A row that holds a NaN is NaN throughout, so that a diverged run is seen.
        The gradient, forward and reverse, passes through the active entries and is zero elsewhere; the
        reverse pass keeps one bool per entry and no floats. A row with a NaN has active entries too, see
        `active_mask`: its gradient is theirs, neither NaN nor zero throughout.

    Raises:
        ValueError: If k is below 1, the activation or backend is unknown, or x and residual differ in shape.
        TypeError: If x is not of one of these dtypes, or residual of another than x.
    """
    terms = (x,) if residual is None else (x, residual)
    _check(terms, k, activation, backend)
    return _topk(terms, applies, k, activation, backend)


def active_mask(x: jax.Array, k: int, activation: str = "relu", backend: str = "auto") -> jax.Array:
    """Which entries pass through `topk`; with "relu" only those above 0.

    A NaN competes by its bits, as in IEEE total order: above infinity, or below minus infinity if its sign
    bit is set; with "abs" above infinity either way. So its row still has winners, the same in every exact
    backend, and they are where the gradient of `topk` passes.

    Args:
        x: As in `topk`.
        k: As in `topk`.
        activation: As in `topk`.
        backend: As in `topk`.

    Returns:
        bool[..., D].

    Raises:
        ValueError: As `topk`.
        TypeError: As `topk`.
    """
    _check((x,), k, activation, backend)
    return _topk_and_mask((x,), None, k, activation, backend)[1]


def check_platform(backend: str, platform: str) -> None:
    """Refuses a kernel that was asked for by name and is not made for the devices.

    Args:
        backend: As in `topk`.
        platform: Of the devices, as `jax.Device.platform` has it.

    Raises:
        UserError: If the backend is a kernel for another platform.
    """
    wanted = KERNELS.get(backend, platform)
    if wanted != platform:
        raise UserError(
            f"model.topk_backend = {backend!r}: a kernel for {wanted.upper()}s, and these devices are "
            f"{platform.upper()}s; use model.topk_backend=auto"
        )


def for_gspmd(config: ModelConfig, n_devices: int) -> ModelConfig:
    """Returns the model for programs that XLA splits over devices by itself, which have no kernels.

    Args:
        config: The model as it is trained.
        n_devices: Over which its parameters lie.
    """
    kernel_possible = config.topk_backend in ("auto", *KERNELS)
    if n_devices > 1 and kernel_possible:
        return dataclasses.replace(config, topk_backend="threshold")
    # A kernel that was asked for by name may be one for other devices than these; the bits are the same.
    return dataclasses.replace(config, topk_backend="auto") if kernel_possible else config


def _check(terms: Terms, k: int, activation: str, backend: str) -> None:
    if k < 1:
        raise ValueError(f"k = {k}: must be 1 or more")
    if activation not in TOPK_ACTIVATIONS:
        raise ValueError(f"activation = {activation!r}: must be one of {', '.join(TOPK_ACTIVATIONS)}")
    if backend not in TOPK_BACKENDS:
        raise ValueError(f"backend = {backend!r}: must be one of {', '.join(TOPK_BACKENDS)}")
    x = terms[0]
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise TypeError(f"x is {x.dtype}: must be float32, bfloat16 or float16")
    for residual in terms[1:]:
        if residual.dtype != x.dtype:
            raise TypeError(f"residual is {residual.dtype}: must be {x.dtype}, as x is")
        if residual.shape != x.shape:
            raise ValueError(f"residual is of shape {residual.shape}: must be {x.shape}, as x is")


# Custom JVPs, not VJPs: forward mode works too (Jacobian lenses need it), and its transpose is the VJP.
# There are two, so that a program without gradients makes no mask, and one with gradients searches once.
@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _topk(terms: Terms, applies: jax.Array | None, k: int, activation: str, backend: str) -> jax.Array:
    return _select(terms, applies, k, activation, backend, with_mask=False)[0]


@_topk.defjvp
def _topk_jvp(
    k: int, activation: str, backend: str, primals: tuple, tangents: tuple
) -> tuple[jax.Array, jax.Array]:
    (terms, applies), (terms_dot, _) = primals, tangents
    y, active = _topk_and_mask(terms, applies, k, activation, backend)
    return y, _pass_through(active, terms_dot)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _topk_and_mask(
    terms: Terms, applies: jax.Array | None, k: int, activation: str, backend: str
) -> tuple[jax.Array, jax.Array]:
    y, active = _select(terms, applies, k, activation, backend, with_mask=True)
    assert active is not None
    return y, active


@_topk_and_mask.defjvp
def _topk_and_mask_jvp(
    k: int, activation: str, backend: str, primals: tuple, tangents: tuple
) -> tuple[tuple, tuple]:
    (terms, applies), (terms_dot, _) = primals, tangents
    y, active = _topk_and_mask(terms, applies, k, activation, backend)
    return (y, active), (_pass_through(active, terms_dot), np.zeros(active.shape, jax.dtypes.float0))


def _pass_through(active: jax.Array, terms_dot: tuple[jax.Array, ...]) -> jax.Array:
    x_dot = functools.reduce(operator.add, terms_dot)
    # The zeros are made from an empty slice of the tangent: an ordinary array of zeros would be one more
    # thing that the reverse pass keeps. XLA folds both to a constant.
    padding = [(0, 0)] * (x_dot.ndim - 1) + [(0, x_dot.shape[-1])]
    return jnp.where(checkpoint_name(active, MASK_NAME), x_dot, jnp.pad(x_dot[..., :0], padding))


# Compiled for itself only so that the layers of a model share one trace.
@functools.partial(jax.jit, static_argnames=("k", "activation", "backend", "with_mask"))
def _select(
    terms: Terms, applies: jax.Array | None, k: int, activation: str, backend: str, *, with_mask: bool
) -> Selected:
    select = _select_all if k >= terms[0].shape[-1] else _BACKENDS[backend]
    return select(terms, applies, k, activation, with_mask)


def _where_it_applies(select: Callable[[Terms, int, str, bool], Selected]) -> Backend:
    """A backend from a selection that always applies."""

    def run(terms: Terms, applies: jax.Array | None, k: int, activation: str, with_mask: bool) -> Selected:
        def pass_all() -> Selected:
            x = _sum(terms)
            return x, jnp.ones(x.shape, bool) if with_mask else None

        def search() -> Selected:
            return select(terms, k, activation, with_mask)

        return search() if applies is None else jax.lax.cond(applies, search, pass_all)

    return run


def _sum(terms: Terms) -> jax.Array:
    return functools.reduce(operator.add, terms)


@_where_it_applies
def _select_all(terms: Terms, k: int, activation: str, with_mask: bool) -> Selected:
    del k
    x = _sum(terms)
    active = order_key(x) > 0 if activation == "relu" else jnp.ones(x.shape, bool)
    return keep(x, active), active if with_mask else None


@_where_it_applies
def _select_lax(terms: Terms, k: int, activation: str, with_mask: bool) -> Selected:
    x = _sum(terms)
    # The order of a row is decided on integers: exact, the same on every platform, denormals included.
    key = order_key(x)
    _, index = jax.lax.top_k(order_key(jnp.abs(x)) if activation == "abs" else key, k)
    return _keep_indices(x, index, activation, with_mask)


@_where_it_applies
def _select_approx(terms: Terms, k: int, activation: str, with_mask: bool) -> Selected:
    x = _sum(terms)
    judged = jnp.abs(x) if activation == "abs" else x
    _, index = jax.lax.approx_max_k(judged, k, recall_target=APPROX_RECALL)
    return _keep_indices(x, index, activation, with_mask)


def _keep_indices(x: jax.Array, index: jax.Array, activation: str, with_mask: bool) -> Selected:
    winners = jnp.put_along_axis(jnp.zeros(x.shape, bool), index, True, axis=-1, inplace=False)
    active = winners & (order_key(x) > 0) if activation == "relu" else winners
    return keep(x, active), active if with_mask else None


@_where_it_applies
def _select_threshold(terms: Terms, k: int, activation: str, with_mask: bool) -> Selected:
    return topk_threshold.select(_sum(terms), k, activation, with_mask=with_mask)


def _kernel(backend: str, k: int, activation: str, with_mask: bool) -> Callable[..., Selected]:
    def run(terms: Terms, applies: jax.Array | None) -> Selected:
        if backend == "pallas_tpu":
            # The matrix product that makes x adds the residual on its way out; the kernel would read both.
            terms = (_sum(terms),)
        return topk_pallas.select(
            terms[0],
            k,
            activation,
            KERNELS[backend],
            residual=terms[1] if len(terms) > 1 else None,
            applies=applies,
            with_mask=with_mask,
        )

    return run


def _select_kernel(
    backend: str,
    platform: str,
    terms: Terms,
    applies: jax.Array | None,
    k: int,
    activation: str,
    with_mask: bool,
) -> Selected:
    # Lowering for any other platform is an error: none else is named.
    kernel = _kernel(backend, k, activation, with_mask)
    return jax.lax.platform_dependent(terms, applies, **{platform: kernel})


def _select_auto(
    terms: Terms, applies: jax.Array | None, k: int, activation: str, with_mask: bool
) -> Selected:
    """Chooses when the program is lowered, when its platform is known: that need not be this machine's."""
    x = terms[0]

    def anywhere(terms: Terms, applies: jax.Array | None) -> Selected:
        return _select_threshold(terms, applies, k, activation, with_mask)

    kernels = {
        platform: _kernel(backend, k, activation, with_mask)
        for backend, platform in (("pallas_gpu", "cuda"), ("pallas_tpu", "tpu"))
        if topk_pallas.supports(x.shape, x.dtype, KERNELS[backend])
    }
    return jax.lax.platform_dependent(terms, applies, default=anywhere, **kernels)


_BACKENDS: dict[str, Backend] = {
    "auto": _select_auto,
    "lax": _select_lax,
    "threshold": _select_threshold,
    "pallas_gpu": functools.partial(_select_kernel, "pallas_gpu", "cuda"),
    "pallas_tpu": functools.partial(_select_kernel, "pallas_tpu", "tpu"),
    "approx": _select_approx,
}
