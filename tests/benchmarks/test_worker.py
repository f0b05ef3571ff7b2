"""Subjects in processes of their own: told to go, measured there, and gone at the end."""

import os
from pathlib import Path

import pytest

from benchmarks.harness.worker import Worker, WorkerError, peak_resident_bytes, threads
from topklm.errors import UserError

MODULE = "stand_in_subject"
PATHS = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])


def start(**spec):
    return Worker(MODULE, spec, {"PYTHONPATH": PATHS})


def is_running(pid):
    return Path(f"/proc/{pid}").exists()


def test_a_side_runs_in_a_process_of_its_own_that_ends():
    with start() as worker:
        pid = worker.facts["pid"]
        assert pid != os.getpid() and is_running(pid)
        assert worker.facts["threads"] == str(threads())
        assert worker.facts["allocator"]
        subjects = worker.subjects()
        assert subjects["sleep"](3) >= 0.06
        assert subjects["talk"](1) >= 0  # what it prints is not taken for an answer
    assert not is_running(pid)


def test_peak_memory_is_that_of_the_process():
    with start() as small, start(bytes=200 * 2**20) as large:
        more = large.peak_bytes() - small.peak_bytes()
        assert 190 * 2**20 < more < 230 * 2**20
        assert peak_resident_bytes() > 0


def test_a_mistake_of_the_user_stays_one():
    with pytest.raises(UserError, match=r"^mesh\.data = 3: no$"):
        start(refuse="mesh.data = 3: no")


def test_a_process_that_fails_says_why():
    with pytest.raises(WorkerError, match=r"ended with code 1: (?s:.*)ZeroDivisionError: so it goes"):
        start(fail="so it goes")


def test_a_process_that_is_killed_is_noticed():
    with start() as worker, pytest.raises(WorkerError, match="ended with code -9"):
        worker.subjects()["die"](1)
