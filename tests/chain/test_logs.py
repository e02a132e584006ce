"""Reading a log in pieces: every entry once, in order, whatever the node's limit is."""

import pytest

from worker.chain.logs import MOST_BLOCKS, Window, walk
from worker.chain.rpc import Throttled, TooMuch
from worker.errors import ChainUnreachable


class Node:
    """A log with one entry per block, and at most `limit` blocks per request."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.asked: list[tuple[int, int]] = []

    def fetch(self, first: int, last: int) -> list[int]:
        self.asked.append((first, last))
        if last - first + 1 > self.limit:
            raise TooMuch("too many blocks")
        return list(range(first, last + 1))


@pytest.mark.parametrize("limit", [1, 7, 100, MOST_BLOCKS])
@pytest.mark.parametrize("newest_first", [False, True])
def test_every_entry_comes_once_and_in_order(limit: int, newest_first: bool) -> None:
    node, window = Node(limit), Window()
    window.blocks = 64
    entries = list(walk(node.fetch, 5, 250, newest_first, window))
    assert entries == (list(range(250, 4, -1)) if newest_first else list(range(5, 251)))


def test_size_that_a_node_takes_is_remembered() -> None:
    node, window = Node(100), Window()
    list(walk(node.fetch, 0, 999, False, window))
    assert 50 < window.blocks <= 100
    num_asked = len(node.asked)
    list(walk(node.fetch, 1000, 1999, False, window))
    widths = [last - first + 1 for first, last in node.asked[num_asked:]]
    assert max(widths) <= 100


def test_single_block_that_is_too_much_is_an_error() -> None:
    with pytest.raises(TooMuch):
        list(walk(Node(0).fetch, 3, 3, False, Window()))


def test_outage_makes_the_next_request_smaller_and_throttling_does_not() -> None:
    def unreachable(first: int, last: int) -> list[int]:
        raise ChainUnreachable("away")

    def throttled(first: int, last: int) -> list[int]:
        raise Throttled("too often", 1.0)

    window = Window()
    with pytest.raises(Throttled):
        list(walk(throttled, 0, 99, False, window))
    assert window.blocks == MOST_BLOCKS
    with pytest.raises(ChainUnreachable):
        list(walk(unreachable, 0, 99, False, window))
    assert window.blocks == 50


def test_nothing_is_asked_for_an_empty_range() -> None:
    node = Node(10)
    assert list(walk(node.fetch, 5, 4, False, Window())) == []
    assert node.asked == []


def test_larger_pieces_are_tried_again_after_a_while() -> None:
    window = Window()
    window.refuse(MOST_BLOCKS)
    window.refuse(window.blocks)
    assert window.blocks == 2500
    for _ in range(200):
        window.take(window.blocks)
    assert window.blocks == MOST_BLOCKS
