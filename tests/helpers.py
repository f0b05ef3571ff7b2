"""Runs the commands on a tiny model, as real processes or in the test's own, and reads what they leave.

Tests of single functions need none of this.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import fcntl
import io
import json
import os
from pathlib import Path
import queue
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from etils import epath
import hypothesis
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from topklm import cli, errors

ROOT = Path(__file__).parents[1]
CONFIG_FILE = ROOT / "configs" / "small.py"
PATIENCE_SECONDS = 300  # other work may share the cores
# Programs of tests are small and run few times. Without LLVM's optimisations, in one module, and with the
# older emitters of loops where XLA still has them (JAX 0.10), compiling takes a third of the time.
# `XLA_FLAGS= pytest` tests what users run.
FAST_COMPILATION = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        *(["--xla_cpu_use_fusion_emitters=false"] if jax.__version_info__ < (0, 11) else []),
    ]
)
STEPS = 24
# Checkpoints after 5, 10, 15, 20 and 24 steps, evaluations after 8, 16 and 24.
TINY: Mapping[str, Any] = {
    "model.d_model": 32,
    "model.n_layers": 2,
    "model.n_heads": 2,
    "model.n_kv_heads": 2,
    "model.d_mlp": 64,
    "model.context_length": 32,
    "model.topk_k": 8,
    "data.vocab_size": 320,
    "train.batch_size": 4,
    "train.steps": STEPS,
    "optim.learning_rate": 0.003,
    "optim.warmup_steps": 4,
    "checkpoint.every_steps": 5,
    "checkpoint.keep": 10,
    "checkpoint.trace": "",
    "eval.every_steps": 8,
    "eval.sample_tokens": 8,
    "log.every_steps": 1,
}
WALL_CLOCK_FIGURES = ("tokens_per_second", "mfu", "seconds_trained", "input_wait", "goodput")


def tries(number: int) -> hypothesis.settings:
    """Lets hypothesis try as many examples at night, with `-m`; a third by day."""
    by_night = hypothesis.settings().max_examples >= hypothesis.settings.get_profile("at night").max_examples
    return hypothesis.settings(max_examples=number if by_night else number // 3)


def sentences(seed: int, n_documents: int) -> list[str]:
    """Documents of a few sentences each from a small grammar; the same seed gives the same ones."""
    pick = random.Random(seed).choice
    adjectives = ["old", "young", "tall", "quiet", "clever", "hungry", "grey", "tired", "lucky", "small"]
    nouns = ["baker", "sailor", "horse", "teacher", "kitten", "doctor", "gardener", "crow", "child", "farmer"]
    verbs = [
        "found",
        "watched",
        "carried",
        "lost",
        "painted",
        "followed",
        "mended",
        "remembered",
        "sold",
        "hid",
    ]
    things = ["lantern", "basket", "letter", "boat", "kettle", "garden", "ladder", "coat", "bridge", "clock"]
    places = ["by the river", "in the barn", "near the mill", "under a tree", "at the market", "on the hill"]

    def sentence() -> str:
        subject, thing = (f"{pick(adjectives)} {pick(words)}" for words in (nouns, things))
        return f"The {subject} {pick(verbs)} a {thing} {pick(places)}."

    return [" ".join(sentence() for _ in range(pick(range(2, 8)))) for _ in range(n_documents)]


def write_documents(path: Path, documents: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents), encoding="utf-8")
    return path


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Makes a folder for all workers of a session: the first calls `make` with it, the others wait."""
    done = folder / "made"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The tiny model's training command; settings given to a method override those of `TINY`."""

    corpus: Path
    datasets: Path
    compilation_cache: Path | None

    def arguments(self, workdir: Path, settings: Mapping[str, Any] | None = None) -> list[str]:
        place = {"data.source": self.corpus, "data.dir": self.datasets}
        fields = {**TINY, **place, **(settings or {})}
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        return [f"--config={CONFIG_FILE}", f"--workdir={workdir}", *flags]

    def start(self, workdir: Path, settings: Mapping[str, Any] | None = None, **options: Any) -> "Process":
        return self.start_python("-m", "topklm.main", *self.arguments(workdir, settings), **options)

    def start_python(
        self, *arguments: str, environment: Mapping[str, str] | None = None, **options: Any
    ) -> "Process":
        variables = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **(environment or {})}
        if self.compilation_cache is None:
            variables["TOPKLM_COMPILATION_CACHE"] = "off"
        else:
            variables["XDG_CACHE_HOME"] = str(self.compilation_cache)
        return Process([sys.executable, *arguments], env=variables, **options)

    def run(self, workdir: Path, settings: Mapping[str, Any] | None = None, **options: Any) -> "Process":
        process = self.start(workdir, settings, **options)
        process.finish()
        return process

    def train(self, workdir: Path, settings: Mapping[str, Any] | None = None) -> "Ended":
        """Trains in the test's own process: a process takes seconds until it has imported everything.

        Not for what depends on signals, the environment, devices or limits of the process.
        """
        return in_this_process("train", *self.arguments(workdir, settings))


