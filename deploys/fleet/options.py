"""Options of the commands that an operator gives to a whole fleet. Loaded with the command line, so nothing heavy."""

import argparse
from collections.abc import Callable
from pathlib import Path


def rollout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inventory", metavar="INVENTORY", help="inventory file, as for pyinfra")
    parser.add_argument(
        "--batch", default="25%", metavar="N|P%", help="hosts at a time after the first one, or a share (default: 25%%)"
    )
    parser.add_argument(
        "--gate-rounds", type=_number(1, 8), default=1, metavar="N",
        help="rounds that each worker of a batch must finish before the next batch (default: 1, at most 8)",
    )  # fmt: skip
    parser.add_argument(
        "--gate-seconds", type=_number(1), default=1800, metavar="S", help="how long they may take (default: 1800)"
    )
    parser.add_argument(
        "--deadline",
        type=_number(1),
        default=3600,
        metavar="S",
        help="how long one host's deploy may take (default: 3600)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the hosts that the last rollout left behind")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of report and logs (default: rollouts/NAME of the inventory)"
    )


def _number(least: int, most: int | None = None) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
            limit = f"from {least} to {most}" if most is not None else f"of at least {least}"
            raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number {limit}")
        return int(text)

    return read
