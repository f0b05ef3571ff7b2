"""How long a training run takes from the start of its process to its first finished step, cold and warm.

python -m benchmarks.startup

Cold: nothing has been compiled before. Warm: the same command has run once, so that its programs lie in the
cache (`topklm.runtime.compilation_cache`). Both find their dataset prepared. Real processes of
`configs/small.py`, taking turns; each is killed after its first step.
"""

import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks.harness import results
from topklm.runtime.compilation_cache import SWITCH

RESULT = results.FOLDER / "startup.json"
TARGET = 0.5  # warm over cold
# The line with which the trainer ends each part of its start.
PARTS = {
    "data: ": "imports and data",
    "new run in": "parameters",
    "compiled the train step": "train step",
    "step 1/": "first step",
}


def main() -> None:
    """Writes benchmarks/results/startup.json."""
    parser = results.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        _start(place / "warm", place / "run")  # prepares the dataset, too
        runs: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
        for repeat in range(repeats):
            runs["cold"].append(_start(place / f"cold-{repeat}", place / f"cold-run-{repeat}"))
            runs["warm"].append(_start(place / "warm", place / f"warm-run-{repeat}"))
            print(json.dumps({kind: starts[-1] for kind, starts in runs.items()}), flush=True)
    seconds = {kind: statistics.median(sum(s.values()) for s in starts) for kind, starts in runs.items()}
    result = {
        "seconds_to_first_step": seconds,
        "warm_over_cold": seconds["warm"] / seconds["cold"],
        "target": TARGET,
        "seconds_of_parts": {kind: _medians(starts) for kind, starts in runs.items()},
        "runs": runs,
    }
    results.write(RESULT, result, shown={**result, "runs": None})


def _medians(starts: list[dict[str, float]]) -> dict[str, float]:
    return {part: statistics.median(start[part] for start in starts) for part in PARTS.values()}


def _start(cache: Path, run: Path) -> dict[str, float]:
    """Measures the seconds of each part of a start; together they are the time to the first step."""
    variables = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    for name in (SWITCH, "JAX_COMPILATION_CACHE_DIR"):
        variables.pop(name, None)
    flags = ["--config=configs/small.py", f"--workdir={run}", "--config.log.every_steps=1"]
    command = [sys.executable, "-m", "topklm.main", *flags]
    ends: dict[str, float] = {}
    began = time.perf_counter()
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            now = time.perf_counter() - began
            ends |= {part: now for text, part in PARTS.items() if line.startswith(text)}
            if PARTS["step 1/"] in ends:
                process.kill()
                break
    if list(ends) != list(PARTS.values()):
        raise RuntimeError(f"the trainer ended, or its lines have changed: saw {list(ends)}")
    parts = zip(ends.items(), [0.0, *ends.values()], strict=False)
    return {part: end - before for (part, end), before in parts}


if __name__ == "__main__":
    main()
