"""The training run: open, restore or start, then step, log, evaluate and save until done.

The order inside the loop is what resuming rests on. A step's metrics are fetched while the next step
already runs (large steps on CPUs take turns: `memory`); before a checkpoint everything up to its step is
written out, so whatever is on disk after a kill belongs to steps up to a checkpoint, or is dropped and done
again. Every process of a run takes the same turns: what one alone knows (a signal, a damaged file) is agreed
on first.
"""

from collections.abc import Iterator
import contextlib
import math
import time
from typing import Any

import jax

from topklm import distributed, sharding
from topklm.checkpoint import run_folder
from topklm.checkpoint.manager import CheckpointManager
from topklm.config import Config, from_saved, warnings
from topklm.data.mixture import Mixture
from topklm.data.stream import heldout_batches, heldout_part, train_stream
from topklm.errors import UserError
from topklm.imports import versions
from topklm.inference.generate import generate_tokens
from topklm.runtime.signals import StopRequest, stop_on_signal
from topklm.runtime.watchdog import Watchdog
from topklm.storage.errors import storage_errors_are_user_errors
from topklm.storage.files import AnyPath
from topklm.training import bad_steps, memory, throughput
from topklm.training import metrics as metrics_lib
from topklm.training.agreement import Agreement
from topklm.training.console import Console, evaluation_line
from topklm.training.evaluation import evaluate
from topklm.training.feed import DeviceBatch, Feed, to_devices
from topklm.training.opening import opened
from topklm.training.optimizer import change_of_schedule, make_optimizer
from topklm.training.profile import Profiler
from topklm.training.step import (
    TrainState,
    abstract_batch,
    abstract_state,
    init_state,
    make_eval_step,
    make_train_step,
)
from topklm.training.summary import describe_model, summary


def train(
    config: Config, workdir: AnyPath, console: Console | None = None, stop: StopRequest | None = None
) -> None:
    """Trains the run in `workdir`, from its newest checkpoint if it has one, to `config.train.steps`.

    Args:
        config: The experiment.
        workdir: The run folder, local or in a bucket; created if missing.
        console: Where progress is shown; by default standard output, of the first process.
        stop: What asks the run to stop; by default Ctrl-C, SIGTERM and SIGHUP, from now on.

    Raises:
        UserError: For anything the user can mend, and for a loss that is no longer finite.
    """
    console = console or Console(quiet=not distributed.is_primary())
    hearing = stop_on_signal(distributed.announce_stop) if stop is None else contextlib.nullcontext(stop)
    with hearing as request:
        mesh = sharding.make_mesh(config.mesh)
        console.say(f"devices: {sharding.describe_devices(mesh)}")
        for line in warnings(config):
            console.say(f"warning: {line}")
        with opened(config, workdir, console) as (whole_config, mixture):
            sharding.check(whole_config, mesh)
            _Run(whole_config, workdir, mixture, mesh, console, request).train()


