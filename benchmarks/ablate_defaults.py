"""The ablation for the model's defaults: one setting changed at a time, two seeds each.

    python -m benchmarks.ablate_defaults --runs runs/ablation --out benchmarks/results/ablation.json

Every run is a real `topklm.main` process with a run folder of its own; runs that are finished are not run
again, so an interrupted ablation continues. It compares held-out bits per byte, never speed, so it does not
mind a busy machine.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys

import rich.console
import rich.table

from benchmarks.harness import results

ROOT = results.ROOT
SEEDS = (0, 1)
# 491,520 tokens, 0.38 of an epoch, with the whole learning-rate schedule inside.
COMMON = {"train.steps": 240, "checkpoint.every_steps": 0, "eval.every_steps": 0}
VARIANTS: dict[str, dict[str, object]] = {
    "default": {},
    "base": {"model.n_nontopk": 4},
    "identity": {"model.topk_activation": "identity"},
    "abs": {"model.topk_activation": "abs"},
    "k8": {"model.topk_k": 8},
    "k16": {"model.topk_k": 16},
    "k64": {"model.topk_k": 64},
    "n2": {"model.n_nontopk": 2},
    "emb.02": {"model.init_embed_std": 0.02},
    "emb.2": {"model.init_embed_std": 0.2},
    "res3": {"model.init_residual_scale": 3.0},
    "res.3": {"model.init_residual_scale": 0.3},
}


def main() -> None:
    """Runs what is missing, then writes the JSON and prints the table."""
    parser = results.parser(__doc__)
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/ablation"))
    parser.add_argument("--out", type=pathlib.Path, default=results.FOLDER / "ablation.json")
    arguments = parser.parse_args()
    found = {}
    for name, changes in VARIANTS.items():
        evaluations = [_run(arguments.runs / f"{name}-seed{seed}", changes, seed) for seed in SEEDS]
        found[name] = {"changes": changes, "seeds": evaluations, **_summary(evaluations)}
    results.write(arguments.out, {"common": COMMON, "variants": found}, shown={})
    _print(found)


def _run(folder: pathlib.Path, changes: dict[str, object], seed: int) -> dict[str, object]:
    evaluation = _last_evaluation(folder)
    if evaluation is None:
        overrides = {**COMMON, **changes, "train.seed": seed}
        flags = [f"--config.{name}={value}" for name, value in overrides.items()]
        command = [sys.executable, "-m", "topklm.main", "--config=configs/small.py", f"--workdir={folder}"]
        subprocess.run([*command, *flags], cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": "."})
        evaluation = _last_evaluation(folder)
    assert evaluation is not None
    names = ("bits_per_byte", "dead_neurons", "norm_kept", "overlap_below")
    return {"seed": seed, **{name: evaluation[f"eval/{name}"] for name in names}}


def _last_evaluation(folder: pathlib.Path) -> dict | None:
    path = folder.absolute() / "metrics.jsonl"
    lines = [json.loads(line) for line in path.open()] if path.exists() else []
    final = [line for line in lines if "eval/loss" in line and line["step"] == COMMON["train.steps"]]
    return final[-1] if final else None


def _summary(evaluations: list[dict]) -> dict[str, float | list[float]]:
    bits = [evaluation["bits_per_byte"] for evaluation in evaluations]
    dead = zip(*(evaluation["dead_neurons"] for evaluation in evaluations), strict=True)
    return {
        "bits_per_byte_mean": statistics.mean(bits),
        "bits_per_byte_range": max(bits) - min(bits),
        "dead_neurons_mean": [statistics.mean(layer) for layer in dead],
    }


def _print(found: dict[str, dict]) -> None:
    table = rich.table.Table(title="Held-out bits per byte, mean of two seeds")
    for column in ("variant", "bits/byte", "range", "gap to Base", "dead, per TopK layer"):
        table.add_column(column)
    base = found["base"]["bits_per_byte_mean"]
    for name, result in found.items():
        mean = result["bits_per_byte_mean"]
        dead = ", ".join(f"{share:.1%}" for share in result["dead_neurons_mean"])
        table.add_row(
            name, f"{mean:.4f}", f"{result['bits_per_byte_range']:.4f}", f"{mean - base:+.4f}", dead
        )
    rich.console.Console().print(table)


if __name__ == "__main__":
    main()
