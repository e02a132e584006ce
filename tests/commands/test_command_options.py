"""Options that parse numbers and ranges: what they accept, and what they refuse."""

import argparse

import pytest

from worker.commands import command_options


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(exit_on_error=False)
    command_options.answers(made)
    return made


@pytest.mark.parametrize(
    ("text", "wanted"), [("7", (7, 7)), ("12-20", (12, 20)), ("12-", (12, None))]
)
def test_range_of_rounds(parser: argparse.ArgumentParser, text: str, wanted: object) -> None:
    assert parser.parse_args(["--round", text]).round == wanted


@pytest.mark.parametrize(("text", "wanted"), [("0.5", (0.5, 0.5)), ("0.2-0.8", (0.2, 0.8))])
def test_range_of_rewards(parser: argparse.ArgumentParser, text: str, wanted: object) -> None:
    assert parser.parse_args(["--reward", text]).reward == wanted


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("--round", "x"),
        ("--round", "3-x"),
        ("--round=-3", None),
        ("--reward", "0.8-0.2"),
        ("--reward", "1.1"),
        ("--reward", "a-b"),
        ("--limit", "0"),
        ("--limit", "1.5"),
    ],
)
def test_other_values_are_refused(
    parser: argparse.ArgumentParser, option: str, text: str | None
) -> None:
    with pytest.raises(argparse.ArgumentError, match=r"got .*; expected"):
        parser.parse_args([option] if text is None else [option, text])


def test_natural_numbers_include_zero_and_positive_ones_do_not() -> None:
    assert command_options.natural("0") == 0
    assert command_options.positive("1") == 1
    for parse, text in ((command_options.natural, "-1"), (command_options.positive, "0")):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number of at least"):
            parse(text)
