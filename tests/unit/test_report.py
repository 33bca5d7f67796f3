"""Tables, numbers and the plot."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from tersor.report.page import comparison_page, comparison_plot
from tersor.report.plot import Point, frontier, pareto_svg
from tersor.report.table import format_bytes, format_error, format_number, text_table


def test_columns_are_aligned():
    assert text_table(["recipe", "MB"], [["q4_0", "91.7"], ["int4_g64 of all", "5"]]) == (
        "recipe             MB\n---------------  ----\nq4_0             91.7\nint4_g64 of all     5"
    )


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0, "0"),
        (1234.5, "1234"),
        (99.96, "100"),
        (99.94, "99.9"),
        (9.994, "9.99"),
        (0.99949, "0.999"),
        (0.0123, "0.0123"),
        (-2.5, "-2.50"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_numbers(x, text):
    assert format_number(x) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [(24.711, 0.53, "24.71 ± 0.53"), (0.00361, 0.00012, "0.00361 ± 0.00012"), (611.3, 12.0, "611.3 ± 12.0"), (5.0, 0.0, "5.00")],
)
def test_errors_decide_the_decimals(value, error, text):
    assert format_error(value, error) == text


@pytest.mark.parametrize(("n", "text"), [(999, "999 B"), (91_700_000, "91.7 MB"), (26_953_662_464, "27.0 GB"), (1500, "1.50 kB")])
def test_bytes(n, text):
    assert format_bytes(n) == text


def points() -> list[Point]:
    rows = [("q8_0", 145, 0.004), ("q5_1", 110, 0.03), ("worse", 120, 0.05), ("q4_0", 92, 0.27), ("a<b", 88, 0.65)]
    return [Point(label, x, y, y / 20, "gguf" if i % 2 else "compressed-tensors") for i, (label, x, y) in enumerate(rows)]


def test_the_frontier_leaves_out_what_is_beaten_in_both():
    assert [p.label for p in frontier(points())] == ["a<b", "q4_0", "q5_1", "q8_0"]


def test_the_plot_is_svg_with_every_point_where_it_belongs():
    root = ElementTree.fromstring(pareto_svg(points(), "MB", "KLD"))
    dots = {dot[0].text.split(":")[0]: (float(dot.get("cx")), float(dot.get("cy"))) for dot in root.iter("circle") if len(dot)}
    assert dots.keys() == {"q8_0", "q5_1", "worse", "q4_0", "a<b"}
    by_size = sorted(dots, key=lambda name: dots[name][0])
    assert by_size == ["a<b", "q4_0", "q5_1", "worse", "q8_0"]
    assert dots["q8_0"][1] > dots["q5_1"][1] > dots["q4_0"][1] > dots["a<b"][1]  # y grows downwards
    labels = [t.text for t in root.iter("text") if t.get("class") == "label"]
    assert sorted(labels) == sorted([*dots, "gguf", "compressed-tensors"])


def test_labels_of_near_points_do_not_overlap():
    near = [Point(f"recipe-{i}", 100 + 0.4 * i, 0.1 * 1.02**i, 0, "gguf") for i in range(4)]
    root = ElementTree.fromstring(pareto_svg([*near, Point("far", 200, 1, 0, "gguf")], "MB", "KLD"))
    boxes = []
    for t in root.iter("text"):
        if t.get("class") == "label":
            width, x, y = 6.7 * len(t.text), float(t.get("x")), float(t.get("y"))
            left = x - width * {"start": 0, "middle": 0.5, "end": 1}[t.get("text-anchor")]
            boxes.append((left, y - 11, left + width, y + 4))
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], boxes


@pytest.mark.parametrize("rows", [[], [Point("zero", 1, 0.0, 0, "gguf")]])
def test_a_plot_of_nothing_is_empty(rows):
    assert pareto_svg(rows, "MB", "KLD") == ""


def test_a_plot_of_one_point():
    assert "only" in pareto_svg([Point("only", 10, 0.1, 0.01, "gguf")], "MB", "KLD")


def test_the_page_is_whole_and_escapes_what_it_is_given():
    page = comparison_page("a & b", "<lead>", ["recipe", "MB"], [["original", "1"], ["<q4>", "2"]], points(), ["note <1>"])
    assert "a &amp; b" in page
    assert "&lt;lead&gt;" in page
    assert "<td>&lt;q4&gt;</td>" in page
    assert "note &lt;1&gt;" in page
    assert page.count("<tr") == 3
    assert "http" not in page  # nothing is fetched
    assert "<script" not in page


def test_plot_stands_alone_as_xml() -> None:
    root = ElementTree.fromstring(comparison_plot(points()))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(root.findall(".//{*}circle[@class]")) == len(comparison_plot(points()).split("<circle")) - 1 > 0
    assert comparison_plot([]) == ""
