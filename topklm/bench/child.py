"""The process of a `processes.Worker`: prepares a module's sides, then runs them as told, line by line.

`python -m topklm.bench.child MODULE`: JSON lines come in on standard input and go out on what was standard
output; whatever libraries print goes to standard error.
"""

import importlib
import json
import os
import sys
from typing import Any, TextIO

from topklm import errors
from topklm.bench.processes import Prepared, peak_resident_bytes
from topklm.bench.timing import timed
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
    _answer(answers, {"facts": facts, "sides": list(prepared.sides)})
    for line in sys.stdin:
        asked = json.loads(line)
        if "peak" in asked:
            _answer(answers, {"peak_bytes": prepared.device_peak_bytes() or peak_resident_bytes()})
        else:
            _answer(answers, {"seconds": timed(prepared.sides[asked["side"]])(asked["calls"])})


def _answer(answers: TextIO, message: Any) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
