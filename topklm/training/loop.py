"""The training run: prepare, restore or start, then step, log, evaluate and save until done.

The order inside the loop is what resuming rests on. A step's metrics are fetched while the next step
already runs; before a checkpoint everything up to its step is written out, so whatever is on disk after a
kill belongs to steps up to a checkpoint, or is dropped and done again.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import pathlib
import time
from typing import Any

import jax
import numpy as np

from topklm import run_folder, sharding
from topklm.config import Config
from topklm.data.mixture import Mixture
from topklm.data.prepare import prepare
from topklm.data.stream import heldout_batches, train_stream
from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.files import write_atomically
from topklm.inference.generate import generate_tokens
from topklm.training import metrics as metrics_lib
from topklm.training import throughput
from topklm.training.checkpoints import Checkpoints
from topklm.training.console import Console, duration, evaluation_line, percentages
from topklm.training.evaluation import evaluate
from topklm.training.feed import DeviceBatch, Feed, to_devices
from topklm.training.interruption import StopRequest, stop_on_signal
from topklm.training.optimizer import make_optimizer
from topklm.training.step import (
    TrainState,
    abstract_state,
    init_state,
    make_eval_step,
    make_train_step,
)


def train(config: Config, workdir: pathlib.Path, console: Console | None = None) -> None:
    """Trains the run in `workdir`, from its newest checkpoint if it has one, to `config.train.steps`.

    Args:
        config: The experiment.
        workdir: The run folder; created if missing.
        console: Where progress is shown.

    Raises:
        UserError: For anything the user can mend, and for a loss that is no longer finite.
    """
    console = console or Console()
    mesh = sharding.make_mesh(config.mesh)
    with run_folder.owned(workdir):
        mixture = prepare(config.data, console.say)
        config = _with_vocabulary(config, mixture)
        sharding.check(config, mesh)
        if not mixture.heldout_text_tokens:
            raise UserError(
                "data.source, data.mixture: no dataset has held-out text to evaluate on; prepare one with "
                "--heldout or --heldout-fraction"
            )
        if run_folder.has_checkpoint(workdir):
            run_folder.check_same_run(workdir, config)
            _check_tokenizer(workdir, mixture)
        with disk_errors_are_user_errors(f"writing to the run folder {workdir}"):
            write_atomically(workdir / run_folder.CONFIG_FILE, _pretty(config.to_dict()).encode())
            mixture.tokenizer.save(workdir / run_folder.TOKENIZER_FILE)
        _Run(config, workdir, mixture, mesh, console).train()


class _Run:
    """One process's part in a run: what the loop needs at hand, opened once."""

    def __init__(
        self,
        config: Config,
        folder: pathlib.Path,
        mixture: Mixture,
        mesh: jax.sharding.Mesh,
        console: Console,
    ):
        self.config, self.folder, self.mixture, self.console = config, folder, mixture, console
        self.mesh = mesh
        self.batch_sharding = sharding.batch_sharding(mesh)
        self.tokens_per_step = config.train.batch_size * config.model.context_length
        self.optimizer = make_optimizer(config.optim, config.train.steps)
        self.eval_step = make_eval_step(config, mesh)
        with disk_errors_are_user_errors(f"opening the checkpoints of {folder}"):
            self.checkpoints = Checkpoints(folder / run_folder.CHECKPOINTS_FOLDER, config.checkpoint)
        stream = train_stream(
            mixture,
            context_length=config.model.context_length,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            rows=sharding.local_rows(self.batch_sharding, config.train.batch_size),
        )
        self.feed = Feed(stream, lambda b: to_devices(b, self.batch_sharding, config.train.batch_size))

    def train(self) -> None:
        """Runs to the end, or to the point where somebody asks to stop."""
        try:
            saved = self.checkpoints.latest_step or 0
            if saved >= self.config.train.steps and not self._owes_evaluation(saved):
                self._say_finished()
                return
            state, seconds = self._restore_or_start()
            first = int(state.step)
            self.clock = throughput.Clock(seconds)
            writer = metrics_lib.MetricsWriter(self.folder, resume_step=first)
            with contextlib.closing(writer) as self.writer, stop_on_signal() as stop:
                if self._owes_evaluation(first):
                    self._evaluate(first, state)
                self._steps(state, first, stop)
        finally:
            self.console.finish()
            with disk_errors_are_user_errors(f"saving a checkpoint in {self.folder}"):
                self.checkpoints.close()

    def _steps(self, state: TrainState, first: int, stop: StopRequest) -> None:
        steps = self.config.train.steps
        train_step = self._compile(state)
        self.log_rate = throughput.Rate(self.config, self.tokens_per_step, first, self.clock.total)
        self.last_logged = (self.clock.total, self.feed.waited)
        self.console.start(first, steps)
        pending: tuple[int, Any] | None = None
        self.clock.start()
        for step in range(first + 1, steps + 1):
            state, step_metrics = train_step(state, next(self.feed))
            if pending:
                self._log(*pending)  # of the step before: the devices are busy with this one
            pending = (step, step_metrics)
            evaluation_due = _is_due(step, self.config.eval.every_steps, steps)
            saving_due = _is_due(step, self.config.checkpoint.every_steps, steps)
            stopping = bool(stop)
            if evaluation_due or saving_due or stopping:
                self._log(*pending)
                pending = None
                self.clock.stop()
                if evaluation_due and not stopping:
                    self._evaluate(step, state)
                    stopping = bool(stop)
                if saving_due or stopping:
                    self._save(state)
                self.clock.start()
            if stopping:
                self._say_stopped(step, stop)
                return
        self._say_trained(steps)

    def _compile(self, state: TrainState) -> Callable:
        began = time.perf_counter()
        train_step = make_train_step(self.config, self.optimizer, self.mesh)
        spec = jax.ShapeDtypeStruct(
            (self.config.train.batch_size, self.config.model.context_length),
            np.int32,
            sharding=self.batch_sharding,
        )
        batch = {name: spec for name in ("inputs", "targets", "segment_ids", "positions")}
        batch["loss_weights"] = spec.update(dtype=np.float32)
        compiled = train_step.lower(state, batch).compile()
        self.console.say(f"compiled the train step in {time.perf_counter() - began:.1f} s")
        return compiled

    def _restore_or_start(self) -> tuple[TrainState, float]:
        """The state and the seconds already trained; the data stream is moved to its place."""
        if self.checkpoints.latest_step is None:
            state = init_state(self.config, self.optimizer, self.mesh)
            n = throughput.parameter_count(state.params)
            self.console.say(f"new run in {self.folder}: {n:,} parameters, {_shape(self.config)}")
            return state, 0.0
        abstract = abstract_state(self.config, self.optimizer)
        state, data_state, facts = self.checkpoints.restore(abstract, self.mesh)
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
        self.feed.set_state(data_state)
        self.console.say(f"continuing {self.folder} from its checkpoint of step {int(state.step):,}")
        return state, facts["seconds_trained"]

    def _log(self, step: int, step_metrics: Any) -> None:
        values = {name: float(value) for name, value in jax.device_get(step_metrics).items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
            self._stop_not_finite(step, values)
        if step % self.config.log.every_steps and step != self.config.train.steps:
            return
        seconds = self.clock.now()
        rate, mfu = self.log_rate.at(step, seconds)
        self.console.report(step, loss=values["loss"], tokens_per_second=rate, mfu=mfu)
        line = {f"train/{name}": value for name, value in values.items()}
        timing = {"tokens_per_second": rate, "mfu": mfu, "seconds_trained": seconds}
        timing["input_wait"] = self._input_wait(seconds)
        self.writer.write(step, {"tokens_seen": step * self.tokens_per_step, **line, **timing})

    def _input_wait(self, seconds: float) -> float:
        """Share of the training time since the line before that the loop spent waiting for its input."""
        before, waited_before = self.last_logged
        self.last_logged = (seconds, self.feed.waited)
        return (self.feed.waited - waited_before) / max(seconds - before, 1e-9)

    def _owes_evaluation(self, step: int) -> bool:
        """Whether somebody stopped the run between this step and the evaluation that was due after it."""
        due = step > 0 and _is_due(step, self.config.eval.every_steps, self.config.train.steps)
        return due and not metrics_lib.is_evaluated(self.folder, step)

    def _evaluate(self, step: int, state: TrainState) -> None:
        result = evaluate(
            self.eval_step,
            state.params,
            self._heldout(),
            n_bytes=self.mixture.heldout_bytes,
            n_topk_layers=self.config.model.n_topk_layers,
        )
        sample = self._sample(state)
        self.console.say(evaluation_line(step, result))
        self.console.say(f"sample: {sample}")
        line = {f"eval/{name}": value for name, value in result.items()}
        tokens_seen = step * self.tokens_per_step
        self.writer.write(step, {"tokens_seen": tokens_seen, **line, "eval/sample": sample})

    def _heldout(self) -> Iterator[DeviceBatch]:
        batch_size = _rounded_up(self.config.eval.batch_size, self.mesh)
        context_length = self.config.model.context_length
        # Documents are packed one after another, so every process makes whole batches.
        rows = sharding.local_rows(self.batch_sharding, batch_size)
        for batch in heldout_batches(self.mixture, context_length=context_length, batch_size=batch_size):
            yield to_devices(batch, self.batch_sharding, batch_size, rows)

    def _sample(self, state: TrainState) -> str:
        tokenizer, settings = self.mixture.tokenizer, self.config.eval
        prompt = [tokenizer.separator_id, *tokenizer.encode(settings.sample_prompt).tolist()]
        continuation = generate_tokens(
            self.config.model,
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
            "process_count": jax.process_count(),
            "versions": {p: importlib.metadata.version(p) for p in ("topklm", "jax", "flax", "grain")},
        }
        self.writer.sync()
        with disk_errors_are_user_errors(f"saving the checkpoint of step {step} in {self.folder}"):
            self.checkpoints.save(state, self.feed.state(), facts)

    def _stop_not_finite(self, step: int, values: dict[str, float]) -> None:
        self.checkpoints.wait()
        good = self.checkpoints.latest_step
        last = f"the last good checkpoint is step {good}" if good else "there is no checkpoint yet"
        raise UserError(
            f"step {step}: loss {values['loss']}, gradient norm {values['gradient_norm']}: no longer "
            f"finite; {last} in {self.folder}. Lower --config.optim.learning_rate (now "
            f"{self.config.optim.learning_rate}) in a new --workdir, or look at the data of that step"
        )

    def _say_stopped(self, step: int, stop: StopRequest) -> None:
        with disk_errors_are_user_errors(f"saving the checkpoint of step {step} in {self.folder}"):
            self.checkpoints.wait()
        self.console.finish()
        self.console.say(
            f"{stop.signal_name}: stopped after step {step:,} of {self.config.train.steps:,}; saved in "
            f"{self.folder}. Continue with the same command"
        )

    def _say_trained(self, steps: int) -> None:
        with disk_errors_are_user_errors(f"saving the checkpoint of step {steps} in {self.folder}"):
            self.checkpoints.wait()
        self.console.finish()
        self.console.table(f"{self.folder}: trained", self._summary())

    def _say_finished(self) -> None:
        self.console.say(
            f"{self.folder} is finished at step {self.checkpoints.latest_step:,}: nothing to train. Go on "
            "with a larger --config.train.steps, or start a new run with --workdir"
        )
        self.console.table(str(self.folder), self._summary())

    def _summary(self) -> dict[str, Any]:
        """Rows of the final table, from what is on disk."""
        newest: dict[str, Any] = {}
        for line in metrics_lib.read(self.folder):
            newest |= line
        formats: dict[str, tuple[str, Callable[[Any], str]]] = {
            "tokens_seen": ("tokens seen", "{:,}".format),
            "seconds_trained": ("time in training steps", duration),
            "train/loss": ("last train loss, nats/token", "{:.4f}".format),
            "eval/loss": ("held-out loss, nats/token", "{:.4f}".format),
            "eval/perplexity": ("held-out perplexity", "{:.2f}".format),
            "eval/bits_per_byte": ("held-out bits per byte", "{:.4f}".format),
            "eval/dead_neurons": ("dead neurons, per TopK layer", percentages),
            "eval/norm_kept": ("squared norm kept, per TopK layer", percentages),
            "eval/overlap_below": ("active in the layer below too", percentages),
        }
        rows = {label: show(newest[key]) for key, (label, show) in formats.items() if key in newest}
        example = f'topklm.load("{self.folder}").generate("The", max_new_tokens=40)'
        return {"steps": f"{self.checkpoints.latest_step:,}", **rows, "read it": example}


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _rounded_up(batch_size: int, mesh: jax.sharding.Mesh) -> int:
    ways = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    return -(-batch_size // ways) * ways


def _with_vocabulary(config: Config, mixture: Mixture) -> Config:
    """Fills in model.vocab_size from the tokenizer."""
    size, asked = mixture.tokenizer.vocab_size, config.model.vocab_size
    if asked not in (0, size):
        raise UserError(f"model.vocab_size = {asked}: must be 0 (the tokenizer's) or the tokenizer's {size}")
    model = dataclasses.replace(config.model, vocab_size=size)
    return dataclasses.replace(config, model=model)


def _check_tokenizer(folder: pathlib.Path, mixture: Mixture) -> None:
    path = folder / run_folder.TOKENIZER_FILE
    if path.exists() and type(mixture.tokenizer).load(path).sha256 != mixture.tokenizer.sha256:
        raise UserError(
            f"{path} is not the tokenizer of the data (the text or its settings changed): restore the "
            "data, or start a new run with --workdir"
        )


def _shape(config: Config) -> str:
    m = config.model
    sparse = f"TopK keeps {m.topk_k} of {m.d_model} ({m.topk_activation}) in {m.n_topk_layers}"
    return f"{m.n_layers} layers, {sparse if m.n_topk_layers else 'TopK in none'} of them"


def _pretty(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"
