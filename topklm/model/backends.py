"""The backends of TopK and of attention: one table each, which settings, model and benchmarks read.

Adding a backend is one entry here and its function. Nothing here imports JAX, so that settings are read fast.
"""

from collections.abc import Callable, Sequence
import dataclasses
import importlib
from typing import Any

from topklm.errors import UserError

AUTO = "auto"
_ANY_DTYPE = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to compute an operation."""

    name: str  # in the settings
    function: str  # "module:function" that computes it
    platform: str | None = None  # the only one it runs on, as `jax.Device.platform` has it; None: any
    # Dtypes of activations at which "auto" takes it on its platform; without one, where it takes no other.
    auto: Sequence[str] = ()
    limits: str = ""  # "module:function" that returns why the backend does not take a case, or ""
    is_exact: bool = True  # whether it gives the bits of the others

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Computes the operation."""
        return _imported(self.function)(*args, **kwargs)

    def obstacle(self, *case: Any) -> str:
        """Returns why it does not take a case, which is given as its `limits` take it, or ""."""
        return _imported(self.limits)(*case) if self.limits else ""


class Backends:
    """The backends of one operation, by name."""

    def __init__(self, field: str, *entries: Backend):
        self.field = field
        self.entries = entries
        self.names = (AUTO, *(entry.name for entry in entries))
        self._by_name = {entry.name: entry for entry in entries}

    def __getitem__(self, name: str) -> Backend:
        return self._by_name[name]

    def automatic(self, platform: str | None, dtype: str) -> Backend:
        """Returns the backend that "auto" is on a platform (None: on one that has none of its own)."""
        taken = [entry for entry in self.entries if dtype in entry.auto]
        own = [entry for entry in taken if entry.platform == platform]
        return (own or [entry for entry in taken if entry.platform is None])[0]

    def all_exact(self, *names: str) -> bool:
        """Returns True if these give the same bits."""
        return all(name == AUTO or self[name].is_exact for name in names)

    def check_platform(self, name: str, platform: str) -> None:
        """Refuses with a `UserError` a backend that was asked for by name and is for other devices."""
        wanted = None if name == AUTO else self[name].platform
        if wanted not in (None, platform):
            raise UserError(
                f"{self.field} = {name!r}: runs on {str(wanted).upper()}s only, and these devices are "
                f"{platform.upper()}s: use {AUTO}"
            )

    def choose(self, name: str, platform: str, dtype: str, *case: Any) -> Backend:
        """Returns the backend to run on a platform, at a dtype of activations, in a case as `limits` take it.

        UserError if one was asked for by name that the devices or the case do not allow.
        """
        if name == AUTO:
            return self.automatic(platform, dtype)
        self.check_platform(name, platform)
        if obstacle := self[name].obstacle(*case):
            raise UserError(f"{self.field} = {name!r}: {obstacle}: change that, or use {AUTO}")
        return self[name]


def _imported(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


_TOPK, _PALLAS = "topklm.model.topk", "topklm.model.topk_pallas"
_ATTENTION = "topklm.model.attention"

# Functions are called with (x, k, activation, with_mask), and those of one platform, which are kernels, as
# `topk_pallas.select`; limits with (shape, dtype, platform).
TOPK = Backends(
    "model.topk_backend",
    Backend("lax", f"{_TOPK}:select_lax"),
    Backend("threshold", "topklm.model.topk_threshold:select", auto=_ANY_DTYPE),
    Backend("pallas_gpu", f"{_PALLAS}:select", "gpu", _ANY_DTYPE, limits=f"{_PALLAS}:limits"),
    Backend("pallas_tpu", f"{_PALLAS}:select", "tpu", _ANY_DTYPE, limits=f"{_PALLAS}:limits"),
    Backend("approx", f"{_TOPK}:select_approx", is_exact=False),
)

# Functions are called with (q, k, v, segment_ids), as `attention.causal_attention`; limits with the
# `ModelConfig`. On GPUs "auto" is the Pallas kernel for Triton, in bfloat16 only: of float32 it would round
# the products. cuDNN is faster at plain causal attention, but JAX's public interface to it knows documents
# inside a row only as a T x T mask: memory that grows with T^2, read for every head, and an unused gradient
# of that size.
ATTENTION = Backends(
    "model.attention",
    Backend("blocked", f"{_ATTENTION}:causal_attention", auto=_ANY_DTYPE),
    Backend("splash", f"{_ATTENTION}:splash", "tpu", _ANY_DTYPE),
    Backend("triton", f"{_ATTENTION}:triton", "gpu", ("bfloat16",)),
    Backend("cudnn", f"{_ATTENTION}:cudnn", "gpu", limits=f"{_ATTENTION}:cudnn_limits"),
)
