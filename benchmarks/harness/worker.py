"""Runs subjects in processes of their own, kept alive: peak memory, allocators, PyTorch.

All get the same number of threads and the same allocator. The process that asks uses no device, and is idle
while a subject runs.

The other process is `python -m benchmarks.harness.worker MODULE`: JSON lines come in on standard input and go
out on what was standard output; lines that libraries print go to standard error. With FUNCTION ARGUMENTS, it
calls that one function, prints its result, and ends.
"""

from collections.abc import Callable, Mapping
import dataclasses
import importlib
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile
from typing import Any, Self, TextIO

from benchmarks.harness.timing import Subject, timed
from topklm.errors import UserError, explain
from topklm.runtime import process

# Never a folder of the same name in the working directory.
_PYTHON = (sys.executable, "-P", "-m", "benchmarks.harness.worker")
_ROOT = str(Path(__file__).parents[2])
_PATIENCE_SECONDS = 60.0  # for a process that was told to end
_SHOWN_CHARACTERS = 2000  # of what a process printed before it died


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The result of `prepare(spec)` of a subject's module, in the process that runs it."""

    subjects: Mapping[str, Callable[[], Any]]  # by name; each returns when its work is done
    facts: Mapping[str, Any]  # for JSON
    device_peak_bytes: Callable[[], int | None] = lambda: None  # of an accelerator, at the end


class WorkerError(RuntimeError):
    """A process died; the text is the end of what it printed."""


class Worker:
    """A process that prepared a module's subjects and waits to run them.

    Use it as a context manager, or call `close`.
    """

    facts: dict[str, Any]

    def __init__(
        self, module: str, spec: Mapping[str, Any], environment: Mapping[str, str] | None = None
    ) -> None:
        """Starts it; returns when it is ready.

        Args:
            module: Has `prepare(spec) -> Prepared`, e.g. "benchmarks.subjects.train_step".
            spec: For `prepare`; must survive JSON.
            environment: Variables set over those of `shared_environment`.

        Raises:
            UserError: If `prepare` raised one.
            WorkerError: If the process died.
        """
        self._errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*_PYTHON, module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            env={**shared_environment(), **(environment or {})},
        )
        try:
            ready = self._ask(spec)
        except BaseException:
            self._kill()
            raise
        self.facts, self._names = ready["facts"], ready["subjects"]

    def subjects(self) -> dict[str, Subject]:
        """Returns its subjects for `timing.alternate`; the time is taken in the process."""

        def subject(name: str) -> Subject:
            return lambda calls: self._ask({"side": name, "calls": calls})["seconds"]

        return {name: subject(name) for name in self._names}

    def peak_bytes(self) -> int:
        """Asks for the most memory that it had so far: of an accelerator, if it used one, else resident."""
        return self._ask({"peak": True})["peak_bytes"]

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(self, message: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise WorkerError(f"the process of a subject ended with code {code}: {self._last_words()}")
        answer = json.loads(line)
        if "user_error" in answer:
            raise UserError(answer["user_error"])
        return answer

    def _last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-_SHOWN_CHARACTERS:].strip()

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream:
                stream.close()


def call(function: str, *arguments: Any) -> Any:
    """Calls a function in a process of its own; returns its result.

    Args:
        function: "MODULE:NAME".
        arguments: They and the result must survive JSON.

    Raises:
        CalledProcessError: If it fails.
    """
    command = [*_PYTHON, *function.split(":"), json.dumps(arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=shared_environment())
    return json.loads(done.stdout.splitlines()[-1])


def threads() -> int:
    """Counts the cores that this process may use: as many threads as each subject gets."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shared_environment() -> dict[str, str]:
    """Makes the environment of every subject: that of this process, and one thread count for all."""
    shared = {**os.environ, "OMP_NUM_THREADS": str(threads()), "PYTHONUNBUFFERED": "1"}
    # Subjects of two frameworks share an accelerator.
    shared.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Where the harness is, wherever it was started from.
    shared["PYTHONPATH"] = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))
    return shared


def peak_resident_bytes() -> int:
    """Reads the most memory that this process had resident so far.

    Not from `getrusage`, which on Linux also counts what the process was before it became this program.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise UserError("bench: /proc/self/status does not say how much memory a process has; use Linux")


def _serve(module: str, answers: TextIO) -> None:
    """Prepares a module's subjects and runs them as told, until standard input ends."""

    def answer(message: Any) -> None:
        print(json.dumps(message), file=answers, flush=True)

    allocator_name = process.keep_freed_memory()  # before either framework has threads
    try:
        prepared: Prepared = importlib.import_module(module).prepare(json.loads(sys.stdin.readline()))
    except Exception as e:
        text = explain(e)
        if text is None:
            raise
        answer({"user_error": text})
        return
    facts = {"allocator": allocator_name, **prepared.facts}
    answer({"facts": facts, "subjects": list(prepared.subjects)})
    for line in sys.stdin:
        asked = json.loads(line)
        if "peak" in asked:
            answer({"peak_bytes": prepared.device_peak_bytes() or peak_resident_bytes()})
        else:
            answer({"seconds": timed(prepared.subjects[asked["side"]])(asked["calls"])})


if __name__ == "__main__":
    if len(sys.argv) == 2:
        with os.fdopen(os.dup(1), "w", encoding="utf-8") as standard_output:
            os.dup2(2, 1)
            _serve(sys.argv[1], standard_output)
    else:
        called = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])
        print(json.dumps(called(*json.loads(sys.argv[3]))))
