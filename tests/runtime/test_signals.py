"""Signals to real processes whose main thread is in a C call that never returns, as a long compilation is."""

import os
import signal
import sys
import threading

from helpers import ROOT, Process
import pytest

from topklm.runtime.process import stop_on_signal

HEADER = """
import ctypes, os, signal, sys, time
from topklm.runtime.process import stop_on_signal

def say(text):
    os.write(1, f"{text}\\n".encode())  # in one piece, whoever else writes

def never_returns():
    # A mutex locked twice waits for ever, outside of Python, and no signal wakes it.
    mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    say("in a C call")
    lock(mutex)
"""
# A shell's background jobs, and their children, are told to ignore Ctrl-C.
HEED_INTERRUPTS = "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
IGNORING_INTERRUPTS = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")
NOTHING_NEW = "stopped before the first step; nothing new to save. Resume with the same command"


@pytest.fixture
def start():
    running = []

    def start(script, shell=()):
        variables = {**os.environ, "PYTHONPATH": str(ROOT)}
        header = HEADER if shell else HEADER + HEED_INTERRUPTS
        command = [*shell, sys.executable, "-c", header + script]
        running.append(Process(command, env=variables, start_new_session=True))
        return running[-1]

    yield start
    for process in running:
        if process.exit_code is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.finish()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_starting_process_ends_at_the_first_signal(start, number, code):
    process = start("with stop_on_signal(lambda text: say('telling: ' + text)): never_returns()")
    process.wait_for_line("in a C call")
    process.signal(number)
    assert process.finish() == code
    line = f"{number.name}: {NOTHING_NEW}"
    assert process.output.splitlines() == ["in a C call", line, f"telling: {line}"]
    assert process.errors == ""


def test_a_starting_process_whose_peers_do_not_answer_ends_at_the_second_signal(start):
    process = start(
        """
def tell(text):
    say("telling")
    time.sleep(1000)

with stop_on_signal(tell): never_returns()
"""
    )
    process.wait_for_line("in a C call")
    process.signal(signal.SIGTERM)
    process.wait_for_line("telling")
    process.signal(signal.SIGTERM)
    assert process.finish() == 128 + signal.SIGTERM


def test_a_starting_process_ends_even_when_its_peers_cannot_be_told(start):
    process = start(
        """
def tell(text):
    raise OSError("no route to host")

with stop_on_signal(tell): never_returns()
"""
    )
    process.wait_for_line("in a C call")
    process.signal(signal.SIGTERM)
    assert process.finish() == 0


def test_a_starting_process_ends_when_another_one_was_asked_to_stop(start):
    process = start(
        """
with stop_on_signal(lambda text: say("telling")) as stop:
    stop.request("SIGTERM")
    stop.begin_training()
    say("training")
"""
    )
    assert process.finish() == 0
    assert process.output == f"SIGTERM: {NOTHING_NEW}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_process_goes_on_until_it_has_saved(start, number):
    process = start(
        """
with stop_on_signal(lambda text: say("telling")) as stop:
    stop.begin_training()
    assert not stop
    say("training")
    while not stop:
        pass
say(f"saved after {stop.signal_name}")
"""
    )
    process.wait_for_line("training")
    process.signal(number)
    assert process.finish() == 0
    assert process.output == f"training\nsaved after {number.name}\n"
    assert process.errors == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_training_process_at_once(start, number):
    process = start(
        """
import sys
import threading

def watch():
    while not stop: time.sleep(0.01)
    say(f"asked by {stop.signal_name}")

with stop_on_signal() as stop:
    stop.begin_training()
    threading.Thread(target=watch, daemon=True).start()
    never_returns()
"""
    )
    process.wait_for_line("in a C call")
    process.signal(signal.SIGTERM)
    process.wait_for_line("asked by SIGTERM")
    process.signal(number)
    assert process.finish() == 128 + number


def test_requests_of_other_processes_are_no_second_signal(start):
    process = start(
        """
with stop_on_signal() as stop:
    stop.begin_training()
    stop.request("SIGTERM")
    stop.request("SIGTERM")
    say("asked")
    while not stop.heard: time.sleep(0.01)
    say(f"saved after {stop.signal_name}")
"""
    )
    process.wait_for_line("asked")
    process.signal(signal.SIGINT)
    assert process.finish() == 0
    assert "saved after SIGTERM" in process.output


def test_a_signal_that_is_ignored_stays_ignored(start):
    process = start("with stop_on_signal(): never_returns()", IGNORING_INTERRUPTS)
    process.wait_for_line("in a C call")
    process.signal(signal.SIGINT)
    process.signal(signal.SIGINT)
    process.signal(signal.SIGTERM)
    assert process.finish() == 0
    assert process.output.splitlines() == ["in a C call", f"SIGTERM: {NOTHING_NEW}"]


def test_a_signal_to_a_child_stays_with_the_child(start):
    process = start(
        """
with stop_on_signal() as stop:
    stop.begin_training()
    child = os.fork()
    if not child:
        say("child")
        time.sleep(1000)
    import subprocess
    other = subprocess.Popen(["sh", "-c", "echo other; exec sleep 1000"])
    say(f"{child} {other.pid}")
    ends = [os.waitpid(pid, 0)[1] for pid in (child, other.pid)]
    say(f"{ends} {bool(stop)}")
"""
    )
    for _ in range(3):
        line = process.wait_for_line("")
        if line.split()[0].isdigit():
            children = [int(pid) for pid in line.split()]
    for pid in children:
        os.kill(pid, signal.SIGTERM)
    assert process.finish() == 0
    assert process.output.splitlines()[-1] == f"{[int(signal.SIGTERM)] * 2} False"


def test_after_the_block_signals_do_what_they_did_before():
    received, sent = os.pipe()
    os.set_blocking(sent, False)
    mine = signal.signal(signal.SIGTERM, lambda *_: None)
    wakeup = signal.set_wakeup_fd(sent)
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    threads = set(threading.enumerate())
    try:
        for _ in range(3):
            with pytest.raises(ZeroDivisionError), stop_on_signal() as stop:
                stop.begin_training()
                raise ZeroDivisionError
            assert not stop
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
        assert set(threading.enumerate()) <= threads
    finally:
        assert signal.set_wakeup_fd(wakeup) == sent
        signal.signal(signal.SIGTERM, mine)
        os.close(received)
        os.close(sent)


def test_a_signal_that_a_library_has_ignored_meanwhile_is_heard_once_there_are_steps_to_save(start):
    process = start(
        """
signal.signal(signal.SIGHUP, signal.SIG_DFL)
with stop_on_signal() as stop:
    ctypes.CDLL(None).signal(signal.SIGHUP, ctypes.c_void_p(1))  # SIG_IGN, which Python does not hear of
    stop.begin_training()
    say("trains")
    while not stop:
        time.sleep(0.01)
    print("saved after", stop.signal_name)
"""
    )
    process.wait_for_line("trains")
    process.signal(signal.SIGHUP)
    assert process.finish() == 0
    assert process.output.splitlines()[-1] == "saved after SIGHUP"
