"""Disturbs a training job of several processes at random moments until it is done.

As a program: `python tests/faults.py --seed 3 --faults 20 FOLDER` makes an undisturbed run and a disturbed
one in FOLDER, compares them, and prints a line for each fault.
"""

import argparse
from collections.abc import Callable
import contextlib
import json
import os
from pathlib import Path
import random
import re
import signal
import sys
import time

from helpers import (
    ROOT,
    Process,
    Trainer,
    assert_same_bits,
    checkpoint_steps,
    final_arrays,
    metrics,
    sentences,
    write_documents,
)

from topklm.checkpoint.run_folder import TRACE_FOLDER, complete_steps
from topklm.inference.load import load

N_PROCESSES = 4
START_TIMEOUT_SECONDS = 45  # one may be stopped before it has joined the others
PEER_TIMEOUT_SECONDS = 5
GRACE_SECONDS = 8  # for the others to find out that one is stopped
PATIENCE_SECONDS = 300  # other work may share the cores
FAULTS = ("kill", "stop", "preempt", "kill all")
# Long enough that faults hit steps, evaluations and savings, and not only the start.
SETTINGS = {
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "train.steps": 120,
    "train.batch_size": 4,
    "checkpoint.every_steps": 4,
    "checkpoint.keep": 3,
    "checkpoint.trace": "log",
    "eval.every_steps": 30,
    "log.every_steps": 1,
}


