"""Writes the tables of docs/performance.md from the JSON of the benchmarks, so that no figure is typed.

    python -m benchmarks.performance_table

What stands between two markers of the document is made anew; what has no JSON yet is said to be missing.
"""

from collections.abc import Iterable, Mapping
import json
import pathlib
from typing import Any

from benchmarks.performance_targets import GPU, TARGETS, Content, Target
from topklm.bench.report import formatted
from topklm.storage.files import write_atomically

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"

_BENCH = "topklm bench"
# What makes each file of benchmarks/results that this page is about.
COMMANDS = {
    "bench_step.json": f"{_BENCH} step --peer=torch",
    "bench_topk.json": f"{_BENCH} topk --peer=torch",
    "bench_data.json": f"{_BENCH} data --config=configs/small.py --peer=torch",
    "bench_decode.json": f"{_BENCH} decode --peer=torch --repeats=19",
    "bench_checkpoint.json": f"{_BENCH} checkpoint",
    "bench_explain.json": f"{_BENCH} step --explain --shape=s1 --dtype=float32",
    "bench_explain_bfloat16.json": f"{_BENCH} step --explain --shape=s1 --dtype=bfloat16",
    "bench_topk_growth.json": f"{_BENCH} topk --against=k --sizes=2048:64 --dtype=float32 --peer=torch",
    "growth.json": "python -m benchmarks.growth",
    "serve.json": "python -m benchmarks.bench_serve runs/small",
    "startup.json": "python -m benchmarks.startup",
    "scaling.json": "python -m benchmarks.scaling",
    "bench_topk_h200.json": f"{_BENCH} topk --peer=torch",
    "bench_step_h200_130m.json": f"{_BENCH} step --config=configs/paper.py:130m --peer=torch",
    "bench_step_h200_1.4b.json": f"{_BENCH} step --config=configs/paper.py:1.4b --peer=torch",
}
PICTURES = {
    "performance-time.svg": "Seconds a step against each size",
    "performance-memory.svg": "Peak memory against each size",
    "performance-topk.svg": "Time of the TopK operation against k",
}


def main() -> None:
    """Rewrites the document."""
    document = DOCUMENT.read_text(encoding="utf-8")
    write_atomically(DOCUMENT, render(document, read(RESULTS), DOCUMENT.parent / "images").encode())


def read(folder: pathlib.Path) -> dict[str, Content]:
    """The results that there are, by file name."""
    paths = [folder / name for name in COMMANDS]
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()}


def render(document: str, results: Mapping[str, Content], images: pathlib.Path) -> str:
    """The document with what stands between its markers made anew.

    Args:
        document: Markdown with a `<!-- NAME -->` and `<!-- end -->` for each part.
        results: From `read`.
        images: Folder of the pictures.

    Raises:
        ValueError: If a part has no markers.
    """
    parts = {
        "targets": _table(
            ["on", "figure", "target", "measured", ""], [_target_row(target, results) for target in TARGETS]
        ),
        "commands": _commands(results),
        "parts": _or_missing("bench_explain.json", results, _figures),
        "parts in bfloat16": _or_missing("bench_explain_bfloat16.json", results, _figures),
        "fit": _or_missing("growth.json", results, _fit),
        "pictures": "\n".join(_picture(name, text, images) for name, text in PICTURES.items()),
    }
    for name in ("step", "topk", "data", "decode", "checkpoint"):
        parts[name] = _or_missing(f"bench_{name}.json", results, _figures_and_comparisons)
    for name, text in parts.items():
        before, start, rest = document.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            raise ValueError(f"{DOCUMENT.name}: no markers for {name}")
        document = f"{before}{start}{text}\n{end}{after}"
    return document


def _target_row(target: Target, results: Mapping[str, Content]) -> list[str]:
    known = [target.place, target.figure, target.wanted]
    found = list(target.find(results[target.file])) if target.file in results else []
    if not found:
        return [*known, "not measured", "no such machine here" if target.place == GPU else ""]
    values = "; ".join(f"{one.what}: {one.value}" if one.what else one.value for one in found)
    missed = [one.what for one in found if not one.reached]
    verdict = "reached" if not missed else "**missed**"
    if missed and len(missed) < len(found):
        verdict += f" by {', '.join(missed)}"
    return [*known, values, verdict]


def _commands(results: Mapping[str, Content]) -> str:
    rows = []
    for name, command in COMMANDS.items():
        row = [f"`{command}`", f"`{name}`"]
        rows.append([*row, _circumstances(results[name]) if name in results else "not measured"])
    text = _table(["command", "file of benchmarks/results", "measured on"], rows)
    return f"{text}\n\nA `topklm bench` command writes its file with `--json=benchmarks/results/FILE`."


