"""Runs a command and watches what it and its children take: wall seconds and peak memory."""

from collections.abc import Mapping, Sequence
import dataclasses
import os
import subprocess
import time

import psutil

_SAMPLE_SECONDS = 0.25  # reading a process's share of memory costs it milliseconds


@dataclasses.dataclass(frozen=True)
class Measured:
    """One run of a command."""

    seconds: float
    peak_bytes: int  # proportional set size summed over the process tree, highest of all samples
    output: str


def measure(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Measured:
    """Runs a command to its end; raises CalledProcessError if it fails."""
    began = time.perf_counter()
    variables = {**os.environ, **(environment or {})}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables) as process:
        tree, peak = psutil.Process(process.pid), 0
        while process.poll() is None:
            peak = max(peak, _pss(tree))
            time.sleep(_SAMPLE_SECONDS)
        seconds = time.perf_counter() - began
        output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output)
    return Measured(seconds, peak, output)


def _pss(tree: psutil.Process) -> int:
    total = 0
    try:
        members = [tree, *tree.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for member in members:
        try:
            total += member.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total
