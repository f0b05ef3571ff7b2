"""The train step, a pure function of pytrees, one `jax.jit` over a mesh: loss, gradient, AdamW.

Loss and gradient are one program for every device (`jax.shard_map`) whose communication is written out, here
and in `topklm.parallel`; the optimizer works on each array as it lies. The update of a bad step, one that is
not finite or that spikes, is left out of the program; `AnomalyPolicy` follows on the host, a step late.
"""

from collections.abc import Callable, Mapping
import functools
import math
import signal
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from topklm.config import Config, ModelConfig, OptimConfig
from topklm.errors import UserError
from topklm.layout import REPLICATED, Layout
from topklm.model import backends, losses, topk, transformer
from topklm.model.block import NO_HOOKS, CaptureFn, LayerHooks
from topklm.parallel import Parallel
from topklm.runtime import process
from topklm.runtime.process import StopRequest
from topklm.training import syntax

# The rule of OLMo 2's optimizer (allenai/OLMo-core, src/olmo_core/optim/skip_step_optimizer.py), which wants
# half a window before it judges, takes falls for spikes too, and lets spikes into its window; here neither.
WINDOW_STEPS = 128
LEAST_STEPS = 32
MOST_SKIPPED_IN_A_ROW = 10  # a bad batch or two pass; a longer row is not the data's fault

StepWindow = dict[str, jax.Array]


def empty_window() -> StepWindow:
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


def push_step(recent: StepWindow, loss: jax.Array, gradient_norm: jax.Array, bad: jax.Array) -> StepWindow:
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


class AnomalyPolicy:
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
            raise self._error(
                step, f"skipped {_describe_skipped(self._skipped)}; to skip more would not help"
            )
        return None

    def finish(self) -> str | None:
        """Returns the line on steps skipped just before, if there are any."""
        skipped, self._skipped = self._skipped, []
        return f"skipped {_describe_skipped(skipped)}" if skipped else None

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


def _describe_skipped(skipped: list[_Step]) -> str:
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


Batch = Mapping[str, jax.Array]

# XLA says that a step is done slightly before it frees the step's temporaries: some 0.3 ms.
_RELEASE_SECONDS = 0.002
_LARGE_BYTES = 64 * 2**20
_STOP_FLAG = "stop_signal"  # among the results of a step

# Of the loss of following tokens: every so many positions of a window are scored, if so many of them follow.
_BAG_STRIDE = 4
_LEAST_BAG = 8
_NEVER = -1e9  # log of the count of a token that is not in the batch


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: jax.Array  # int32 scalar, optimizer steps done
    params: transformer.Parameters
    opt_state: optax.OptState
    recent: StepWindow  # loss and gradient norm of the last good steps


def init_state(config: Config, optimizer: optax.GradientTransformation, layout: Layout) -> TrainState:
    """Makes a new state, every array created on the devices that hold it."""
    shardings = layout.shardings(abstract_state(config, optimizer))
    return jax.jit(functools.partial(_init, config, optimizer), out_shardings=shardings)()


def abstract_state(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of a state, with nothing allocated."""
    return jax.eval_shape(functools.partial(_init, config, optimizer))


def _init(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    params = transformer.create(config.model, config.train.seed)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), empty_window())


def abstract_batch(config: Config, layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and layout of a training batch, with nothing allocated."""
    shape = (config.train.batch_size, config.model.context_length)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout.batch)
    batch = dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), tokens)
    return {**batch, "loss_weights": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout.batch)}