def _circumstances(content: Content) -> str:
    machine = content["machine"]
    threads = content.get("threads", machine["cores"])
    facts = [f"{threads} threads", f"Python {machine['python']}", f"jax {machine['jax']}"]
    versions = content.get("versions", {})
    facts += [f"torch {versions['torch']}"] if "torch" in versions else []
    place = machine["processor"] if machine["devices"] == ["cpu"] else ", ".join(machine["devices"])
    when = [content["date"][:10]] if "date" in content else []
    return ", ".join([place, *facts, *_allocators(content), *when])


def _allocators(content: Content) -> list[str]:
    """The names in a report, wherever a benchmark has put them."""
    settings = content.get("settings", {})
    cases = [settings, *settings.get("cases", {}).values(), *content.get("points", [])]
    names = dict.fromkeys(case["allocator"].partition(" (")[0] for case in cases if case.get("allocator"))
    return [f"allocator {name}" for name in names]


def _or_missing(name: str, results: Mapping[str, Content], part: Any) -> str:
    return part(results[name]) if name in results else f"Not measured yet: `{COMMANDS[name]}`."


def _figures(content: Content) -> str:
    columns = ["figure", "median", "quartiles", "floor", "of the floor", ""]
    return _table(columns, [_figure_row(result) for result in content["results"]])


def _figure_row(result: Mapping[str, Any]) -> list[str]:
    unit, floor = result["unit"], result["floor"]
    spread = " to ".join(formatted(value, unit) for value in result["quartiles"])
    return [
        result["name"],
        formatted(result["median"], unit),
        spread if len(result["samples"]) > 1 else "",
        formatted(floor, unit) if floor else "",
        f"{result['median'] / floor:.2f} x" if floor else "",
        result["note"],
    ]


def _figures_and_comparisons(content: Content) -> str:
    rows = [
        [row["name"], f"{row['median']:.2f} x", " to ".join(f"{value:.2f}" for value in row["quartiles"])]
        for row in content["comparisons"]
    ]
    return f"{_figures(content)}\n\n{_table(['comparison', 'median', 'quartiles'], rows)}"


def _fit(content: Content) -> str:
    """The cost model in words, and every point beside it."""
    time, memory = content["fits"]["seconds"], content["fits"]["peak_bytes"]
    centre = max(content["points"], key=lambda point: len(point["axes"]))
    moved = content["centre_again_seconds"] / centre["seconds"] - 1
    terms = [
        f"{time['constant'] * 1e3:.0f} ms",
        f"matrix products {_rate(time['rates']['matmul_flops'], 'GFLOP/s')}",
        f"activations {_rate(time['rates']['activation_bytes'], 'GB/s')}",
        f"parameters {_rate(time['rates']['parameter_bytes'], 'GB/s')}",
    ]
    shares = [f"{memory['rates'][name]:.3f}" for name in ("activation_bytes", "parameter_bytes")]
    held = "{} of the bytes that activations move, {} of those that parameters do".format(*shares)
    lines = [
        f"- Time: {', '.join(terms)}; the worst residual is {time['worst_residual']:.0%}.",
        f"- Memory: {memory['constant'] / 1e6:,.0f} MB, {held}; the worst residual is "
        f"{memory['worst_residual']:.0%}.",
        f"- The centre was measured first and last; its time moved by {moved:+.1%}.",
    ]
    columns = [
        "D",
        "L",
        "T",
        "V",
        "k",
        "B",
        "s a step",
        "model",
        "residual",
        "tokens/s",
        "peak",
        "model",
        "residual",
    ]
    rows = [_point_row(point) for point in content["points"]]
    return "\n".join(lines) + "\n\n" + _table(columns, rows)


def _point_row(point: Mapping[str, Any]) -> list[str]:
    sizes = ("d_model", "n_layers", "context_length", "vocab_size", "topk_k", "batch_size")
    row = [f"{point['config'][name]:,}" for name in sizes]
    for quantity, unit in (("seconds", "s"), ("peak_bytes", "bytes")):
        value, fitted = point[quantity], point[f"fitted_{quantity}"]
        row += [formatted(value, unit), formatted(fitted, unit), f"{value / fitted - 1:+.0%}"]
        row += [f"{point['tokens_per_second']:,.0f}"] if quantity == "seconds" else []
    return row


def _rate(cost: float, unit: str) -> str:
    return f"at {1e-9 / cost:,.1f} {unit}" if cost else "free"


def _picture(name: str, text: str, images: pathlib.Path) -> str:
    return f"![{text}](images/{name})" if (images / name).exists() else f"Not drawn yet: {text.lower()}."


def _table(columns: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *rows])


if __name__ == "__main__":
    main()
