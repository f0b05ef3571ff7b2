"""The process of a `worker.Worker`: prepares a module's subjects, then runs them as told, line by line.

`python -m benchmarks.harness.worker_main MODULE`: JSON lines come in on standard input and go out on what was
standard output; lines that libraries print go to standard error. With FUNCTION ARGUMENTS, it calls that one
function, prints its result, and ends.
"""

import importlib
import json
import os
import sys
from typing import Any, TextIO

from benchmarks.harness.timing import timed
from benchmarks.harness.worker import Prepared, peak_resident_bytes
from topklm import errors
from topklm.runtime import allocator


def main(module: str) -> None:
    """Answers until standard input ends."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        _serve(module, answers)


def _serve(module: str, answers: TextIO) -> None:
    allocator_name = allocator.keep_freed_memory()  # before either framework has threads
    try:
        prepared: Prepared = importlib.import_module(module).prepare(json.loads(sys.stdin.readline()))
    except Exception as e:
        text = errors.explain(e)
        if text is None:
            raise
        _answer(answers, {"user_error": text})
        return
    facts = {"allocator": allocator_name, **prepared.facts}
    _answer(answers, {"facts": facts, "subjects": list(prepared.subjects)})
    for line in sys.stdin:
        asked = json.loads(line)
        if "peak" in asked:
            _answer(answers, {"peak_bytes": prepared.device_peak_bytes() or peak_resident_bytes()})
        else:
            _answer(answers, {"seconds": timed(prepared.subjects[asked["side"]])(asked["calls"])})


def _answer(answers: TextIO, message: Any) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        called = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])
        print(json.dumps(called(*json.loads(sys.argv[3]))))
