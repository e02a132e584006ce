"""Whole numbers on the command line: bounds, and what a refusal says."""

import argparse

import pytest

from worker.runtime.whole_numbers import whole_number


@pytest.mark.parametrize(
    ("bounds", "text", "number"),
    [
        ((0,), "0", 0),
        ((1,), "1", 1),
        ((1, 8), "8", 8),
        ((0,), "007", 7),
        ((0,), "9" * 30, 10**30 - 1),
    ],
)
def test_number_within_its_bounds_is_taken(bounds, text, number) -> None:
    assert whole_number(*bounds)(text) == number


@pytest.mark.parametrize(
    ("bounds", "text", "limit"),
    [
        ((0,), "", "of at least 0"),
        ((0,), "-1", "of at least 0"),
        ((0,), "+1", "of at least 0"),
        ((0,), "1.0", "of at least 0"),
        ((0,), "1e3", "of at least 0"),
        ((0,), " 1", "of at least 0"),
        ((0,), "1_000", "of at least 0"),
        ((0,), "²", "of at least 0"),
        ((1,), "0", "of at least 1"),
        ((1, 8), "9", "from 1 to 8"),
        ((1, 8), "0", "from 1 to 8"),
        ((0, 0), "1", "from 0 to 0"),
    ],
)
def test_anything_else_is_refused(bounds, text, limit) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as refusal:
        whole_number(*bounds)(text)
    assert str(refusal.value) == f"got {text!r}; expected a whole number {limit}"


def test_number_of_any_length_is_read_or_refused_in_one_short_line() -> None:
    assert whole_number(0)("9" * 1000) == 10**1000 - 1
    for digits in (1001, 5000, 100_000):
        with pytest.raises(argparse.ArgumentTypeError) as refusal:
            whole_number(0)("9" * digits)
        shown = "9" * 60 + "..."
        assert str(refusal.value) == f"got {shown!r}; expected a whole number of at least 0"


@pytest.mark.parametrize("text", ["9" * 5000, "x" * 5000, "-1"])
def test_command_line_shows_the_refusal(text, capsys) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=whole_number(1))
    with pytest.raises(SystemExit):
        parser.parse_args([f"--workers={text}"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert "expected a whole number of at least 1" in last
    assert len(last) < 200
