"""Templates about the market that more than one site uses."""

import time
from pathlib import Path

import jinja2

from worker.log import printable
from worker.market_view import price_chart
from worker.swarm.identity import animal_name

FOLDER = Path(__file__).parent / "page"
"""Folder of the templates."""
STYLE = FOLDER / "market.css"
_MAX_TEXT = 1500
_END_OF_CALENDAR = 253402300800.0  # the year 10000


def prepare(environment: jinja2.Environment) -> None:
    """Add what the templates in FOLDER need."""
    environment.filters |= {
        "moment": _moment,
        "time_of_day": _time_of_day,
        "tokens": "{:,.2f}".format,
        "words": _words,
        "known_as": animal_name,
    }
    environment.globals |= {
        "draw": price_chart.draw,
        "chart_width": price_chart.WIDTH,
        "chart_height": price_chart.HEIGHT,
    }


def _moment(at: float | None) -> str:
    """Return a Unix time as date and time; a dash for None, and for a time beyond all calendars.

    A foreign contract may contain any number.
    """
    if at is None or not 0 <= at < _END_OF_CALENDAR:
        return "–"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at))


def _time_of_day(at: float) -> str:
    return _moment(at).rpartition(" ")[2]


def _words(text: str) -> str:
    """Return untrusted text with its line breaks, without control characters, truncated."""
    lines = [printable(line) for line in text[:_MAX_TEXT].splitlines()]
    return "\n".join(lines) + ("…" if len(text) > _MAX_TEXT else "")
