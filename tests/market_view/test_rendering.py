"""Values on the pages of the market: times, tokens, and words of anybody."""

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.market_view import rendering


@pytest.fixture(scope="module")
def environment() -> jinja2.Environment:
    made = jinja2.Environment(autoescape=True)
    rendering.prepare(made)
    return made


def shown(environment: jinja2.Environment, source: str, value: object) -> str:
    return environment.from_string(source).render(value=value)


@pytest.mark.parametrize(
    ("at", "moment", "time_of_day"),
    [
        (None, "–", "–"),
        (0, "1970-01-01 00:00:00", "00:00:00"),
        (1798761659.99, "2027-01-01 00:00:59", "00:00:59"),
        (253402300799, "9999-12-31 23:59:59", "23:59:59"),
        (253402300800, "–", "–"),
        (float(2**256 - 1), "–", "–"),
        (-1, "–", "–"),
        (float("nan"), "–", "–"),
        (float("inf"), "–", "–"),
    ],
)
def test_time_of_any_contract_is_shown(environment, at, moment, time_of_day):
    assert shown(environment, "{{ value | moment }}", at) == moment
    assert shown(environment, "{{ value | time_of_day }}", at) == time_of_day


@pytest.mark.parametrize(
    ("tokens", "text"), [(0, "0.00"), (1234.567, "1,234.57"), (1e-9, "0.00"), (-1, "-1.00")]
)
def test_tokens_have_two_digits(environment, tokens, text):
    assert shown(environment, "{{ value | tokens }}", tokens) == text


def test_words_keep_their_lines_and_nothing_that_hides(environment):
    words = "1 + 1\r\n<b>2</b>\x1b[2J\u202e"
    text = shown(environment, "{{ value | words }}", words)
    assert text == "1 + 1\n&lt;b&gt;2&lt;/b&gt;\\x1b[2J\\u202e"


@given(st.text(max_size=2000))
def test_any_words_are_lines_of_printable_text(text):
    found = rendering._words(text)
    assert all(line.isprintable() for line in found.split("\n"))
    assert found.endswith("…") == (len(text) > 1500) or text.rstrip().endswith("…")


@pytest.mark.parametrize(("length", "is_cut"), [(1499, False), (1500, False), (1501, True)])
def test_long_words_are_cut(length, is_cut):
    found = rendering._words("x" * length)
    assert found == "x" * min(length, 1500) + ("…" if is_cut else "")


def test_peer_is_shown_by_its_animal(environment):
    peer = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
    name = shown(environment, "{{ value | known_as }}", peer)
    assert len(name.split()) == 3
    assert name == shown(environment, "{{ value | known_as }}", peer)


def test_templates_of_the_market_are_valid(environment):
    names = [file.name for file in rendering.FOLDER.glob("*.html")]
    assert names
    loading = jinja2.Environment(loader=jinja2.FileSystemLoader(rendering.FOLDER), autoescape=True)
    rendering.prepare(loading)
    for name in names:
        loading.get_template(name)
    assert rendering.STYLE.is_file()
