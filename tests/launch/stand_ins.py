"""Programs that take the place of gcloud, kubectl, Slurm's commands and the trainer, first on the PATH.

Each appends what it was called with to calls.jsonl, and does what scenario.json in the same folder says.
`main` is all of them, called under the name of the program it stands for. Clouds are simulated only
as far as the launchers can see.
"""

from collections.abc import Callable, Mapping
import contextlib
import fcntl
import json
import os
from pathlib import Path
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any

NAMES = ("gcloud", "kubectl", "sbatch", "srun", "scontrol", "scancel", "uv", "curl", "wget")
# Of `gcloud ... --help`, version 528; a test compares them with an installed gcloud.
GCLOUD_FLAGS = {
    "queued-resources create": "--accelerator-type --runtime-version --node-id --node-count --node-prefix "
    "--spot --reserved --internal-ips --service-account",
    "queued-resources describe": "--format --flatten",
    "queued-resources delete": "--force",
    "tpu-vm describe": "--format",
    "tpu-vm ssh": "--worker --command --ssh-flag --internal-ip",
    "tpu-vm scp": "--worker --internal-ip",
}
GCLOUD_WIDE_FLAGS = "--zone --project --quiet"


def wait_for(condition: Callable[[], bool]) -> None:
    """Returns when the condition holds."""
    deadline = time.monotonic() + 300  # other work may share the cores
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class Stage:
    """A folder with the stand-ins, what they shall do, and what they were asked."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        here = str(Path(__file__).parent)
        source = f"import sys\nsys.path.append({here!r})\nimport stand_ins\nsys.exit(stand_ins.main())\n"
        for name in NAMES:
            self._add(name, f"#!{sys.executable} -IS\n{source}")
        self._add("hostname", '#!/bin/sh\necho "${HOST:-laptop}"\n')  # called often, and quicker like this
        self.set()

    def _add(self, name: str, text: str) -> None:
        program = self.bin / name
        program.write_text(text)
        program.chmod(0o755)

    def set(self, **scenario: Any) -> None:
        """Sets what the programs shall do; see the functions below."""
        (self.folder / "scenario.json").write_text(json.dumps(scenario))

    @property
    def environment(self) -> dict[str, str]:
        """With nothing but the stand-ins and the system's programs on the PATH."""
        return {
            "PATH": f"{self.bin}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self.folder / "home"),
            "STAGE": str(self.folder),
            "TOPKLM_POLL_SECONDS": "0.02",
        }

    def calls(self, program: str) -> list[dict[str, Any]]:
        """Returns the arguments of a program's calls, in order."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [call for call in map(json.loads, lines) if call["program"] == program]

    def gcloud_calls(self, command: str) -> list[list[str]]:
        """Arguments of `gcloud compute tpus COMMAND`, after the command."""
        n = len(command.split()) + 2
        return [c["argv"][n:] for c in self.calls("gcloud") if c["argv"][2:n] == command.split()]

    def workers(self) -> list[Path]:
        """Returns the home folders of the workers."""
        return sorted((self.folder / "workers").glob("*/*"))

    def end_processes(self) -> None:
        """Kills what still trains."""
        for call in self.calls("trainer"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if str(self.folder) in Path(f"/proc/{call['pid']}/cmdline").read_text():
                    os.kill(call["pid"], signal.SIGKILL)


def main() -> int:
    """Plays the program whose name this file has."""
    stage, program = Path(os.environ["STAGE"]), Path(sys.argv[0]).name
    argv = sys.argv[1:]
    if program != "python":
        _record(stage, program, argv)
    scenario = json.loads((stage / "scenario.json").read_text())
    return globals()[f"_{program}"](stage, scenario, argv)


# --- what all share ---


def _record(stage: Path, program: str, argv: list[str], **more: Any) -> None:
    line = json.dumps({"program": program, "argv": argv, **more}) + "\n"
    with (stage / "calls.jsonl").open("a") as file:
        file.write(line)


def _next(stage: Path, name: str, values: list[Any]) -> Any:
    """Takes the values one after another, the last one for ever; across all programs."""
    counter = stage / f"{name}.count"
    with counter.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        n = int(file.read() or 0)
        file.truncate(0)
        file.write(str(n + 1))
    return values[min(n, len(values) - 1)]


# --- gcloud ---


def _gcloud(stage: Path, scenario: Mapping[str, Any], argv: list[str]) -> int:
    """Simulates a project with one queued resource.

    scenario: `creates`, for each request an error message, or the list of states it goes through (the last
    one stays); `workers`, how many a slice has; `ssh`, exit codes of the first ssh and scp calls.
    """
    if argv[:2] != ["compute", "tpus"]:
        return _complain(f"unexpected {argv}")
    command, rest = " ".join(argv[2:4]), argv[4:]
    flags = {}
    for flag in (word for word in rest if word.startswith("--")):
        name, _, value = flag.partition("=")
        if name not in f"{GCLOUD_FLAGS[command]} {GCLOUD_WIDE_FLAGS}".split():
            return _complain(f"unrecognized arguments: {flag}")
        flags[name] = value
    plain = [word for word in rest if not word.startswith("--")]
    play: dict[str, Callable[[], int]] = {
        "queued-resources create": lambda: _create(stage, scenario, plain[0], flags),
        "queued-resources describe": lambda: _describe(stage, scenario, flags),
        "queued-resources delete": lambda: _delete(stage),
        "tpu-vm describe": lambda: _describe_slice(stage, plain[0]),
        "tpu-vm ssh": lambda: _ssh(stage, scenario, plain[0], flags),
        "tpu-vm scp": lambda: _scp(stage, scenario, plain, flags),
    }
    return play[command]()


def _complain(message: str) -> int:
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    return 1


def _create(stage: Path, scenario: Mapping[str, Any], name: str, flags: Mapping[str, str]) -> int:
    if (stage / "tpu.json").exists():
        return _complain("ALREADY_EXISTS")
    states = _next(stage, "creates", scenario.get("creates", [["ACTIVE"]]))
    if isinstance(states, str):
        return _complain(states)
    prefix, count = flags.get("--node-prefix"), int(flags.get("--node-count", "1"))
    slices = [f"{prefix}-{i}" for i in range(count)] if prefix else [flags["--node-id"]]
    (stage / "describes.count").unlink(missing_ok=True)
    (stage / "tpu.json").write_text(json.dumps({"states": states, "slices": slices, "state": states[0]}))
    for node in slices:
        for worker in range(scenario.get("workers", 2)):
            (stage / "workers" / node / str(worker)).mkdir(parents=True)
    return 0


def _describe(stage: Path, scenario: Mapping[str, Any], flags: Mapping[str, str]) -> int:
    if not (stage / "tpu.json").exists():
        return _complain("NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/pod' was not found")
    tpu = json.loads((stage / "tpu.json").read_text())
    match flags["--format"]:
        case "value(state.state)":
            tpu["state"] = _next(stage, "describes", tpu["states"])
            (stage / "tpu.json").write_text(json.dumps(tpu))
            if tpu["state"] not in ("ACTIVE", "UNREACHABLE"):
                for home in (stage / "workers").glob("*/*"):
                    _kill_trainer(home)
            if tpu["state"] == "UNREACHABLE":
                return _complain("UNAVAILABLE: try again")
            print(tpu["state"])
        case "value(tpu.nodeSpec.nodeId)":
            assert flags["--flatten"] == "tpu.nodeSpec[]"
            print("\n".join(tpu["slices"]))
        case "value(state.failedData.error.message)":
            print(scenario.get("failure", ""))
    return 0


def _describe_slice(stage: Path, name: str) -> int:
    del name
    print(json.loads((stage / "tpu.json").read_text()).get("slice_state", "READY"), "HEALTHY", sep="\t")
    return 0


def _delete(stage: Path) -> int:
    for home in (stage / "workers").glob("*/*"):
        _kill_trainer(home)
    shutil.rmtree(stage / "workers", ignore_errors=True)
    (stage / "tpu.json").unlink(missing_ok=True)
    return 0


def _ssh(stage: Path, scenario: Mapping[str, Any], node: str, flags: Mapping[str, str]) -> int:
    """Splits the command at spaces as gcloud does, has ssh join it again, and fails if any worker does."""
    if code := _connect(stage, scenario):
        return code
    command = " ".join(flags["--command"].split(" "))
    running = [
        subprocess.Popen(
            ["bash", "-c", command], cwd=home, env=_environment_of(home), stdin=subprocess.DEVNULL
        )
        for home in _homes(stage, node, flags["--worker"])
    ]
    codes = [process.wait() for process in running]
    return next((code for code in codes if code), 0)


def _scp(stage: Path, scenario: Mapping[str, Any], plain: list[str], flags: Mapping[str, str]) -> int:
    if code := _connect(stage, scenario):
        return code
    node, _, place = plain[1].partition(":")
    for home in _homes(stage, node, flags["--worker"]):
        shutil.copy(plain[0], home / place)
    return 0


def _connect(stage: Path, scenario: Mapping[str, Any]) -> int:
    tpu = json.loads((stage / "tpu.json").read_text())
    if tpu["state"] != "ACTIVE":
        return _complain(f"the TPU is {tpu['state']}")
    return _next(stage, "ssh", [*scenario.get("ssh", []), 0])


def _homes(stage: Path, node: str, worker: str) -> list[Path]:
    homes = sorted((stage / "workers" / node).iterdir())
    return homes if worker == "all" else [homes[int(worker)]]


def _environment_of(home: Path) -> dict[str, str]:
    return {**os.environ, "HOME": str(home), "HOST": f"t1v-n-{home.parent.name}-w-{home.name}"}


def _kill_trainer(home: Path) -> None:
    """Removes a worker as if its machine were taken away."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
        os.kill(int((home / "topklm-run/pid").read_text()), signal.SIGKILL)


