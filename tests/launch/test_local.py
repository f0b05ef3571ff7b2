"""The launcher with small programs in the trainer's place."""

import json
import os
from pathlib import Path
import shlex
import signal
import subprocess
import sys
import time

from helpers import PATIENCE_SECONDS, ROOT, Process
import pytest

LAUNCHER = ROOT / "launch" / "local.py"
PROGRAMS = {
    "reports": "print(os.environ['TOPKLM_COORDINATOR'], me, count, os.environ['XLA_FLAGS'], sys.argv[1:])",
    "waits": """
signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))
print("up")
time.sleep(1e4)
""",
    "stubborn": """
signal.signal(signal.SIGINT, lambda *_: print("no"))
print("up")
while True:
    signal.pause()
""",
    "ends_with": "sys.exit(int(sys.argv[1 + me]))",
    "one_dies": "os.kill(os.getpid(), signal.SIGKILL) if me else time.sleep(1e4)",
    "one_stops": "os.kill(os.getpid(), signal.SIGSTOP) if me else sys.exit(75)",
    "second_time_lucky": """
place = pathlib.Path(sys.argv[1]) / str(me)
if not place.exists():
    place.touch()
    sys.exit(75)
""",
    "has_a_child": "print('child', subprocess.Popen(['sleep', '1000']).pid); sys.exit(1)",
}
HEAD = """
import os, pathlib, signal, subprocess, sys, time
me, count = int(os.environ["TOPKLM_PROCESS_ID"]), int(os.environ["TOPKLM_PROCESS_COUNT"])
"""


@pytest.fixture
def launch(tmp_path):
    """Starts a job of processes that run one of the programs."""
    for name, body in PROGRAMS.items():
        (tmp_path / f"{name}.py").write_text(HEAD + body)

    def start(count: int, module: str, *options: str, flags: tuple[str, ...] = ()) -> Process:
        command = [sys.executable, str(LAUNCHER), str(count), "--module", module, "--grace", "0.5", *options]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "XLA_FLAGS": "--xla_some_flag=1"}
        return Process([*command, "--", *flags], env=environment)

    return start


def is_alive(pid: int) -> bool:
    """Returns whether a process is there, and no mere entry of one that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "still there"
        time.sleep(0.01)


def wait_for_all_up(job: Process, count: int) -> None:
    for _ in range(count):
        job.wait_for_line("up")


def test_each_process_learns_its_place_its_devices_and_its_flags(launch):
    job = launch(2, "reports", "--devices-per-process", "4", flags=("--config=a.py", "--workdir=a b"))
    assert job.finish() == 0, job.errors
    places = {}
    for line in job.output.splitlines():
        prefix, coordinator, me, rest = line.split(maxsplit=3)
        places[prefix] = (me, coordinator)
        assert rest == (
            "2 --xla_some_flag=1 --xla_force_host_platform_device_count=4 ['--config=a.py', '--workdir=a b']"
        )
    assert {prefix: me for prefix, (me, _) in places.items()} == {"[0]": "0", "[1]": "1"}
    assert len({coordinator for _, coordinator in places.values()}) == 1


def test_a_dry_run_prints_commands_that_a_shell_could_run():
    command = [sys.executable, str(LAUNCHER), "2", "--dry-run", "--", "--config=a b.py"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for index, line in enumerate(lines):
        words = shlex.split(line)
        assert f"TOPKLM_PROCESS_ID={index}" in words
        assert words[-4:] == ["-u", "-m", "topklm.main", "--config=a b.py"]
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("codes", "expected"),
    [("0 0", 0), ("75 2", 2), ("75 1", 1), ("0 75", 75), ("130 0", 130), ("1 2", 2)],
)
def test_the_exit_code_sums_up_those_of_the_processes(launch, codes, expected):
    assert launch(2, "ends_with", flags=tuple(codes.split())).finish() == expected


def test_a_signal_goes_to_all(launch):
    job = launch(2, "waits")
    wait_for_all_up(job, 2)
    job.signal(signal.SIGTERM)
    assert job.finish() == 1
    assert sorted(job.output.splitlines()[-2:]) == ["[0] told to stop", "[1] told to stop"]


def test_a_second_signal_kills(launch):
    job = launch(2, "stubborn")
    wait_for_all_up(job, 2)
    job.signal(signal.SIGINT)
    for _ in range(2):
        job.wait_for_line("no")
    job.signal(signal.SIGINT)
    assert job.finish() == 75
    assert sorted(job.output.splitlines()[-2:]) == ["[0] ended by SIGKILL", "[1] ended by SIGKILL"]


@pytest.mark.parametrize("program", ["one_dies", "one_stops"])
def test_when_one_fails_the_others_are_ended_stopped_or_not(launch, tmp_path, program):
    job = launch(2, program, "--log-dir", str(tmp_path / "logs"))
    assert job.finish() == 75
    pids = json.loads((tmp_path / "logs" / "pids.json").read_text())["pids"]
    assert len(pids) == 2
    assert not any(is_alive(pid) for pid in pids)


def test_all_are_started_again_after_a_failure_that_may_pass(launch, tmp_path):
    logs = tmp_path / "logs"
    job = launch(2, "second_time_lucky", "--restarts", "3", "--log-dir", str(logs), flags=(str(tmp_path),))
    assert job.finish() == 0
    assert job.output.splitlines() == ["local: starting all again, restart 1 of 3"]
    assert json.loads((logs / "pids.json").read_text())["restart"] == 1


def test_a_mistake_is_not_repeated_and_failures_only_so_often(launch):
    mistake = launch(1, "ends_with", "--restarts", "3", flags=("2",))
    assert mistake.finish() == 2
    assert mistake.output == ""
    failure = launch(1, "ends_with", "--restarts", "2", flags=("75",))
    assert failure.finish() == 75
    assert failure.output.count("starting all again") == 2


def test_nothing_outlives_the_launcher_even_when_it_is_killed(launch, tmp_path):
    job = launch(2, "waits", "--log-dir", str(tmp_path))
    wait_for_all_up(job, 2)
    pids = json.loads((tmp_path / "pids.json").read_text())["pids"]
    assert all(is_alive(pid) for pid in pids)
    job.kill()
    wait_until_gone(pids)


def test_children_of_the_processes_are_ended_too(launch):
    job = launch(1, "has_a_child")
    child = int(job.wait_for_line("child").split()[-1])
    assert job.finish() == 1
    wait_until_gone([child])


@pytest.mark.parametrize("arguments", [["0"], ["two"], ["2", "--restarts", "-1"], ["2", "--config=a.py"]])
def test_arguments_that_do_not_fit_are_refused(arguments):
    command = [sys.executable, str(LAUNCHER), *arguments]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 2
    assert "local.py: error: " in result.stderr.splitlines()[-1]


def test_a_job_goes_on_when_nobody_reads_its_output(tmp_path):
    (tmp_path / "talks.py").write_text(
        "import pathlib, sys\n"
        "for n in range(5000): sys.stdout.buffer.write(f'{n} é\\n'.encode()); sys.stdout.flush()\n"
        "pathlib.Path('done').write_text('yes')\n"
    )
    command = f"{sys.executable} {ROOT / 'launch' / 'local.py'} 1 --module talks -- | head -n 2"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "ascii"}
    shell = ["bash", "-o", "pipefail", "-c", command]
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(shell, check=True, **options)
    assert done.stdout.startswith("[0] 0 \\xe9")
    assert done.stderr == ""
    assert (tmp_path / "done").read_text() == "yes"
