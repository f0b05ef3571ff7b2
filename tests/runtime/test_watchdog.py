"""The watchdog in processes of its own: it ends them."""

import os
import signal
import sys
import textwrap
import time

from helpers import ROOT, Process
import pytest

from topklm.errors import UserError
from topklm.runtime.watchdog import Watchdog

PROGRAM = """
import pathlib, sys, time
from topklm.runtime.watchdog import Watchdog

def waits_for_ever():
    time.sleep(1000)

with Watchdog(pathlib.Path(sys.argv[1]), timeout_s={timeout_s}) as watchdog:
    {body}
print("done")
"""


def run(folder, timeout_s: float, body: str) -> Process:
    program = PROGRAM.format(timeout_s=timeout_s, body=textwrap.indent(body, " " * 4).lstrip())
    return Process(
        [sys.executable, "-u", "-c", program, str(folder)], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def test_a_hang_in_a_step_is_shown_and_ends_the_process(tmp_path):
    process = run(tmp_path, 2.0, "watchdog.tick(step=411)\nwaits_for_ever()")
    assert process.finish() == 75
    *stacks, last = process.errors.splitlines()
    assert last == (
        "error: no progress for 2 s in step 412; stacks above; start the same command again to resume"
    )
    assert any("in waits_for_ever" in line for line in stacks)
    assert "in waits_for_ever" in (tmp_path / "stacks-0.txt").read_text()


def test_the_start_has_more_time(tmp_path):
    process = run(tmp_path, 0.5, "waits_for_ever()")
    assert process.finish() == 75
    assert "error: no progress for 3 s before the first step" in process.errors


@pytest.mark.slow
def test_progress_pauses_and_a_stopped_process_are_no_hangs(tmp_path):
    process = run(
        tmp_path,
        4.0,
        """
watchdog.tick(step=1)
with watchdog.paused():
    time.sleep(5)
watchdog.tick()
print("stop me")
time.sleep(1)
""",
    )
    process.wait_for_line("stop me")
    process.signal(signal.SIGSTOP)
    time.sleep(6)
    process.signal(signal.SIGCONT)
    assert process.finish() == 0, process.errors
    assert process.output.endswith("done\n")


def test_a_timeout_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("TOPKLM_HANG_TIMEOUT", "ten minutes")
    with pytest.raises(UserError, match="TOPKLM_HANG_TIMEOUT = 'ten minutes': must be a number of seconds"):
        Watchdog()
