"""Measures the cost of following neurons: entries of `checkpoint.trace`, `topklm trace run`, chained SAEs.

    python -m benchmarks.trace_cost runs/small runs/small-base

Writes benchmarks/results/trace_cost.json: for an entry, seconds that training is held up, seconds until it is
on the disk, and CPU seconds, each the median of `ENTRIES` after the first; for commands, wall seconds of each
run of them, which take turns. The runs need a trace of their own checkpoints; nothing is written into them.
With --only=entries the other figures stay as they are; programs are kept as the trainer keeps them.
"""

from pathlib import Path
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from benchmarks.harness import results
import topklm
from topklm.checkpoint.manager import TraceManager
from topklm.runtime import compilation_cache

ENTRIES = 20
REPEATS = 3
_SAE = ["--steps", "724,1300", "--layers", "0,1,2", "--sae-tokens", "82_000", "--no-language"]
# Of which run, and how.
COMMANDS = {
    "trace": ("topk", ["--steps", "log"]),
    "coordinates": ("base", [*_SAE, "--dictionary", "coordinates"]),
    "sae_chained": ("base", [*_SAE, "--dictionary", "sae-chained"]),
}


def main() -> None:
    """Measures, and writes the JSON."""
    parser = results.parser(__doc__)
    parser.add_argument("topk", type=Path, help="run folder of a TopK LM")
    parser.add_argument("base", type=Path, help="run folder of a Base LM")
    parser.add_argument("--only", choices=("entries",), help="measure entries alone")
    arguments = parser.parse_args()
    path = results.FOLDER / "trace_cost.json"
    compilation_cache.enable()
    if arguments.only:
        with tempfile.TemporaryDirectory() as name:
            entries = measure_entries(arguments.topk, Path(name) / "entries")
        results.write(path, {**results.read(path), "entries": entries})
        return
    with tempfile.TemporaryDirectory() as name:
        runs = {}
        for kind in ("topk", "base"):
            runs[kind] = Path(name) / kind
            shutil.copytree(getattr(arguments, kind), runs[kind], ignore=shutil.ignore_patterns("neurons"))
        entries = measure_entries(runs["topk"], Path(name) / "entries")
        seconds: dict[str, list[float]] = {command: [] for command in COMMANDS}
        for _ in range(REPEATS):
            for command, (kind, flags) in COMMANDS.items():
                seconds[command].append(_timed(runs[kind], flags))
    commands = {name: {"flags": COMMANDS[name][1], "seconds": of} for name, of in seconds.items()}
    results.write(path, {"entries": entries, "commands": commands})


def measure_entries(run: Path, folder: Path) -> dict[str, Any]:
    """Saves the parameters of a run's newest checkpoint again and again."""
    model = topklm.load(run)
    facts = {"config": model.config.to_dict(), "tokenizer_sha256": model.tokenizer.sha256}
    manager, rows = TraceManager(folder, range(ENTRIES + 1)), []
    for step in range(ENTRIES + 1):
        began, cpu = time.perf_counter(), time.process_time()
        manager.save(step, model.params, {**facts, "step": step})
        held_up = time.perf_counter() - began
        manager.close()
        rows.append((held_up, time.perf_counter() - began, time.process_time() - cpu))
    names = ("held_up_seconds", "written_seconds", "cpu_seconds")
    n_bytes = sum(path.stat().st_size for path in (folder / "1").rglob("*") if path.is_file())
    n_parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    return {
        "first": dict(zip(names, rows[0], strict=True)),
        "median": dict(zip(names, np.median(rows[1:], axis=0).tolist(), strict=True)),
        "bytes": n_bytes,
        "bytes_per_parameter": n_bytes / n_parameters,
    }


def _timed(run: Path, flags: list[str]) -> float:
    shutil.rmtree(run / "neurons", ignore_errors=True)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "topklm", "trace", "run", str(run), *flags], check=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
