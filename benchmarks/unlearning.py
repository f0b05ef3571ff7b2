"""Unlearning towns with several seeds, for docs/unlearning.md.

    python -m benchmarks.unlearning runs/small-seed0 runs/small-seed1 --base runs/base-seed0 runs/base-seed1

Runs `topklm unlearn` on each run with `SETTINGS`, which were fixed before the first of these was made, and
writes benchmarks/results/unlearning.json: every method of every seed, and the means over seeds with 95 %
intervals by Student's t over seeds.
"""

from collections.abc import Mapping
import json
from pathlib import Path
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
import scipy.stats

from benchmarks.harness import results

PATTERN = r"\b(city|town|village|municipality)\b"
SETTINGS = {
    "tokens": 24_000,
    "count": 16,
    "steps": 40,
    "batch-size": 4,
    "random-sets": 3,
    "relearn-steps": 20,
    "limit": 5,
    "eval-tokens": 12_000,
}
COLUMNS = ("forget", "retain", "blimp", "bits_per_byte", "relearned")


def main() -> None:
    """Measures, and writes the JSON."""
    parser = results.parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, the same model with other seeds")
    parser.add_argument("--base", nargs="+", type=Path, default=[], help="likewise, of its Base twin")
    arguments = parser.parse_args()
    content: dict[str, Any] = {"pattern": PATTERN, "settings": SETTINGS}
    for kind, runs in (("topk", arguments.runs), ("base", arguments.base)):
        found = list[dict[str, Any]]()
        for run in runs:
            # Coordinates of a Base LM are above 0 at half of all tokens: the cut leaves none.
            found.append(unlearned(run, SETTINGS | ({"retain-frequency": 1} if kind == "base" else {})))
            content[kind] = {"over_seeds": over_seeds(found), "runs": found}
            results.write(results.FOLDER / "unlearning.json", content, shown=content[kind]["over_seeds"])


def unlearned(run: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the command on one run; the new run is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "unlearned"
        command = [sys.executable, "-c", "import sys; from topklm import cli; sys.exit(cli.run())", "unlearn"]
        flags = [f"--{name}={value}" for name, value in settings.items()]
        command += [str(run), f"--forget-regex={PATTERN}", f"--out={out}", *flags]
        subprocess.run(command, check=True)
        content = json.loads((out / "unlearn.json").read_text())
    return shortened({**content, "run": run.name})


def shortened(content: dict[str, Any]) -> dict[str, Any]:
    """Returns what a run's report says of its methods, their neurons as text."""
    for method in content["methods"]:
        method["neurons"] = ",".join(f"{layer}:{neuron}" for layer, neuron in method["neurons"])
    return {name: content[name] for name in ("run", "step", "documents", "methods")}


def over_seeds(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Computes the mean change of each method over seeds; of random neurons, of all sets of a seed first.

    Each other method also as the first one less it, paired by seed.
    """
    names = list(dict.fromkeys(method["method"].rstrip(" 123456789") for method in found[0]["methods"][1:]))
    changes = {
        name: {
            column: [
                float(np.mean([m[column]["change"]["value"] for m in one["methods"] if _is(m, name)]))
                for one in found
            ]
            for column in COLUMNS
        }
        for name in names
    }
    first = changes[names[0]]
    for name in names[1:]:
        less = {column: np.subtract(first[column], changes[name][column]).tolist() for column in COLUMNS}
        changes[f"{names[0]} less {name}"] = less
    return {name: {column: _mean(values) for column, values in of.items()} for name, of in changes.items()}


def _is(method: Mapping[str, Any], name: str) -> bool:
    return method["method"].rstrip(" 123456789") == name


def _mean(by_seed: list[float]) -> dict[str, Any]:
    mean = float(np.mean(by_seed))
    if len(by_seed) < 2:
        return {"mean": mean, "low": None, "high": None, "seeds": by_seed}
    spread = float(np.std(by_seed, ddof=1)) / len(by_seed) ** 0.5
    reach = float(scipy.stats.t.ppf(0.975, len(by_seed) - 1)) * spread
    return {"mean": mean, "low": mean - reach, "high": mean + reach, "seeds": by_seed}


if __name__ == "__main__":
    main()
