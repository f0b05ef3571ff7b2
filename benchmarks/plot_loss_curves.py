"""Draws the loss curves of runs side by side, from their metrics.jsonl.

python -m benchmarks.plot_loss_curves runs/small runs/small-base --out docs/images/loss_curves.svg
"""

import json
import pathlib

import matplotlib.axes
import numpy as np

from benchmarks.harness import pictures, results
from benchmarks.harness.pictures import COLOURS

_SMOOTHING_LINES = 9  # logged steps in the running mean of the train loss


def main() -> None:
    """Reads the runs and writes the picture."""
    parser = results.parser(__doc__)
    parser.add_argument("runs", nargs="+", type=pathlib.Path, metavar="RUN")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--baselines", type=pathlib.Path, help="JSON of benchmarks.text_baselines")
    arguments = parser.parse_args()
    baselines = json.loads(arguments.baselines.read_text()) if arguments.baselines else {}
    draw(arguments.runs, arguments.out, baselines.get("bits_per_byte", {}))


def draw(runs: list[pathlib.Path], out: pathlib.Path, baselines: dict[str, float]) -> None:
    """Writes the figure; its format is that of the file's ending.

    Args:
        runs: Run folders.
        out: The picture.
        baselines: Name -> held-out bits per byte, drawn as horizontal lines.
    """
    figure, (left, right) = pictures.panels(1, 2, figsize=(10, 3.8), layout="constrained")
    for run, colour in zip(runs, COLOURS, strict=False):
        _draw_run(left, right, run, colour)
    above = np.inf
    for name, bits in sorted(baselines.items(), key=lambda item: -item[1]):
        right.axhline(bits, color="#888888", linewidth=0.8, linestyle="--")
        # A label goes under its line where the one above is too close to leave space.
        side = "bottom" if above - bits > 0.05 else "top"
        across = right.get_yaxis_transform()
        right.text(0.02, bits, name, transform=across, va=side, color="#555555", size=8)
        above = bits
    left.set(xlabel="tokens seen (millions)", ylabel="train loss (nats per token)")
    right.set(xlabel="tokens seen (millions)", ylabel="held-out bits per byte")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.grid(axis="y", color="#e6e6e6")
        axes.set_xlim(left=0)
    pictures.save(figure, out)


def _draw_run(
    left: matplotlib.axes.Axes, right: matplotlib.axes.Axes, run: pathlib.Path, colour: str
) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")]
    trained = [(x["tokens_seen"] / 1e6, x["train/loss"]) for x in lines if "train/loss" in x]
    held_out = [(x["tokens_seen"] / 1e6, x["eval/bits_per_byte"]) for x in lines if "eval/loss" in x]
    tokens, losses = np.array(trained).T
    left.plot(tokens, losses, color=colour, alpha=0.25, linewidth=0.8)
    window = min(_SMOOTHING_LINES, len(losses))
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    left.plot(tokens[window // 2 : window // 2 + len(smooth)], smooth, color=colour, label=run.name)
    right.plot(*np.array(held_out).T, color=colour, marker="o", markersize=4)
    right.annotate(
        f"{held_out[-1][1]:.3f}",
        held_out[-1],
        xytext=(4, 6),
        textcoords="offset points",
        color=colour,
        size=9,
    )


if __name__ == "__main__":
    main()
