"""The TopK activation: each row keeps its k largest entries, the rest become zero.

A backend (`topklm.model.backends`) finds the winners of every row; activation, NaN and gradient are the same
for all of them. The winners follow from the row's IEEE total order (-0.0 < +0.0), as in `jax.lax.top_k`; on a
tie the lowest index wins, in every backend but "approx", bit for bit.
"""

from collections.abc import Callable
import dataclasses
import functools
import operator

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from topklm.config import TOPK_ACTIVATIONS, ModelConfig
from topklm.errors import ArgumentError
from topklm.model import backends, topk_pallas, topk_threshold
from topklm.model.topk_threshold import keep, order_key

# Share of the k largest entries that "approx" finds, on average over rows in random order.
APPROX_RECALL = 0.95
MASK_NAME = "topk_mask"  # of what the reverse pass keeps, in remat policies

Terms = tuple[jax.Array, ...]  # their sum is x
Selected = tuple[jax.Array, jax.Array | None]  # the result of `topk`, and which entries are active
# A backend: (terms, applies, k, activation, with_mask) -> result.
Select = Callable[[Terms, jax.Array | None, int, str, bool], Selected]


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
        activation: "relu" keeps the largest by signed value, clipped at 0; "identity" the same, not clipped;
            "abs" the largest by magnitude, with their sign.
        backend: How the winners are found. "lax": `jax.lax.top_k`. "threshold": a search for the k-th value.
            "pallas_gpu", "pallas_tpu": one kernel, on that platform only. "auto": the fastest of these where
            the program runs. All of them give the same bits. "approx": `jax.lax.approx_max_k`, which keeps k
            entries, but on TPUs not always the largest: on average `APPROX_RECALL` of them.
        residual: [..., D] in the dtype of x: the row is x + residual.
        applies: bool scalar, known when the program runs; False: the rows pass as they are, with all their
            gradient, and nothing is searched for. None: True.

    Returns:
        [..., D] in the dtype of x. A row that holds a NaN is NaN throughout, so that a diverged run is seen.
        The gradient, forward and reverse, passes through the active entries (with "relu" those kept that
        are above 0) and is zero elsewhere; the reverse pass keeps one bool per entry and no floats. A NaN
        competes by its bits, as in IEEE total order: above infinity, or below minus infinity if its sign bit
        is set; with "abs" above infinity either way. So its row has active entries too, the same in every
        exact backend, and its gradient is theirs, neither NaN nor zero throughout.

    Raises:
        ValueError: If k is below 1, the activation or backend is unknown, or x and residual differ in shape.
        TypeError: If x is not of one of these dtypes, or residual of another than x.
    """
    terms = (x,) if residual is None else (x, residual)
    _check(terms, k, activation, backend)
    return _topk(terms, applies, k, activation, backend)


def for_gspmd(config: ModelConfig, n_devices: int) -> ModelConfig:
    """Returns the model for programs that XLA splits over devices by itself, which have no kernels.

    Args:
        config: The model as it is trained.
        n_devices: Over which its parameters lie.
    """
    if not backends.TOPK.needs_one_device(config.topk_backend):
        return config
    # A kernel that was asked for by name may be one for other devices than these; the bits are the same.
    splittable = backends.TOPK.automatic(None, config.dtype).name
    return dataclasses.replace(config, topk_backend=splittable if n_devices > 1 else backends.AUTO)


def _check(terms: Terms, k: int, activation: str, backend: str) -> None:
    if k < 1:
        raise ArgumentError(field="k", value=k, allowed="1 or more")
    if activation not in TOPK_ACTIVATIONS:
        raise ArgumentError(
            field="activation", value=repr(activation), allowed=f"one of {', '.join(TOPK_ACTIVATIONS)}"
        )
    if backend not in backends.TOPK.names:
        raise ArgumentError(
            field="backend", value=repr(backend), allowed=f"one of {', '.join(backends.TOPK.names)}"
        )
    x = terms[0]
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise TypeError(f"x is {x.dtype}: must be float32, bfloat16 or float16")
    for residual in terms[1:]:
        if residual.dtype != x.dtype:
            raise TypeError(f"residual is {residual.dtype}: must be {x.dtype}, as x is")
        if residual.shape != x.shape:
            raise ArgumentError(f"is of shape {residual.shape}: must be {x.shape}, as x is", field="residual")


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
    if k >= terms[0].shape[-1]:
        return _select_all(terms, applies, k, activation, with_mask)
    by_platform = _by_platform(backend, terms[0])

    def run(chosen: backends.Backend) -> Callable[[Terms, jax.Array | None], Selected]:
        return lambda terms, applies: chosen(terms, applies, k, activation, with_mask)

    if list(by_platform) == ["default"]:
        return run(by_platform["default"])(terms, applies)
    # Chosen when the program is lowered, when its platform is known: that need not be this machine's.
    # Without a default, lowering for any other platform is an error.
    return jax.lax.platform_dependent(terms, applies, **{name: run(b) for name, b in by_platform.items()})


def _by_platform(backend: str, x: jax.Array) -> dict[str, backends.Backend]:
    """Returns the backend for each platform to lower for, and "default", the one for all others."""
    if backend != backends.AUTO:
        chosen = backends.TOPK[backend]
        return {_lowered_as(chosen.platform): chosen}
    dtype = str(x.dtype)
    found = {"default": backends.TOPK.automatic(None, dtype)}
    for entry in backends.TOPK.entries:
        if entry.platform and dtype in entry.auto and not entry.obstacle(x.shape, x.dtype, entry.platform):
            found[_lowered_as(entry.platform)] = entry
    return found


def _lowered_as(platform: str | None) -> str:
    """Returns a platform's name in `jax.lax.platform_dependent`, which tells makers of GPUs apart."""
    return {None: "default", "gpu": "cuda"}.get(platform, str(platform))


