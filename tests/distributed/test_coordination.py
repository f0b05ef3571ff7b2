"""Every method of JAX's coordination client that the package uses, on the JAX that is installed."""

import sys

from helpers import ROOT, Process, coordinator_port

from topklm.distributed.coordination import missing_processes

ALONE = """
import os, sys, threading
import jax
from topklm.distributed import coordination
from topklm.distributed.coordination import ClusterProcess

alone = ClusterProcess(0, 1, "localhost", int(sys.argv[1]))
client = coordination.connect(
    alone, start_timeout_s=60, peer_timeout_s=60, on_abort=lambda said: os._exit(75)
)
assert coordination.is_listening(alone, 10)

assert client.get("a/x") is None
assert client.set("a/x", "1")
assert not client.set("a/x", "2")
assert client.get("a/x") == client.wait_for("a/x") == "1"
assert client.set("a/y", "4")
assert client.values("a") == {"x": "1", "y": "4"}
client.delete("a/x")
assert client.values("a") == {"y": "4"}
assert client.values("b") == {}
assert client.barrier("door", 60)
assert client.alive(1).keys() == {0}

def wait_in_vain():
    try:
        client.wait_for("never")
    except jax.errors.JaxRuntimeError:
        print("the wait ended", flush=True)

waiting = threading.Thread(target=wait_in_vain)
waiting.start()
client.disconnect()
waiting.join()
"""
ABORTED = """
import os, sys
from topklm.distributed import coordination
from topklm.distributed.coordination import ClusterProcess

def end(said):
    print(coordination.missing_processes(said), flush=True)
    os._exit(75)

process = ClusterProcess(0, 3, "localhost", int(sys.argv[1]))
coordination.connect(process, start_timeout_s=1, peer_timeout_s=60, on_abort=end)
"""


def run(program: str) -> Process:
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = Process([sys.executable, "-c", program, str(coordinator_port())], env=environment)
    process.finish()
    return process


def test_a_store_a_barrier_and_who_is_alive():
    process = run(ALONE)
    assert (process.exit_code, process.output, process.errors) == (0, "the wait ended\n", "")


def test_an_abort_of_xla_calls_the_handler_with_what_it_said():
    process = run(ABORTED)
    assert (process.exit_code, process.output, process.errors) == (75, "(1, '1, 2')\n", "")


def test_another_text_of_xla_names_nobody():
    assert missing_processes("UNAVAILABLE: failed to connect to all addresses") is None
