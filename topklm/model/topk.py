"""The TopK activation: each row keeps its k largest entries, the rest become zero.

A backend (`topklm.model.backends`) finds the winners of every row; activation, NaN and gradient are the same
for all of them. The winners follow from the row's IEEE total order (-0.0 < +0.0), as in `jax.lax.top_k`; on a
tie the lowest index wins, in every backend but "approx", bit for bit.
"""

from collections.abc import Callable
import dataclasses
import functools
import operator
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from topklm.config import TOPK_ACTIVATIONS, ModelConfig
from topklm.errors import ArgumentError
from topklm.model import backends
from topklm.model.topk_threshold import Selected, keep, order_key

# Share of the k largest entries that "approx" finds, on average over rows in random order.
APPROX_RECALL = 0.95
MASK_NAME = "topk_mask"  # of what the reverse pass keeps, in remat policies
# Platforms as `jax.lax.platform_dependent` names them, which tells makers of GPUs apart.
_LOWERED_AS = {None: "default", "gpu": "cuda", "tpu": "tpu"}

Terms = tuple[jax.Array, ...]  # their sum is x


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
    return _topk(terms, applies, k, activation, backend, False)[0]


def model_topk(
    config: ModelConfig,
    x: jax.Array,
    residual: jax.Array | None = None,
    applies: jax.Array | None = None,
    topk: Callable[..., jax.Array] = topk,
) -> jax.Array:
    """Applies a model's TopK to rows [..., D]: each group of neurons keeps its own k largest entries.

    `topk` is the function above, or one with its arguments and another gradient.
    """
    how = config.topk_activation, config.topk_backend
    if len(config.groups) == 1:
        return topk(x, config.topk_k, *how, residual=residual, applies=applies)
    kept, begin = [], 0
    for width, k in config.groups:
        group = slice(begin, begin := begin + width)
        beside = None if residual is None else residual[..., group]
        kept.append(topk(x[..., group], k, *how, residual=beside, applies=applies))
    return jnp.concatenate(kept, axis=-1)


def centred(config: ModelConfig, u: jax.Array) -> jax.Array:
    """Returns rows [..., D] less the mean over each group of neurons, which is taken in float32."""
    parts = jnp.split(u, np.cumsum([width for width, _ in config.groups])[:-1], axis=-1)
    means = [jnp.mean(x, axis=-1, keepdims=True, dtype=jnp.float32).astype(x.dtype) for x in parts]
    return jnp.concatenate([x - mean for x, mean in zip(parts, means, strict=True)], axis=-1)


def for_platform(config: ModelConfig, platform: str) -> ModelConfig:
    """Returns the model with "auto" named where the platform has no kernel of its own.

    Else those of all platforms are imported and traced, for a program that is lowered for one of them.
    """
    automatic = backends.TOPK.automatic(platform, config.dtype)
    if config.topk_backend != backends.AUTO or automatic.platform:
        return config
    return dataclasses.replace(config, topk_backend=automatic.name)


def for_parameters(config: ModelConfig, parameters: Any) -> ModelConfig:
    """Does as `for_platform` of the devices on which parameters lie; nothing where that is not known yet."""
    array = jax.tree.leaves(parameters)[0]
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
        return config
    return for_platform(config, next(iter(array.devices())).platform)


def for_gspmd(config: ModelConfig, n_devices: int) -> ModelConfig:
    """Returns the model for programs that XLA splits by itself over these devices, which have no kernels."""
    asked = config.topk_backend
    if asked != backends.AUTO and backends.TOPK[asked].platform is None:
        return config
    # A kernel that was asked for by name may be one for other devices than these; the bits are the same.
    splittable = backends.TOPK.automatic(None, config.dtype).name
    return dataclasses.replace(config, topk_backend=splittable if n_devices > 1 else backends.AUTO)


def _check(terms: Terms, k: int, activation: str, backend: str) -> None:
    if k < 1:
        raise ArgumentError(field="k", value=k, allowed="1 or more")
    names = {"activation": (activation, TOPK_ACTIVATIONS), "backend": (backend, backends.TOPK.names)}
    for field, (name, known) in names.items():
        if name not in known:
            raise ArgumentError(field=field, value=repr(name), allowed=f"one of {', '.join(known)}")
    x = terms[0]
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise TypeError(f"x is {x.dtype}: must be float32, bfloat16 or float16")
    for residual in terms[1:]:
        if residual.dtype != x.dtype:
            raise TypeError(f"residual is {residual.dtype}: must be {x.dtype}, as x is")
        if residual.shape != x.shape:
            raise ArgumentError(f"is of shape {residual.shape}: must be {x.shape}, as x is", field="residual")


# A custom JVP, not VJP: forward mode works too (Jacobian lenses need it), and its transpose is the VJP. A
# program without gradients makes no mask (`with_mask`), and one with gradients searches once.
@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4, 5))
def _topk(
    terms: Terms, applies: jax.Array | None, k: int, activation: str, backend: str, with_mask: bool
) -> Selected:
    return _select(terms, applies, k, activation, backend, with_mask=with_mask)


