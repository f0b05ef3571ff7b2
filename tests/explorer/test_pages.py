"""How tokens are shaded and numbers written, and plots measured."""

import math
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from topklm.explorer import markup, plots, traced


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("share", 0.0123, "1.23\u00a0%"),
        ("share", 0.00001, "0.0010\u00a0%"),
        ("number", 0.00999, "0.0100"),
        ("number", 0.000012, "1.2e\u221205"),
        ("share", 1.0, "100\u00a0%"),
        ("count", 1234567, "1,234,567"),
        ("number", 2.0, "2.00"),
        ("number", 0.0, "0"),
        ("number", -12.34, "\u221212.3"),
        ("number", 1234.5, "1,234"),
        ("effect", 0.01, "+0.0100"),
        ("effect", -0.01, "\u22120.0100"),
        ("number", None, markup.MISSING),
        ("number", math.nan, markup.MISSING),
    ],
)
def test_numbers_are_written_for_people(kind, value, text):
    assert markup.write_as(kind, value) == text


def bars(svg, kind="rect"):
    root = ElementTree.fromstring(str(svg))
    return root, [element.attrib for element in root.iter(kind)]


def test_a_histograms_bars_are_as_high_as_the_roots_of_their_counts():
    counts = [0, 16, 4, 1, 0]
    root, found = bars(plots.histogram(counts, 5.0, "activation", "tokens", "about <this>"))
    heights = [float(bar["height"]) for bar in found]
    np.testing.assert_allclose(np.array(heights) / heights[0], [1, 0.5, 0.25], atol=0.01)
    assert [element.text for element in root.iter("title")] == ["1 to 2: 16", "2 to 3: 4", "3 to 4: 1"]
    assert root.attrib["aria-label"] == "about <this>"


def test_the_line_of_a_violin_stands_at_the_median():
    axis = plots.Axis("density", 0.001, 1, True)
    _, lines = bars(plots.violins({"0": np.array([0.01, 0.1, 1.0])}, axis, "x"), "line")
    ticks = {float(line["y1"]) for line in lines if line["class"] == "grid"}
    middle = next(float(line["y1"]) for line in lines if line["class"] == "median")
    assert any(abs(tick - middle) < 0.11 for tick in ticks)  # of 0.1
    assert len(ticks) == 4


def test_layers_without_any_value_leave_their_place_empty():
    layers = {"0": np.zeros(0), "1": np.array([1.0])}
    root, _ = bars(plots.violins(layers, plots.Axis("x", 0, 2), "x"))
    assert len([e for e in root.iter("path") if e.attrib["class"] == "violin"]) == 1


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_inside(low, width):
    axis = plots.Axis("x", low, low + width)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 6
    assert all(-1e-6 <= axis.share(tick) <= 1 + 1e-6 for tick in ticks)


def test_points_stand_where_their_values_are():
    x, y = plots.Axis("a", 0, 10), plots.Axis("b", 0, 10)
    points = [plots.Point(0, 0, "zero", "/0", 0), plots.Point(10, 10, "<ten>", "/1", 5)]
    _, found = bars(plots.scatter(points, x, y, "two", ("a", "b")), "circle")
    (left, low), (right, high) = ((float(c["cx"]), float(c["cy"])) for c in found)
    assert left < right
    assert low > high
    assert [c["data-address"] for c in found] == ["/0", "/1"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1k"), (2500, "2.5k"), (4_000_000, "4M"), (10**9, "1G")],
)
def test_counts_beside_an_axis_are_short(count, text):
    assert plots._short(count) == text


def test_marks_of_a_timeline_stand_at_their_steps():
    x = plots.Axis("step", 1, 100, logarithmic=True)
    mark = traced.Mark
    rows = {
        "loss & <more>": [mark(1, "a"), mark(10, "b", "break"), mark(100, "c", "rises")],
        "onsets": [mark(10, "d", span=(1, 100))],
    }
    svg = traced.timeline(rows, x, "about")
    _, circles = bars(svg, "circle")
    assert [circle["class"] for circle in circles] == ["dot", "dot hollow", "dot"]
    _, lines = bars(svg, "line")
    begin, end = next((float(line["x1"]), float(line["x2"])) for line in lines if line["class"] == "span")
    middle = (begin + end) / 2
    assert [float(circle["cx"]) for circle in circles] == pytest.approx([begin, middle, middle], abs=0.1)
    _, paths = bars(svg, "path")
    assert paths[0]["d"].startswith(f"M{end:.1f} ")
    assert circles[0]["cy"] == circles[1]["cy"] != circles[2]["cy"]


def test_rows_of_a_heat_map_are_drawn_in_order_and_their_gaps_left_empty():
    rows = [
        traced.Row([0.05, 0.31, math.nan], 1, "first"),
        traced.Row([-1, 0.31, 0.39], math.nan, "second", "/neurons/0/1"),
    ]
    axis = plots.Axis("loss", 1, 3)
    svg = traced.shaded(["0", "1", "2"], rows, 2, axis, [3, math.nan, 1], "about")
    _, paths = bars(svg, "path")
    cells = {(p["class"], p["fill-opacity"]): p["d"].count("z") for p in paths if "cell" in p["class"]}
    # Neighbours of one shade are one.
    assert cells == {("cell up", "0.1"): 1, ("cell up", "0.4"): 2, ("cell down", "1.0"): 1}
    edge = next(p["d"] for p in paths if p["class"] == "edge")
    assert edge.count("V") == 1
    curve = next(p["d"] for p in paths if p["class"] == "curve c0")
    assert curve.count("L") == 1
    root, rects = bars(svg)
    assert [rect.get("data-address") for rect in rects] == [None, "/neurons/0/1"]
    assert [element.text for element in root.iter("title")][:2] == ["first", "second"]
