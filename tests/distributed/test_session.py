"""Real processes on this machine, ended in every way that a process can end."""

import hashlib
import json
import os
import re
import signal
import socket
import sys
import textwrap

from helpers import ROOT, Process, coordinator_port
import pytest

from topklm import distributed
from topklm.errors import UserError
from topklm.imports import versions

PROGRAM = """
import os, signal, sys, time
import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
from topklm import distributed, errors
from topklm.runtime.watchdog import Watchdog

def sum_over_processes(value):
    mesh = jax.make_mesh((jax.device_count(),), ("x",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("x",), ()))
    ones = jax.make_array_from_process_local_data(split, np.array([value], np.float32))
    return float(jax.jit(lambda x: x.sum(), out_shardings=whole)(ones))

def main():
    with distributed.session():
        me = distributed.process_index()
{body}
    print("left", flush=True)

sys.exit(errors.guarded(main))
"""
# The service's calls return late after the end of the session, as on a busy machine.
LEFT_PROGRAM = """
import sys, time
from topklm import distributed, errors
from topklm.distributed.coordination import CoordinationClient

wait_for = CoordinationClient.wait_for

def return_late(self, key):
    try:
        return wait_for(self, key)
    except BaseException:
        time.sleep(1)
        raise

CoordinationClient.wait_for = return_late

def main():
    with distributed.session():
{body}
    print(*[thread.is_alive() for thread in session._threads[:2]])

sys.exit(errors.guarded(main))
"""
# Hears signals from before the others have come, like the trainer.
WAITING_PROGRAM = """
import sys
from topklm import distributed, errors
from topklm.runtime.process import stop_on_signal

def main():
    with stop_on_signal(distributed.announce_stop) as stop:
        print("waiting", flush=True)
        with distributed.session(lambda: stop.heard):
            print("all have come", flush=True)

sys.exit(errors.guarded(main))
"""
# Reaches the port, and has jaxlib's client: `STRANGER PORT INDEX KEY WORD...`. Takes part in the barrier of a
# key that ends in /1.
STRANGER = """
import os, sys, time
from jax._src.lib import _jax
port, index, *words = sys.argv[1:]
client = _jax.get_distributed_runtime_client(f"127.0.0.1:{port}", int(index), init_timeout=60)
client.connect()
print("connected", flush=True)
for key, word in zip(words[::2], words[1::2]):
    client.key_value_set(key, word, allow_overwrite=True)
    if key.endswith("/1"):
        client.wait_at_barrier(key.removesuffix("/1"), 60_000)
time.sleep(5)
os._exit(0)
"""
IN_A_COLLECTIVE = """
sum_over_processes(1)
print("ready", flush=True)
{instead}
sum_over_processes(1)
"""


PEER_TIMEOUT_SECONDS = 5


class Job:
    """Processes that run the program together."""

    def __init__(
        self,
        folder,
        count: int,
        body: str,
        *,
        started=None,
        timeouts: tuple[int, int] = (300, PEER_TIMEOUT_SECONDS),
        program: str = PROGRAM,
        port: int | None = None,
        counts=None,
    ):
        path = folder / "program.py"
        path.write_text(program.format(body=textwrap.indent(body, " " * 8)))
        self.port = port or coordinator_port()
        start_timeout, peer_timeout = timeouts
        self._command = [sys.executable, str(path)]
        self._counts = {index: count for index in range(count)} | (counts or {})
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",
            "TOPKLM_COORDINATOR": f"localhost:{self.port}",
            "TOPKLM_START_TIMEOUT": str(start_timeout),
            "TOPKLM_PEER_TIMEOUT": str(peer_timeout),
        }
        self.strays: list[Process] = []
        self.processes = {
            index: self._start(index) for index in (range(count) if started is None else started)
        }

    def __getitem__(self, index: int) -> Process:
        return self.processes[index]

    def _start(self, index: int) -> Process:
        numbers = {"TOPKLM_PROCESS_ID": str(index), "TOPKLM_PROCESS_COUNT": str(self._counts[index])}
        return Process(self._command, env={**self._environment, **numbers})

    def start(self, index: int) -> Process:
        """Starts one more process of this index."""
        self.strays.append(self._start(index))
        return self.strays[-1]

    def start_stranger(self, *arguments: str) -> Process:
        command = [sys.executable, "-c", STRANGER, str(self.port), *arguments]
        self.strays.append(Process(command, env={**self._environment, "no_proxy": "127.0.0.1"}))
        return self.strays[-1]

    def wait_for(self, text: str) -> None:
        for process in self.processes.values():
            process.wait_for_line(text)

    def finish(self) -> list[int]:
        """Returns the exit codes."""
        return [process.finish() for process in self.processes.values()]