def make_train_step(
    config: Config, optimizer: optax.GradientTransformation, layout: Layout
) -> jax.stages.Wrapped:
    """Builds `(state, batch, *sentences) -> (state, metrics)`; the state's memory is reused.

    The gradient is that of the weighted mean loss over all tokens of the batch, also when it is accumulated
    over microbatches that hold different numbers of weighted tokens. A bad step (`is_bad`) counts,
    but with `train.on_bad_step = "skip"` changes neither parameters nor optimizer.

    Sentences are none, or one batch, whose part of the loss has the weight of `optim.syntax_weight`.

    Metrics are float32 scalars: `loss` (nats per token, of the batch, without z-loss), `gradient_norm`
    (before clipping), `learning_rate`, and `bad`, 1 for a bad step; with `optim.topic_weight` `topic_loss`,
    nats per following token (`make_loss_and_gradient`); with sentences `syntax_attention`
    (`topklm.training.syntax`).
    """
    schedule = learning_rate_schedule(config.optim, config.train.steps)
    loss_and_gradient = make_loss_and_gradient(config, layout)

    # XLA splits this part of the step over devices by itself.
    of_neighbours = functools.partial(
        syntax.attention_of_neighbours, topk.for_gspmd(config.model, layout.size)
    )

    def train_step(
        state: TrainState, batch: Batch, *sentences: syntax.Sentences
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        found, grads = loss_and_gradient(state.params, batch)
        loss = found["loss"]
        for parsed in sentences:
            attention, of_parsed = jax.value_and_grad(of_neighbours)(state.params, parsed)
            weight = syntax.weight_at(config, state.step)
            grads = jax.tree.map(lambda g, h, weight=weight: g + weight * h, grads, of_parsed)
            found = {**found, "syntax_attention": attention}
        norm = optax.tree.norm(grads)
        bad = is_bad(state.recent, loss, norm, config.train.spike_sigmas)
        recent = push_step(state.recent, loss, norm, bad)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        learned = optax.apply_updates(state.params, updates), opt_state
        if config.train.on_bad_step == "skip":
            before = state.params, state.opt_state
            learned = jax.tree.map(lambda old, new: jnp.where(bad, old, new), before, learned)
        metrics = {
            **found,
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "bad": bad.astype(jnp.float32),
        }
        return TrainState(state.step + 1, *learned, recent), metrics

    return jax.jit(train_step, donate_argnums=0)


def make_loss_and_gradient(config: Config, layout: Layout) -> Callable:
    """Builds `(params, batch) -> ({"loss": mean in nats}, gradient with z-loss)`.

    With `optim.topic_weight` the gradient is also that of `topic_loss`, likewise in the results: of the
    tokens that follow in the same document, `optim.topic_tokens` at most, predicted by `bag_cross_entropy`
    from the first of `model.topk_groups` alone, through final norm and unembedding; the mean over all layers
    with TopK. Alternatives are the tokens of the batch.
    """
    specs, parallel, forward = make_forward(config.model, layout)
    has_topics = config.optim.topic_weight > 0
    capture = (lambda h, u, h_next: h_next) if has_topics else None

    def loss_of_device(
        params: transformer.Parameters, batch: Batch, log_counts_V: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        model, h, outputs_LBTD = forward(params, batch, capture)
        h, w, targets = parallel.gather_tokens(h), model.unembedding(), batch["targets"]
        z_loss, n_vocab = config.optim.z_loss, config.model.vocab_size
        loss, nll = losses.cross_entropy(
            h, w, targets, batch["loss_weights"], z_loss, n_vocab, parallel.tensor
        )
        if not has_topics:
            return loss, {"loss": nll}
        n_topics, n_layers = config.model.groups[0][0], config.model.n_topk_layers
        scored, bags, shares = _following_tokens(batch, config.optim.topic_tokens)

        def of_layer(h_BTD: jax.Array) -> jax.Array:
            z_BTG = parallel.gather_tokens(model.final_norm(h_BTD)[..., :n_topics])[:, scored]
            of_scored = bags, shares, batch["topic_weights"][:, scored]
            return losses.bag_cross_entropy(z_BTG, w[:n_topics], *of_scored, log_counts_V, parallel.tensor)

        topic_loss = jnp.mean(jax.lax.map(of_layer, outputs_LBTD[:n_layers]))
        return loss + config.optim.topic_weight * topic_loss, {"loss": nll, "topic_loss": topic_loss}

    gradient = jax.value_and_grad(loss_of_device, has_aux=True)

    def of_device(params: transformer.Parameters, batch: Batch) -> tuple[dict[str, jax.Array], Any]:
        batch = parallel.balanced(batch)
        weights = {"loss_weights": batch["loss_weights"]}
        log_counts_V = None
        if has_topics:
            weights["topic_weights"] = _topic_weights(batch, config.optim.topic_tokens)
            log_counts_V = _log_counts(batch["inputs"], config.model.padded_vocab_size, layout, parallel)
        totals = {
            name: layout.sum_over(x.sum(), keep=REPLICATED, leave_out="tensor") for name, x in weights.items()
        }
        batch = {**batch, **{name: x / jnp.maximum(totals[name], 1.0) for name, x in weights.items()}}
        of_microbatch = functools.partial(gradient, log_counts_V=log_counts_V)
        (_, found), grads = _accumulate(of_microbatch, params, batch, config.train.grad_accumulation)
        # Along the axes that split a parameter its gradient has been summed where it was gathered.
        grads = jax.tree.map(lambda g, spec: layout.sum_over(g, keep=spec), grads, specs)
        found = {name: layout.sum_over(x, keep=REPLICATED, leave_out="tensor") for name, x in found.items()}
        return found, grads

    results = dict.fromkeys(("loss", "topic_loss") if has_topics else ("loss",), REPLICATED)
    return layout.on_every_device(of_device, specs, (results, specs))


def _following_tokens(batch: Batch, n_following: int) -> tuple[np.ndarray, jax.Array, jax.Array]:
    """Returns positions int[P] of windows, the tokens after each, int32[B, P, H], and the share of each.

    Shares, float32[B, P, H], are equal and add up to 1 over the tokens of the position's document.
    """
    tokens, segments = batch["inputs"], batch["segment_ids"]
    scored = np.arange(min(_BAG_STRIDE // 2, tokens.shape[1] - 1), tokens.shape[1], _BAG_STRIDE)
    following = scored[:, None] + 1 + np.arange(n_following)
    index = np.minimum(following, tokens.shape[1] - 1)
    inside = (segments[:, index] == segments[:, scored][..., None]) & (following < tokens.shape[1])
    n_inside = inside.sum(axis=-1, keepdims=True)
    return scored, tokens[:, index], inside / jnp.maximum(n_inside, 1).astype(jnp.float32)


def _topic_weights(batch: Batch, n_following: int) -> jax.Array:
    """Returns 1 at positions that are scored by `_following_tokens` and that enough tokens follow, else 0."""
    scored, _, shares = _following_tokens(batch, n_following)
    enough = (shares > 0).sum(axis=-1) >= min(_LEAST_BAG, n_following)
    return jnp.zeros(batch["inputs"].shape, jnp.float32).at[:, scored].set(enough)


def _log_counts(tokens_BT: jax.Array, rows: int, layout: Layout, parallel: Parallel) -> jax.Array:
    """Returns the log of how often each token is in the batch, of this device's part of the vocabulary."""
    counts = jnp.zeros(rows, jnp.float32).at[tokens_BT].add(1.0)
    counts = layout.sum_over(counts, keep=REPLICATED, leave_out="tensor")
    if parallel.tensor is not None:
        size = rows // jax.lax.axis_size(parallel.tensor)
        counts = jax.lax.dynamic_slice_in_dim(counts, jax.lax.axis_index(parallel.tensor) * size, size)
    return jnp.where(counts > 0, jnp.log(jnp.maximum(counts, 1.0)), _NEVER)


def make_forward(
    config: ModelConfig, layout: Layout, hooks: LayerHooks = NO_HOOKS
) -> tuple[Any, Parallel, Callable]:
    """Builds the forward pass of one device's program; hooks are called with the number of the layer.

    Returns the specs of the parameters; the device's view of the mesh; and `(params, batch, capture) ->
    (model, h, captured)`, whose parameters are this device's parts, and whose
    batch went through `parallel.balanced`.
    """
    shapes = jax.eval_shape(functools.partial(transformer.create, config, 0))
    backends.TOPK.check_platform(config.topk_backend, layout.platform)
    config = topk.for_platform(config, layout.platform)
    attention = backends.ATTENTION.choose(config.attention, layout.platform, config.dtype, config)
    parallel = layout.device_view(shapes, jnp.dtype(config.dtype), attention.name)

    def forward(
        params: transformer.Parameters, batch: Batch, capture: CaptureFn | None = None
    ) -> tuple[transformer.Transformer, jax.Array, Any]:
        def gathered() -> transformer.Transformer:
            # The blocks are gathered one at a time, where they are used.
            outside_blocks = parallel.gather({name: x for name, x in params.items() if name != "blocks"})
            return transformer.bind(config, {**params, **outside_blocks})

        model = gathered()
        inputs = batch["inputs"], batch["segment_ids"], batch["positions"]
        numbers = None if hooks == NO_HOOKS else jnp.arange(config.n_layers)
        h, captured = model.hidden(
            *inputs, capture=capture, hooks=hooks, hook_inputs=numbers, parallel=parallel
        )
        # A tied table's two gradients differ in dtype: the loss's is float32 in bfloat16 models too. Each
        # goes through a gather of its own, which sums in float32; XLA makes one of the two gathers forward.
        tied = config.tie_embeddings and config.dtype != "float32"
        return gathered() if tied else model, h, captured

    return layout.specs(shapes), parallel, forward


def _accumulate(gradient: Callable, params: Any, batch: Batch, n: int) -> Any:
    """Sums `gradient(params, batch)` over n microbatches; the loss weights already sum to 1."""
    if n == 1:
        return gradient(params, batch)

    def microbatches(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 1, 0)

    def add(total: Any, microbatch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, microbatch)), None

    shape = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[: x.shape[0] // n], batch))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
    return jax.lax.scan(add, zeros, jax.tree.map(microbatches, batch))[0]


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
    """Describes the jump of the learning rate where a run of `before` steps goes on to `steps`; or None."""
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


def compile_step(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a train step, and gives back what the compiler took and freed."""
    compiled = lowered.compile()
    process.release_freed_memory()
    return compiled


def release_seconds(compiled: jax.stages.Compiled) -> float:
    """Returns how long to wait, in seconds, between a step that is done and the next; 0 if they may overlap.

    A step that begins before the last one's temporaries are free takes as much memory again, and the
    allocator keeps it.
    """
    if jax.default_backend() != "cpu":
        return 0.0
    sizes = compiled.memory_analysis()
    large = sizes is not None and sizes.temp_size_in_bytes > _LARGE_BYTES
    return _RELEASE_SECONDS if large else 0.0


class StopSync:
    """Truthy once all processes know that the run shall stop; the same in all of them after each step.

    Each process puts the signal of its own `StopRequest` into the step as an array over its devices, and
    reads the largest of all among the step's results: a step later all know, without any message.
    """

    def __init__(self, layout: Layout, stop: StopRequest):
        self._layout, self._stop = layout, stop
        self._alone = jax.process_count() == 1
        self._agreed = False
        self._flags: dict[int, jax.Array] = {}

    def __bool__(self) -> bool:
        return bool(self._stop) if self._alone else self._agreed

    def with_stop_flag(self, step: Callable, donate_argnums: tuple[int, ...] = ()) -> Callable:
        """Gives a step, which returns results or (state, results), a stop flag, if there are others."""
        if self._alone:
            return step

        def with_flag(*arguments_and_flag: Any) -> Any:
            *arguments, flag = arguments_and_flag
            out = step(*arguments)
            *state, results = out if isinstance(out, tuple) else (out,)
            results = {**results, _STOP_FLAG: jnp.max(flag)}
            return (*state, results) if state else results

        return jax.jit(with_flag, donate_argnums=donate_argnums)

    def stop_flag(self) -> tuple[jax.Array, ...]:
        """Returns the further argument of such a step: this process's signal number now, or 0, per device."""
        if self._alone:
            return ()
        asked = signal.Signals[self._stop.signal_name].value if self._stop.signal_name else 0
        if asked not in self._flags:
            self._flags[asked] = self._layout.one_per_device(asked)
        return (self._flags[asked],)

    def read_stop_flag(self, results: dict[str, Any]) -> dict[str, Any]:
        """Takes the flag out of a step's results; every process must do so for every step, in order."""
        asked = int(results.pop(_STOP_FLAG, 0))
        if asked:
            self._agreed = True
            self._stop.request(signal.Signals(asked).name)
        return results
