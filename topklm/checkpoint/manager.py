"""Saving and restoring a run: parameters, optimizer, data position and facts, in one atomic step.

A save that fails is tried again while training goes on; a damaged checkpoint gives way to the one before.
Orbax's CheckpointManager is not used: where one process fails, it leaves the others waiting, some of them in
a collective that has no end. Here processes tell each other. The layout on disk is `checkpoint_format`'s.
"""

from collections import deque
from collections.abc import Callable, Mapping
import dataclasses
import itertools
import json
import math
import threading
import time
from typing import Any

from etils import epath
import flax.serialization
import jax
import jax.numpy as jnp

from topklm import distributed, sharding
from topklm.checkpoint import format as on_disk
from topklm.checkpoint.format import DATA, FACTS, OPTIMIZER, PARAMS, DamagedError
from topklm.checkpoint.retry import Backoff
from topklm.config import CheckpointConfig
from topklm.errors import UserError
from topklm.storage.errors import says_nothing_of_content, storage_problem
from topklm.storage.files import AnyPath, absolute
from topklm.training.step import TrainState

_MEETING_S = 600.0  # for all processes to come to the same line
_STORAGE_S = 1200.0  # for each to read or write its part; a save that takes longer has failed
_LOOK_EVERY_S = 5.0  # while something is being written by several processes

