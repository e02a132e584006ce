"""Whole numbers as options of the command lines."""

import argparse
from collections.abc import Callable


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return the type of an option that is a number of these bounds; `most` None: no upper one."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
            limit = f"from {least} to {most}" if most is not None else f"of at least {least}"
            raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number {limit}")
        return int(text)

    return read
