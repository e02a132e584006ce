"""Compute once what pyinfra computes again for each operation, fact and host.

For the place of an operation in the deploy, for instance, pyinfra asks `inspect` for the source of
all callers, which searches all modules. In a deploy of forty hosts this is more than half of the
operator's processor time.
"""

import functools
import sys
from types import FrameType
from typing import NamedTuple

from pyinfra.api import arguments, connectors, facts, inventory, util


class _Place(NamedTuple):
    """The fields of `inspect.getframeinfo` that pyinfra reads."""

    filename: str
    lineno: int


def install() -> None:
    """Replace the repeated computations of pyinfra in this process; config.py calls this."""
    util.stack = _stack
    util.getframeinfo = _place_of
    for function, users in (
        (arguments.all_global_arguments, (arguments, facts)),
        (connectors.get_all_connectors, (connectors, inventory)),
        (connectors.get_execution_connectors, (connectors, inventory)),
    ):
        for module in users:
            setattr(module, function.__name__, functools.cache(function))


def _stack() -> list[tuple[FrameType]]:
    """Return the frames of all callers, the innermost first, as `inspect.stack` does."""
    frames = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        frames.append((frame,))
        frame = frame.f_back
    return frames


def _place_of(frame: FrameType) -> _Place:
    """Return file and line of a frame, without its source."""
    return _Place(frame.f_code.co_filename, frame.f_lineno)
