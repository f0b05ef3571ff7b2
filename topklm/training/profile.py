"""Traces a few steps of a run (`--config.profile=10:13`) for XProf to show where their time goes.

The run's first process traces its own devices and its own host. The trace is written beside and copied into
the run folder, local or in a bucket, when it is whole.
"""

from collections.abc import Callable, Iterator
import contextlib
from pathlib import Path
import tempfile

import jax

from topklm import distributed
from topklm.errors import UserError
from topklm.storage.errors import storage_errors_are_user_errors
from topklm.storage.files import AnyPath, write_atomically

FOLDER = "profile"
STEP_NAME = "train"  # of a step in the trace


class Profiler:
    """Traces some steps of a run, once.

    Args:
        steps: To trace, by number; empty: none.
        folder: Of the run.
        first: Steps that the run has done already.
        say: Tells a person a line.
    """

    def __init__(self, steps: range, folder: AnyPath, first: int, say: Callable[[str], None]):
        self._steps, self._folder, self._say = steps, folder / FOLDER, say
        self._traced: list[int] = []
        self._session = contextlib.ExitStack()
        if steps and first >= steps[-1]:
            say(f"profile: nothing to trace, step {steps[-1]:,} is done already")

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Surrounds the dispatch of a step."""
        if number not in self._steps or not distributed.is_primary():
            yield
            return
        if not self._traced:
            self._start()
        self._traced.append(number)
        with jax.profiler.StepTraceAnnotation(STEP_NAME, step_num=number):
            yield

    def ends_with(self, step: int) -> bool:
        """Tells whether this step is the last to be traced, for all processes alike."""
        return bool(self._steps) and step == self._steps[-1]

    def close(self) -> None:
        """Writes what was traced: when the devices are done with it, or when the run ends before."""
        traced, self._traced, self._steps = self._traced, [], range(0)
        if not traced:
            return
        try:
            with self._session, storage_errors_are_user_errors("writing the profile", self._folder):
                jax.profiler.stop_trace()
                self._publish()
        except UserError as e:
            self._say(f"no profile was written: {e}")
            return
        self._say(
            f"profile of steps {traced[0]:,} to {traced[-1]:,} in {self._folder}; to open it: pip install "
            f"xprof, then: xprof --logdir={self._folder}"
        )

    def _start(self) -> None:
        self._place = Path(self._session.enter_context(tempfile.TemporaryDirectory(prefix="topklm-profile-")))
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = (
            0  # every call of every function, which slows the host and hides the rest
        )
        jax.profiler.start_trace(self._place, profiler_options=options)

    def _publish(self) -> None:
        for file in sorted(path for path in self._place.rglob("*") if path.is_file()):
            target = self._folder / file.relative_to(self._place).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, file.read_bytes())
