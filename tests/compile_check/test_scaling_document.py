"""docs/scaling.md and the tables beside the results say what benchmarks/results/scaling.json holds."""

import json

from benchmarks import scaling
from configs import paper
from topklm.compile_check.check import from_dict


def results():
    return json.loads(scaling.RESULT.read_text(encoding="utf-8"))["checks"]


def test_the_document_is_rendered_from_the_results():
    document = scaling.DOCUMENT.read_text(encoding="utf-8")
    assert scaling.render(document, results()) == document


def test_the_tables_beside_the_results_are_rendered_from_them():
    assert scaling.tables(results()) == scaling.TABLES.read_text(encoding="utf-8")


def test_every_recipe_and_its_twin_fits_its_slice():
    reports = {name: from_dict(check["report"]) for name, check in results().items()}
    for size, topology in paper.TOPOLOGIES.items():
        for recipe in (size, f"{size}-base"):
            assert reports[f"{recipe} on {topology}"].fits


def test_topk_sends_no_more_than_its_twin_on_any_slice():
    """Allows a little less: its last, dense layer is a loop of one turn, with one gather of parameters."""
    reports = {name: from_dict(check["report"]) for name, check in results().items()}
    for size, topology in paper.TOPOLOGIES.items():
        ours, base = (
            {(row.kind, row.axes): row.bytes for row in reports[f"{recipe} on {topology}"].traffic}
            for recipe in (size, f"{size}-base")
        )
        assert ours.keys() == base.keys()
        assert all(0.97 * base[key] <= ours[key] <= base[key] for key in base)
