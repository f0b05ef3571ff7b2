"""Steps that are not finite, or that spike: how they are told, and how a run answers.

The first half is pure and runs inside the jitted train step; `Policy` follows on the host, a step late.
The train step leaves out the update of a bad step.
"""

from collections.abc import Callable
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from topklm.errors import UserError

# The rule of OLMo 2's optimizer (allenai/OLMo-core, src/olmo_core/optim/skip_step_optimizer.py), which wants
# half a window before it judges, takes falls for spikes too, and lets spikes into its window; here neither.
WINDOW_STEPS = 128
LEAST_STEPS = 32
MOST_SKIPPED_IN_A_ROW = 10  # a bad batch or two pass; a longer row is not the data's fault

StepWindow = dict[str, jax.Array]


def empty() -> StepWindow:
    """Makes a window without steps.

    `loss` and `gradient_norm`, float32[WINDOW_STEPS], are rings of the last good steps; `count`, int32
    scalar, is how many good steps there have been.
    """
    # Two arrays: a step that reuses the state's memory must not be given one twice.
    windows = {name: jnp.zeros(WINDOW_STEPS, jnp.float32) for name in ("loss", "gradient_norm")}
    return {**windows, "count": jnp.zeros((), jnp.int32)}


def is_bad(recent: StepWindow, loss: jax.Array, gradient_norm: jax.Array, sigmas: float) -> jax.Array:
    """Tells, as a bool scalar, whether a step is not finite, or its loss or gradient norm a spike.

    A spike lies above mean + sigmas * standard deviation (n - 1 in the denominator) of the last good steps,
    once there have been LEAST_STEPS of them; with 0 sigmas, nothing is one.
    """
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(gradient_norm))
    if sigmas > 0:
        spike = (loss > _highest(recent, "loss", sigmas)) | (
            gradient_norm > _highest(recent, "gradient_norm", sigmas)
        )
        bad |= spike & (recent["count"] >= LEAST_STEPS)
    return bad


def push(recent: StepWindow, loss: jax.Array, gradient_norm: jax.Array, bad: jax.Array) -> StepWindow:
    """Appends a step to the window, unless it is bad."""
    here = recent["count"] % WINDOW_STEPS

    def put(window: jax.Array, value: jax.Array) -> jax.Array:
        return window.at[here].set(jnp.where(bad, window[here], value))

    return {
        "loss": put(recent["loss"], loss),
        "gradient_norm": put(recent["gradient_norm"], gradient_norm),
        "count": recent["count"] + jnp.where(bad, 0, 1),
    }


def _highest(recent: StepWindow, name: str, sigmas: float) -> jax.Array:
    n = jnp.minimum(recent["count"], WINDOW_STEPS)
    seen = jnp.arange(WINDOW_STEPS) < n
    window = recent[name]
    mean = jnp.sum(window, where=seen) / jnp.maximum(n, 1)
    variance = jnp.sum((window - mean) ** 2, where=seen) / jnp.maximum(n - 1, 1)
    return mean + sigmas * jnp.sqrt(variance)


class Policy:
    """Stops a run at bad steps, or counts those that it skips; sees every step once, in order."""

    def __init__(
        self, on_bad_step: str, sigmas: float, advice: str, last_checkpoint: Callable[[], int | None]
    ):
        """Has seen nothing yet.

        `on_bad_step` is "stop" or "skip", `sigmas` as of `is_bad`. The last line of a run that stops has the
        advice how to mend it, and the newest checkpoint's step once all are on disk.
        """
        self._stops, self._sigmas, self._advice = on_bad_step == "stop", sigmas, advice
        self._last_checkpoint = last_checkpoint
        self._skipped: list[_Step] = []  # in a row, up to the newest step

    def observe(self, step: int, loss: float, gradient_norm: float, bad: bool) -> str | None:
        """Judges a step that `is_bad` told bad or good; returns a line once skipped bad steps are over.

        UserError at the first bad step, or the MOST_SKIPPED_IN_A_ROW-th in a row with "skip".
        """
        if not bad:
            return self.finish()
        this = _Step(step, loss, gradient_norm)
        if self._stops:
            spike = f"a spike, over {self._sigmas:g} standard deviations above recent steps"
            why = spike if this.is_finite else "no longer finite"
            raise self._error(step, f"step {step}: loss {loss}, gradient norm {gradient_norm}: {why}")
        self._skipped.append(this)
        if len(self._skipped) >= MOST_SKIPPED_IN_A_ROW:
            raise self._error(step, f"skipped {_describe(self._skipped)}; to skip more would not help")
        return None

    def finish(self) -> str | None:
        """Returns the line on steps skipped just before, if there are any."""
        skipped, self._skipped = self._skipped, []
        return f"skipped {_describe(skipped)}" if skipped else None

    def _error(self, step: int, what: str) -> UserError:
        good = self._last_checkpoint()
        last = f"the last good checkpoint is step {good}" if good else "there is no checkpoint yet"
        suspects = f"the data of steps {(good or 0) + 1} to {step}"
        return UserError(f"{what}; {last}; look at {suspects}. {self._advice}")


class _Step(NamedTuple):
    number: int
    loss: float
    gradient_norm: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


def _describe(skipped: list[_Step]) -> str:
    """Describes steps skipped one after another, such as "steps 3 to 5 (3): not finite in 3"."""
    first, last, n = skipped[0].number, skipped[-1].number, len(skipped)
    finite = [step for step in skipped if step.is_finite]
    parts = []
    if finite:
        loss, norm = max(step.loss for step in finite), max(step.gradient_norm for step in finite)
        parts.append(f"loss up to {loss:.4g}, gradient norm up to {norm:.4g}")
    if len(finite) < n:
        parts.append(f"not finite in {n - len(finite)}")
    steps = f"step {first:,}" if n == 1 else f"steps {first:,} to {last:,}"
    return f"{steps} ({n}): {', '.join(parts)}"
