"""Render a report as one HTML file: tables, charts and texts, without scripts or external files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import jinja2

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 220, 56, 28
MAX_POINTS = 400
"""Largest number of points of a line in a chart; of more, every n-th and the last are drawn."""
_MAX_FIGURE = 1e300
"""Larger values are not drawn, because their difference may overflow."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Table:
    """A table; cells are text, which is escaped."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over rounds; `lines` are points (x, y) by name."""

    title: str
    lines: Mapping[str, Points]


@dataclass(frozen=True, slots=True)
class Text:
    """A text that is shown as it is, with its line breaks."""

    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a report with its heading."""

    heading: str
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    texts: Sequence[Text] = ()


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of a chart in pixels; `style`: number of its colour."""

    name: str
    style: int
    path: str
    is_point: bool


@dataclass(frozen=True, slots=True)
class _Drawing:
    title: str
    lines: Sequence[_Line]
    y_marks: Sequence[tuple[float, str]] = field(default=())
    x_first: str = ""
    x_last: str = ""


def render(
    title: str,
    subtitle: str,
    parts: Sequence[Part],
) -> str:
    """Return the whole file."""
    drawings = {id(chart): _draw(chart) for part in parts for chart in part.charts}
    return _TEMPLATE.render(
        title=title,
        subtitle=subtitle,
        parts=parts,
        drawings=drawings,
        size=(WIDTH, HEIGHT, LEFT, BOTTOM),
    )


def _draw(chart: Chart) -> _Drawing:
    finite = {name: _finite(line) for name, line in chart.lines.items()}
    points = list(chain.from_iterable(finite.values()))
    if not points:
        return _Drawing(chart.title, ())
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(*ys, 0.0), max(ys)
    if high == low:
        high = low + 1.0
    first, last = min(xs), max(xs)

    def at(
        x: float,
        y: float,
    ) -> tuple[float, float]:
        share = 0.5 if last == first else (x - first) / (last - first)
        across = LEFT + share * (WIDTH - LEFT - 8)
        return across, 8 + (1 - (y - low) / (high - low)) * (HEIGHT - BOTTOM - 8)

    lines = []
    for number, (name, line) in enumerate(finite.items()):
        step = max(1, math.ceil(len(line) / MAX_POINTS))
        drawn = [at(x, y) for x, y in [*line[:-1:step], *line[-1:]]]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        lines.append(_Line(name, number % 6, path, len(drawn) == 1))
    marks = [low, (low + high) / 2, high]
    y_marks = [(at(first, y)[1], f"{y:.3g}") for y in marks]
    return _Drawing(chart.title, lines, y_marks, f"{first:g}", f"{last:g}")


def _finite(line: Points) -> Points:
    """Return the points that can be drawn; a failed step has figures that are not finite."""
    return [(x, y) for x, y in line if abs(x) < _MAX_FIGURE and abs(y) < _MAX_FIGURE]


_environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
_environment.filters["identity"] = id
_TEMPLATE = _environment.from_string(
    """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1c2024; --paper: #fff; --faint: #667; --rule: #ccd; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --paper: #15181b; --faint: #9aa5b1; --rule: #3a4048; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
.faint, figcaption, text { color: var(--faint); fill: var(--faint); font-size: 0.85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: 0.2rem 0.9rem 0.2rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
td:first-child { white-space: nowrap; }
figure { margin: 1rem 0; }
svg { width: 100%; height: auto; }
polyline { fill: none; stroke-width: 1.5; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--rule);
  padding-left: 0.8rem; font-size: 0.85rem; }
.l0 { stroke: #2a78d6; } .l1 { stroke: #d1652b; } .l2 { stroke: #2f9e6e; }
.l3 { stroke: #a25bc4; } .l4 { stroke: #b8860b; } .l5 { stroke: #c2416c; }
i { display: inline-block; width: 0.9rem; border-top: 3px solid; vertical-align: middle; }
i.l0 { color: #2a78d6; } i.l1 { color: #d1652b; } i.l2 { color: #2f9e6e; }
i.l3 { color: #a25bc4; } i.l4 { color: #b8860b; } i.l5 { color: #c2416c; }
</style>
<main>
<h1>{{ title }}</h1>
<p class="faint">{{ subtitle }}</p>
{% for part in parts %}
<h2>{{ part.heading }}</h2>
{% for table in part.tables %}
<div class="wide" tabindex="0" role="region" aria-label="{{ part.heading }}, table"><table>
<thead><tr>{% for name in table.columns %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endfor %}
{% for chart in part.charts %}{% set drawing = drawings[chart|identity] %}
<figure><figcaption><b>{{ drawing.title }}</b>
{% for line in drawing.lines %} <i class="l{{ line.style }}"></i> {{ line.name }}{% endfor %}
{% if not drawing.lines %} nothing was measured{% endif %}</figcaption>
{% if drawing.lines %}
<svg viewBox="0 0 {{ size[0] }} {{ size[1] }}" role="img" aria-label="{{ drawing.title }}">
{% for y, label in drawing.y_marks %}
<line x1="{{ size[2] }}" x2="{{ size[0] }}" y1="{{ y }}" y2="{{ y }}" stroke="var(--rule)"/>
<text x="{{ size[2] - 6 }}" y="{{ y + 4 }}" text-anchor="end">{{ label }}</text>
{% endfor %}
{% for line in drawing.lines %}{% if line.is_point %}
<circle class="l{{ line.style }}" cx="{{ line.path.split(',')[0] }}"
 cy="{{ line.path.split(',')[1] }}" r="2"/>{% else %}
<polyline class="l{{ line.style }}" points="{{ line.path }}"/>{% endif %}{% endfor %}
<text x="{{ size[2] }}" y="{{ size[1] - 6 }}">round {{ drawing.x_first }}</text>
<text x="{{ size[0] }}" y="{{ size[1] - 6 }}" text-anchor="end">{{ drawing.x_last }}</text>
</svg>{% endif %}</figure>
{% endfor %}
{% for text in part.texts %}
<h3>{{ text.title }}</h3>
<pre tabindex="0">{{ text.text }}</pre>
{% endfor %}
{% endfor %}
</main>
</html>
"""
)
