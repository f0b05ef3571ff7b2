"""Draws how step time, memory and the TopK operation grow, from the results of the benchmarks.

python -m benchmarks.plot_performance

Writes docs/images/performance-{time,memory,topk}.svg; the same results give the same bytes.
"""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

import matplotlib.axes
import matplotlib.figure

from benchmarks.harness import pictures, results
from benchmarks.harness.pictures import COLOURS

GIB = 2.0**30
# Each size of the growth measurement, and what it is called under its panel.
SIZES = {
    "d_model": "D, width of the residual stream",
    "n_layers": "L, layers",
    "context_length": "T, tokens a window",
    "vocab_size": "V, vocabulary",
    "topk_k": "k, entries kept per token",
    "batch_size": "B, windows a step",
}


def main() -> None:
    """Reads the results and writes the pictures."""
    parser = results.parser(__doc__)
    parser.add_argument(
        "--results", type=pathlib.Path, default=results.FOLDER, help="folder of the JSON files"
    )
    parser.add_argument("--out", type=pathlib.Path, default=results.IMAGES, help="folder of the pictures")
    arguments = parser.parse_args()
    names = ("growth.json", "bench_topk_growth.json")
    growth, topk = (results.read(arguments.results / name) for name in names)
    draw(growth, topk, arguments.out)


def draw(growth: Mapping[str, Any], topk: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Writes the pictures.

    Args:
        growth: JSON of `benchmarks.growth`.
        topk: JSON of `topklm bench topk --against=k`.
        folder: Where they go.
    """
    points = growth["points"]
    figures = {
        "time": _growth_figure(points, "seconds", 1.0, "seconds a step"),
        "memory": _growth_figure(points, "peak_bytes", GIB, "peak memory (GiB)"),
        "topk": _topk_figure(topk["results"]),
    }
    for name, figure in figures.items():
        pictures.save(figure, folder / f"performance-{name}.svg")


def _growth_figure(
    points: Sequence[Mapping[str, Any]], quantity: str, unit: float, label: str
) -> matplotlib.figure.Figure:
    """Draws a panel for each size, all with the same scale upwards."""
    figure, grid = pictures.panels(2, 3, figsize=(10, 5.6), layout="constrained", sharey=True)
    for axes, (size, text) in zip(grid.flat, SIZES.items(), strict=True):
        line = sorted((p for p in points if size in p["axes"]), key=lambda p: p["config"][size])
        values = [point["config"][size] for point in line]
        fitted = [point[f"fitted_{quantity}"] / unit for point in line]
        measured = [point[quantity] / unit for point in line]
        axes.plot(values, fitted, color=COLOURS[1], linewidth=1.2, label="cost model")
        axes.plot(values, measured, "o", color=COLOURS[0], markersize=5, label="measured")
        _dress(axes, text, values)
    for axes in grid[:, 0]:
        axes.set_ylabel(label)
    grid.flat[0].set_ylim(bottom=0)
    grid.flat[0].legend(frameon=False)
    return figure


def _topk_figure(results: Sequence[Mapping[str, Any]]) -> matplotlib.figure.Figure:
    """Draws time of the forward pass against k, a line for each operation, and the floor."""
    forward = [result for result in results if not result["facts"]["backward"]]
    facts = forward[0]["facts"]
    figure, axes = pictures.panels(1, 1, figsize=(6, 3.8), layout="constrained")
    operations = dict.fromkeys(result["facts"]["operation"] for result in forward)
    for operation, colour in zip(operations, COLOURS, strict=False):
        line = sorted(
            (result["facts"]["k"], result["median"] * 1e3)
            for result in forward
            if result["facts"]["operation"] == operation
        )
        axes.plot(*zip(*line, strict=True), "o-", color=colour, markersize=4, label=operation)
    floor = forward[0]["floor"] * 1e3
    axes.axhline(floor, color="#888888", linewidth=0.8, linestyle="--")
    axes.text(
        0.02, floor, "one read and one write", transform=axes.get_yaxis_transform(), va="bottom", size=8
    )
    ks = sorted({result["facts"]["k"] for result in forward})
    _dress(axes, f"k, entries kept of {facts['d']:,}; {facts['rows']:,} rows, {facts['dtype']}", ks)
    axes.set(ylabel="milliseconds, forward pass", yscale="log")
    axes.legend(frameon=False)
    return figure


def _dress(axes: matplotlib.axes.Axes, label: str, values: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.grid(axis="y", color="#e6e6e6")


if __name__ == "__main__":
    main()
