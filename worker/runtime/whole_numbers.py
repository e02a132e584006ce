"""Whole numbers as options of the command lines."""

import argparse
from collections.abc import Callable

_MAX_DIGITS = 1000
"""Longest text to parse; Python refuses texts that are far longer."""
_MAX_SHOWN = 60


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return the type of an option: a number within these bounds; `most` None: no upper bound."""

    def read(text: str) -> int:
        number = int(text) if text.isdecimal() and len(text) <= _MAX_DIGITS else None
        if number is None or number < least or (most is not None and number > most):
            limit = f"from {least} to {most}" if most is not None else f"of at least {least}"
            shown = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
            raise argparse.ArgumentTypeError(f"got {shown!r}; expected a whole number {limit}")
        return number

    return read
