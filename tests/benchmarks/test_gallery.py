"""docs/gallery.md shows neurons of benchmarks/results/gallery-books.json."""

from benchmarks import gallery
from benchmarks.harness import results


def test_page_has_the_tables_of_the_result():
    page = gallery.PAGE.read_text(encoding="utf-8")
    found = results.read(results.FOLDER / "gallery-books.json")
    tables = gallery.page_tables(found)
    assert results.fill(page, tables, "gallery.md") == page
    for number in gallery.NAMES:  # each is the name of a neuron that is shown
        assert f"| {number} |" in tables[f"first {gallery.TOPK}"]