@_topk.defjvp
def _topk_jvp(
    k: int, activation: str, backend: str, with_mask: bool, primals: tuple, tangents: tuple
) -> tuple[Selected, tuple]:
    (terms, applies), (terms_dot, _) = primals, tangents
    y, active = _topk(terms, applies, k, activation, backend, True)
    assert active is not None
    x_dot = _sum(terms_dot)
    # The zeros are made from an empty slice of the tangent: an ordinary array of zeros would be one more
    # thing that the reverse pass keeps. XLA folds both to a constant.
    zeros = jnp.pad(x_dot[..., :0], [(0, 0)] * (x_dot.ndim - 1) + [(0, x_dot.shape[-1])])
    y_dot = jnp.where(checkpoint_name(active, MASK_NAME), x_dot, zeros)
    if with_mask:
        return (y, active), (y_dot, np.zeros(active.shape, jax.dtypes.float0))
    return (y, None), (y_dot, None)


# Compiled for itself only so that the layers of a model share one trace.
@functools.partial(jax.jit, static_argnames=("k", "activation", "backend", "with_mask"))
def _select(
    terms: Terms, applies: jax.Array | None, k: int, activation: str, backend: str, *, with_mask: bool
) -> Selected:
    settings: dict[str, Any] = {"k": k, "activation": activation, "with_mask": with_mask}
    if k >= terms[0].shape[-1]:
        return _search(_select_all, terms, applies, **settings)
    branches = {
        _LOWERED_AS[chosen.platform]: functools.partial(
            _run_kernel if chosen.platform else _search, chosen, **settings
        )
        for chosen in _backends_to_lower(backend, terms[0])
    }
    if list(branches) == ["default"]:
        return branches["default"](terms, applies)
    # Chosen when the program is lowered, when its platform is known: that need not be this machine's.
    # Without a default, lowering for any other platform is an error.
    return jax.lax.platform_dependent(terms, applies, **branches)


def _search(
    select: Callable[..., Selected], terms: Terms, applies: jax.Array | None, **settings: Any
) -> Selected:
    """Runs a selection that has no flag `applies` of its own."""

    def search() -> Selected:
        return select(_sum(terms), **settings)

    def pass_all() -> Selected:
        x = _sum(terms)
        return x, jnp.ones(x.shape, bool) if settings["with_mask"] else None

    return search() if applies is None else jax.lax.cond(applies, search, pass_all)


def _run_kernel(
    kernel: backends.Backend, terms: Terms, applies: jax.Array | None, **settings: Any
) -> Selected:
    # On TPUs the matrix product that makes x adds the residual on its way.
    x, residual = (*terms, None)[:2] if kernel.platform == "gpu" else (_sum(terms), None)
    return kernel(x, platform=kernel.platform, residual=residual, applies=applies, **settings)


def _backends_to_lower(backend: str, x: jax.Array) -> list[backends.Backend]:
    """Returns the backend asked for; or, for "auto", that of any platform and the kernels that can take x."""
    if backend != backends.AUTO:
        return [backends.TOPK[backend]]
    dtype = str(x.dtype)
    kernels = [entry for entry in backends.TOPK.entries if entry.platform and dtype in entry.auto]
    usable = [entry for entry in kernels if not entry.obstacle(x.shape, x.dtype, entry.platform)]
    return [backends.TOPK.automatic(None, dtype), *usable]


def _sum(terms: Terms) -> jax.Array:
    return functools.reduce(operator.add, terms)


def _select_all(x: jax.Array, k: int, activation: str, with_mask: bool) -> Selected:
    del k
    return keep(x, order_key(x) > 0 if activation == "relu" else jnp.ones(x.shape, bool), with_mask)


def select_lax(x: jax.Array, k: int, activation: str, with_mask: bool) -> Selected:
    """Selects by `jax.lax.top_k`."""
    # The order of a row is decided on integers: exact, the same on every platform, denormals included.
    _, index = jax.lax.top_k(order_key(jnp.abs(x) if activation == "abs" else x), k)
    return _keep_indices(x, index, activation, with_mask)


def select_approx(x: jax.Array, k: int, activation: str, with_mask: bool) -> Selected:
    """Selects by `jax.lax.approx_max_k`."""
    judged = jnp.abs(x) if activation == "abs" else x
    _, index = jax.lax.approx_max_k(judged, k, recall_target=APPROX_RECALL)
    return _keep_indices(x, index, activation, with_mask)


def _keep_indices(x: jax.Array, index: jax.Array, activation: str, with_mask: bool) -> Selected:
    winners = jnp.put_along_axis(jnp.zeros(x.shape, bool), index, True, axis=-1, inplace=False)
    return keep(x, winners & (order_key(x) > 0) if activation == "relu" else winners, with_mask)