def _where_it_applies(select: Callable[[Terms, int, str, bool], Selected]) -> Select:
    """Makes a backend of a selection that always applies."""

    @functools.wraps(select)
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
def select_lax(terms: Terms, k: int, activation: str, with_mask: bool) -> Selected:
    """Selects by `jax.lax.top_k`."""
    x = _sum(terms)
    # The order of a row is decided on integers: exact, the same on every platform, denormals included.
    key = order_key(x)
    _, index = jax.lax.top_k(order_key(jnp.abs(x)) if activation == "abs" else key, k)
    return _keep_indices(x, index, activation, with_mask)


@_where_it_applies
def select_approx(terms: Terms, k: int, activation: str, with_mask: bool) -> Selected:
    """Selects by `jax.lax.approx_max_k`."""
    x = _sum(terms)
    judged = jnp.abs(x) if activation == "abs" else x
    _, index = jax.lax.approx_max_k(judged, k, recall_target=APPROX_RECALL)
    return _keep_indices(x, index, activation, with_mask)


def _keep_indices(x: jax.Array, index: jax.Array, activation: str, with_mask: bool) -> Selected:
    winners = jnp.put_along_axis(jnp.zeros(x.shape, bool), index, True, axis=-1, inplace=False)
    active = winners & (order_key(x) > 0) if activation == "relu" else winners
    return keep(x, active), active if with_mask else None


@_where_it_applies
def select_threshold(terms: Terms, k: int, activation: str, with_mask: bool) -> Selected:
    """Selects by a search for the k-th value."""
    return topk_threshold.select(_sum(terms), k, activation, with_mask=with_mask)


def select_on_gpu(
    terms: Terms, applies: jax.Array | None, k: int, activation: str, with_mask: bool
) -> Selected:
    """Selects by the Pallas kernel for GPUs, which adds up the terms by itself."""
    return topk_pallas.select(
        terms[0],
        k,
        activation,
        "gpu",
        residual=terms[1] if len(terms) > 1 else None,
        applies=applies,
        with_mask=with_mask,
    )


def select_on_tpu(
    terms: Terms, applies: jax.Array | None, k: int, activation: str, with_mask: bool
) -> Selected:
    """Selects by the Pallas kernel for TPUs; the matrix product that makes x adds the residual on its way."""
    return topk_pallas.select(_sum(terms), k, activation, "tpu", applies=applies, with_mask=with_mask)
