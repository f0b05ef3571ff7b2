"""How long a command takes from the start of its process until it is of use, cold and warm.

python -m benchmarks.startup

`train`: to the first finished step of `configs/small.py`, whose dataset is prepared. `serve`: to the first
token that a client of such a run's server gets. Cold: nothing has been compiled before. Warm: the same
command has run once, so that its programs lie in the cache (`topklm.runtime.compilation_cache`). Real
processes, taking turns; each ends after its first step or token. `import` is the CPU time of all modules that
the trainer needs before its first step.
"""

from collections.abc import Callable
import contextlib
import http.client
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile
import time
from urllib.parse import urlsplit

from benchmarks.harness import results
from topklm.runtime.compilation_cache import SWITCH

RESULT = results.FOLDER / "startup.json"
TARGETS = {"train warm": 2.5, "import": 1.5, "serve cold": 15.0, "serve warm": 3.0}  # seconds
CONFIG = "--config=configs/small.py"
# The line with which the trainer ends each part of its start.
PARTS = {
    "data: ": "imports and data",
    "new run in": "parameters",
    "compiled the train step": "train step",
    "step 1/": "first step",
}
IMPORTS = """
import resource
from topklm.commands import train
train.load_modules()
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime)
"""
REQUEST = {"prompt": "The city of", "max_tokens": 8, "stream": True, "seed": 1}

Start = dict[str, float]  # seconds of each part


def main() -> None:
    """Writes benchmarks/results/startup.json."""
    parser = results.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    text = "the others stay as they are in the file; default: all"
    parser.add_argument("--only", choices=("train", "serve", "import"), help=text)
    parser.add_argument("--out", type=Path, default=RESULT, metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        kinds = _kinds(place, arguments.only)
        runs: dict[str, list[Start]] = {kind: [] for kind in kinds}
        for repeat in range(arguments.repeats):
            for kind, start in kinds.items():
                runs[kind].append(start(repeat))
                print(json.dumps({kind: runs[kind][-1]}), flush=True)
    if arguments.only:
        runs = {**json.loads(arguments.out.read_text())["runs"], **runs}
    whole = {kind: [sum(start.values()) for start in starts] for kind, starts in runs.items()}
    result = {
        "seconds": {kind: statistics.median(seconds) for kind, seconds in whole.items()},
        "quartiles": {kind: statistics.quantiles(seconds, n=4)[::2] for kind, seconds in whole.items()},
        "targets": {kind: target for kind, target in TARGETS.items() if kind in runs},
        "seconds_of_parts": {kind: _medians(starts) for kind, starts in runs.items()},
        "runs": runs,
    }
    results.write(arguments.out, result, shown={**result, "runs": None})


def _kinds(place: Path, only: str | None) -> dict[str, Callable[[int], Start]]:
    """Prepares the dataset, a run and the caches that are asked for; returns how each kind is measured."""
    warm, run, kinds = place / "warm", place / "run", dict[str, Callable[[int], Start]]()
    if only in (None, "import"):
        kinds["import"] = lambda _: {"all": _cpu_seconds_of_imports()}
    if only in (None, "train"):
        _train(warm, place / "first")  # prepares the dataset, too
        kinds["train cold"] = lambda i: _train(place / f"cold-{i}", place / f"cold-run-{i}")
        kinds["train warm"] = lambda i: _train(warm, place / f"warm-run-{i}")
    if only in (None, "serve"):
        short = ["--config.train.steps=2", "--config.eval.max_tokens=2048"]
        command = [sys.executable, "-m", "topklm.main", CONFIG, f"--workdir={run}", *short]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        _serve(warm, run)
        kinds["serve cold"] = lambda i: _serve(place / f"cold-serve-{i}", run)
        kinds["serve warm"] = lambda _: _serve(warm, run)
    return kinds


def _medians(starts: list[Start]) -> Start:
    return {part: statistics.median(start[part] for start in starts) for part in starts[0]}


def _environment(cache: Path) -> dict[str, str]:
    variables = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    for name in (SWITCH, "JAX_COMPILATION_CACHE_DIR"):
        variables.pop(name, None)
    return variables


def _train(cache: Path, run: Path) -> Start:
    """Measures a training run to its first step."""
    command = [sys.executable, "-m", "topklm.main", CONFIG, f"--workdir={run}", "--config.log.every_steps=1"]
    ends: Start = {}
    began = time.perf_counter()
    with subprocess.Popen(command, env=_environment(cache), stdout=subprocess.PIPE, text=True) as process:
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


def _serve(cache: Path, run: Path) -> Start:
    """Measures a server to the first token of its first request, which is sent as soon as it listens."""
    command = [sys.executable, "-m", "topklm", "serve", str(run), "--port", "0", "--json"]
    began = time.perf_counter()
    with subprocess.Popen(
        command, env=_environment(cache), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout
            address = json.loads(process.stdout.readline())["address"]
            listening = time.perf_counter() - began
            connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=600)
            with contextlib.closing(connection):
                connection.request("POST", "/v1/completions", json.dumps(REQUEST))
                answer = connection.getresponse()
                line = answer.readline()
                if answer.status != 200 or not line.startswith(b"data: {"):
                    raise RuntimeError(f"no token came, but {answer.status}: {line!r}")
                token = time.perf_counter() - began
        finally:
            process.kill()
    return {"listening": listening, "first token": token - listening}


def _cpu_seconds_of_imports() -> float:
    found = subprocess.run([sys.executable, "-c", IMPORTS], check=True, stdout=subprocess.PIPE, text=True)
    return float(found.stdout)


if __name__ == "__main__":
    main()
