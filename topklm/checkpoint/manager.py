"""When checkpoints are saved, and which one is restored: arrays, data position and facts together.

A save that fails is tried again while training goes on; a damaged checkpoint gives way to the one before.
Orbax's own manager is not used: where one process fails, it leaves the others waiting, some of them in a
collective that has no end. Here processes exchange their results. `step_folder` describes the layout on disk.
"""

from collections.abc import Callable, Collection, Mapping
from concurrent import futures
import dataclasses
import functools
import json
import math
import time
from typing import Any

from etils import epath
import flax.serialization
import jax
import jax.numpy as jnp

from topklm import distributed
from topklm.checkpoint.step_folder import (
    DATA,
    FACTS,
    OPTIMIZER,
    PARAMS,
    READ_ERRORS,
    CheckpointReader,
    CheckpointWriter,
    DamagedError,
    complete_steps,
    describe_damage,
    remove,
    remove_old,
)
from topklm.config import CheckpointConfig
from topklm.errors import UserError
from topklm.layout import Layout
from topklm.storage.files import AnyPath, absolute, beside, storage_problem

_MEETING_S = 600.0  # for all processes to come to the same line
_STORAGE_S = 1200.0  # for each to read or write its part; a save that takes longer has failed

_CHECKPOINT, _ENTRY = "checkpoint", "trace entry"  # kinds, in the words that processes exchange

FIRST_WAIT_S = 2.0  # after the first of several failures in a row; then twice as long each
LONGEST_WAIT_S = 60.0