@pytest.fixture
def start(tmp_path):
    """Starts a job, of which nothing is left after the test."""
    jobs = []

    def start_job(*arguments, **options) -> Job:
        jobs.append(Job(tmp_path, *arguments, **options))
        return jobs[-1]

    yield start_job
    for job in jobs:
        for process in [*job.processes.values(), *job.strays]:
            if process.exit_code is None:
                process.kill()


def last_line(process: Process) -> str:
    return process.errors.splitlines()[-1]


def test_four_processes_agree_and_end_on_the_mistake_that_one_of_them_finds(start):
    job = start(
        4,
        """
for turn in "ab":
    print(distributed.gather("words", f"{turn}{me}"), distributed.broadcast("word", f"{turn}{me}"))
distributed.barrier("words")
print(me == jax.process_index(), distributed.process_count(), distributed.is_primary())
print("sum", sum_over_processes(me + 1), flush=True)
if me == 2:
    raise errors.UserError("data.source = nowhere: there is no such file")
sum_over_processes(1)
""",
    )
    assert job.finish() == [2, 2, 2, 2]
    for index, process in job.processes.items():
        lines = [line for line in process.output.splitlines() if "Gloo" not in line]
        assert lines == [
            "['a0', 'a1', 'a2', 'a3'] a0",
            "['b0', 'b1', 'b2', 'b3'] b0",
            f"True 4 {index == 0}",
            "sum 10.0",
        ]
        said = "data.source = nowhere: there is no such file"
        heard = said if index == 2 else f"process 2 failed: {said}"
        assert process.errors == f"error: {heard}\n"


def test_threads_exchange_words_of_different_names_at_the_same_time(start):
    """As training does while a checkpoint is being written."""
    job = start(
        3,
        """
import threading
def exchange(name, pause):
    for turn in range(40):
        time.sleep(pause * (me + 1))
        assert distributed.gather(name, f"{turn}{me}") == [f"{turn}{i}" for i in range(3)]

saving = threading.Thread(target=exchange, args=("saving", 0.003))
saving.start()
exchange("training", 0.002)
saving.join()
""",
    )
    assert job.finish() == [0, 0, 0]
    assert [process.errors for process in job.processes.values()] == ["", "", ""]


def test_no_thread_is_in_a_call_of_the_service_once_the_session_has_ended(start):
    job = start(2, "session = distributed._session", program=LEFT_PROGRAM)
    assert job.finish() == [0, 0]
    assert [process.output for process in job.processes.values()] == ["False False\n"] * 2


def test_a_barrier_names_who_did_not_come_and_all_leave_together(start):
    job = start(
        2,
        """
if me == 0:
    try:
        distributed.barrier("door", 0.5)
    except distributed.PeerLost as e:
        print(e, flush=True)
sum_over_processes(1)
""",
    )
    assert job.finish() == [0, 0]
    assert "waited 0.5 s at 'door' for process 1; start the same command again" in job[0].output
    assert [process.output.splitlines()[-1] for process in job.processes.values()] == ["left", "left"]
    assert [process.errors for process in job.processes.values()] == ["", ""]


def test_a_process_that_waits_for_long_work_of_others_hears_signals(start):
    job = start(
        2,
        """
print(distributed.of_first("word", lambda: [f"of {me}"]), flush=True)
if me:
    distributed.meet("work")
time.sleep(1000)
""",
    )
    job.wait_for("['of 0']")
    job[1].signal(signal.SIGINT)
    assert job.finish() == [75, 130]
    assert "process 1 was told to stop" in last_line(job[0])
    assert last_line(job[1]) == "interrupted; what was saved before stays"


def test_who_waits_in_vain_ends_the_run_for_all(start):
    job = start(2, 'distributed.barrier("door", 0.5) if me else sum_over_processes(1)')
    assert job.finish() == [75, 75]
    for process in job.processes.values():
        assert process.errors.startswith("error: waited 0.5 s at 'door' for process 0; start the same")


