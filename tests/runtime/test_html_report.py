"""Reports as one file: what is drawn, and that no text becomes markup."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.runtime.html_report import HEIGHT, MAX_POINTS, WIDTH, Chart, Part, Table, Text, render

HOSTILE = "<img src=x onerror=alert(1)>\"'&"


def charts(*shown: Chart) -> list[ElementTree.Element]:
    text = render("title", "subtitle", [Part("Curves", charts=shown)])
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def points(svg: ElementTree.Element) -> list[list[tuple[float, float]]]:
    found = []
    for line in svg.iter("polyline"):
        pairs = (pair.split(",") for pair in line.attrib["points"].split())
        found.append([(float(x), float(y)) for x, y in pairs])
    return found


def test_lines_are_inside_of_the_picture_and_higher_is_better() -> None:
    (svg,) = charts(Chart("rewards", {"a": [(0, 0.0), (1, 0.5), (2, 1.0)], "b": [(2, -3), (9, 7)]}))
    a, b = points(svg)
    for x, y in [*a, *b]:
        assert 0 <= x <= WIDTH
        assert 0 <= y <= HEIGHT
    assert [x for x, _ in a] == sorted(x for x, _ in a)
    assert [y for _, y in a] == sorted((y for _, y in a), reverse=True)
    assert b[1][1] < a[2][1] < b[0][1]


def test_figures_that_are_not_finite_leave_the_rest_of_the_curve() -> None:
    line = [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)]
    (svg,) = charts(Chart("norm", {"a": line}))
    (drawn,) = points(svg)
    assert len(drawn) == 2
    assert "nan" not in ElementTree.tostring(svg, encoding="unicode")
    nothing = render("t", "s", [Part("Curves", charts=[Chart("norm", {"a": [(0, math.nan)]})])])
    assert "<svg" not in nothing
    assert "nothing was measured" in nothing


def test_long_curve_keeps_its_first_and_last_point() -> None:
    (svg,) = charts(Chart("long", {"a": [(n, float(n)) for n in range(100_000)]}))
    (drawn,) = points(svg)
    assert MAX_POINTS <= len(drawn) <= MAX_POINTS + 1
    assert drawn[0][0] == min(x for x, _ in drawn)
    assert drawn[-1][1] == min(y for _, y in drawn) == 8.0
    texts = [text.text for text in svg.iter("text")]
    assert "round 0" in texts
    assert "99999" in texts


def test_one_point_is_a_dot_and_equal_values_are_a_line() -> None:
    (dot,) = charts(Chart("one", {"a": [(5, 0.5)]}))
    assert (len(list(dot.iter("circle"))), points(dot)) == (1, [])
    (flat,) = charts(Chart("flat", {"a": [(0, 0.0), (1, 0.0)]}))
    ((left, right),) = points(flat)
    assert left[1] == right[1] <= HEIGHT


def test_no_text_becomes_markup() -> None:
    part = Part(
        HOSTILE,
        tables=[Table((HOSTILE,), [(HOSTILE,)])],
        charts=[Chart(HOSTILE, {HOSTILE: [(0, 1.0), (1, 2.0)]})],
        texts=[Text(HOSTILE, HOSTILE)],
    )
    text = render(HOSTILE, HOSTILE, [part])
    assert "<img" not in text
    assert text.count("&lt;img src=x onerror=alert(1)&gt;") == 12
    assert f'aria-label="{HOSTILE}' not in text


@pytest.mark.parametrize("count", [2, 399, 400, 401, 799, 800, 801, 1601])
def test_curve_of_any_length_has_no_more_points_than_its_limit(count: int) -> None:
    (svg,) = charts(Chart("long", {"a": [(n, float(n)) for n in range(count)]}))
    (drawn,) = points(svg)
    assert min(count, MAX_POINTS // 2) <= len(drawn) <= MAX_POINTS + 1
    assert (drawn[0][1], drawn[-1][1]) == (HEIGHT - 28, 8.0)


NUMBERS = st.floats() | st.integers(-5, 5).map(float)


@given(st.dictionaries(st.text("abc", min_size=1), st.lists(st.tuples(NUMBERS, NUMBERS))))
def test_whatever_was_measured_is_inside_of_the_picture(
    lines: dict[str, list[tuple[float, float]]],
) -> None:
    for svg in charts(Chart("any", lines)):
        for x, y in [pair for line in points(svg) for pair in line]:
            assert 0 <= x <= WIDTH
            assert 0 <= y <= HEIGHT
        for dot in svg.iter("circle"):
            assert 0 <= float(dot.attrib["cx"]) <= WIDTH
            assert 0 <= float(dot.attrib["cy"]) <= HEIGHT


def test_line_without_points_is_in_the_legend_with_its_own_colour() -> None:
    lines = {"a": [], "b": [(0, 1.0), (1, 2.0)]}
    text = render("t", "s", [Part("Curves", charts=[Chart("c", lines)])])
    assert re.findall(r'<i class="(l\d)"></i> (\w)', text) == [("l0", "a"), ("l1", "b")]
    assert 'class="l1" points="' in text


def test_seventh_line_has_the_first_colour_again() -> None:
    lines = {str(n): [(0.0, 1.0), (1.0, 2.0)] for n in range(7)}
    (svg,) = charts(Chart("c", lines))
    classes = [line.attrib["class"] for line in svg.iter("polyline")]
    assert classes == ["l0", "l1", "l2", "l3", "l4", "l5", "l0"]