@dataclasses.dataclass(frozen=True)
class Ended:
    """A command that ran in the test's own process; looks like a `Process` that has ended."""

    exit_code: int
    output: str
    errors: str


class Job:
    """Processes that run `topklm` together, to their end, each after the statements of `first`."""

    def __init__(self, folder: Path, count: int, arguments: Sequence[Any], first: str = "", **variables: str):
        path = folder / f"program-{count}.py"
        path.write_text(f"{first}\nimport sys\nfrom topklm import cli\nsys.exit(cli.run(sys.argv[1:]))\n")
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TOPKLM_COORDINATOR": f"localhost:{coordinator_port()}",
            "TOPKLM_PROCESS_COUNT": str(count),
            "TOPKLM_PEER_TIMEOUT": "5",
            **variables,
        }
        command = [sys.executable, str(path), *map(str, arguments)]
        self.processes = [
            Process(command, env={**environment, "TOPKLM_PROCESS_ID": str(index)}) for index in range(count)
        ]
        self.codes = [process.finish() for process in self.processes]
        self.errors = [process.errors for process in self.processes]


def in_this_process(*arguments: Any) -> Ended:
    """Runs `topklm` with these arguments to its end; what C++ libraries print is not caught."""
    output, said = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOPKLM_ALLOCATOR", "system")
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(said):
            code = errors.guarded(lambda: cli.dispatch(list(map(str, arguments))))
    return Ended(code, output.getvalue(), said.getvalue())


def coordinator_port() -> int:
    """Chooses a port for process 0 of a run, which binds it seconds later.

    It lies below those that the kernel gives to connections meanwhile (from 32,768 on, on Linux).
    """
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port := random.SystemRandom().randrange(10_000, 32_768)))
            return port


def devices(count: int) -> dict[str, str]:
    """The environment of a process with so many devices, which compiles as this one does."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={count}".strip()}


class Process:
    """A running command whose lines are read as they come; `output` and `errors` hold what came so far."""

    def __init__(self, command: list[str], **options: Any):
        self._popen = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", **options
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._output: list[str] = []
        self._errors: list[str] = []
        self._readers = [threading.Thread(target=target, daemon=True) for target in (self._read, self._drain)]
        for reader in self._readers:
            reader.start()

    @property
    def output(self) -> str:
        return "".join(self._output)

    @property
    def errors(self) -> str:
        return "".join(self._errors)

    def wait_for_line(self, text: str) -> str:
        """The next line of standard output that holds `text`."""
        while (line := self._lines.get(timeout=PATIENCE_SECONDS)) is not None:
            if text in line:
                return line
        raise AssertionError(f"ended without printing {text!r}:\n{self.output}\n{self.errors}")

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._popen.poll()

    @property
    def pid(self) -> int:
        return self._popen.pid

    def signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def kill(self) -> None:
        """`kill -9`, and waits until the process is gone."""
        self.signal(signal.SIGKILL)
        self.finish()

    def finish(self) -> int:
        """Waits for the end and returns the exit code."""
        code = self._popen.wait(timeout=PATIENCE_SECONDS)
        for reader in self._readers:
            reader.join(timeout=PATIENCE_SECONDS)
        return code

    def _read(self) -> None:
        for line in self._popen.stdout:
            self._output.append(line)
            self._lines.put(line)
        self._lines.put(None)

    def _drain(self) -> None:
        self._errors.extend(self._popen.stderr)


def wait_until(condition: Any, process: Process) -> bool:
    """Whether the condition came true before the process ended; looks as often as it can."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while process.exit_code is None:
        if condition():
            return True
        if time.monotonic() > deadline:
            raise AssertionError(f"waited in vain:\n{process.output}\n{process.errors}")
    return False


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the figures that depend on the wall clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in WALL_CLOCK_FIGURES} for line in lines]


def final_arrays(run: Path) -> Any:
    """Parameters and optimizer state of the newest checkpoint."""
    return arrays(run, max(checkpoint_steps(run)))


def arrays(run: Path, step: int) -> Any:
    """Parameters and optimizer state of a checkpoint, as NumPy arrays."""
    handler, restored = ocp.PyTreeCheckpointHandler(), {}
    for item in ("params", "optimizer"):
        folder = epath.Path(run / "checkpoints" / str(step) / item)
        shapes = handler.metadata(folder).tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        restored[item] = handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return restored


def checkpoint_steps(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit())


def assert_same_bits(left: Any, right: Any) -> None:
    """Two trees of arrays agree in structure, dtypes and every bit."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(jax.tree.leaves_with_path(left), jax.tree.leaves(right), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def assert_one_line_error(errors: str) -> str:
    """Standard error is exactly one line, made for a person; returns it."""
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("error: ")
    assert "Traceback" not in errors
    return lines[0]