class _Run:
    """One process's part in a run: what the loop needs at hand, opened once."""

    def __init__(
        self,
        config: Config,
        folder: AnyPath,
        mixture: Mixture,
        mesh: jax.sharding.Mesh,
        console: Console,
        stop: StopRequest,
    ):
        self.config, self.folder, self.mixture, self.console = config, folder, mixture, console
        self.mesh, self.stop = mesh, stop
        self.agreement = Agreement(mesh, stop)
        self.batch_sharding = sharding.batch_sharding(mesh)
        self.tokens_per_step = config.train.batch_size * config.model.context_length
        self.heldout = heldout_part(mixture, config.eval.max_tokens)
        self.optimizer = make_optimizer(config.optim, config.train.steps)
        self.eval_step = self.agreement.voting(make_eval_step(config, mesh))
        with storage_errors_are_user_errors(f"opening the checkpoints of {folder}", folder):
            self.checkpoints = CheckpointManager(
                folder / run_folder.CHECKPOINTS_FOLDER, config.checkpoint, console.say
            )
        stream = train_stream(
            mixture,
            context_length=config.model.context_length,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            rows=sharding.local_rows(self.batch_sharding, config.train.batch_size),
        )
        self.feed = Feed(stream, lambda b: to_devices(b, self.batch_sharding, config.train.batch_size))
        self.policy = bad_steps.Policy(
            config.train.on_bad_step,
            config.train.spike_sigmas,
            f"Lower --config.optim.learning_rate (now {config.optim.learning_rate}) in a new --workdir, or "
            "continue with --config.train.on_bad_step=skip",
            self.checkpoints.settle,
        )

    def train(self) -> None:
        """Runs to the end, or to the point where somebody asks to stop."""
        try:
            with contextlib.ExitStack() as stack:
                self.watchdog = stack.enter_context(Watchdog(self.folder))
                state = self._restore_or_start()
                first = int(state.step)
                if first >= self.config.train.steps and not self._owes_evaluation(first):
                    self._say_finished(first)
                    return
                if first:
                    self.console.say(f"continuing {self.folder} from its checkpoint of step {first:,}")
                writer = metrics_lib.open_writer(
                    self.folder,
                    first,
                    synced=self.synced_metrics,
                    primary=distributed.is_primary(),
                    warn=self.console.say,
                )
                self.writer = stack.enter_context(contextlib.closing(writer))
                profiler = Profiler(self.config.profiled_steps, self.folder, first, self.console.say)
                self.profiler = stack.enter_context(contextlib.closing(profiler))
                train_step = self._compile(state)
                self.stop.begin_training()
                if self._owes_evaluation(first):
                    self._evaluate(first, state)
                self._steps(train_step, state, first)
        finally:
            self.console.finish()
            with storage_errors_are_user_errors(f"saving a checkpoint in {self.folder}", self.folder):
                self.checkpoints.close()

    def _steps(self, train_step: jax.stages.Compiled, state: TrainState, first: int) -> None:
        steps = self.config.train.steps
        release_seconds = memory.release_seconds(train_step)
        self.log_rate = throughput.Rate(self.config, self.tokens_per_step, first, self.clock.total)
        self.last_logged = (self.clock.total, self.feed.waited)
        self.console.start(first, steps)
        pending: tuple[int, Any] | None = None
        self.clock.start()
        for step in range(first + 1, steps + 1):
            if release_seconds and pending:
                self._log(*pending)
                pending = None
                time.sleep(release_seconds)
            with self.profiler.step(step):
                state, step_metrics = train_step(state, next(self.feed), *self.agreement.ballot())
            if pending:
                self._log(*pending)  # of the step before: the devices are busy with this one
            pending = (step, step_metrics)
            evaluation_due = _is_due(step, self.config.eval.every_steps, steps)
            saving_due = _is_due(step, self.config.checkpoint.every_steps, steps)
            saving_due |= self.checkpoints.due(step)
            stopping = bool(self.agreement)
            traced = self.profiler.ends_with(step)
            if evaluation_due or saving_due or stopping or traced:
                self._log(*pending)
                pending = None
                self.clock.stop()
                self.log_rate.measure_again()
                if traced:  # and the devices are done, for `_log` has fetched what they made
                    with self.watchdog.paused():
                        self.profiler.close()
                if evaluation_due and not stopping:
                    self._evaluate(step, state)
                stopping = stopping or bool(self.agreement)
                if saving_due or stopping:
                    self._save(state)
                self.clock.start()
            if stopping:
                self._say_stopped(step)
                return
        self._say_trained(steps)

    def _compile(self, state: TrainState) -> jax.stages.Compiled:
        began = time.perf_counter()
        step_alone = make_train_step(self.config, self.optimizer, self.mesh)
        train_step: Any = self.agreement.voting(step_alone, donate_argnums=(0,))
        batch = abstract_batch(self.config, self.mesh)
        compiled = memory.compile_step(train_step.lower(state, batch, *self.agreement.ballot()))
        self.console.say(f"compiled the train step in {time.perf_counter() - began:.1f} s")
        return compiled

    def _restore_or_start(self) -> TrainState:
        """The state and its clock; the data stream is moved to its place."""
        abstract = abstract_state(self.config, self.optimizer)
        self._check_layout(abstract.params)
        memory.check(abstract, self.mesh)
        self.synced_metrics: dict[str, int] | None = None
        if self.checkpoints.latest_step is None:
            state = init_state(self.config, self.optimizer, self.mesh)
            n = throughput.parameter_count(state.params)
            self.console.say(f"new run in {self.folder}: {n:,} parameters, {describe_model(self.config)}")
            self.clock = throughput.Clock(total=0.0, began_at=time.time())
            return state
        with storage_errors_are_user_errors(f"reading the checkpoints of {self.folder}", self.folder):
            state, data_state, facts = self.checkpoints.restore(
                abstract, self.mesh, fresh={"recent": bad_steps.fresh()}
            )
        run_folder.check_same_config(self.folder, from_saved(facts["config"]), self.config)
        if facts["tokenizer_sha256"] != self.mixture.tokenizer.sha256:
            raise UserError(
                f"checkpoint {int(state.step)} of {self.folder} belongs to another tokenizer than the data: "
                "put the run's own checkpoints back, or start a new run with --workdir"
            )
        # Absent from checkpoints of earlier versions.
        if facts.get("data_fingerprint", self.mixture.fingerprint) != self.mixture.fingerprint:
            raise UserError(
                f"data.source, data.mixture: not the data that {self.folder} was trained on (fingerprint "
                f"{self.mixture.fingerprint[:12]}, not {facts['data_fingerprint'][:12]}): name the data it "
                "began with, wherever it lies now, or start a new run with --workdir"
            )
        before = facts["config"]["train"]["steps"]
        if said := change_of_schedule(self.config.optim, before, self.config.train.steps, int(state.step)):
            self.console.say(said)
        self.feed.set_state(data_state)
        began_at = facts.get("began_at", time.time() - facts["seconds_trained"])
        self.clock = throughput.Clock(total=facts["seconds_trained"], began_at=began_at)
        self.synced_metrics = facts.get("metrics")
        return state

    def _check_layout(self, params: Any) -> None:
        """Shows how parameters are split, and refuses a mesh that fails to split them."""
        if self.mesh.size == 1:
            return
        sizes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
        self.console.layout(sizes, sharding.layout_of(params, self.mesh))
        sharding.check_split(params, self.mesh)

    def _log(self, step: int, step_metrics: Any) -> None:
        results = self.agreement.count(jax.device_get(step_metrics))
        self.watchdog.tick(step)
        values = {name: float(value) for name, value in results.items()}
        bad = bool(values.pop("bad"))
        if said := self.policy.see(step, values["loss"], values["gradient_norm"], bad):
            self.console.say(said)
        if step % self.config.log.every_steps and step != self.config.train.steps and not bad:
            return
        seconds = self.clock.now()
        rate, mfu = self.log_rate.at(step, seconds)
        self.console.report(step, loss=values["loss"], tokens_per_second=rate, mfu=mfu)
        # JSON has no way to write what is not finite.
        line = {f"train/{name}": value for name, value in values.items() if math.isfinite(value)}
        line |= {"train/skipped": 1.0} if bad else {}
        timing = {"tokens_per_second": rate, "seconds_trained": seconds}
        timing |= {"mfu": mfu} if math.isfinite(mfu) else {}
        timing |= {"input_wait": self._input_wait(seconds), "goodput": self.clock.goodput()}
        self.writer.write(step, {"tokens_seen": step * self.tokens_per_step, **line, **timing})

    def _input_wait(self, seconds: float) -> float:
        """Share of the training time since the line before that the loop spent waiting for its input."""
        before, waited_before = self.last_logged
        self.last_logged = (seconds, self.feed.waited)
        return (self.feed.waited - waited_before) / max(seconds - before, 1e-9)

    def _owes_evaluation(self, step: int) -> bool:
        """Whether somebody stopped the run between this step and the evaluation that was due after it."""
        due = step > 0 and _is_due(step, self.config.eval.every_steps, self.config.train.steps)
        if not due:
            return False
        owes = distributed.is_primary() and not metrics_lib.is_evaluated(self.folder, step)
        return distributed.broadcast("owes evaluation", str(owes)) == "True"

    def _evaluate(self, step: int, state: TrainState) -> None:
        result = evaluate(
            self._eval_step,
            state.params,
            self._heldout(),
            n_bytes=self.heldout.utf8_bytes,
            n_topk_layers=self.config.model.n_topk_layers,
            stopped=lambda: bool(self.agreement),
        )
        if result is None:
            return
        with self.watchdog.paused():  # as long as the user asked for
            sample = self._sample(state)
        if result["tokens"] < self.mixture.heldout_text_tokens:
            result["of_tokens"] = self.mixture.heldout_text_tokens
        self.console.say(evaluation_line(step, result))
        self.console.say(f"sample: {sample}")
        line = {f"eval/{name}": value for name, value in result.items()}
        tokens_seen = step * self.tokens_per_step
        self.writer.write(step, {"tokens_seen": tokens_seen, **line, "eval/sample": sample})

    def _eval_step(self, params: Any, batch: DeviceBatch) -> dict[str, Any]:
        sums = jax.device_get(self.eval_step(params, batch, *self.agreement.ballot()))
        self.watchdog.tick()
        return self.agreement.count(sums)

    def _heldout(self) -> Iterator[DeviceBatch]:
        batch_size = _rounded_up(self.config.eval.batch_size, self.mesh)
        context_length = self.config.model.context_length
        # Documents are packed one after another, so every process makes whole batches.
        rows = sharding.local_rows(self.batch_sharding, batch_size)
        for batch in heldout_batches(
            self.mixture, context_length=context_length, batch_size=batch_size, part=self.heldout
        ):
            yield to_devices(batch, self.batch_sharding, batch_size, rows)

    def _sample(self, state: TrainState) -> str:
        tokenizer, settings = self.mixture.tokenizer, self.config.eval
        prompt = [tokenizer.separator_id, *tokenizer.encode(settings.sample_prompt).tolist()]
        continuation = generate_tokens(
            sharding.outside_shard_map(self.config.model, self.mesh),
            state.params,
            prompt,
            max_new_tokens=settings.sample_tokens,
            temperature=0.7,
            seed=self.config.train.seed,
            stop_token=tokenizer.separator_id,
        )
        return settings.sample_prompt + tokenizer.decode(continuation)

    def _save(self, state: TrainState) -> None:
        step = int(state.step)
        facts = {
            "config": self.config.to_dict(),
            "tokenizer_sha256": self.mixture.tokenizer.sha256,
            "data_fingerprint": self.mixture.fingerprint,
            "step": step,
            "tokens_seen": step * self.tokens_per_step,
            "seconds_trained": self.clock.total,
            "began_at": self.clock.began_at,
            "process_count": jax.process_count(),
            "versions": versions("topklm", "jax", "flax", "grain"),
        }
        with self.watchdog.paused():  # storage has a patience of its own
            if distributed.is_primary():
                run_folder.check_owned(self.folder)
            facts["metrics"] = self.writer.sync()
            with storage_errors_are_user_errors(f"saving checkpoint {step} in {self.folder}", self.folder):
                self.checkpoints.save(state, self.feed.state(), facts)

    def _say_stopped(self, step: int) -> None:
        self._wait_for_checkpoint(step)
        self.console.say(
            f"{self.stop.signal_name}: stopped after step {step:,} of {self.config.train.steps:,}; saved in "
            f"{self.folder}. Resume with the same command"
        )

    def _say_trained(self, steps: int) -> None:
        self._wait_for_checkpoint(steps)
        self.console.table(f"{self.folder}: trained", summary(self.folder, steps))

    def _say_finished(self, step: int) -> None:
        self.console.say(
            f"{self.folder} is finished at step {step:,}: nothing to train. Go on with a larger "
            "--config.train.steps, or start a new run with --workdir"
        )
        self.console.table(str(self.folder), summary(self.folder, step))

    def _wait_for_checkpoint(self, step: int) -> None:
        saving = storage_errors_are_user_errors(f"saving checkpoint {step} in {self.folder}", self.folder)
        with self.watchdog.paused(), saving:
            self.checkpoints.wait()
        if said := self.policy.finish():
            self.console.say(said)
        self.console.finish()


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _rounded_up(batch_size: int, mesh: jax.sharding.Mesh) -> int:
    ways = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    return -(-batch_size // ways) * ways