# --- on a worker ---


def _uv(stage: Path, scenario: Mapping[str, Any], argv: list[str]) -> int:
    if argv[0] == "venv":
        program = Path(argv[-1]) / "bin" / "python"
        program.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sys.argv[0], program)
    return 0


def _curl(stage: Path, scenario: Mapping[str, Any], argv: list[str]) -> int:
    return 1  # there is no network


_wget = _curl


def _python(stage: Path, scenario: Mapping[str, Any], argv: list[str]) -> int:
    """Plays the trainer: `trainer` in the scenario says what each start does, words between ;; marks."""
    variables = {name: os.environ.get(name) for name in scenario.get("variables", [])}
    host = os.environ.get("HOST", "laptop-0")
    _record(stage, "trainer", argv, host=host, cwd=str(Path.cwd()), pid=os.getpid(), variables=variables)
    index = os.environ.get("SLURM_PROCID") or host.rpartition("-")[2]
    script = _next(stage, f"starts-{host}-{index}", scenario.get("trainer", ["finish"]))
    script = script.get(index, script["others"]) if isinstance(script, dict) else script
    primary = index == "0"
    for action in script.split(" ;; "):
        word, _, value = action.partition(" ")
        match word:
            case "step" if primary:
                print(f"step {int(value):,}/9,000 | loss 1.000", flush=True)
            case "say":
                print(value, flush=True)
            case "exit":
                return int(value)
            case "train":
                return _train_until_stopped(primary)
            case "finish" if primary:
                print("run: trained", flush=True)
    return 0


