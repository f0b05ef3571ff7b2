"""Scans of settings: one thing changed at a time, each variant a real training run of its own.

    python -m benchmarks.scan defaults
    python -m benchmarks.scan readability --conllu ud-english.conllu.gz

`defaults` is the ablation of the model's defaults, two seeds of each variant. `readability` is the first
stage of docs/readability.md: after each run its readability card is made. Runs that are finished are not run
again, nor are cards, so an interrupted scan continues. Bits per byte are compared and never speed, so a busy
machine does no harm.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

import rich.console
import rich.table

from benchmarks.harness import results

ROOT = results.ROOT

Changes = dict[str, object]


@dataclasses.dataclass(frozen=True)
class Scan:
    """Variants of a config."""

    config: str
    common: Changes
    variants: dict[str, Changes]
    seeds: tuple[int, ...]
    base: str  # the variant that others are compared with
    result: str
    has_cards: bool = False


SCANS = {
    "defaults": Scan(
        "configs/small.py",
        # 491,520 tokens, 0.38 of an epoch, with the whole learning-rate schedule inside.
        {"train.steps": 240, "checkpoint.every_steps": 0, "eval.every_steps": 0},
        {
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
        },
        (0, 1),
        "base",
        "ablation.json",
    ),
    "readability": Scan(
        "configs/small.py:readable",
        {"train.steps": 400, "optim.learning_rate": 3e-3, "checkpoint.every_steps": 0, "eval.every_steps": 0},
        {
            "readable": {},
            "base": {"model.n_nontopk": 4},
            "paper's layer": {
                "model.token_input": "first",
                "model.topk_groups": "",
                "model.topk_centred": False,
            },
            "not centred": {"model.topk_centred": False},
            "k8": {"model.topk_k": 8, "model.topk_groups": "8:2,56:3,448:3"},
            "no groups": {"model.topk_groups": ""},
            "groups alone": {"model.token_input": "first"},
            "topics": {"model.topk_groups": "64:4,448:12", "optim.topic_weight": 5.0},
            "few broad": {"model.topk_groups": "16:1,64:3,432:12"},
            "lr.0015": {"optim.learning_rate": 1.5e-3},
            "lr.006": {"optim.learning_rate": 6e-3},
            "wide": {"model.d_model": 1024, "model.topk_groups": "16:4,112:6,896:6"},
        },
        (0,),
        "base",
        "readability/scan.json",
        has_cards=True,
    ),
}


def main() -> None:
    """Runs what is missing, then writes the JSON and prints the table."""
    parser = results.parser(__doc__)
    parser.add_argument("scan", choices=SCANS)
    parser.add_argument("--runs", type=pathlib.Path, help="folder of the runs; default runs/SCAN")
    parser.add_argument("--out", type=pathlib.Path, help="default benchmarks/results/, by scan")
    parser.add_argument("--conllu", type=pathlib.Path, help="sentences to probe for parts of speech (cards)")
    arguments = parser.parse_args()
    scan = SCANS[arguments.scan]
    runs = (arguments.runs or pathlib.Path("runs") / arguments.scan).absolute()
    found = {}
    for name, changes in scan.variants.items():
        folders = {seed: runs / f"{name.replace(' ', '-')}-seed{seed}" for seed in scan.seeds}
        evaluations = [_run(scan, folder, changes, seed) for seed, folder in folders.items()]
        found[name] = {"changes": changes, "seeds": evaluations, **_summary(evaluations)}
        if scan.has_cards:
            found[name]["cards"] = [_card(folder, arguments.conllu) for folder in folders.values()]
    out = arguments.out or results.FOLDER / scan.result
    out.parent.mkdir(parents=True, exist_ok=True)
    results.write(out, {"common": scan.common, "variants": found}, shown={})
    _print(scan, found)


def _run(scan: Scan, folder: pathlib.Path, changes: Changes, seed: int) -> dict[str, object]:
    last_step = int(str(scan.common["train.steps"]))
    evaluation = _last_evaluation(folder, last_step)
    if evaluation is None:
        overrides = {**scan.common, **changes, "train.seed": seed}
        flags = [f"--config.{name}={value}" for name, value in overrides.items()]
        _topklm("topklm.main", f"--config={scan.config}", f"--workdir={folder}", *flags)
        evaluation = _last_evaluation(folder, last_step)
    assert evaluation is not None
    names = ("bits_per_byte", "dead_neurons", "norm_kept", "overlap_below")
    return {"seed": seed, **{name: evaluation[f"eval/{name}"] for name in names}}


def _card(folder: pathlib.Path, conllu: pathlib.Path | None) -> Any:
    """Makes the readability card of a run, without steering, which takes longest."""
    path = folder / "card.json"
    if not path.exists():
        labels = ["--conllu", str(conllu.absolute())] if conllu else []
        _topklm("topklm", "neurons", "card", str(folder), "--no-steering", *labels, "--json", str(path))
    return results.read(path)


def _topklm(module: str, *arguments: str) -> None:
    command = [sys.executable, "-m", module, *arguments]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": "."})


def _last_evaluation(folder: pathlib.Path, last_step: int) -> dict | None:
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.open()] if path.exists() else []
    final = [line for line in lines if "eval/loss" in line and line["step"] == last_step]
    return final[-1] if final else None


def _summary(evaluations: list[dict]) -> dict[str, float | list[float]]:
    bits = [evaluation["bits_per_byte"] for evaluation in evaluations]
    dead = zip(*(evaluation["dead_neurons"] for evaluation in evaluations), strict=True)
    return {
        "bits_per_byte_mean": statistics.mean(bits),
        "bits_per_byte_range": max(bits) - min(bits),
        "dead_neurons_mean": [statistics.mean(layer) for layer in dead],
    }


def _print(scan: Scan, found: dict[str, dict]) -> None:
    table = rich.table.Table(title=f"Held-out bits per byte, mean over {len(scan.seeds)} seeds")
    for column in ("variant", "bits/byte", "range", "gap to Base", "dead, per TopK layer"):
        table.add_column(column)
    base = found[scan.base]["bits_per_byte_mean"]
    for name, result in found.items():
        mean = result["bits_per_byte_mean"]
        dead = ", ".join(f"{share:.1%}" for share in result["dead_neurons_mean"])
        table.add_row(
            name, f"{mean:.4f}", f"{result['bits_per_byte_range']:.4f}", f"{mean - base:+.4f}", dead
        )
    rich.console.Console().print(table)


if __name__ == "__main__":
    main()