class Job:
    """`launch/local.py` with the trainer: four devices, each of a process if not said otherwise."""

    def __init__(
        self, trainer: Trainer, run: Path, logs: Path, settings: dict, n_processes: int = N_PROCESSES
    ):
        flags = trainer.arguments(run, {**SETTINGS, **settings})
        options = [str(n_processes), "--devices-per-process", str(N_PROCESSES // n_processes)]
        options += ["--log-dir", str(logs), "--grace", str(GRACE_SECONDS), "--module", "keeping_programs"]
        command = [str(ROOT / "launch" / "local.py"), *options, "--", *flags]
        environment = {
            "TOPKLM_START_TIMEOUT": str(START_TIMEOUT_SECONDS),
            "TOPKLM_PEER_TIMEOUT": str(PEER_TIMEOUT_SECONDS),
            "KEPT_PROGRAMS": str(trainer.compilation_cache / str(n_processes)),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }
        self.launcher: Process = trainer.start_python(*command, environment=environment)
        self._pids_file = logs / "pids.json"

    def pids(self) -> list[int]:
        """Returns the process ids of the ranks, in order, once they have been started."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self._pids_file.exists() and self.launcher.exit_code is None:
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        if self._pids_file.exists():
            return json.loads(self._pids_file.read_text(encoding="utf-8"))["pids"]
        raise AssertionError(f"no processes:\n{self.launcher.output}\n{self.launcher.errors}")


def disturb(job: Job, fault: str, chance: random.Random) -> tuple[str, set[int]]:
    """Does it; returns a description, and the exit codes that are right then."""
    pids = job.pids()
    rank = chance.randrange(N_PROCESSES)
    if fault == "kill all":
        _signal(pids, signal.SIGKILL)
        return "killed all", {75}
    number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "preempt": signal.SIGTERM}[fault]
    _signal([pids[rank]], number)
    if fault != "preempt":
        return f"{fault} of process {rank}", {75}
    # Before the first step the others, who were not asked to stop, end with 75: nothing looks finished.
    return f"preempt of process {rank}", {0} if re.search(r"step [\d,]+/", job.launcher.output) else {0, 75}


def train_disturbed(
    trainer: Trainer,
    run: Path,
    logs: Path,
    n_faults: int,
    seed: int,
    settings: dict | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, int]:
    """Trains to the end through faults; how often each was done.

    A fault comes at a random moment of the start or after a random number of further steps; the job must end
    with the right code, never lose a checkpoint, and go on where it was.
    """
    chance, done, kept = random.Random(seed), dict.fromkeys(FAULTS, 0), 0
    for number in range(n_faults):
        job = Job(trainer, run, logs / str(number), settings or {})
        fault = FAULTS[number % len(FAULTS)] if number < len(FAULTS) else chance.choice(FAULTS)
        _wait_for_a_moment(job, chance)
        finished_already = "trained" in job.launcher.output
        what, right = disturb(job, fault, chance)
        code = job.launcher.finish()
        newest = max(checkpoint_steps(run), default=0)
        say(f"fault {number + 1}: {what}: exit code {code}, newest checkpoint {newest} (before: {kept})")
        lines = f"{what}:\n{job.launcher.output}\n{job.launcher.errors}"
        assert code in right or "trained" in job.launcher.output or finished_already, lines
        assert "Traceback" not in job.launcher.output + job.launcher.errors, lines
        assert newest >= kept, f"a checkpoint was lost: {newest} < {kept}; {lines}"
        assert _alive(job.pids()) == [], lines
        done[fault] += 1
        kept = newest
    last = Job(trainer, run, logs / "last", settings or {})
    assert last.launcher.finish() == 0, last.launcher.output + last.launcher.errors
    say(f"undisturbed to the end: {done}")
    return done


def assert_as_if_undisturbed(run: Path, undisturbed: Path) -> None:
    """Requires the same bits in parameters, optimizer, metrics and trace, and the same place in the data."""
    assert metrics(run) == metrics(undisturbed)
    assert_same_bits(final_arrays(run), final_arrays(undisturbed))
    assert_same_place_in_the_data(run, undisturbed)
    traced, expected = (complete_steps(folder, TRACE_FOLDER) for folder in (run, undisturbed))
    assert traced == expected
    for step in traced:
        assert_same_bits(*(load(folder, step=step).params for folder in (run, undisturbed)))


def assert_same_place_in_the_data(run: Path, undisturbed: Path) -> None:
    """Requires newest checkpoints of one step that have read the same windows."""
    assert checkpoint_steps(run)[-1] == checkpoint_steps(undisturbed)[-1]
    newest = str(checkpoint_steps(run)[-1])
    states = [
        (folder / "checkpoints" / newest / "data" / "metadata").read_bytes() for folder in (run, undisturbed)
    ]
    assert states[0] == states[1]


def train_undisturbed(trainer: Trainer, run: Path, logs: Path, settings: dict | None = None) -> None:
    job = Job(trainer, run, logs, settings or {})
    assert job.launcher.finish() == 0, job.launcher.output + job.launcher.errors


def _wait_for_a_moment(job: Job, chance: random.Random) -> None:
    if chance.random() < 0.2:  # while it starts
        time.sleep(chance.uniform(0, 6))
        return
    job.launcher.wait_for_line("compiled the train step")
    for _ in range(chance.randint(0, 10)):
        job.launcher.wait_for_line("step ")
    time.sleep(chance.uniform(0, 0.2))  # between two lines, or in an evaluation or a saving


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.kill(pid, number)


def _alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    corpus = write_documents(folder / "corpus.jsonl", sentences(seed=0, n_documents=400))
    trainer = Trainer(corpus, folder / "datasets", folder / "xla")
    undisturbed, disturbed = folder / "undisturbed", folder / f"disturbed-{arguments.seed}"
    if not (undisturbed / "checkpoints" / str(SETTINGS["train.steps"])).exists():
        train_undisturbed(trainer, undisturbed, folder / "logs-undisturbed")
    logs = folder / f"logs-{arguments.seed}"
    train_disturbed(
        trainer, disturbed, logs, arguments.faults, arguments.seed, say=lambda s: print(s, flush=True)
    )
    assert_as_if_undisturbed(disturbed, undisturbed)
    print(f"seed {arguments.seed}: the same bits as undisturbed after {arguments.faults} faults", flush=True)


if __name__ == "__main__":
    sys.exit(main())
