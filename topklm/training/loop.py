"""The training run: open, restore or start, then step, log, evaluate and save until done.

The order inside the loop is what resuming rests on. A step's metrics are fetched while the next step already
runs (large steps on CPUs take turns: `release_seconds`); before a checkpoint everything up to its step is
written out, so whatever is on disk after a kill belongs to steps up to a checkpoint, or is dropped and done
again. Every process of a run takes the same turns: all agree first on anything that one alone knows (a
signal, a damaged file).
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import math
import time
from typing import Any

import jax

from topklm import distributed
from topklm.checkpoint import run_folder
from topklm.checkpoint.manager import CheckpointManager, TraceManager
from topklm.config import Config
from topklm.data.stream import DeviceBatch, Feed, heldout_part, train_stream
from topklm.errors import UserError
from topklm.eval.tasks import Task
from topklm.imports import versions
from topklm.inference.scheduler import generate_tokens
from topklm.model import topk
from topklm.runtime.process import StopRequest, stop_on_signal
from topklm.runtime.watchdog import Watchdog
from topklm.storage.files import AnyPath, storage_errors_are_user_errors
from topklm.training import metrics, only, syntax
from topklm.training.evaluation import (
    TaskEvaluation,
    evaluate,
    find_tasks,
    heldout_feed,
    make_eval_step,
)
from topklm.training.metrics import Console, describe_model, evaluation_line, next_commands, summary_rows
from topklm.training.setup import PreparedRun, check_memory, initial_parameters, prepare_run
from topklm.training.step import (
    AnomalyPolicy,
    StopSync,
    TrainState,
    abstract_batch,
    abstract_state,
    change_of_schedule,
    compile_step,
    empty_window,
    init_state,
    make_optimizer,
    make_train_step,
    release_seconds,
)
from topklm.training.throughput import Clock, Profiler, Rate, parameter_count


def train(config: Config, workdir: AnyPath, stop: StopRequest | None = None) -> None:
    """Trains the run in `workdir`, from its newest checkpoint if it has one, to `config.train.steps`.

    The folder is local or in a bucket, and created if missing. `stop` asks the run to stop; by default
    Ctrl-C, SIGTERM and SIGHUP do, from now on. UserError for anything the user can mend, and for a loss that
    is no longer finite.
    """
    console = Console(quiet=not distributed.is_primary())
    # A task, a treebank or a tracker that is not there shows before the data are prepared.
    tasks = find_tasks(config.eval)
    syntax.check_there(config)
    config = only.resolved(config)
    tracked = metrics.find(config.log.trackers) if distributed.is_primary() else {}
    hearing = stop_on_signal(distributed.announce_stop) if stop is None else contextlib.nullcontext(stop)
    with hearing as request, prepare_run(config, workdir, console) as run:
        _Loop(run, console, request, tracked, tasks).train()


class _Loop:
    """One process's part in a run: all that its steps need, opened once."""

    def __init__(
        self,
        run: PreparedRun,
        console: Console,
        stop: StopRequest,
        tracked: Mapping[str, metrics.Factory],
        tasks: Sequence[Task],
    ):
        self.tracked = tracked
        self.run, self.console, self.stop = run, console, stop
        self.config, self.folder, self.layout = config, folder, layout = run.config, run.folder, run.layout
        self.stop_sync = StopSync(layout, stop)
        self.heldout = heldout_part(run.mixture, config.eval.max_tokens)
        self.tasks = TaskEvaluation(config, tasks, run.mixture.tokenizer, layout) if tasks else None
        self.syntax = syntax.open_sentences(config, run.mixture.tokenizer, layout)
        if self.syntax.said:
            console.say(f"data.syntax = {config.data.syntax}: {self.syntax.said}")
        self.optimizer = only.selective(make_optimizer(config.optim, config.train.steps), config)
        with self._storage("opening the checkpoints of"):
            self.checkpoints = CheckpointManager(
                folder / run_folder.CHECKPOINTS_FOLDER, config.checkpoint, console.say
            )
            self.trace = TraceManager(folder / run_folder.TRACE_FOLDER, config.traced_steps, console.say)
        stream = train_stream(
            run.mixture,
            context_length=config.model.context_length,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            rows=layout.process_rows(config.train.batch_size),
        )
        self.feed = Feed(stream, lambda batch: layout.put_batch(batch, config.train.batch_size))
        self.policy = AnomalyPolicy(
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
                    self.console.say(
                        f"{self.folder} is finished at step {first:,}: nothing to train. Go on with a larger "
                        "--config.train.steps, or start a new run with --workdir"
                    )
                    self._show_summary(str(self.folder), first)
                    return
                if first:
                    self.console.say(f"continuing {self.folder} from its checkpoint of step {first:,}")
                self.writer: metrics.MetricsWriter | metrics.NoWriter = metrics.NoWriter()
                if distributed.is_primary():
                    self.writer = metrics.MetricsWriter(
                        self.folder, first, self.synced_metrics, self.console.say
                    )
                stack.callback(self.writer.close)
                self.trackers = metrics.Trackers(
                    self.tracked, self.folder, self.config.to_dict(), self.console.say
                )
                stack.callback(self.trackers.close)
                self.profiler = Profiler(self.config.profiled_steps, self.folder, first, self.console.say)
                stack.callback(self.profiler.close)
                train_step = self._make_steps(state)
                self.stop.begin_training()
                if self._owes_evaluation(first):
                    self._evaluate(first, state)
                self._steps(train_step, state, first)
        finally:
            self.run.mixture.close()
            self.console.finish()
            with self._storage("saving a checkpoint in"):
                self.trace.close()
                self.checkpoints.close()

    def _steps(self, train_step: jax.stages.Compiled, state: TrainState, first: int) -> None:
        steps = self.config.train.steps
        rest_seconds = release_seconds(train_step)
        self.log_rate = Rate(self.config, self.run.tokens_per_step, first, self.clock.total)
        self.feed.wait_share(self.clock.total)
        self.console.start(first, steps)
        pending: tuple[int, Any] | None = None
        self.clock.start()
        for step in range(first + 1, steps + 1):
            if (k := self.config.topk_k_at(step)) != self.config.topk_k_at(step - 1) and step > first + 1:
                if pending:
                    self._log(*pending)
                    pending = None
                self.clock.stop()
                with self.watchdog.paused():
                    train_step = self._compile_step(state, k)
                self.log_rate.measure_again()
                self.clock.start()
            if rest_seconds and pending:
                self._log(*pending)
                pending = None
                time.sleep(rest_seconds)
            with self.profiler.step(step):
                with self._saved_without_data(state, pending):
                    batch = next(self.feed)
                given = batch, *self.syntax.batch(step), *self.stop_sync.stop_flag()
                state, step_metrics = train_step(state, *given)
            if pending:
                self._log(*pending)  # of the step before: the devices are busy with this one
            pending = (step, step_metrics)
            evaluation_due = _is_due(step, self.config.eval.every_steps, steps)
            saving_due = _is_due(step, self.config.checkpoint.every_steps, steps)
            saving_due |= self.checkpoints.due(step)
            stopping = bool(self.stop_sync)
            profiled = self.profiler.ends_with(step)
            tracing_due = self.trace.due(step)
            if evaluation_due or saving_due or stopping or profiled or tracing_due:
                self._log(*pending)
                pending = None
                self.clock.stop()
                self.log_rate.measure_again()
                if profiled:  # and the devices are done, for `_log` has fetched what they made
                    with self.watchdog.paused():
                        self.profiler.close()
                if evaluation_due and not stopping:
                    with self._saved_without_data(state):
                        self._evaluate(step, state)
                stopping = stopping or bool(self.stop_sync)
                if tracing_due:
                    self._save_for_trace(state)
                if saving_due or stopping:
                    self._save(state)
                self.clock.start()
            if stopping:
                self._say_stopped(step)
                return
        self._wait_for_checkpoint(steps)
        self._show_summary(f"{self.folder}: trained", steps)

    @contextlib.contextmanager
    def _saved_without_data(
        self, state: TrainState, pending: tuple[int, Any] | None = None
    ) -> Iterator[None]:
        """Saves the state if the block finds no data to be had and the process is alone, and raises on."""
        try:
            yield
        except UserError:
            if distributed.process_count() == 1 and (step := int(state.step)):
                if pending:
                    self._log(*pending)
                self._save(state)
                self._wait_for_checkpoint(step)
                self.console.say(f"no more data: saved step {step:,} in {self.folder}")
            raise

    def _make_steps(self, state: TrainState) -> jax.stages.Compiled:
        """Makes the evaluation step, and compiles and returns the train step."""
        self.eval_step = self.stop_sync.with_stop_flag(make_eval_step(self.config, self.layout))
        self.task_step = self.stop_sync.with_stop_flag(self.tasks.program) if self.tasks else None
        return self._compile_step(state, self.config.topk_k_at(int(state.step) + 1))

    def _compile_step(self, state: TrainState, k: int) -> jax.stages.Compiled:
        """Compiles the train step whose TopK layers keep k neurons."""
        began = time.perf_counter()
        model = dataclasses.replace(self.config.model, topk_k=k)
        config = dataclasses.replace(self.config, model=model)
        step_alone = make_train_step(config, self.optimizer, self.layout)
        train_step: Any = self.stop_sync.with_stop_flag(step_alone, donate_argnums=(0,))
        batch = abstract_batch(self.config, self.layout)
        given = batch, *self.syntax.batch(1), *self.stop_sync.stop_flag()
        compiled = compile_step(train_step.lower(state, *given))
        kept = f" that keeps {k} neurons" if self.config.train.topk_k_start else ""
        self.console.say(f"compiled the train step{kept} in {time.perf_counter() - began:.1f} s")
        return compiled

    def _restore_or_start(self) -> TrainState:
        """Returns the state, sets the clock, and moves the data stream to its position."""
        abstract = abstract_state(self.config, self.optimizer)
        if self.layout.size > 1:
            sizes = " x ".join(f"{axis} {size}" for axis, size in self.layout.mesh.shape.items())
            self.console.layout(sizes, self.layout.describe_parameters(abstract.params))
            self.layout.check_split(abstract.params)
        check_memory(abstract, self.layout)
        self.synced_metrics: dict[str, int] | None = None
        if self.checkpoints.latest_step is None:
            state = init_state(self.config, self.optimizer, self.layout)
            if self.config.train.init:
                state = state._replace(params=initial_parameters(self.run))
            if self.config.fisher_draws:
                chances = only.importance(self.run, state.params, self.console.say)
                state = state._replace(opt_state=state.opt_state._replace(chances=chances))
            n = parameter_count(state.params)
            begun = f", begun with those of {other}" if (other := self.config.train.init) else ""
            about = describe_model(self.config)
            self.console.say(f"new run in {self.folder}: {n:,} parameters{begun}, {about}")
            self.clock = Clock(total=0.0, began_at=time.time())
            self._begin_trace(state)
            return state
        with self._storage("reading the checkpoints of"):
            state, data_state, facts = self.checkpoints.restore(
                abstract, self.layout, fresh={"recent": empty_window()}
            )
        self.run.check_facts(int(state.step), facts)
        self.syntax.check_facts(facts)
        before = facts["config"]["train"]["steps"]
        if said := change_of_schedule(self.config.optim, before, self.config.train.steps, int(state.step)):
            self.console.say(said)
        self.feed.set_state(data_state)
        began_at = facts.get("began_at", time.time() - facts["seconds_trained"])
        self.clock = Clock(total=facts["seconds_trained"], began_at=began_at)
        self.synced_metrics = facts.get("metrics")
        self._begin_trace(state)
        return state

    def _log(self, step: int, step_metrics: Any) -> None:
        results = self.stop_sync.read_stop_flag(jax.device_get(step_metrics))
        self.watchdog.tick(step)
        values = {name: float(value) for name, value in results.items()}
        bad = bool(values.pop("bad"))
        if said := self.policy.observe(step, values["loss"], values["gradient_norm"], bad):
            self.console.say(said)
        if step % self.config.log.every_steps and step != self.config.train.steps and not bad:
            return
        seconds = self.clock.now()
        rate, mfu = self.log_rate.at(step, seconds)
        self.console.report(step, loss=values["loss"], tokens_per_second=rate, mfu=mfu)
        line = {f"train/{name}": value for name, value in values.items()}
        line |= {"train/skipped": 1.0} if bad else {}
        line |= {"tokens_per_second": rate, "seconds_trained": seconds, "mfu": mfu}
        line |= {"input_wait": self.feed.wait_share(seconds), "goodput": self.clock.goodput()}
        # JSON has no way to write a number that is not finite.
        self._write(step, {name: value for name, value in line.items() if math.isfinite(value)})

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        line = {"tokens_seen": step * self.run.tokens_per_step, **values}
        self.writer.write(step, line)
        self.trackers.write(step, line)

    def _owes_evaluation(self, step: int) -> bool:
        """Tells whether the run was stopped between this step and the evaluation that was due after it."""
        due = step > 0 and _is_due(step, self.config.eval.every_steps, self.config.train.steps)
        if not due:
            return False
        owes = distributed.is_primary() and not metrics.is_evaluated(self.folder, step)
        return distributed.broadcast("owes evaluation", str(owes)) == "True"

    def _evaluate(self, step: int, state: TrainState) -> None:
        result = evaluate(
            self._eval_step,
            state.params,
            heldout_feed(self.config, self.run.mixture, self.layout, self.heldout),
            n_bytes=self.heldout.utf8_bytes,
            n_topk_layers=self.config.model.n_topk_layers,
            stopped=lambda: bool(self.stop_sync),
        )
        if result is None or (figures := self._evaluate_tasks(state.params)) is None:
            return
        with self.watchdog.paused():  # as long as the user asked for
            sample = self._sample(state)
        if result["tokens"] < self.run.mixture.heldout_text_tokens:
            result["of_tokens"] = self.run.mixture.heldout_text_tokens
        self.console.say(evaluation_line(step, result))
        self.console.say(f"sample: {sample}")
        if figures:
            said = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            self.console.say(f"tasks: {said}")
        found = {**figures, **result, "sample": sample}
        self._write(step, {f"eval/{name}": value for name, value in found.items()})

    def _evaluate_tasks(self, params: Any) -> dict[str, float] | None:
        """Returns figures of tasks by name, none without tasks; None if the run is to stop."""
        if self.tasks is None:
            return {}
        program = functools.partial(self._run, self.task_step)
        return self.tasks.evaluate(params, program, lambda: bool(self.stop_sync))

    def _eval_step(self, params: Any, batch: DeviceBatch) -> dict[str, Any]:
        return self._run(self.eval_step, params, batch)

    def _run(self, step: Any, *arguments: Any) -> dict[str, Any]:
        results = jax.device_get(step(*arguments, *self.stop_sync.stop_flag()))
        self.watchdog.tick()
        return self.stop_sync.read_stop_flag(results)

    def _sample(self, state: TrainState) -> str:
        tokenizer, settings = self.run.mixture.tokenizer, self.config.eval
        prompt = [tokenizer.separator_id, *tokenizer.encode(settings.sample_prompt).tolist()]
        continuation = generate_tokens(
            topk.for_gspmd(self.config.model, self.layout.size),
            state.params,
            prompt,
            max_new_tokens=settings.sample_tokens,
            temperature=0.7,
            seed=self.config.train.seed,
            stop_token=tokenizer.separator_id,
        )
        return settings.sample_prompt + tokenizer.decode(continuation)

    def _facts(self, step: int) -> dict[str, Any]:
        """Returns what checkpoints of all kinds hold besides arrays."""
        return {
            **self.run.facts(),
            "step": step,
            "tokens_seen": step * self.run.tokens_per_step,
            "seconds_trained": self.clock.total,
            "began_at": self.clock.began_at,
            "process_count": jax.process_count(),
            "versions": versions("topklm", "jax", "flax", "grain"),
            **self.syntax.facts(),
        }

    def _begin_trace(self, state: TrainState) -> None:
        """Drops entries of later steps from the trace; takes that of a new run before it trains."""
        step = int(state.step)
        with self._storage("opening the trace of"):
            self.trace.begin_after(step or -1)
        if self.trace.due(step) and step < self.config.train.steps:
            self.trace.hold(step, state.params, self._facts(step))
        elif self.trace.due(step):
            self._save_for_trace(state)

    def _save_for_trace(self, state: TrainState) -> None:
        with self.watchdog.paused():
            self.trace.save(int(state.step), state.params, self._facts(int(state.step)))

    def _save(self, state: TrainState) -> None:
        step = int(state.step)
        facts = self._facts(step)
        with self.watchdog.paused():  # storage has a patience of its own
            if distributed.is_primary():
                run_folder.check_owned(self.folder)
            facts["metrics"] = self.writer.sync()
            self.trace.settle_before(step)
            with self._storage(f"saving checkpoint {step} in"):
                self.checkpoints.save(state, self.feed.state(), facts)

    def _say_stopped(self, step: int) -> None:
        self._wait_for_checkpoint(step)
        self.console.say(
            f"{self.stop.signal_name}: stopped after step {step:,} of {self.config.train.steps:,}; saved in "
            f"{self.folder}. Resume with the same command"
        )

    def _show_summary(self, title: str, step: int) -> None:
        self.console.table(title, summary_rows(metrics.read(self.folder), step))
        self.console.say("next:")
        for command in next_commands(self.folder):
            self.console.say(f"  {command}")

    def _wait_for_checkpoint(self, step: int) -> None:
        with self.watchdog.paused(), self._storage(f"saving checkpoint {step} in"):
            self.checkpoints.wait()
        if said := self.policy.finish():
            self.console.say(said)
        self.console.finish()

    def _storage(self, doing: str) -> contextlib.AbstractContextManager[None]:
        """Turns a refusal of the disk or bucket into a UserError; `doing` is followed by the folder."""
        return storage_errors_are_user_errors(f"{doing} {self.folder}", self.folder)


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)
