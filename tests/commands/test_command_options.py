"""Options that parse numbers and ranges: what they accept, and what they refuse."""

import argparse

import pytest

from worker.commands import command_options
from worker.evaluation import HELD_OUT


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


@pytest.mark.parametrize(("text", "value"), [("600", 600.0), ("0.5", 0.5), ("1e3", 1000.0)])
def test_time_limit_is_a_number_above_0(text: str, value: float) -> None:
    assert command_options.seconds(text) == value


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "-inf", "1e999", "", "ten", "1 s"])
def test_time_limit_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a number of seconds above 0"):
        command_options.seconds(text)


@pytest.mark.parametrize("add", [command_options.evaluation, command_options.held_out])
def test_seed_of_held_out_tasks_is_never_one_of_training(add) -> None:
    made = argparse.ArgumentParser(exit_on_error=False)
    add(made)
    assert made.parse_args([]).seed == 0
    for seed in (0, 2**31 - 1):
        found = made.parse_args(["--seed", str(seed)]).seed + HELD_OUT
        assert 2**31 <= found < 2**32
    for text in ("-1", str(2**31), "1.5", "9" * 5000):
        with pytest.raises(argparse.ArgumentError, match=r"expected a whole number from 0"):
            made.parse_args([f"--seed={text}"])


@pytest.mark.parametrize(
    ("text", "level"), [("gcd=2", ("gcd", 2)), ("code/a=b=0", ("code/a=b", 0)), ("a=007", ("a", 7))]
)
def test_level_of_a_family(text: str, level: tuple[str, int]) -> None:
    made = argparse.ArgumentParser(exit_on_error=False)
    command_options.held_out(made)
    assert made.parse_args(["--level", text, "--level", "z=1"]).level == [level, ("z", 1)]


@pytest.mark.parametrize("text", ["gcd", "=2", "gcd=", "gcd=-1", "gcd=two", f"a={'9' * 5000}", ""])
def test_level_of_something_else_is_refused(text: str) -> None:
    made = argparse.ArgumentParser(exit_on_error=False)
    command_options.held_out(made)
    with pytest.raises(argparse.ArgumentError, match=r"expected FAMILY=N, such as gcd=2"):
        made.parse_args(["--level", text])


@pytest.mark.parametrize("text", ["nan", "inf-inf", "0.2-", "-0.2", "0.2-0.8-0.9", "", "-"])
def test_rewards_that_are_no_numbers_are_refused(
    parser: argparse.ArgumentParser, text: str
) -> None:
    with pytest.raises(argparse.ArgumentError, match="expected 0 to 1, or a range"):
        parser.parse_args([f"--reward={text}"])


@pytest.mark.parametrize("text", ["20-12", "-", "", "1-2-3", "9" * 19, f"1-{'9' * 5000}", "１-x"])
def test_rounds_that_are_no_range_are_refused(parser: argparse.ArgumentParser, text: str) -> None:
    with pytest.raises(argparse.ArgumentError, match="expected a round, or a range"):
        parser.parse_args([f"--round={text}"])
