"""Read a contract's log in pieces that the node accepts.

Public nodes limit a request by blocks (10 to 10,000), by results or by time, and each provider
words its refusal differently. So the text is not interpreted: a refused piece is halved, down to
one block, and the accepted size is remembered.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

from worker.chain.rpc import Throttled, TooMuch
from worker.errors import ChainUnreachable

MOST_BLOCKS = 10_000
"""The first size tried, which the more generous public nodes accept."""
_TAKEN_BEFORE_LARGER = 64
"""Accepted pieces in a row before a refused size is retried: the limit may be on results."""

_Entry = TypeVar("_Entry")


class Window:
    """The number of blocks per request, adapted to what the chain refuses."""

    def __init__(self) -> None:
        self.blocks = MOST_BLOCKS
        self._refused: int | None = None
        self._num_taken = 0

    def refuse(self, blocks: int) -> None:
        """Note that a request for `blocks` blocks was too much."""
        self.blocks = max(1, blocks // 2)
        self._refused = blocks
        self._num_taken = 0

    def take(self, blocks: int) -> None:
        """Note that a request for `blocks` blocks was answered."""
        if blocks < self.blocks:
            return
        self._num_taken += 1
        if self._num_taken >= _TAKEN_BEFORE_LARGER:
            self._refused, self._num_taken = None, 0
        larger = min(2 * self.blocks, MOST_BLOCKS)
        if self._refused is None or larger < self._refused:
            self.blocks = larger


def walk(
    fetch: Callable[[int, int], list[_Entry]],
    first: int,
    last: int,
    newest_first: bool,
    window: Window,
) -> Iterator[_Entry]:
    """Yield the results of `fetch` for blocks `first` to `last` (inclusive), in log order.

    With `newest_first` the order is reversed.
    """
    while first <= last:
        start = max(first, last - window.blocks + 1) if newest_first else first
        end = min(start + window.blocks - 1, last)
        width = end - start + 1
        try:
            found = fetch(start, end)
        except TooMuch:
            if width == 1:
                raise
            window.refuse(width)
            continue
        except Throttled:
            raise
        except ChainUnreachable:
            # Perhaps so large a piece took too long: the next attempt asks for fewer blocks.
            window.refuse(width)
            raise
        window.take(width)
        yield from reversed(found) if newest_first else found
        first, last = (first, start - 1) if newest_first else (end + 1, last)
