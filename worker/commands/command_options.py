"""Options of commands about a node's model and answers.

Every start of the command line imports this module, so it imports nothing heavy.
"""

import argparse
import math
from pathlib import Path

from worker.runtime.whole_numbers import whole_number

natural = whole_number(0)
positive = whole_number(1)
held_out_seed = whole_number(0, 2**31 - 1)
"""Smallest value of --seed: with one below 0 the tasks could be those of a round."""
_MAX_DIGITS = 18


def seconds(text: str) -> float:
    """Read a time limit in seconds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a number of seconds above 0")
    return value


def evaluation(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hivewright eval`."""
    parser.add_argument("--before", action="store_true", help="evaluate the untouched model")
    parser.add_argument(
        "--now", action="store_true", help="evaluate the newest checkpoint (default: both)"
    )
    _checkpoint(parser)
    parser.add_argument(
        "--tasks", type=positive, default=32, metavar="N", help="tasks of each (default: 32)"
    )
    parser.add_argument("--level", type=natural, metavar="N", help="this level of every family")
    parser.add_argument(
        "--seed",
        type=held_out_seed,
        default=0,
        metavar="N",
        help="which held-out tasks (default: 0)",
    )
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=600.0,
        metavar="S",
        help="stop asking after this long, each (default: 600)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def export(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hivewright export`."""
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="the new folder to write"
    )
    _checkpoint(parser)


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="a checkpoint, or a folder of them (default: the node's own)",
    )


def held_out(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the held-out tasks of a harvest."""
    parser.add_argument(
        "--tasks", type=positive, default=32, metavar="N", help="tasks of each (default: 32)"
    )
    parser.add_argument(
        "--seed",
        type=held_out_seed,
        default=0,
        metavar="N",
        help="which held-out tasks (default: 0)",
    )
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=600.0,
        metavar="S",
        help="stop asking after this long (default: 600)",
    )
    parser.add_argument(
        "--level",
        type=_level,
        action="append",
        default=[],
        metavar="FAMILY=N",
        help="ask this level of a family too, besides the first",
    )


def harvest_choose(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hivewright harvest choose`."""
    held_out(parser)
    parser.add_argument(
        "--nodes", nargs="*", default=[], metavar="NAME", help="whose weights these are"
    )


def _level(text: str) -> tuple[str, int]:
    family, _, level = text.rpartition("=")
    if not family or not _is_number(level):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected FAMILY=N, such as gcd=2")
    return family, int(level)


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) <= _MAX_DIGITS


def chat(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hivewright chat`."""
    parser.add_argument("--before", action="store_true", help="talk to the untouched model")
    parser.add_argument(
        "--tokens", type=positive, default=256, metavar="N", help="longest answer (default: 256)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of sampling (default: 0)"
    )
    parser.add_argument(
        "--task", action="store_true", help="ask in the node's own form, as in training"
    )


def answers(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hivewright answers`."""
    parser.add_argument("--family", metavar="NAME", help="only tasks of this family")
    parser.add_argument(
        "--peer", metavar="WHO", help="own, peers, or a part of a peer's id or animal name"
    )
    parser.add_argument(
        "--round",
        type=_range_of_rounds,
        metavar="N[-M]",
        help="a round, or first and last: 12-20, 12-",
    )
    parser.add_argument(
        "--reward",
        type=_range_of_rewards,
        metavar="LOW[-HIGH]",
        help="mean reward of a group, such as 0.2-0.8",
    )
    parser.add_argument(
        "--limit",
        type=positive,
        default=50,
        metavar="N",
        help="groups to show, newest first (default: 50)",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--all", action="store_true", help="all answers of a group, not only its best and worst"
    )
    form.add_argument("--json", action="store_true", help="print JSON lines")


def _range_of_rounds(text: str) -> tuple[int, int | None]:
    first, dash, last = text.partition("-")
    is_range = _is_number(first) and (not last or (_is_number(last) and int(first) <= int(last)))
    if not is_range:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected a round, or a range such as 12-20 or 12-"
        )
    if not dash:
        return int(first), int(first)
    return int(first), int(last) if last else None


def _range_of_rewards(text: str) -> tuple[float, float]:
    low, dash, high = text.partition("-")
    try:
        bounds = float(low), float(high if dash else low)
    except ValueError:
        bounds = (2.0, 2.0)
    if not 0 <= bounds[0] <= bounds[1] <= 1:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected 0 to 1, or a range such as 0.2-0.8"
        )
    return bounds