def test_a_mistake_that_all_make_is_one_line_of_each(start):
    job = start(2, 'raise errors.UserError(f"the mistake of {me}")')
    assert job.finish() == [2, 2]
    assert [job[i].errors for i in (0, 1)] == ["error: the mistake of 0\n", "error: the mistake of 1\n"]


def test_a_bug_keeps_its_traceback_and_the_others_name_it(start):
    job = start(2, IN_A_COLLECTIVE.format(instead="if me == 0: {}['neuron']"))
    assert job.finish() == [1, 75]
    assert "Traceback" in job[0].errors
    assert last_line(job[0]) == "KeyError: 'neuron'"
    assert job[1].errors == (
        "error: process 0 failed: KeyError: 'neuron'; start the same command again to resume\n"
    )


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_is_missed_by_those_who_wait_in_a_collective(start, killed):
    job = start(2, IN_A_COLLECTIVE.format(instead=f"if me == {killed}: time.sleep(1000)"))
    job.wait_for("ready")
    job[killed].kill()
    survivor = job[1 - killed]
    assert survivor.finish() == 75
    assert re.fullmatch(
        rf"error: process {killed} is gone \(.*\): it was killed or its machine failed; "
        "start the same command again to resume",
        survivor.errors.removesuffix("\n") if killed else last_line(survivor),
    ), survivor.errors
    assert "Traceback" not in survivor.errors


