r"""Fills the tables of docs/capabilities.md from results of `topklm eval`.

    topklm eval runs/small-seed{0,1,2} --against runs/small-base-seed{0,1,2} --json \
        benchmarks/results/capabilities/small.json
    python -m benchmarks.capabilities

A result NAME.json fills the table between the markers NAME.
"""

import pathlib
from typing import Any

from benchmarks.harness import results
from topklm.eval.tasks import MEASURES

FOLDER = results.FOLDER / "capabilities"
PAGE = pathlib.Path(__file__).parents[1] / "docs/capabilities.md"
_COLUMNS = ("task", "measure", "TopK", "Base", "TopK less Base, 95 %", "by seed", "margin", "")


def main() -> None:
    """Reads all results and writes the page."""
    results.parser(__doc__).parse_args()
    tables = {path.stem: table(results.read(path)) for path in sorted(FOLDER.glob("*.json"))}
    PAGE.write_text(results.fill(PAGE.read_text(encoding="utf-8"), tables, PAGE.name), encoding="utf-8")


def table(result: Any) -> str:
    """Formats a result, and says of what it is."""
    items = {task["task"]: task["items"] for task in result["tasks"]}
    rows = []
    for entry in result["figures"]:
        gap = entry["difference"]
        digits = 4 if entry["measure"] == "bits_per_byte" else 3
        name = f"{entry['task']} {entry['part']}".strip()
        unit = f"{entry['units']:,} {entry['unit']}s"
        of = unit if entry["unit"] != "paradigm" else f"{unit}{_size(items, entry)}"
        means = [f"{entry[side]['value']:.{digits}f}" for side in ("mean", "mean_against")]
        interval = f"{gap['value']:+.{digits}f} ({gap['low']:+.{digits}f} to {gap['high']:+.{digits}f})"
        by_seed = ", ".join(f"{one:+.{digits}f}" for one in gap["by_run"])
        title = MEASURES[entry["measure"]].title
        rows.append([f"{name}, {of}", title, *means, interval, by_seed, f"{gap['margin']:g}", gap["verdict"]])
    return results.markdown(_COLUMNS, rows)


def _size(items: dict[str, int], entry: Any) -> str:
    return "" if entry["part"] else f", {items[entry['task']]:,} pairs"


if __name__ == "__main__":
    main()
