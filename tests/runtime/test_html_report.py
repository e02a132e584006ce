"""Reports as one file: what is drawn, and that no text becomes markup."""

import math
import re
import xml.etree.ElementTree as ElementTree

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
