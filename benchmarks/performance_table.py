"""Writes tables from the JSON of the benchmarks, so that no figure is typed.

    python -m benchmarks.performance_table

Each file of benchmarks/results that docs/performance.md is about gets its tables beside it, in a file of the
same name that ends in .md; README.md there lists them all. The summary of docs/performance.md, between its
markers, is made from the same files.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import results as results_lib
from benchmarks.harness.report import formatted
from benchmarks.harness.results import FOLDER, ROOT, Content, markdown
from benchmarks.harness.timing import interval
from benchmarks.performance_targets import GPU, TARGETS, Target
from topklm.storage.files import write_atomically

DOCUMENT = ROOT / "docs" / "performance.md"
INDEX = "README.md"

_BENCH = "topklm bench"
_FEW = "256:32,1024:4,1024:8,1024:32,1024:128,2048:4,2048:8,2048:32,2048:64,4096:4,4096:8,4096:32,4096:128"
# The command of each file of benchmarks/results that the page is about.
COMMANDS = {
    "bench_step.json": f"{_BENCH} step --peer=torch",
    "bench_topk.json": f"{_BENCH} topk --peer=torch",
    "bench_topk_few.json": f"{_BENCH} topk --only=auto --peer=torch --sizes={_FEW}",
    "bench_step_avx2.json": f"{_BENCH} step --isa=avx2 --shape=s1 --dtype=float32 --peer=torch",
    "bench_topk_few_avx2.json": (
        f"{_BENCH} topk --isa=avx2 --only=auto --dtype=float32 --peer=torch --sizes={_FEW}"
    ),
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


def main() -> None:
    """Rewrites the summary of the document and the tables."""
    results = read(FOLDER)
    document = render(DOCUMENT.read_text(encoding="utf-8"), results)
    write_atomically(DOCUMENT, document.encode())
    for name, text in tables(results).items():
        write_atomically(FOLDER / name, text.encode())


def read(folder: Path) -> dict[str, Content]:
    """Reads the results that there are, by file name."""
    return {name: results_lib.read(folder / name) for name in COMMANDS if (folder / name).exists()}


def render(document: str, results: Mapping[str, Content]) -> str:
    """Fills the summary in.

    Args:
        document: Markdown with `<!-- targets -->` and `<!-- end -->`.
        results: From `read`.

    Raises:
        ValueError: If it has no markers.
    """
    rows = [_target_row(target, results) for target in TARGETS]
    summary = markdown(["on", "figure", "target", "before", "now", ""], rows)
    return results_lib.fill(document, {"targets": summary}, DOCUMENT.name)


def tables(results: Mapping[str, Content]) -> dict[str, str]:
    """Renders the files of tables, by name."""
    made = {INDEX: _index(results)}
    for name, content in results.items():
        if "results" in content:
            text = _figures(content)
        elif "fits" in content:
            text = _fit(content)
        else:
            continue
        facts = f"`{COMMANDS[name]}`: {_circumstances(content)}."
        made[_table_file(name)] = f"# {name}\n\n{facts}\n\n{text}\n"
    return made


def _table_file(name: str) -> str:
    return name.removesuffix(".json") + ".md"


def _target_row(target: Target, results: Mapping[str, Content]) -> list[str]:
    known = [target.place, target.figure, target.wanted, target.before]
    found = target.find(results[target.file]) if target.file in results else []
    if not found:
        return [*known, "not measured", "no such machine here" if target.place == GPU else ""]
    values = "; ".join(f"{one.what}: {one.value}" if one.what else one.value for one in found)
    missed = [one.what for one in found if not one.reached]
    verdict = "reached" if not missed else "**missed**"
    if missed and len(missed) < len(found):
        verdict += f" by {', '.join(missed)}"
    return [*known, values, verdict]


def _index(results: Mapping[str, Content]) -> str:
    rows = []
    for name, command in COMMANDS.items():
        content = results.get(name, {})
        is_table = name == "scaling.json" or "results" in content or "fits" in content
        shown = f"[tables]({_table_file(name)})" if content and is_table else ""
        where = _circumstances(content) if content else "not measured"
        rows.append([f"`{command}`", f"`{name}`", shown, where])
    return (
        "# Results\n\nWritten by `python -m benchmarks.performance_table`. A `topklm bench` command writes "
        "its file with `--json=benchmarks/results/FILE`.\n\n"
        f"{markdown(['command', 'file', 'tables', 'measured on'], rows)}\n"
    )


def _circumstances(content: Content) -> str:
    machine = content["machine"]
    threads = content.get("threads", machine["cores"])
    facts = [f"{threads} threads", f"Python {machine['python']}", f"jax {machine['jax']}"]
    versions = content.get("versions", {})
    facts += [f"torch {versions['torch']}"] if "torch" in versions else []
    place = machine["processor"] if machine["devices"] == ["cpu"] else ", ".join(machine["devices"])
    if "instructions" in machine and machine["devices"] == ["cpu"]:
        place += f", {machine['instructions']}"
    when = [content["date"][:10]] if "date" in content else []
    return ", ".join([place, *facts, *_allocators(content), *when])


def _allocators(content: Content) -> list[str]:
    """Returns the names in a report, wherever a benchmark has put them."""
    settings = content.get("settings", {})
    cases = [settings, *settings.get("cases", {}).values(), *content.get("points", [])]
    names = dict.fromkeys(case["allocator"].partition(" (")[0] for case in cases if case.get("allocator"))
    return [f"allocator {name}" for name in names]


def _figures(content: Content) -> str:
    columns = ["figure", "median", "95 %", "floor", "of the floor", ""]
    text = markdown(columns, [_figure_row(result) for result in content["results"]])
    rows = [
        [
            row["name"],
            f"{row['median']:.2f} x",
            " to ".join(f"{value:.2f}" for value in interval(row["samples"])),
        ]
        for row in content["comparisons"]
    ]
    return f"{text}\n\n{markdown(['comparison', 'median', '95 %'], rows)}" if rows else text


def _figure_row(result: Mapping[str, Any]) -> list[str]:
    unit, floor = result["unit"], result["floor"]
    spread = " to ".join(formatted(value, unit) for value in interval(result["samples"]))
    return [
        result["name"],
        formatted(result["median"], unit),
        spread if len(result["samples"]) > 1 else "",
        formatted(floor, unit) if floor else "",
        f"{result['median'] / floor:.2f} x" if floor else "",
        result["note"],
    ]


def _fit(content: Content) -> str:
    """Says the cost model in words, and lists every point beside it."""
    time, memory = content["fits"]["seconds"], content["fits"]["peak_bytes"]
    centre = max(content["points"], key=lambda point: len(point["axes"]))
    moved = content["centre_again_seconds"] / centre["seconds"] - 1
    rates = time["rates"]
    activations, parameters = (memory["rates"][f"{name}_bytes"] for name in ("activation", "parameter"))
    lines = [
        f"- Time: {time['constant'] * 1e3:.0f} ms, "
        f"matrix products {_rate(rates['matmul_flops'], 'GFLOP/s')}, "
        f"activations {_rate(rates['activation_bytes'], 'GB/s')}, "
        f"parameters {_rate(rates['parameter_bytes'], 'GB/s')}; "
        f"the worst residual is {time['worst_residual']:.0%}.",
        f"- Memory: {memory['constant'] / 1e6:,.0f} MB, {activations:.3f} of the bytes that activations "
        f"move, {parameters:.3f} of those that parameters do; the worst residual is "
        f"{memory['worst_residual']:.0%}.",
        f"- The centre was measured first and last; its time moved by {moved:+.1%}.",
    ]
    columns = [*"DLTVkB", "s a step", "model", "residual", "tokens/s", "peak", "model", "residual"]
    return "\n".join(lines) + "\n\n" + markdown(columns, [_point_row(point) for point in content["points"]])


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


if __name__ == "__main__":
    main()