def _train_until_stopped(primary: bool) -> int:
    heard: list[int] = []

    def hear(number: int, frame: Any) -> None:
        heard.append(number)
        if len(heard) > 1:
            os._exit(128 + number)

    signal.signal(signal.SIGTERM, hear)
    print("training", flush=True)
    while not heard:
        time.sleep(0.01)
    time.sleep(0.2)  # saving, while a second signal would be heard
    if primary:
        print("SIGTERM: stopped after step 7 of 9; saved in run. Resume with the same command", flush=True)
    return 0


# --- kubectl and Slurm ---


def _kubectl(stage: Path, scenario: Mapping[str, Any], argv: list[str]) -> int:
    _record(stage, "manifest", argv, text=sys.stdin.read())
    return scenario.get("kubectl", 0)


def _sbatch(stage: Path, scenario: Mapping[str, Any], argv: list[str]) -> int:
    text = sys.stdin.read()
    _record(stage, "script", argv, text=text)
    if scenario.get("sbatch"):
        print("sbatch: error: invalid partition", file=sys.stderr)
        return scenario["sbatch"]
    print("77")
    return 0


def _srun(stage: Path, scenario: Mapping[str, Any], argv: list[str]) -> int:
    """Runs the command in each task, with its number before each line; ends with the highest exit code.

    SIGTERM makes the real srun kill all tasks. SIGUSR2 stands for a signal that Slurm sends to the tasks.
    """
    command = argv[argv.index("python") :]
    tasks: list[subprocess.Popen[str]] = []
    signal.signal(signal.SIGTERM, lambda *_: [task.kill() for task in tasks])
    signal.signal(signal.SIGUSR2, lambda *_: [task.terminate() for task in tasks])
    (stage / "srun.pid").write_text(str(os.getpid()))
    for index in range(scenario.get("tasks", 2)):
        environment = {**os.environ, "SLURM_PROCID": str(index)}
        tasks.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    readers = [threading.Thread(target=_label, args=item) for item in enumerate(tasks)]
    for reader in readers:
        reader.start()
    codes = [task.wait() % 256 for task in tasks]
    for reader in readers:
        reader.join()
    return max(codes)


def _label(index: int, task: subprocess.Popen[str]) -> None:
    for line in task.stdout or ():
        print(f"{index}: {line}", end="", flush=True)


def _scontrol(stage: Path, scenario: Mapping[str, Any], argv: list[str]) -> int:
    return scenario.get("scontrol", 0)


def _scancel(stage: Path, scenario: Mapping[str, Any], argv: list[str]) -> int:
    """Plays scancel: `--signal=TERM JOB` reaches the tasks of all steps, not the batch shell."""
    if re.match("--signal=TERM", argv[0]):
        os.kill(int((stage / "srun.pid").read_text()), signal.SIGUSR2)
    return 0