Restored = tuple[TrainState, dict[str, Any], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Patience:
    """For how long a checkpoint that cannot be written is tried again, from the first failure on."""

    while_training_s: float = 900.0
    at_end_s: float = 120.0  # when there is nothing else left to do


PATIENCE = Patience()


class CheckpointManager:
    """The checkpoints of one run; all processes of the run make the same calls in the same order.

    Saving is asynchronous: training goes on while bytes are written.
    """

    def __init__(
        self,
        folder: AnyPath,
        config: CheckpointConfig,
        say: Callable[[str], None] = print,
        patience: Patience | None = None,
    ):
        """Opens the folder, makes it if need be, and removes what a killed process left half-written.

        Args:
            folder: Holds checkpoints and nothing else.
            config: How many to keep.
            say: Is told, a line each, about damaged checkpoints and failures that are tried again.
            patience: By default `PATIENCE`.
        """
        self._folder = absolute(folder)
        self._keep, self._say, self._patience = config.keep, say, patience or PATIENCE
        steps: list[int] = []
        if distributed.is_primary():
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                on_disk.remove_old(self._folder)
            except OSError as e:
                why = storage_problem(e, self._folder)
                say(f"warning: {self._folder}: a checkpoint that was half-written cannot be removed: {why}")
            steps = on_disk.complete_steps(self._folder)
        # A file system or bucket may not show all hosts the same.
        self._steps: list[int] = json.loads(
            distributed.broadcast("checkpoints", json.dumps(steps), _MEETING_S)
        )
        self._pace = _Pace()
        self._backoff = Backoff(self._patience.while_training_s)
        self._asked: tuple[TrainState, Mapping[str, Any], Mapping[str, Any]] | None = None
        self._save: _Save | None = None
        self._failure: str | None = None  # of the newest save, until one succeeds
        self._look_at = 0  # step
        self._retry_at: int | None = None  # step

    @property
    def latest_step(self) -> int | None:
        """Newest complete checkpoint, or None; one that is still being written does not count."""
        return max(self._steps, default=None)

    def save(self, state: TrainState, data_state: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Starts saving; a step that is already saved is left as it is.

        A failure of the storage is told to `say`, and `due` and `wait` see to another attempt.

        Args:
            state: The training state; the next step may be given its buffers once this returns.
            data_state: JSON-able state of the data iterator after exactly `state.step` batches.
            facts: JSON-able: config, tokenizer sha256, tokens seen, seconds trained, versions.

        Raises:
            UserError: If nothing could be written for as long as patience lasts.
        """
        step = int(state.step)
        if self._finish():
            self._plan_retry(step, steps=0)
        if step not in self._steps:
            self._asked = (state, data_state, facts)
            self._begin()

    def due(self, step: int) -> bool:
        """Whether the state after this step shall be saved because an earlier one could not be.

        To be asked after every step. The same in all processes, which exchange a word every few seconds while
        something is being written, and else none.

        Raises:
            UserError: As `save`.
        """
        self._pace.tick()
        if self._save and step > self._save.step:
            self._asked = None  # its memory belongs to later steps now
            if step >= self._look_at:
                answers = distributed.gather("is the save done", str(self._save.is_done()), _MEETING_S)
                if not all(answer == "True" for answer in answers):
                    self._look_at = step + self._steps_between_looks()
                elif self._finish():
                    self._plan_retry(step)
        return self._retry_at is not None and step >= self._retry_at

    def wait(self) -> None:
        """Returns when what was last saved is safely on disk; tries again until it is.

        Raises:
            UserError: If it cannot be written, and patience is over.
        """
        self._finish()
        backoff = Backoff(self._patience.at_end_s if self._asked else 0.0)
        while self._failure:
            seconds = self._seconds_to_wait(backoff)
            self._say(f"{self._failure}: will try again in {seconds:g} s, {_failures(backoff)}")
            time.sleep(seconds)
            self._begin()
            self._finish()

    def settle(self) -> int | None:
        """Waits for what is being written, whatever becomes of it; returns `latest_step` then."""
        if self._finish():
            self._say(f"{self._failure}")
        return self.latest_step

    def close(self) -> None:
        """As `settle`; to be called last, however the run ends."""
        self.settle()

    def restore(
        self, abstract_state: TrainState, mesh: jax.sharding.Mesh, fresh: Mapping[str, Any] | None = None
    ) -> Restored:
        """Reads the newest checkpoint that is whole onto `mesh`, whatever devices it was saved from.

        A damaged one is renamed to `<step>.damaged-<n>`, once an older one is found to be whole. Damaged is
        one whose folder is there, but something in it is missing, does not parse or has another checksum.
        Refused access, a server that does not answer and errors of the disk itself are no damage.

        Args:
            abstract_state: Shapes and dtypes, as from `jax.eval_shape`.
            mesh: Where the arrays shall live.
            fresh: Fields of the state that checkpoints of earlier versions lack, and their values then.

        Returns:
            The state, the data iterator's state, and the facts.

        Raises:
            UserError: If the checkpoint holds another model (each array that differs is named), or if all are
                damaged (each is named).
        """
        if not self._steps:
            raise ValueError("there is no checkpoint to restore")
        damages: dict[int, str] = {}
        for step in sorted(self._steps, reverse=True):
            for newer, why in list(damages.items())[-1:]:
                self._say(
                    f"checkpoint {newer} of {self._folder} is damaged ({why}): going back to step {step}"
                )
            restored, damage = _try_restore(self._folder / str(step), abstract_state, mesh, fresh or {})
            if restored:
                self._set_aside(list(damages))
                return restored
            damages[step] = damage
        listed = "; ".join(f"{step}: {why}" for step, why in damages.items())
        raise UserError(
            f"every checkpoint of {self._folder} is damaged ({listed}): put back a copy of one, or start a "
            "new run with --workdir"
        )

    def _set_aside(self, steps: list[int]) -> None:
        if distributed.is_primary():
            for step in steps:
                on_disk.set_aside(self._folder / str(step))
        self._steps = [step for step in self._steps if step not in steps]

    def _begin(self) -> None:
        """Starts writing what was asked for last."""
        assert self._asked
        state, data_state, facts = self._asked
        values = {DATA: dict(data_state), FACTS: dict(facts)}
        trees = jax.tree.map(jnp.asarray, _trees(state))
        self._save = _Save(self._folder, int(state.step), trees, values, self._keep)
        self._retry_at, self._look_at = None, self._save.step + self._steps_between_looks()

    def _finish(self) -> bool:
        """Waits for what is being written, if anything is; returns whether that failed."""
        if not self._save:
            return False
        save, self._save = self._save, None
        if problem := save.result():
            self._failure = f"checkpoint {save.step} could not be written ({problem})"
            return True
        if self._failure:
            self._say(f"checkpoint {save.step} is written")
        if save.not_removed:
            self._say(
                f"warning: older checkpoints in {self._folder} could not be removed ({save.not_removed}): "
                "will try again after the next save"
            )
        self._steps = sorted({*self._steps, save.step})[-self._keep :]
        self._asked = self._failure = None
        self._backoff = Backoff(self._patience.while_training_s)
        return False

    def _plan_retry(self, step: int, steps: int | None = None) -> None:
        """After a failure found out after `step`; by default the back-off says in how many steps."""
        seconds = self._seconds_to_wait(self._backoff)
        self._retry_at = step + (self._steps_in(seconds) if steps is None else steps)
        when = f"will try again at step {self._retry_at}"
        self._say(f"{self._failure}: {when}, {_failures(self._backoff)}")

    def _seconds_to_wait(self, backoff: Backoff) -> float:
        """After a failure; the first process decides."""
        seconds = json.loads(distributed.broadcast("back-off", json.dumps(backoff.failed()), _MEETING_S))
        if seconds is None:
            last = f"that of step {self.latest_step}" if self._steps else "none"
            raise UserError(
                f"{self._failure}, {_failures(backoff)}; the last good one in {self._folder} is {last}: mend "
                "that, and resume with the same command"
            )
        return seconds

    def _steps_between_looks(self) -> int:
        return self._steps_in(_LOOK_EVERY_S) if distributed.process_count() > 1 else 1

    def _steps_in(self, seconds: float) -> int:
        """How many steps take that long, 1 or more, as the first process has measured it."""
        return int(distributed.broadcast("pace", str(self._pace.steps_in(seconds)), _MEETING_S))


def _failures(backoff: Backoff) -> str:
    return f"{backoff.failures} failure{'s' * (backoff.failures > 1)} so far"


class _Pace:
    """How long steps take."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=9)

    def tick(self) -> None:
        self._times.append(time.monotonic())

    def steps_in(self, seconds: float) -> int:
        """At least 1; what lies between two of the last steps besides training does not count."""
        times = list(self._times)
        shortest = min((after - before for before, after in itertools.pairwise(times)), default=seconds)
        return max(1, math.ceil(seconds / max(shortest, 1e-6)))


class _Save:
    """One checkpoint on its way to the disk, most of it in a thread of its own.

    The processes meet when the folders are there, when all have written their parts, and when the first one
    has made the whole. A failure of one is a failure of all.
    """

    def __init__(
        self, folder: epath.Path, step: int, trees: Mapping[str, Any], values: Mapping[str, Any], keep: int
    ):
        self.step = step
        self._folder, self._values, self._keep = folder, values, keep
        self._writing = on_disk.Writing(folder, step)
        self.not_removed = ""  # why older checkpoints could not be removed
        self._bug: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._problem = self._meet(
            "begin", self._primary(lambda: self._writing.make_folders([*trees, *values]))
        )
        if not self._problem:
            self._record = on_disk.make_record(trees)
            copied = self._attempt(lambda: self._writing.copy(trees))
            self._thread = threading.Thread(target=self._run, args=(copied,), name="checkpoint")
            self._thread.start()

    def is_done(self) -> bool:
        """Whether `result` need not wait."""
        return self._thread is None or not self._thread.is_alive()

    def result(self) -> str:
        """Waits; returns what went wrong with the storage, or nothing, the same in all processes."""
        if self._thread:
            self._thread.join()
        if self._bug:
            raise self._bug
        return self._problem

    def _run(self, copied: str) -> None:
        try:
            self._problem = self._write(copied)
        except BaseException as e:
            self._bug = e

    def _write(self, copied: str) -> str:
        written = copied or self._attempt(lambda: self._writing.finish_part(_STORAGE_S))
        problem = self._meet("write", written, _STORAGE_S)
        problem = problem or self._meet("commit", self._primary(self._commit), _STORAGE_S)
        if problem:
            self._primary(self._writing.abandon)
        else:
            self.not_removed = self._primary(self._remove_old)
        return problem

    def _commit(self) -> None:
        self._writing.commit(self._values, self._record(self._values))

    def _remove_old(self) -> None:
        """Removes all but the newest; never part of committing, for the new one is whole without it."""
        on_disk.remove_old(self._folder, self._keep)

    def _primary(self, action: Callable[[], None]) -> str:
        return self._attempt(action) if distributed.is_primary() else ""

    def _attempt(self, action: Callable[[], None]) -> str:
        """What went wrong with the storage, or nothing; a bug too, which `result` raises in this process."""
        try:
            action()
        except Exception as e:
            problem = storage_problem(e, self._folder)
            if problem is None:
                self._bug = e
            return problem or f"{type(e).__name__}: {e}"
        return ""

    def _meet(self, name: str, problem: str, timeout_s: float = _MEETING_S) -> str:
        return _meet(f"{name} a checkpoint", problem, timeout_s)


def _meet(name: str, problem: str, timeout_s: float) -> str:
    """The first of the problems that the processes have, or nothing; the same in all of them."""
    problems = enumerate(distributed.gather(name, problem, timeout_s))
    prefix = "process {}: {}" if distributed.process_count() > 1 else "{1}"
    return next((prefix.format(i, problem) for i, problem in problems if problem), "")


def _trees(state: TrainState) -> dict[str, Any]:
    """The state as nested dicts, by the item they are saved in."""
    fields = {name: flax.serialization.to_state_dict(value) for name, value in state._asdict().items()}
    return {PARAMS: fields.pop("params"), OPTIMIZER: fields}


def _try_restore(
    folder: epath.Path, abstract_state: TrainState, mesh: jax.sharding.Mesh, fresh: Mapping[str, Any]
) -> tuple[Restored | None, str]:
    """What a checkpoint holds, or where it is damaged; the same in all processes."""
    damage = ""
    try:
        contents = on_disk.Contents(folder)
        values = contents.values
        trees = _read(contents, folder, _trees(abstract_state), mesh, fresh)
    except (DamagedError, OSError, ValueError, KeyError, TypeError) as e:
        damage = _damage(e, folder)
        if not damage:
            raise
    # Before the checksums, which all processes must compute together.
    if damage := _meet("read a checkpoint", damage, _STORAGE_S):
        return None, damage
    try:
        contents.check(trees)
    except DamagedError as e:
        damage = str(e)
    if damage := _meet("check a checkpoint", damage, _MEETING_S):
        return None, damage
    fields = {PARAMS: trees[PARAMS], **_placed(fresh, mesh)}
    fields |= trees[OPTIMIZER]
    restored = {
        name: flax.serialization.from_state_dict(abstract, fields[name])
        for name, abstract in abstract_state._asdict().items()
    }
    return (TrainState(**restored), values[DATA], values[FACTS]), ""


def _read(
    contents: on_disk.Contents,
    folder: epath.Path,
    wanted: Mapping[str, Any],
    mesh: jax.sharding.Mesh,
    fresh: Mapping[str, Any],
) -> dict[str, Any]:
    held = contents.shapes
    fields = {name.partition(".")[0] for name in held[OPTIMIZER]}
    optimizer = {n: value for n, value in wanted[OPTIMIZER].items() if n in fields or n not in fresh}
    targets = {PARAMS: wanted[PARAMS], OPTIMIZER: optimizer}
    for item, target in targets.items():
        if problems := on_disk.mismatches(held[item], target):
            where = f"checkpoint {folder.name} of {folder.parent}"
            raise UserError(f"{where} holds another model: {'; '.join(problems)}")
    return {item: contents.read(item, on_disk.placed(target, mesh)) for item, target in targets.items()}


def _placed(value: Any, mesh: jax.sharding.Mesh) -> Any:
    shardings = sharding.parameter_shardings(value, mesh)
    return jax.jit(lambda: jax.tree.map(jnp.asarray, value), out_shardings=shardings)()


def _damage(error: Exception, folder: epath.Path) -> str:
    """What an error says of the checkpoint's content; nothing, if the storage itself may be in trouble."""
    if says_nothing_of_content(error) or not folder.exists():
        return ""
    line = next(iter(str(error).splitlines()), "")[:200]
    return (
        line if isinstance(error, DamagedError | OSError | ValueError) else f"{type(error).__name__}: {line}"
    )