Restored = tuple[Any, dict[str, Any], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Patience:
    """For how long a checkpoint that cannot be written is tried again, from the first failure on."""

    while_training_s: float = 900.0
    at_end_s: float = 120.0  # when there is nothing else left to do


PATIENCE = Patience()


class CheckpointManager:
    """The checkpoints of one run; all processes of the run make the same calls in the same order.

    Saving is asynchronous: training goes on while bytes are written. A training state is any pytree that Flax
    makes a nested dict of, with a `step` and `params` among its fields. The folder holds checkpoints and
    nothing else; it is made if need be, and rid of half-written ones. `say` receives a line for each damaged
    checkpoint and each failure that is tried again, by default for as long as `PATIENCE`.
    """

    def __init__(
        self,
        folder: AnyPath,
        config: CheckpointConfig,
        say: Callable[[str], None] = print,
        patience: Patience | None = None,
    ):
        self._folder = absolute(folder)
        self._keep, self._say, self._patience = config.keep, say, patience or PATIENCE
        self._steps = _open(_CHECKPOINT, self._folder, say)
        self._backoff = Backoff(self._patience.while_training_s)
        self._asked: tuple[dict[str, Any], dict[str, Any]] | None = None  # arrays and values to be saved
        self._save: _Save | None = None
        self._failure: str | None = None  # of the newest save, until one succeeds
        self._retry_at: int | None = None  # step

    @property
    def latest_step(self) -> int | None:
        """Newest complete checkpoint, or None; one that is still being written does not count."""
        return max(self._steps, default=None)

    def save(self, state: Any, data_state: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Starts saving; a step that is already saved is left as it is.

        `data_state` is the data iterator's after exactly `state.step` batches, `facts` go with it, both
        JSON-able; the buffers of `state` are free once this returns. A failure of the storage is told to
        `say`, and `due` and `wait` see to another attempt; UserError once patience has ended.
        """
        trees = _items(state)
        step = int(trees[OPTIMIZER]["step"])
        if self._finish():
            self._plan_retry(step)
        if step not in self._steps:
            self._asked = trees, {DATA: dict(data_state), FACTS: dict(facts)}
            self._begin()

    def due(self, step: int) -> bool:
        """Returns True if a failed save is to be retried after this step; to be asked after every step.

        The same in all processes, which exchange a word 1, 2, 4, 8 ... steps after a save began, until it has
        ended. Raises as `save`.
        """
        if self._save and step > self._save.step:
            self._asked = None  # its memory belongs to later steps now
            n_steps = step - self._save.step
            if distributed.process_count() == 1 or n_steps.bit_count() == 1:
                done = distributed.gather("is the save done", str(self._save.problem.done()), _MEETING_S)
                seconds = (time.monotonic() - self._save.began) / n_steps
                if all(answer == "True" for answer in done) and self._finish():
                    self._plan_retry(step, seconds)
        return self._retry_at is not None and step >= self._retry_at

    def wait(self) -> None:
        """Returns when the last save is safely on disk; tries again until it is. Raises as `save`."""
        self._finish()
        backoff = Backoff(self._patience.at_end_s if self._asked else 0.0)
        while self._failure:
            seconds = self._seconds_to_wait(backoff)
            self._say(f"{self._failure}: will try again in {seconds:g} s, {backoff}")
            time.sleep(seconds)
            self._begin()
            self._finish()

    def settle(self) -> int | None:
        """Waits for what is being written, whether or not that succeeds; returns `latest_step` then."""
        if self._finish():
            self._say(f"{self._failure}")
        return self.latest_step

    def close(self) -> None:
        """Acts as `settle`; to be called last, however the run ends."""
        self.settle()

    def restore(
        self, abstract_state: Any, layout: Layout, fresh: Mapping[str, Any] | None = None
    ) -> Restored:
        """Reads the newest checkpoint that is undamaged, whatever devices it was saved from.

        A damaged one is renamed to `<step>.damaged-<n>`, once an older one is found to be undamaged. Damaged
        is one whose folder is there, but something in it is missing, does not parse or has another checksum.
        Refused access, a server that does not answer and errors of the disk itself are no damage.

        The abstract state has shapes and dtypes, as from `jax.eval_shape`; `fresh` are fields that
        checkpoints of earlier versions lack, and their values then. Returns the state, the data iterator's,
        and the facts. UserError if the checkpoint holds another model (each array that differs is named), or
        if all are damaged.
        """
        if not self._steps:
            raise ValueError("there is no checkpoint to restore")
        damages: dict[int, str] = {}
        for step in sorted(self._steps, reverse=True):
            for newer, why in list(damages.items())[-1:]:
                self._say(
                    f"checkpoint {newer} of {self._folder} is damaged ({why}): going back to step {step}"
                )
            restored, damage = _try_restore(self._folder / str(step), abstract_state, layout, fresh or {})
            if restored:
                self._quarantine(list(damages))
                return restored
            damages[step] = damage
        listed = "; ".join(f"{step}: {why}" for step, why in damages.items())
        raise UserError(
            f"every checkpoint of {self._folder} is damaged ({listed}): put back a copy of one, or start a "
            "new run with --workdir"
        )

    def _quarantine(self, steps: list[int]) -> None:
        if distributed.is_primary():
            for step in steps:
                folder = self._folder / str(step)
                folder.rename(beside(folder, "damaged"))  # there it no longer counts as a checkpoint
        self._steps = [step for step in self._steps if step not in steps]

    def _begin(self) -> None:
        """Starts writing the last state that was to be saved."""
        assert self._asked
        trees, values = self._asked
        step = int(trees[OPTIMIZER]["step"])
        self._save = _Save(_CHECKPOINT, self._folder, step, trees, values, self._keep)
        self._retry_at = None

    def _finish(self) -> bool:
        """Waits for what is being written, if anything is; returns whether that failed."""
        if not self._save:
            return False
        save, self._save = self._save, None
        if problem := save.problem.result():
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

    def _plan_retry(self, step: int, seconds_per_step: float = math.inf) -> None:
        """Plans the next attempt after a failure found out after `step`: as soon as the back-off says."""
        seconds = self._seconds_to_wait(self._backoff)
        steps = math.ceil(seconds / max(seconds_per_step, 1e-6))
        self._retry_at = step + int(distributed.broadcast("retry", str(steps), _MEETING_S))
        self._say(f"{self._failure}: will try again at step {self._retry_at}, {self._backoff}")

    def _seconds_to_wait(self, backoff: "Backoff") -> float:
        """Counts a failure; the first process decides how long all wait after it."""
        seconds = json.loads(distributed.broadcast("back-off", json.dumps(backoff.failed()), _MEETING_S))
        if seconds is None:
            last = f"that of step {self.latest_step}" if self._steps else "none"
            raise UserError(
                f"{self._failure}, {backoff}; the last good one in {self._folder} is {last}: mend that, and "
                "resume with the same command"
            )
        return seconds


class TraceManager:
    """The parameters after chosen steps of one run, as bfloat16: to be read, never to be resumed from.

    All processes of the run make the same calls in the same order. Nothing but `begin_after`
    removes an entry. One that cannot be written costs a warning and not the run.

    Args:
        folder: Holds the entries and nothing else; made if there are steps to be kept.
        steps: Those to be kept, as `Config.traced_steps`.
        say: Receives the warnings.
    """

    def __init__(self, folder: AnyPath, steps: Collection[int], say: Callable[[str], None] = print):
        self._folder, self._say = absolute(folder), say
        self._due = set(steps)
        self._save: _Save | None = None
        self._held: tuple[int, Any, Mapping[str, Any]] | None = None
        self._rounding: Callable[[Any], Any] | None = None  # compiled once, for the shardings of the run
        self._saved = set(_open(_ENTRY, self._folder, say)) if steps else set()

    def begin_after(self, step: int) -> None:
        """Removes the entries of later steps: of a future of the run that it may not have again.

        -1 is the step before a new run, which then has no entry.
        """
        later = sorted(s for s in self._saved if s > step)
        if later and distributed.is_primary():
            remove(self._folder, later)
        self._saved -= set(later)

    def due(self, step: int) -> bool:
        """Returns True if the parameters after this step are to be saved, or others are held."""
        return self._held is not None or self._lacks(step)

    def hold(self, step: int, params: Any, facts: Mapping[str, Any]) -> None:
        """Takes what `save` does, for the next `save` to save first: a first step need not wait for that."""
        self._due.discard(step)
        self._held = step, self._rounded(params), facts

    def save(self, step: int, params: Any, facts: Mapping[str, Any]) -> None:
        """Starts saving parameters (a nested dict) if they are due; their buffers are free on return."""
        held, self._held = self._held, None
        if held:
            self._begin(*held)
        if self._lacks(step):
            self._due.discard(step)
            self._begin(step, self._rounded(params), facts)

    def _rounded(self, params: Any) -> Any:
        """Rounds arrays (a nested dict) to bfloat16 where they are."""
        if self._rounding is None:
            shardings = jax.tree.map(lambda array: array.sharding, params)
            cast = functools.partial(jax.tree.map, lambda array: array.astype(jnp.bfloat16))
            self._rounding = jax.jit(cast, out_shardings=shardings)
        return self._rounding(params)

    def _lacks(self, step: int) -> bool:
        return step in self._due and step not in self._saved

    def _begin(self, step: int, rounded: Any, facts: Mapping[str, Any]) -> None:
        self.close()
        self._save = _Save(_ENTRY, self._folder, step, {PARAMS: rounded}, {FACTS: dict(facts)}, None)

    def settle_before(self, step: int) -> None:
        """Waits for an entry of an earlier step: a run that resumes from this one would not save it again."""
        if self._save and self._save.step < step:
            self.close()

    def close(self) -> None:
        """Waits for what is being written, whether or not that succeeds."""
        save, self._save = self._save, None
        if save and (problem := save.problem.result()):
            self._say(f"warning: the trace lacks step {save.step}, which could not be written ({problem})")


def rounded_shapes(abstract: Any) -> Any:
    """Returns shapes of parameters as the trace holds them, for those of a model (a nested dict)."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), abstract)


@dataclasses.dataclass
class Backoff:
    """Waits of 2, 4, 8 ... 60 s after failures in a row, until patience is over."""

    patience_s: float
    failures: int = 0
    _since: float = 0.0

    def __str__(self) -> str:
        return f"{self.failures} failure{'s' * (self.failures > 1)} so far"

    def failed(self) -> float | None:
        """Counts a failure; returns the seconds until the next attempt, None once patience is over."""
        now = time.monotonic()
        self._since = self._since if self.failures else now
        self.failures += 1
        if now - self._since >= self.patience_s:
            return None
        return min(FIRST_WAIT_S * 2.0 ** (self.failures - 1), LONGEST_WAIT_S)


class _Save:
    """One checkpoint on its way to the disk, most of it in a thread of its own.

    The processes meet when the folders are there, when all have written their parts, and when the first one
    has completed the checkpoint. A failure of one is a failure of all.

    Attributes:
        problem: Will be what went wrong with the storage, or "", the same in all processes; raises a bug.
        not_removed: Says why older checkpoints could not be removed, or "".
    """

    def __init__(
        self,
        kind: str,
        folder: epath.Path,
        step: int,
        trees: Mapping[str, Any],
        values: Mapping[str, Any],
        keep: int | None,
    ):
        self.step = step
        self.began = time.monotonic()
        self.not_removed = ""
        self._kind, self._folder, self._values, self._keep = kind, folder, values, keep
        self._writer = CheckpointWriter(folder, self.step)
        self._bug: Exception | None = None
        made = self._primary(lambda: self._writer.make_folders([*trees, *values]))
        problem = self._first_problem("begin", made, _MEETING_S)
        copied = ""
        if not problem:
            arrays = jax.tree.map(jnp.asarray, dict(trees))
            self._writer.start_record(arrays)  # uses no storage
            copied = self._attempt(lambda: self._writer.copy(arrays))
        thread = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.problem = thread.submit(lambda: self._end(problem or self._write(copied)))
        thread.shutdown(wait=False)

    def _end(self, problem: str) -> str:
        if self._bug:
            raise self._bug
        return problem

    def _write(self, copied: str) -> str:
        written = copied or self._attempt(lambda: self._writer.finish_part(_STORAGE_S))
        problem = self._first_problem("write", written, _STORAGE_S)
        if not problem:
            committed = self._primary(lambda: self._writer.commit(self._values))
            problem = self._first_problem("commit", committed, _STORAGE_S)
        if problem:
            self._primary(self._writer.abandon)
        else:  # never part of committing, for the new checkpoint is complete without it
            self.not_removed = self._primary(lambda: remove_old(self._folder, self._keep))
        return problem

    def _first_problem(self, doing: str, problem: str, timeout_s: float) -> str:
        # One of another kind may be written at the same time, by another thread.
        return _first_problem(f"{doing} a {self._kind}", problem, timeout_s)

    def _primary(self, action: Callable[[], None]) -> str:
        return self._attempt(action) if distributed.is_primary() else ""

    def _attempt(self, action: Callable[[], None]) -> str:
        """Returns what went wrong with the storage, or ""; a bug too, which is raised at the end."""
        try:
            action()
        except Exception as e:
            problem = storage_problem(e, self._folder)
            if problem is None:
                self._bug = e
            return problem or f"{type(e).__name__}: {e}"
        return ""


def _open(kind: str, folder: epath.Path, say: Callable[[str], None]) -> list[int]:
    """Makes a folder of checkpoints if need be, rid of half-written ones; returns the steps of the others."""
    steps: list[int] = []
    if distributed.is_primary():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            remove_old(folder)
        except OSError as e:
            why = storage_problem(e, folder)
            say(f"warning: {folder}: a checkpoint that was half-written cannot be removed: {why}")
        steps = complete_steps(folder)
    # A file system or bucket may not show all hosts the same.
    found: list[int] = json.loads(distributed.broadcast(kind, json.dumps(steps), _MEETING_S))
    return found


def _first_problem(name: str, problem: str, timeout_s: float) -> str:
    """Returns the first of the problems that the processes have, or nothing; the same in all of them."""
    problems = enumerate(distributed.gather(name, problem, timeout_s))
    prefix = "process {}: {}" if distributed.process_count() > 1 else "{1}"
    return next((prefix.format(i, problem) for i, problem in problems if problem), "")


def _items(state: Any) -> dict[str, Any]:
    """Returns the state as nested dicts, by the item they are saved in."""
    fields = dict(flax.serialization.to_state_dict(state))
    return {PARAMS: fields.pop("params"), OPTIMIZER: fields}


def _try_restore(
    folder: epath.Path, abstract_state: Any, layout: Layout, fresh: Mapping[str, Any]
) -> tuple[Restored | None, str]:
    """Returns what a checkpoint holds, or where it is damaged; the same in all processes."""
    damage = ""
    try:
        reader = CheckpointReader(folder)
        targets = _items(abstract_state)
        held = {name.partition(".")[0] for name in reader.shapes[OPTIMIZER]}
        for field in fresh.keys() - held:
            del targets[OPTIMIZER][field]
        trees = reader.read({item: layout.with_shardings(target) for item, target in targets.items()})
    except READ_ERRORS as e:
        damage = describe_damage(e) if folder.exists() else ""
        if not damage:
            raise
    # Before the checksums, which all processes must compute together.
    if damage := _first_problem("read a checkpoint", damage, _STORAGE_S):
        return None, damage
    try:
        reader.verify(trees)
    except DamagedError as e:
        damage = str(e)
    if damage := _first_problem("check a checkpoint", damage, _MEETING_S):
        return None, damage
    fields = {PARAMS: trees[PARAMS], **_fresh_arrays(fresh, layout), **trees[OPTIMIZER]}
    state = flax.serialization.from_state_dict(abstract_state, fields)
    return (state, reader.values[DATA], reader.values[FACTS]), ""


def _fresh_arrays(value: Any, layout: Layout) -> Any:
    return jax.jit(lambda: jax.tree.map(jnp.asarray, value), out_shardings=layout.shardings(value))()
