"""docs/formation.md shows the figures of benchmarks/results/formation.json."""

import json

import numpy as np
import pytest

from benchmarks import formation
from benchmarks.harness import results


@pytest.fixture(scope="module")
def result():
    return results.read(formation.OUT)


def test_page_has_the_tables_of_the_result(result):
    page = formation.PAGE.read_text(encoding="utf-8")
    assert results.fill(page, formation.page_tables(result), "formation.md") == page


def test_page_has_the_tables_of_the_books():
    page = formation.PAGE.read_text(encoding="utf-8")
    parts = formation.tables_of_books(results.read(formation.BOOKS_OUT))
    assert len(parts) == 4
    assert results.fill(page, parts, "formation.md") == page


def test_figures_in_words_are_those_of_the_result(result):
    def mean(group, curve, step):
        runs = result["groups"][group]
        return np.mean([run["curves"][curve][run["steps"].index(step)] for run in runs])

    assert len(result["groups"][formation.TOPK]) == len(result["groups"][formation.BASE]) == 3
    assert f"{mean(formation.TOPK, 'r_reference', 181):.2f}" == "0.68"
    assert f"{mean(formation.TOPK, 'r_other', 181):.2f}" == "0.25"
    assert f"{mean(formation.BASE, 'r_reference', 181):.2f}" == "0.40"
    assert f"{mean(formation.TOPK, 'first_3', 32):.2f}" == "0.36"
    for run in result["groups"][formation.TOPK]:
        changes = np.array(run["curves"]["r_previous"][1:], float)
        assert run["steps"][1 + changes.argmin()] == 64


def test_spread_shows_mean_least_and_largest():
    runs = [{"steps": [0, 4], "curves": {"r": [0.1, value]}} for value in (0.2, 0.4, None)]
    assert formation.spread(runs, ("curves", "r"), 4, 2) == "0.30 (0.20 to 0.40)"
    assert formation.spread(runs, ("curves", "r"), 0, 2) == "0.10"
    assert formation.spread(runs, ("curves", "r"), 9, 2) == "-"


def test_lists_of_numbers_stand_on_one_line(tmp_path):
    content = {"a": [1, -2.5e-07, None, 3.0], "b": [[1, 2], ["x", 1]], "c": [], "d": "[\n 1, 2\n]"}
    results.save(tmp_path / "out.json", content)
    text = (tmp_path / "out.json").read_text()
    assert json.loads(text) == content
    assert '"a": [ 1, -2.5e-07, null, 3.0 ]' in text
