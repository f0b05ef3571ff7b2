"""AdamW with a decay mask, clipping and the learning-rate schedules."""

from typing import Any

import jax
import optax

from topklm.config import OptimConfig


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Chains clipping by global norm, AdamW (Loshchilov and Hutter 2019) and the schedule of a whole run."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate_schedule(config, steps)),
    )


def learning_rate_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Maps step to learning rate: linear warm-up, then a cosine, or a plateau with a linear end (WSD)."""
    peak = config.learning_rate
    final = peak * config.final_learning_rate_fraction
    # The first step already moves: the ramp starts at peak / warmup_steps, not at 0.
    warmup = min(config.warmup_steps, steps)
    ramp = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    if config.schedule == "cosine":
        decay_steps = max(steps - warmup, 1)
        tail = optax.cosine_decay_schedule(peak, decay_steps, alpha=config.final_learning_rate_fraction)
        return optax.join_schedules([ramp, tail], [warmup])
    decay = min(round(config.decay_fraction * steps), steps - warmup)
    tail = optax.linear_schedule(peak, final, max(decay, 1))
    return optax.join_schedules([ramp, optax.constant_schedule(peak), tail], [warmup, steps - decay])


def change_of_schedule(config: OptimConfig, before: int, steps: int, step: int) -> str | None:
    """Describes the jump of the learning rate in a run of `before` steps that goes on to `steps` at `step`.

    Returns None if the rate goes on as it would have.
    """
    last, planned = (float(learning_rate_schedule(config, before)(i)) for i in (step - 1, step))
    now = float(learning_rate_schedule(config, steps)(step))
    if steps == before or abs(now - planned) <= 0.01 * config.learning_rate:
        return None
    return (
        f"train.steps was {before:,} and is {steps:,}: the learning rate goes from {last:.3g} to {now:.3g}, "
        f"where {config.schedule} over {steps:,} steps is after step {step:,}"
    )


def decay_mask(params: Any) -> Any:
    """Marks matrices True, norm scales False (they carry a layer axis, so the name decides)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)
