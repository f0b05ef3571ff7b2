"""Trains with several processes on one machine, as if each were a host of its own.

For trying out what happens on many hosts, not for speed. Four hosts with two devices each:

    python launch/local.py 4 --devices-per-process 2 -- --config=configs/small.py --workdir=runs/try
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
import contextlib
import ctypes
import json
import os
from pathlib import Path
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from typing import IO

BUG, USER_ERROR, TRY_AGAIN, INTERRUPTED = 1, 2, 75, 130
TERMINATE_S = 5.0
POLL_S = 0.05
COORDINATOR_PORTS = range(20_000, 32_768)  # Linux gives 32,768 and above, others 49,152 and above
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
DEVICES_FLAG = "--xla_force_host_platform_device_count"
EPILOG = """
Each line of output begins with the number of its process. Ctrl-C, SIGTERM and SIGHUP go to all; a second
one kills them. Exit code: 0 if all end with 0; else 2 (a mistake to mend) or 1 (a bug) if any process does;
else 75: start the same command again. DIR gets process-N.log, and pids.json, {"restart": R, "pids": [...]}.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the processes, again after a failure that a new start may mend; returns the exit code."""
    options = _parse(argv)
    sys.stdout.reconfigure(errors="backslashreplace")
    if options.dry_run:
        _print_commands(options)
        return 0
    job = Job(options)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN or number == signal.SIGINT:
            signal.signal(number, job.receive)
    for restart in range(options.restarts + 1):
        code = job.run(restart)
        if code != TRY_AGAIN or job.signals or restart == options.restarts:
            break
        _say(f"local: starting all again, restart {restart + 1} of {options.restarts}")
    return code


class Job:
    """The processes that run now, and what was asked of them."""

    def __init__(self, options: argparse.Namespace):
        self.signals = 0
        self._options = options
        self._processes: list[subprocess.Popen[str]] = []

    def run(self, restart: int) -> int:
        """Starts all processes, waits for the end of all, and returns the job's exit code."""
        count = self._options.processes
        coordinator = f"localhost:{_free_port()}"
        readers: list[threading.Thread] = []
        try:
            for index in range(count):
                self._processes.append(_start(self._options, index, coordinator))
            readers = [self._follow(index, process) for index, process in enumerate(self._processes)]
            self._write_pids(restart)
            if self.signals:  # during the starts
                self._send(signal.SIGTERM)
            self._wait()
        finally:
            codes = [_kill(process) for process in self._processes]
            self._processes = []
        for reader in readers:
            reader.join(TERMINATE_S)
        for index, code in enumerate(codes):
            if code < 0:
                _say(f"[{index}] ended by {signal.Signals(-code).name}")
        return _job_code(codes)

    def receive(self, number: int, frame: types.FrameType | None) -> None:
        """Passes a signal on to all processes; the second one kills them."""
        del frame
        self.signals += 1
        self._send(signal.SIGKILL if self.signals > 1 else number)

    def _wait(self) -> None:
        """Returns when all have ended, or those that were asked to after another's failure do not."""
        failed_at: float | None = None
        terminated = False
        while None in (codes := [process.poll() for process in self._processes]):
            if failed_at is None and any(codes):
                failed_at = time.monotonic()
            if failed_at is not None:
                waited = time.monotonic() - failed_at
                if waited > self._options.grace + TERMINATE_S:
                    return
                if waited > self._options.grace and not terminated:
                    terminated = True
                    self._send(signal.SIGTERM)
            time.sleep(POLL_S)

    def _send(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def _follow(self, index: int, process: subprocess.Popen[str]) -> threading.Thread:
        log = self._options.log_dir and (self._options.log_dir / f"process-{index}.log").open("a")
        reader = threading.Thread(target=_pass_lines_on, args=(index, process.stdout, log), daemon=True)
        reader.start()
        return reader

    def _write_pids(self, restart: int) -> None:
        if self._options.log_dir:
            path = self._options.log_dir / "pids.json"
            pids = [process.pid for process in self._processes]
            path.with_suffix(".new").write_text(json.dumps({"restart": restart, "pids": pids}))
            path.with_suffix(".new").replace(path)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="local.py N [options] -- TRAINER FLAGS...",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("processes", metavar="N", type=_at_least(1), help="how many hosts to simulate")
    parser.add_argument("--devices-per-process", metavar="D", type=_at_least(1), default=1)
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    parser.add_argument(
        "--restarts", metavar="R", type=_at_least(0), default=0, help="start all again after a failure"
    )
    parser.add_argument("--log-dir", metavar="DIR", type=Path, help="for the output of each process too")
    parser.add_argument(
        "--grace", metavar="S", type=float, default=20, help="seconds for the others after a failure; 20"
    )
    parser.add_argument(
        "--module", default="topklm.main", help="Python module to run; the trainer, topklm.main"
    )
    own, flags = list(argv), []
    if "--" in own:
        flags = own[own.index("--") + 1 :]
        own = own[: own.index("--")]
    options = parser.parse_args(own, argparse.Namespace(flags=flags))
    if options.log_dir:
        options.log_dir.mkdir(parents=True, exist_ok=True)
    return options


def _at_least(lowest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdigit() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, {lowest} or more")
        return int(text)

    return number


def _print_commands(options: argparse.Namespace) -> None:
    coordinator = f"localhost:{_free_port()}"
    for index in range(options.processes):
        variables = [f"{k}={shlex.quote(v)}" for k, v in _variables(options, index, coordinator).items()]
        print(*variables, shlex.join(_command(options)))


def _command(options: argparse.Namespace) -> list[str]:
    return [sys.executable, "-u", "-m", options.module, *options.flags]


def _variables(options: argparse.Namespace, index: int, coordinator: str) -> dict[str, str]:
    """Returns the variables of a process that the launcher does not have."""
    other_xla_flags = re.sub(rf"{DEVICES_FLAG}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    return {
        "TOPKLM_COORDINATOR": coordinator,
        "TOPKLM_PROCESS_ID": str(index),
        "TOPKLM_PROCESS_COUNT": str(options.processes),
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
        "XLA_FLAGS": f"{other_xla_flags} {DEVICES_FLAG}={options.devices_per_process}".strip(),
    }


def _start(options: argparse.Namespace, index: int, coordinator: str) -> subprocess.Popen[str]:
    launcher = os.getpid()
    return subprocess.Popen(
        _command(options),
        env={**os.environ, **_variables(options, index, coordinator)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        # A terminal's Ctrl-C reaches this process only, which passes it on; and a group can be swept.
        start_new_session=True,
        preexec_fn=lambda: _die_with(launcher),  # noqa: PLW1509 - no other thread runs yet
    )


def _die_with(launcher: int) -> None:
    """Asks the kernel, before the command runs, to kill this process when the launcher dies in any way."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # it died just before
            os._exit(TRY_AGAIN)


def _kill(process: subprocess.Popen[str]) -> int:
    """Sees to it that a process, stopped or not, and its descendants are gone; returns its exit code."""
    if process.poll() is None:
        process.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _job_code(codes: Sequence[int]) -> int:
    """Returns the job's exit code for those of its processes; negative ones are deaths by a signal."""
    if not any(codes):
        return 0
    if not set(codes) - {0, INTERRUPTED}:
        return INTERRUPTED
    return next((code for code in (USER_ERROR, BUG) if code in codes), TRY_AGAIN)


def _pass_lines_on(index: int, lines: Iterable[str], log: IO[str] | None) -> None:
    with log or contextlib.nullcontext():
        for line in lines:
            _say(f"[{index}] {line.rstrip()}")
            if log:
                with contextlib.suppress(OSError):  # a full disk; the run goes on without its log
                    log.write(line)
                    log.flush()


def _say(line: str) -> None:
    """Prints a line, while somebody reads: a job does not end because nobody does any more."""
    try:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # where the interpreter's last flush goes, too
    except OSError:
        pass  # a full disk may have space again for the next line


def _free_port() -> int:
    """Chooses a port below those that the kernel gives to connections: process 0 binds it seconds later."""
    for port in random.sample(COORDINATOR_PORTS, len(COORDINATOR_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port
    raise OSError(f"no port from {COORDINATOR_PORTS[0]} to {COORDINATOR_PORTS[-1]} is free")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