@pytest.mark.parametrize("stopped", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stopped_process_is_given_up_and_ends_when_it_wakes(start, stopped):
    job = start(
        2,
        IN_A_COLLECTIVE.format(instead=f"if me == {stopped}: time.sleep(1000)"),
        timeouts=(300, PEER_TIMEOUT_SECONDS),
    )
    job.wait_for("ready")
    job[stopped].signal(signal.SIGSTOP)
    survivor = job[1 - stopped]
    assert survivor.finish() == 75
    assert f"process {stopped} is gone (no sign of life for {PEER_TIMEOUT_SECONDS} s)" in last_line(survivor)
    job[stopped].signal(signal.SIGCONT)
    assert job[stopped].finish() == 75
    assert last_line(job[stopped]).endswith("start the same command again to resume")


@pytest.mark.slow
def test_a_process_that_holds_the_interpreter_for_long_is_not_given_up(start):
    job = start(
        2,
        IN_A_COLLECTIVE.format(
            instead=f"import ctypes\nif me: ctypes.PyDLL(None).sleep({2 * PEER_TIMEOUT_SECONDS})"
        ),
    )
    assert job.finish() == [0, 0]
    assert [process.errors for process in job.processes.values()] == ["", ""]


@pytest.mark.slow
def test_a_process_that_never_starts_is_named(start):
    job = start(3, "pass", started=[0, 2], timeouts=(10, PEER_TIMEOUT_SECONDS))
    assert job.finish() == [75, 75]
    for process in job.processes.values():
        assert process.errors == (
            "error: waited 10 s for 3 processes, 2 came (missing: 1): start the same command on every host\n"
        )


def test_without_process_0_the_others_say_where_they_looked_for_it(start):
    job = start(2, "pass", started=[1], timeouts=(1, PEER_TIMEOUT_SECONDS))
    assert job.finish() == [75]
    assert re.match(r"error: waited 1 s for process 0 to answer at localhost:\d+ \(", job[1].errors)


def test_a_stop_of_one_before_training_ends_all_and_does_not_look_finished(start):
    job = start(
        2,
        """
if me == 1:
    distributed.announce_stop("SIGTERM: stopped before the first step")
    os._exit(0)
time.sleep(1000)
""",
    )
    assert job.finish() == [75, 0]
    assert job[1].errors == ""
    assert job[0].errors == (
        "error: process 1 was told to stop (SIGTERM: stopped before the first step); "
        "start the same command again to resume\n"
    )


def test_a_hang_shows_where_each_process_is(start):
    job = start(
        2,
        """
def waits_for_ever():
    time.sleep(1000)

def works():
    while True:
        time.sleep(0.05)
        watchdog.tick()

with Watchdog(timeout_s=3.0) as watchdog:
    watchdog.tick(step=411)
    waits_for_ever() if me else works()
""",
    )
    assert job.finish() == [75, 75]
    for process, function in ((job[0], "works"), (job[1], "waits_for_ever")):
        assert last_line(process) == (
            "error: no progress for 3 s in step 412 (process 1); stacks above; "
            "start the same command again to resume"
        )
        assert f"in {function}" in process.errors


def test_a_stop_of_all_while_one_has_not_come_ends_those_that_have(start):
    job = start(3, "", started=[0, 1], program=WAITING_PROGRAM)
    job.wait_for("waiting")
    for process in job.processes.values():
        process.signal(signal.SIGTERM)
    assert job.finish() == [0, 0]
    for process in job.processes.values():
        assert "Resume with the same command" in process.output.splitlines()[-1]


@pytest.mark.parametrize("preempted", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_stop_of_one_while_another_has_not_come_leaves_the_rest_until_the_start_timeout(start, preempted):
    job = start(3, "", started=[0, 1], program=WAITING_PROGRAM, timeouts=(5, PEER_TIMEOUT_SECONDS))
    job.wait_for("waiting")
    job[preempted].signal(signal.SIGTERM)
    assert job[preempted].finish() == 0
    assert job[1 - preempted].finish() == 75
    assert last_line(job[1 - preempted]).startswith("error: ")


def test_a_taken_port_is_a_mistake_that_process_0_names(start):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        job = start(2, "pass", started=[0], port=taken.getsockname()[1])
        assert job.finish() == [2]
    assert re.match(r"error: process 0 cannot listen at port \d+ \(address already in use\)", job[0].errors)
    assert job[0].errors.count("\n") == 1


def test_a_process_that_was_started_for_another_number_of_processes_is_named(start):
    job = start(2, "pass", counts={1: 3})
    assert job.finish() == [2, 2]
    for process in job.processes.values():
        assert process.errors == (
            "error: process 1 failed: started as one of 3 processes, process 0 as one of 2\n"
        )


def test_another_process_of_the_same_number_does_not_let_the_run_go_on(start):
    job = start(2, IN_A_COLLECTIVE.format(instead="time.sleep(1000)"))
    job.wait_for("ready")
    newcomer = job.start(1)
    assert newcomer.finish() == 75
    assert "process 1 came when the run was under way" in last_line(newcomer)
    assert job.finish() == [75, 75]


@pytest.mark.parametrize(
    "kind", ["stop", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("mistake", None))]
)
def test_a_stranger_at_the_port_cannot_make_a_run_look_finished_or_mistaken(start, kind):
    """Lets it end the run, as any process of a run can: launchers then start it again."""
    word = json.dumps({"by": 1, "secret": "?", "kind": kind, "process": 1, "text": "trained"})
    job = start(2, IN_A_COLLECTIVE.format(instead="time.sleep(1000)"))
    job.wait_for("ready")
    stranger = job.start_stranger("1", "topklm/ending", word if kind else "trained")
    stranger.wait_for_line("connected")
    assert job.finish() == [75, 75]
    for process in job.processes.values():
        assert "trained" not in process.output + process.errors
        assert last_line(process).endswith("start the same command again to resume")


@pytest.mark.slow
def test_a_stranger_that_comes_before_a_process_cannot_make_a_run_look_finished(start):
    job = start(2, "pass", started=[0])
    hello = {"count": 2, "versions": versions("topklm", "jax"), "hash": hashlib.sha256(b"s").hexdigest()}
    word = {"by": 1, "secret": "s", "kind": "stop", "process": 1, "text": "trained"}
    job.start_stranger(
        "1", "topklm/hello#1/1", json.dumps(hello), "topklm/ending", json.dumps(word)
    ).wait_for_line("connected")
    assert job.finish() == [75]
    assert job[0].errors == (
        "error: process 1 was told to stop (trained); start the same command again to resume\n"
    )


def test_a_process_with_other_facts_than_the_first_is_named(monkeypatch):
    others = {"--k": 4, "text": "leads"}
    monkeypatch.setattr(distributed, "meet", lambda name, value: [value, json.dumps(others)])
    distributed.check_same(others)
    for facts, said in (
        ({"--k": 3, "text": "leads"}, "--k: process 1 has 4, process 0 3: give all hosts"),
        ({"--k": 4}, "text: process 1 has 'leads', process 0 None"),
    ):
        with pytest.raises(UserError, match=said):
            distributed.check_same(facts)
