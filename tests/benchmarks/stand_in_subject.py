"""Subjects for the tests of `benchmarks.harness.worker`; run in a process of their own."""

import os
import signal
import time

from benchmarks.harness.worker import Prepared
from topklm.errors import UserError


def prepare(spec):
    print("a library that talks on standard output")
    if "refuse" in spec:
        raise UserError(spec["refuse"])
    if "fail" in spec:
        raise ZeroDivisionError(spec["fail"])
    held = bytearray(spec.get("bytes", 0))
    held[:: os.sysconf("SC_PAGE_SIZE")] = b"x" * len(held[:: os.sysconf("SC_PAGE_SIZE")])
    subjects = {
        "sleep": lambda: time.sleep(0.02),
        "talk": lambda: print("more"),
        "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
    }
    return Prepared(
        subjects, {"pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"], "held": len(held)}
    )
