"""docs/capabilities.md has the tables of the results that lie beside it."""

from benchmarks import capabilities
from benchmarks.harness import results


def test_the_page_has_the_tables_of_the_results():
    page = capabilities.PAGE.read_text(encoding="utf-8")
    found = sorted(capabilities.FOLDER.glob("*.json"))
    assert found
    tables = {path.stem: capabilities.table(results.read(path)) for path in found}
    assert results.fill(page, tables, "capabilities.md") == page


def test_a_row_has_both_means_the_difference_and_each_pair_of_runs():
    gap = {"value": -0.0123, "low": -0.02, "high": -0.004, "by_run": [-0.01, -0.0146], "margin": 0.005}
    figures = [
        {
            "task": "blimp",
            "part": "",
            "measure": "acc",
            "unit": "paradigm",
            "units": 51,
            "mean": {"value": 0.5},
            "mean_against": {"value": 0.5123},
            "difference": {**gap, "verdict": "open"},
        }
    ]
    made = capabilities.table({"tasks": [{"task": "blimp", "items": 51000}], "figures": figures})
    assert made.splitlines()[-1] == (
        "| blimp, 51 paradigms, 51,000 pairs | accuracy | 0.500 | 0.512 | -0.012 (-0.020 to -0.004) | "
        "-0.010, -0.015 | 0.005 | open |"
    )
